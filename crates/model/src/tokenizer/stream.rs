//! Text from token ids as they come.

use super::Tokenizer;

/// Turns token ids into text as they come; a character that spans tokens comes out whole.
///
/// All pushes and [`StreamDecoder::finish`] together are the text that the whole ids give, however they were split.
#[derive(Debug, Default, Clone)]
pub struct StreamDecoder {
    /// The start of a character, at most three bytes.
    pending: Vec<u8>,
    /// A space at the very start is the tokenizer's, not the text's.
    drop_space: bool,
}

impl StreamDecoder {
    /// For an answer: text that goes on after a prompt, so a space at its start belongs to it.
    pub fn new() -> StreamDecoder {
        StreamDecoder::default()
    }

    /// For a whole text, as [`Tokenizer::decode`] gives it: without the space that SentencePiece puts in front.
    pub fn whole_text(tokenizer: &Tokenizer) -> StreamDecoder {
        StreamDecoder { pending: Vec::new(), drop_space: tokenizer.has_space_prefix() }
    }

    /// The text that `id` completes (often one token's, sometimes none).
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.push_bytes(tokenizer.token_bytes(id))
    }

    /// The text that `bytes` complete.
    pub fn push_bytes(&mut self, mut bytes: &[u8]) -> String {
        if self.drop_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.drop_space = false;
        }
        self.pending.extend_from_slice(bytes);
        let unfinished = unfinished_suffix(&self.pending);
        let complete = self.pending.len() - unfinished;
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// What is left at the end: an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Bytes at the end that may be the start of a character still to come.
fn unfinished_suffix(bytes: &[u8]) -> usize {
    // A character's start is at most three bytes long, and only its first byte is no continuation byte.
    for back in 1..=bytes.len().min(3) {
        let tail = &bytes[bytes.len() - back..];
        if tail[0] & 0b1100_0000 == 0b1000_0000 {
            continue;
        }
        let unfinished =
            std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none());
        return if unfinished { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_make_the_whole(parts in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..5),
            "\\PC{0,3}".prop_flat_map(|s| {
                let bytes = s.into_bytes();
                let n = bytes.len();
                (0..=n).prop_map(move |at| bytes[at..].to_vec())
            }),
            Just(vec![0xF0, 0x9F]), Just(vec![0x98, 0x80]), Just(vec![0xE2]), Just(vec![0xED, 0xA0]),
        ], 0..12)) {
            let mut decoder = StreamDecoder::new();
            let mut text = String::new();
            for part in &parts {
                text += &decoder.push_bytes(part);
            }
            text += &decoder.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&parts.concat()).into_owned());
        }
    }

    #[test]
    fn a_character_comes_out_whole_and_at_once() {
        let mut decoder = StreamDecoder::new();
        assert_eq!(decoder.push_bytes(b"a\xF0\x9F"), "a");
        assert_eq!(decoder.push_bytes(b"\x98"), "");
        assert_eq!(decoder.push_bytes(b"\x80!"), "😀!");
        assert_eq!(decoder.push_bytes(b"\xE2\x82"), "");
        assert_eq!(decoder.push_bytes(b"x"), "\u{FFFD}x");
        assert_eq!(decoder.push_bytes(b"\xC3"), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
        assert_eq!(decoder.finish(), "");
    }
}

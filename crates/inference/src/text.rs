//! One answer's token ids to text as they come, cut at the first stop string.
//!
//! A character that spans tokens comes out whole ([`StreamDecoder`]); a stop string that spans tokens is never
//! shown in part: text that could be its start is held back until the next token decides. Text is treated as if it
//! came character by character, so how it was split into tokens doesn't matter: the stop string that is complete
//! first wins, and of several that end at the same character the one that starts first.
//!
//! Pure; each push costs (held back + new text) × stop strings. At most the longest stop string, less a character,
//! is held back.

use consort_model::Tokenizer;
use consort_model::tokenizer::StreamDecoder;

/// What a token made visible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// New text, in order; often one token's, sometimes none.
    pub text: String,
    /// Set when a stop string is complete: the answer ends here and later tokens are ignored.
    pub stop: Option<StopMatch>,
}

/// The stop string that ended an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Its index among those given.
    pub index: usize,
    /// Tokens of the answer up to and including the one that completed it: what usage counts.
    pub tokens: usize,
}

/// Assembles one answer's text.
#[derive(Clone, Debug)]
pub struct TextAssembler {
    decoder: StreamDecoder,
    cutter: Cutter,
    tokens: usize,
    stop: Option<StopMatch>,
}

impl TextAssembler {
    /// At the start of an answer; empty stop strings are ignored.
    pub fn new(stops: Vec<String>) -> TextAssembler {
        let cutter = Cutter { stops, held: String::new() };
        TextAssembler { decoder: StreamDecoder::new(), cutter, tokens: 0, stop: None }
    }

    /// After tokens that were emitted elsewhere, whose text was shown there. The text that these would have held
    /// back is held back here too; a stop string that they complete is reported by the next call.
    pub fn resumed(stops: Vec<String>, tokenizer: &Tokenizer, emitted: &[u32]) -> TextAssembler {
        let mut assembler = TextAssembler::new(stops);
        for &id in emitted {
            assembler.push(tokenizer, id);
        }
        assembler
    }

    /// The text that `id` makes visible.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Piece {
        if self.stop.is_some() {
            return self.stopped();
        }
        self.tokens += 1;
        let text = self.decoder.push(tokenizer, id);
        self.cut(&text)
    }

    /// What is left when the answer ends: text held back, an unfinished character as U+FFFD. A stop string can
    /// still be complete with it.
    pub fn finish(&mut self) -> Piece {
        if self.stop.is_some() {
            return self.stopped();
        }
        let text = self.decoder.finish();
        let mut piece = self.cut(&text);
        if piece.stop.is_none() {
            piece.text.push_str(&std::mem::take(&mut self.cutter.held));
        }
        piece
    }

    /// The stop string that ended the answer, if one did.
    pub fn stop(&self) -> Option<StopMatch> {
        self.stop
    }

    /// Tokens so far, up to the one that completed a stop string.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn stopped(&self) -> Piece {
        Piece { text: String::new(), stop: self.stop }
    }

    fn cut(&mut self, text: &str) -> Piece {
        let (text, index) = self.cutter.push(text);
        self.stop = index.map(|index| StopMatch { index, tokens: self.tokens });
        Piece { text, stop: self.stop }
    }
}

/// Cuts a stream of text at the first stop string.
#[derive(Clone, Debug)]
struct Cutter {
    stops: Vec<String>,
    /// Text that may be the start of a stop string.
    held: String,
}

impl Cutter {
    /// The text that is safe to show, and the stop string that ends it.
    fn push(&mut self, text: &str) -> (String, Option<usize>) {
        self.held.push_str(text);
        let matches = (self.stops.iter().enumerate())
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(index, stop)| self.held.find(stop).map(|start| (start + stop.len(), start, index)));
        if let Some((_, start, index)) = matches.min() {
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(start);
            return (shown, Some(index));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }
}

/// Bytes of the longest end of `text` that is a start of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    (stop.char_indices().map(|(at, _)| at).rev())
        .find(|&length| length <= text.len() && text.as_bytes().ends_with(&stop.as_bytes()[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use consort_base::Philox;

    /// Everything shown, and the stop that ended it.
    fn cut(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut cutter =
            Cutter { stops: stops.iter().map(|s| (*s).to_owned()).collect(), held: String::new() };
        let mut shown = String::new();
        for piece in pieces {
            let (text, stop) = cutter.push(piece);
            shown.push_str(&text);
            if stop.is_some() {
                return (shown, stop);
            }
        }
        (shown + &cutter.held, None)
    }

    #[test]
    fn stops_are_cut_wherever_the_tokens_part() {
        assert_eq!(cut(&["###"], &["ab", "#", "#", "#", "c"]), ("ab".into(), Some(0)));
        assert_eq!(cut(&["###"], &["a##b", "##", "x"]), ("a##b##x".into(), None));
        assert_eq!(cut(&["###"], &["a##"]), ("a##".into(), None));
        assert_eq!(cut(&["aab"], &["a", "a", "a", "b"]), ("a".into(), Some(0)));
        assert_eq!(cut(&["", "b"], &["ab"]), ("a".into(), Some(1)));
        assert_eq!(cut(&["é!"], &["caf", "é", "é!"]), ("café".into(), Some(0)));
        assert_eq!(cut(&[], &["a", "b"]), ("ab".into(), None));
    }

    #[test]
    fn the_first_complete_stop_wins() {
        assert_eq!(cut(&["bcd", "c"], &["abcd"]), ("ab".into(), Some(1)));
        assert_eq!(
            cut(&["c", "bc"], &["abcd"]),
            ("a".into(), Some(1)),
            "both end at c: the one that starts first"
        );
    }

    #[test]
    fn nothing_is_held_back_for_longer_than_it_must() {
        let mut cutter = Cutter { stops: vec!["User:".into()], held: String::new() };
        assert_eq!(cutter.push("hello U").0, "hello ");
        assert_eq!(cutter.push("se").0, "");
        assert_eq!(cutter.push(" x").0, "Use x");
    }

    /// Character by character is the definition; any other split must agree with it.
    #[test]
    fn any_split_gives_the_same_cut() {
        let alphabet = ["a", "b", "ü", "#"];
        for seed in 0..3000 {
            let mut rng = Philox::new(seed, 0);
            let mut word = |most: u64| -> String {
                (0..=rng.below(most)).map(|_| alphabet[rng.below(4) as usize]).collect()
            };
            let text = word(14);
            let stops = [word(3), word(3), word(2)];
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            let expected = cut(&stops, &characters);

            let mut pieces = Vec::new();
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let count = 1 + Philox::new(seed, rest.len() as u64).below(4) as usize;
                let at = rest.char_indices().nth(count).map_or(rest.len(), |(at, _)| at);
                pieces.push(&rest[..at]);
                rest = &rest[at..];
            }
            assert_eq!(cut(&stops, &pieces), expected, "seed {seed}: {pieces:?} at {stops:?}");
        }
    }
}

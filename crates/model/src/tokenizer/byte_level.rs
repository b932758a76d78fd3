//! The byte alphabet of GPT-2's tokenizer (Radford et al. 2019): each byte as one printable character.
//!
//! Printable Latin-1 bytes stand for themselves; the other 68 get the characters from U+0100 on, in order. So a
//! space is `Ġ` and a line feed `Ċ`, and any bytes can be written in a text vocabulary.

use std::sync::LazyLock;

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let shown = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if shown { byte as u32 } else { next };
        next += u32::from(!shown);
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
});

/// The character that stands for `byte`.
pub(crate) fn char_of(byte: u8) -> char {
    CHARS[byte as usize]
}

/// The byte that `c` stands for.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
        let mut bytes = [None; 0x144];
        for byte in 0..=255u8 {
            bytes[char_of(byte) as usize] = Some(byte);
        }
        bytes
    });
    BYTES.get(c as usize).copied().flatten()
}

/// Appends the bytes that a token's spelling stands for; the spelling itself where it isn't in this alphabet.
pub(crate) fn push_bytes(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_gpt2s_alphabet() {
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(char_of(b'\n'), 'Ċ');
        assert_eq!(char_of(0), 'Ā');
        assert_eq!(char_of(0xAD), 'Ń');
        assert_eq!(char_of(b'a'), 'a');
        assert_eq!(char_of(0xFF), 'ÿ');
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('日'), None);
    }

    #[test]
    fn a_spelling_outside_the_alphabet_is_literal() {
        let mut out = vec![1];
        push_bytes("Ġa", &mut out);
        push_bytes("a b", &mut out);
        assert_eq!(out, b"\x01 aa b");
    }
}

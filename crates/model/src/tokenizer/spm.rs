//! SentencePiece's byte-pair encoding (Llama 2, Gemma): no words, spaces are the letter `▁`, and the pair merges
//! first whose result scores highest. What no piece covers is spelled in bytes.

use super::merge::{Pairs, Symbol, merge};
use super::vocabulary::{TokenKind, Vocabulary};

/// The character that stands for a space in a spelling.
pub(crate) const SPACE: char = '▁';

/// The scores of a SentencePiece vocabulary.
#[derive(Debug)]
pub(crate) struct Spm {
    /// By token: lower merges first.
    keys: Vec<u32>,
    /// The token of each byte.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Text that begins a sequence or follows a special token gets a space in front.
    pub(crate) space_prefix: bool,
}

impl Spm {
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        scores: &[f32],
        unknown: Option<u32>,
        space_prefix: bool,
    ) -> Spm {
        let mut bytes = vec![None; 256];
        for id in vocabulary.of_kind(TokenKind::Byte) {
            if let [byte] = *vocabulary.bytes(id) {
                bytes[byte as usize] = Some(id);
            }
        }
        Spm { keys: scores.iter().map(|&s| descending(s)).collect(), bytes, unknown, space_prefix }
    }

    /// `first`: the text begins the sequence or follows a token that isn't text.
    pub(crate) fn encode(&self, vocabulary: &Vocabulary, text: &str, first: bool, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut spelled = String::with_capacity(text.len() + 3);
        if first && self.space_prefix {
            spelled.push(SPACE);
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));

        let pieces = Pieces { spm: self, vocabulary, text: &spelled };
        let symbols: Vec<Symbol> = spelled
            .char_indices()
            .map(|(at, c)| {
                let end = at + c.len_utf8();
                Symbol { token: pieces.token(at, end), start: at as u32, end: end as u32 }
            })
            .collect();
        merge(&symbols, &pieces, |symbol| match symbol.token {
            Some(token) => out.push(token),
            None => {
                for &byte in &spelled.as_bytes()[symbol.start as usize..symbol.end as usize] {
                    out.extend(self.bytes[byte as usize].or(self.unknown));
                }
            }
        });
    }
}

struct Pieces<'a> {
    spm: &'a Spm,
    vocabulary: &'a Vocabulary,
    text: &'a str,
}

impl Pieces<'_> {
    /// The piece that spells this range. Never a special token or a byte: `</s>` in a text is four characters.
    fn token(&self, start: usize, end: usize) -> Option<u32> {
        let id = self.vocabulary.id(&self.text[start..end])?;
        matches!(self.vocabulary.kind(id)?, TokenKind::Normal | TokenKind::UserDefined).then_some(id)
    }
}

impl Pairs for Pieces<'_> {
    fn pair(&self, left: Symbol, right: Symbol) -> Option<(u32, u32)> {
        let token = self.token(left.start as usize, right.end as usize)?;
        Some((*self.spm.keys.get(token as usize)?, token))
    }
}

/// A key that orders scores from high to low.
fn descending(score: f32) -> u32 {
    let bits = score.to_bits();
    if bits >> 31 == 1 { bits } else { !(bits | 1 << 31) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn higher_scores_come_first() {
        let mut scores = vec![-1000.0, 0.0, 3.5, -0.25, f32::NEG_INFINITY, -236_280.0, 1e30];
        scores.sort_by_key(|&s| descending(s));
        assert_eq!(scores, [1e30, 3.5, 0.0, -0.25, -1000.0, -236_280.0, f32::NEG_INFINITY]);
    }
}

//! The table of a vocabulary: each token's spelling, its bytes and its kind, in three flat arrays.
//!
//! Flat, because a map of 262,144 owned strings would take some 25 MB and as many allocations at start.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// A piece of text that is matched whole, before anything is merged (runs of spaces, `<think>`).
    UserDefined,
    /// A single byte (`<0x0A>`), for text that no piece covers.
    Byte,
    /// Structure: `<|im_end|>`. It has no text of its own.
    Special,
}

/// Tokens by id, and ids by spelling.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    text: String,
    text_ends: Vec<u32>,
    bytes: Vec<u8>,
    byte_ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    by_text: HashTable<u32>,
    hasher: DefaultHashBuilder,
    longest: usize,
}

impl Vocabulary {
    pub(crate) fn with_capacity(tokens: usize, text_bytes: usize) -> Vocabulary {
        Vocabulary {
            text: String::with_capacity(text_bytes),
            text_ends: Vec::with_capacity(tokens),
            bytes: Vec::with_capacity(text_bytes),
            byte_ends: Vec::with_capacity(tokens),
            kinds: Vec::with_capacity(tokens),
            by_text: HashTable::with_capacity(tokens),
            hasher: DefaultHashBuilder::default(),
            longest: 0,
        }
    }

    /// Adds the token with the next id. Of two with the same spelling the later is found by it.
    pub(crate) fn push(&mut self, text: &str, kind: TokenKind, bytes: impl FnOnce(&mut Vec<u8>)) {
        let id = self.kinds.len() as u32;
        self.text.push_str(text);
        self.text_ends.push(self.text.len() as u32);
        bytes(&mut self.bytes);
        self.byte_ends.push(self.bytes.len() as u32);
        self.kinds.push(kind);
        self.longest = self.longest.max(text.len());

        let hash = self.hasher.hash_one(text);
        let (all, ends, hasher) = (&self.text, &self.text_ends, &self.hasher);
        let spelled = |&other: &u32| slice(all, ends, other) == text;
        let rehash = |&other: &u32| hasher.hash_one(slice(all, ends, other));
        *self.by_text.entry(hash, spelled, rehash).or_insert(id).get_mut() = id;
    }

    pub(crate) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Bytes of the longest spelling.
    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        if text.len() > self.longest {
            return None;
        }
        let spelled = |&id: &u32| slice(&self.text, &self.text_ends, id) == text;
        self.by_text.find(self.hasher.hash_one(text), spelled).copied()
    }

    pub(crate) fn text(&self, id: u32) -> Option<&str> {
        ((id as usize) < self.len()).then(|| slice(&self.text, &self.text_ends, id))
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let at = id as usize;
        let Some(&end) = self.byte_ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.byte_ends[at - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(crate) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// Ids of a kind, ascending.
    pub(crate) fn of_kind(&self, kind: TokenKind) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.kinds).filter(move |&(_, &k)| k == kind).map(|(id, _)| id)
    }
}

fn slice<'a>(text: &'a str, ends: &[u32], id: u32) -> &'a str {
    let at = id as usize;
    let start = if at == 0 { 0 } else { ends[at - 1] };
    &text[start as usize..ends[at] as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_by_id_and_by_spelling() {
        let mut vocabulary = Vocabulary::with_capacity(0, 0);
        for (text, kind) in [("a", TokenKind::Normal), ("", TokenKind::Normal), ("<s>", TokenKind::Special)] {
            vocabulary.push(text, kind, |b| b.extend_from_slice(text.as_bytes()));
        }
        vocabulary.push("a", TokenKind::UserDefined, |b| b.push(7));
        assert_eq!(vocabulary.len(), 4);
        assert_eq!(vocabulary.text(2), Some("<s>"));
        assert_eq!(vocabulary.text(1), Some(""));
        assert_eq!(vocabulary.text(4), None);
        assert_eq!(vocabulary.id("a"), Some(3), "the later of two");
        assert_eq!(vocabulary.id("<s>x"), None);
        assert_eq!(vocabulary.bytes(3), [7]);
        assert!(vocabulary.bytes(9).is_empty());
        assert_eq!(vocabulary.of_kind(TokenKind::Special).collect::<Vec<_>>(), [2]);
    }
}

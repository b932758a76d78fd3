//! Text to token ids and back.
//!
//! A text is taken apart in three steps: special tokens' spellings (only where a template wrote them), user-defined
//! pieces (always: they are vocabulary, such as Gemma's runs of spaces), and what lies between, which one of three
//! encoders takes: byte-level BPE and SentencePiece from a GGUF's metadata, or the `tokenizers` crate for a
//! `tokenizer.json`. The two of our own exist because a GGUF has no `tokenizer.json`, its SentencePiece has scores
//! and no merges, and the first token must not wait: a table of 49,152 tokens and 48,900 merges is built in 15 ms.

mod bpe;
mod byte_level;
pub(crate) mod export;
mod gguf;
mod hugging_face;
mod merge;
mod pieces;
mod split;
mod spm;
mod stream;
mod vocabulary;

use std::borrow::Cow;

pub use gguf::GgufVocab;
pub use hugging_face::chat_template_source;
pub use stream::StreamDecoder;
pub use vocabulary::TokenKind;

use bpe::Bpe;
use hugging_face::Pipeline;
use pieces::{Piece, Spellings};
use spm::Spm;
use vocabulary::Vocabulary;

/// Names of tokens that end an answer, whatever a file says about them.
const ENDS: [&str; 12] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<EOT>",
];

/// Whether the text of a special token in the input becomes that token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Never: user text. `<|im_end|>` typed by a person is seven ordinary characters or so.
    AsText,
    /// Yes: text that a template made.
    Parse,
}

/// A model's tokenizer. Cheap to share behind an `Arc`.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    encoder: Encoder,
    specials: Spellings,
    user_defined: Spellings,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    ends: Vec<u32>,
    /// SentencePiece puts a space in front of a text; it is no part of it.
    space_prefix: bool,
}

enum Encoder {
    Bpe(Bpe),
    Spm(Spm),
    HuggingFace(Box<Pipeline>),
}

impl Tokenizer {
    /// Token ids of `text`, without any that a post-processor would add (see [`Tokenizer::bos`]).
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 4);
        match specials {
            Specials::AsText => self.encode_text(text, true, &mut ids),
            Specials::Parse => self.encode_around(text, None, &mut ids),
        }
        ids
    }

    /// As [`Specials::Parse`]; then `sentinel` is taken out of the text between special tokens. A special token's
    /// spelling with the sentinel inside is therefore text.
    pub(crate) fn encode_guarded(&self, text: &str, sentinel: char) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 4);
        self.encode_around(text, Some(sentinel), &mut ids);
        ids
    }

    fn encode_around(&self, text: &str, sentinel: Option<char>, ids: &mut Vec<u32>) {
        let mut at_start = true;
        self.specials.cut(text, |piece| {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => {
                    let text = match sentinel {
                        Some(c) if text.contains(c) => Cow::Owned(text.replace(c, "")),
                        _ => Cow::Borrowed(text),
                    };
                    self.encode_text(&text, at_start, ids);
                }
            }
            at_start = false;
        });
    }

    fn encode_text(&self, text: &str, mut at_start: bool, ids: &mut Vec<u32>) {
        self.user_defined.cut(text, |piece| {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => match &self.encoder {
                    Encoder::Bpe(bpe) => bpe.encode(&self.vocabulary, text, ids),
                    // Text begins a sequence or follows a token: a piece never follows a piece.
                    Encoder::Spm(spm) => spm.encode(&self.vocabulary, text, true, ids),
                    Encoder::HuggingFace(pipeline) => pipeline.encode(&self.vocabulary, text, at_start, ids),
                },
            }
            at_start = false;
        });
    }

    /// The token that starts every sequence, where the model wants one.
    pub fn bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }

    /// The spelling of the start token, whether or not the model wants it put in front: a template's `bos_token`.
    pub fn bos_text(&self) -> Option<&str> {
        self.vocabulary.text(self.bos?)
    }

    /// The spelling of the end token: a template's `eos_token`.
    pub fn eos_text(&self) -> Option<&str> {
        self.vocabulary.text(self.eos?)
    }

    /// Tokens that end an answer (end of text, end of turn), ascending.
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }

    /// Tokens in the vocabulary; ids are below it. A model's logits may be wider (padding).
    pub fn vocab(&self) -> usize {
        self.vocabulary.len()
    }

    /// The bytes a token stands for (a part of a character, perhaps); empty for special tokens and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// The token's name as the vocabulary spells it (`<|im_end|>`, `Ġthe`).
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocabulary.text(id)
    }

    /// The token with this name.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.vocabulary.id(text)
    }

    /// Whether the token is special: it has no text of its own.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.kind(id) == Some(TokenKind::Special)
    }

    /// What a token is for; `None` for an id outside the vocabulary.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocabulary.kind(id)
    }

    /// Whether encoding puts a space in front of a text (SentencePiece), which [`Tokenizer::decode`] takes off.
    pub fn has_space_prefix(&self) -> bool {
        self.space_prefix
    }

    /// Text of whole ids; bytes that are no UTF-8 become U+FFFD. Special tokens are left out, and so is the space
    /// that SentencePiece puts in front of a text.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = StreamDecoder::whole_text(self);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        decoder.push_bytes(&bytes) + &decoder.finish()
    }

    /// Puts `mark` inside every special token's spelling in `text`, and inside the start of one at its end; `None`
    /// where there is neither.
    pub(crate) fn break_specials(&self, text: &str, mark: char) -> Option<String> {
        self.specials.broken(text, mark)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let encoder = match self.encoder {
            Encoder::Bpe(_) => "byte-level BPE",
            Encoder::Spm(_) => "SentencePiece",
            Encoder::HuggingFace(_) => "tokenizer.json",
        };
        f.debug_struct("Tokenizer")
            .field("encoder", &encoder)
            .field("vocab", &self.vocab())
            .finish_non_exhaustive()
    }
}

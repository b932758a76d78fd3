//! A tokenizer from a GGUF's metadata.

use std::path::Path;

use super::bpe::Bpe;
use super::byte_level;
use super::pieces::{Matching, Spellings};
use super::split::Splitter;
use super::spm::{SPACE, Spm};
use super::vocabulary::{TokenKind, Vocabulary};
use super::{ENDS, Encoder, Tokenizer};
use crate::Error;
use crate::formats::gguf::Gguf;

/// A GGUF's tokenizer metadata as plain values: the keys `tokenizer.ggml.…`, as they stand in the file.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab<'a> {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: &'a str,
    /// `pre`: how a BPE cuts words.
    pub pre: Option<&'a str>,
    /// `tokens`.
    pub tokens: Vec<&'a str>,
    /// `scores`, one a token; SentencePiece needs them.
    pub scores: Vec<f32>,
    /// `token_type`, one a token, or none.
    pub token_types: Vec<i32>,
    /// `merges`; BPE needs them.
    pub merges: Vec<&'a str>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `eom_token_id`: ends a message that calls a tool.
    pub eom: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`; where absent, SentencePiece and Llama 3 want it.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`; where absent, SentencePiece wants it.
    pub add_space_prefix: Option<bool>,
}

impl<'a> GgufVocab<'a> {
    /// The tokenizer's part of a file's metadata.
    ///
    /// # Errors
    /// [`Error::Malformed`] where a key holds a value of the wrong type.
    pub fn read(gguf: &'a Gguf) -> Result<GgufVocab<'a>, Error> {
        let id = |name: &str| gguf.u32(&format!("tokenizer.ggml.{name}_token_id"));
        Ok(GgufVocab {
            model: gguf.str("tokenizer.ggml.model")?.unwrap_or("none"),
            pre: gguf.str("tokenizer.ggml.pre")?,
            tokens: gguf.strings("tokenizer.ggml.tokens")?.into_iter().flatten().collect(),
            scores: gguf.array_f32("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types: gguf.array_i32("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: gguf.strings("tokenizer.ggml.merges")?.into_iter().flatten().collect(),
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unknown: id("unknown")?,
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
        })
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file carries.
    ///
    /// # Errors
    /// As [`Tokenizer::from_vocab`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, Error> {
        Tokenizer::from_vocab(&GgufVocab::read(gguf)?, gguf.path())
    }

    /// Builds a tokenizer from a GGUF's metadata; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names a kind of tokenizer or pre-tokenizer; [`Error::Malformed`] a field.
    pub fn from_vocab(vocab: &GgufVocab<'_>, path: &Path) -> Result<Tokenizer, Error> {
        let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
        check(vocab).map_err(malformed)?;
        let sentence_piece = match vocab.model {
            "gpt2" => false,
            "llama" => true,
            other => return Err(unsupported(path, format!("the tokenizer {other:?}"), "gpt2 and llama")),
        };

        let known = [vocab.bos, vocab.eos, vocab.eot, vocab.eom, vocab.unknown];
        let kind_of = |id: u32, text: &str| {
            // Some files call these ordinary. They end sequences all the same, so no text may spell them.
            if known.contains(&Some(id)) || (ENDS.contains(&text) && text != "</s>") {
                return TokenKind::Special;
            }
            match vocab.token_types.get(id as usize) {
                Some(2 | 3 | 5) => TokenKind::Special,
                Some(4) => TokenKind::UserDefined,
                Some(6) => TokenKind::Byte,
                _ => TokenKind::Normal,
            }
        };
        let text_bytes = vocab.tokens.iter().map(|t| t.len()).sum();
        let mut vocabulary = Vocabulary::with_capacity(vocab.tokens.len(), text_bytes);
        for (id, &text) in (0u32..).zip(&vocab.tokens) {
            let kind = kind_of(id, text);
            vocabulary.push(text, kind, |out| match kind {
                TokenKind::Special => {}
                TokenKind::UserDefined => out.extend_from_slice(text.as_bytes()),
                TokenKind::Byte => out.extend(byte_token(text)),
                TokenKind::Normal if sentence_piece => push_piece(text, out),
                TokenKind::Normal => byte_level::push_bytes(text, out),
            });
        }

        let mut space_prefix = false;
        let mut add_bos = sentence_piece;
        let encoder = if sentence_piece {
            space_prefix = vocab.add_space_prefix.unwrap_or(true);
            Encoder::Spm(Spm::new(&vocabulary, &vocab.scores, vocab.unknown, space_prefix))
        } else {
            let name = vocab.pre.unwrap_or("none");
            let splitter = Splitter::named(name)
                .ok_or_else(|| unsupported(path, format!("the pre-tokenizer {name:?}"), Splitter::NAMES))?;
            add_bos = splitter == Splitter::Llama3;
            Encoder::Bpe(Bpe::new(splitter, &vocabulary, vocab.merges.iter().copied()))
        };

        let ends = [vocab.eos, vocab.eot, vocab.eom].into_iter().flatten();
        let ends = end_tokens(&vocabulary, ends);
        let plain = |id| (id, Matching::default());
        let specials = vocabulary.of_kind(TokenKind::Special).filter(|&id| is_breakable(&vocabulary, id));
        let specials = Spellings::new(&vocabulary, specials.map(plain));
        let user_defined = Spellings::new(&vocabulary, vocabulary.of_kind(TokenKind::UserDefined).map(plain));
        Ok(Tokenizer {
            specials: specials.map_err(malformed)?,
            user_defined: user_defined.map_err(malformed)?,
            encoder,
            bos: vocab.bos,
            eos: vocab.eos,
            add_bos: vocab.add_bos.unwrap_or(add_bos),
            ends,
            space_prefix,
            vocabulary,
        })
    }
}

fn check(vocab: &GgufVocab<'_>) -> Result<(), String> {
    let tokens = vocab.tokens.len();
    if tokens == 0 {
        return Err("tokenizer.ggml.tokens is missing or empty".into());
    }
    // Ids and offsets into the spellings are 32 bits wide.
    let bytes: usize = vocab.tokens.iter().map(|t| t.len()).sum();
    if u32::try_from(bytes.max(tokens)).is_err() {
        return Err(format!("tokenizer.ggml.tokens has {tokens} tokens of {bytes} bytes in all"));
    }
    let lengths = [("scores", vocab.scores.len()), ("token_type", vocab.token_types.len())];
    for (name, got) in lengths {
        if got != 0 && got != tokens {
            return Err(format!("tokenizer.ggml.{name} has {got} entries for {tokens} tokens"));
        }
    }
    if vocab.model == "llama" && vocab.scores.is_empty() {
        return Err("tokenizer.ggml.scores is missing".into());
    }
    if vocab.model == "gpt2" && vocab.merges.is_empty() {
        return Err("tokenizer.ggml.merges is missing or empty".into());
    }
    let ids = [("bos", vocab.bos), ("eos", vocab.eos), ("eot", vocab.eot), ("eom", vocab.eom)];
    for (name, id) in ids.into_iter().chain([("unknown", vocab.unknown)]) {
        if let Some(id) = id.filter(|&id| id as usize >= tokens) {
            return Err(format!("tokenizer.ggml.{name}_token_id is {id}, and there are {tokens} tokens"));
        }
    }
    Ok(())
}

fn unsupported(path: &Path, what: String, supported: &str) -> Error {
    Error::Unsupported { path: path.to_owned(), what, supported: supported.to_owned() }
}

/// The ids given and the special tokens that end answers by their name, ascending, each once.
pub(super) fn end_tokens(vocabulary: &Vocabulary, given: impl Iterator<Item = u32>) -> Vec<u32> {
    let named = ENDS.iter().filter_map(|name| vocabulary.id(name));
    let named = named.filter(|&id| vocabulary.kind(id) == Some(TokenKind::Special));
    let mut ends: Vec<u32> = given.chain(named).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// Whether a special token's spelling can be told from text that happens to be the same: a mark fits into it. One of
/// a single character is never parsed.
pub(super) fn is_breakable(vocabulary: &Vocabulary, id: u32) -> bool {
    vocabulary.text(id).is_some_and(|text| text.chars().nth(1).is_some())
}

/// The byte that `<0x0A>` names.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The bytes of a SentencePiece piece.
pub(super) fn push_piece(text: &str, out: &mut Vec<u8>) {
    let mut utf8 = [0; 4];
    for c in text.chars() {
        let c = if c == SPACE { ' ' } else { c };
        out.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
    }
}

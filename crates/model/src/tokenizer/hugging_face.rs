//! A tokenizer from a Hugging Face folder: `tokenizer.json`, and the files beside it that say which tokens start
//! and end a sequence.
//!
//! The `tokenizers` crate runs normalizer, pre-tokenizer and model. Added tokens are matched by us and not by it,
//! because it matches special ones in any text.

use std::fs;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;
use tokenizers::{
    Model as _, ModelWrapper, NormalizedString, Normalizer as _, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
};

use super::gguf::{byte_token, end_tokens, is_breakable, push_piece};
use super::pieces::{Matching, Spellings};
use super::vocabulary::{TokenKind, Vocabulary};
use super::{Encoder, Tokenizer, byte_level};
use crate::Error;

/// Most bytes of a JSON file that are read. The largest vocabularies in use take some 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The stages between a text and its tokens.
pub(crate) struct Pipeline {
    normalizer: Option<NormalizerWrapper>,
    /// For text that begins a sequence, and for text after a token.
    first: Option<PreTokenizerWrapper>,
    later: Option<PreTokenizerWrapper>,
    model: ModelWrapper,
}

impl Pipeline {
    pub(crate) fn encode(&self, vocabulary: &Vocabulary, text: &str, at_start: bool, ids: &mut Vec<u32>) {
        let from = ids.len();
        if self.run(text, at_start, ids).is_ok() {
            if ids[from..].iter().any(|&id| self.is_spelled_special(vocabulary, id)) {
                self.respell(vocabulary, from, ids);
            }
            return;
        }
        // An expression gave up on a long text (they have a limit on backtracking). Halves are still right but for
        // the words at the cut, and a single character that fails has no token.
        ids.truncate(from);
        let middle = text.char_indices().map(|(at, _)| at).find(|&at| at >= text.len().div_ceil(2));
        if let Some(middle) = middle.filter(|&at| at > 0) {
            self.encode(vocabulary, &text[..middle], at_start, ids);
            self.encode(vocabulary, &text[middle..], false, ids);
        }
    }

    fn run(&self, text: &str, at_start: bool, ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut normalized)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        let pre_tokenizer = if at_start { &self.first } else { &self.later };
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        words.tokenize(|word| self.model.tokenize(word.get()))?;
        for (_, _, tokens) in words.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    /// A special token that plain text was merged into (a vocabulary may have `</s>` as a piece); the unknown token
    /// is what some text has.
    fn is_spelled_special(&self, vocabulary: &Vocabulary, id: u32) -> bool {
        vocabulary.kind(id) == Some(TokenKind::Special) && Some(id) != self.unknown(vocabulary)
    }

    fn unknown(&self, vocabulary: &Vocabulary) -> Option<u32> {
        match &self.model {
            ModelWrapper::BPE(bpe) => bpe.unk_token.as_deref().and_then(|text| vocabulary.id(text)),
            _ => None,
        }
    }

    /// Spells such tokens a character at a time.
    fn respell(&self, vocabulary: &Vocabulary, from: usize, ids: &mut Vec<u32>) {
        for id in ids.split_off(from) {
            if !self.is_spelled_special(vocabulary, id) {
                ids.push(id);
                continue;
            }
            for c in vocabulary.text(id).unwrap_or("").chars() {
                if let Ok(tokens) = self.model.tokenize(c.encode_utf8(&mut [0; 4])) {
                    ids.extend(
                        tokens.iter().map(|t| t.id).filter(|&t| !self.is_spelled_special(vocabulary, t)),
                    );
                }
            }
        }
    }
}

/// How tokens spell bytes, as the decoder of a `tokenizer.json` says.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    ByteLevel,
    SentencePiece { space_prefix: bool },
}

impl Tokenizer {
    /// Builds a tokenizer from a folder with a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`], [`Error::Unsupported`] by the name of the stage.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, Error> {
        let path = folder.join("tokenizer.json");
        let mut file = read_json(&path)?.ok_or_else(|| Error::Io {
            path: path.clone(),
            source: std::io::Error::from(std::io::ErrorKind::NotFound),
        })?;
        let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };

        let spelling = spelling(&file).map_err(|what| Error::Unsupported {
            path: path.clone(),
            what,
            supported: "ByteLevel, Metaspace, and sequences with ByteFallback".to_owned(),
        })?;
        let entries = entries(&file).map_err(malformed)?;
        let vocabulary =
            fill(&entries, spelling, file["model"]["byte_fallback"] == true).map_err(malformed)?;

        let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let map = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        let named =
            |key: &str| [&config, &map].into_iter().find_map(|v| token_name(&v[key])).map(str::to_owned);
        let bos = named("bos_token").and_then(|name| vocabulary.id(&name));
        let eos = named("eos_token").and_then(|name| vocabulary.id(&name));
        let mut ends: Vec<u32> = eos.into_iter().collect();
        for file in ["generation_config.json", "config.json"] {
            let Some(value) = read_json(&folder.join(file))? else { continue };
            match &value["eos_token_id"] {
                Value::Array(ids) => ends.extend(ids.iter().filter_map(id_of)),
                id => ends.extend(id_of(id)),
            }
        }
        ends.retain(|&id| (id as usize) < vocabulary.len());
        let ends = end_tokens(&vocabulary, ends.into_iter());
        let add_bos = config["add_bos_token"].as_bool().unwrap_or_else(|| {
            let first = post_processor_start(&file["post_processor"]);
            first.is_some() && first.and_then(|name| vocabulary.id(name)) == bos
        });

        let special = |wanted: bool| {
            let tokens = entries.iter().filter(move |e| e.added.is_some_and(|a| a.special == wanted));
            tokens.filter_map(|e| Some((e.id, e.added?.matching)))
        };
        let breakable = special(true).filter(|&(id, _)| is_breakable(&vocabulary, id));
        let specials = Spellings::new(&vocabulary, breakable).map_err(malformed)?;
        let user_defined = Spellings::new(&vocabulary, special(false)).map_err(malformed)?;

        let pipeline = pipeline(&mut file).map_err(malformed)?;
        Ok(Tokenizer {
            specials,
            user_defined,
            encoder: Encoder::HuggingFace(Box::new(pipeline)),
            bos,
            eos,
            add_bos,
            ends,
            space_prefix: spelling == Spelling::SentencePiece { space_prefix: true },
            vocabulary,
        })
    }
}

/// The source of a folder's chat template: `chat_template.jinja`, or the one in `tokenizer_config.json` (of several
/// the one named `default`).
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`].
pub fn chat_template_source(folder: &Path) -> Result<Option<String>, Error> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read(&path)? {
        let text = String::from_utf8(bytes);
        return text.map(Some).map_err(|_| Error::Malformed { path, reason: "it is not UTF-8".into() });
    }
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    Ok(match &config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first());
            default.and_then(|t| t["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    })
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let reason = format!("it is longer than {} MiB", MAX_FILE_BYTES >> 20);
        return Err(Error::Malformed { path: path.to_owned(), reason });
    }
    Ok(Some(bytes))
}

fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| Error::Malformed { path: path.to_owned(), reason: format!("no JSON: {e}") })
}

fn id_of(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// The special token that a post-processor puts first.
fn post_processor_start(value: &Value) -> Option<&str> {
    match value["type"].as_str()? {
        "TemplateProcessing" => value["single"].get(0)?["SpecialToken"]["id"].as_str(),
        "Sequence" => value["processors"].as_array()?.iter().find_map(post_processor_start),
        _ => None,
    }
}

fn spelling(file: &Value) -> Result<Spelling, String> {
    fn stages(value: &Value) -> Vec<&Value> {
        match &value["decoders"] {
            Value::Array(inner) => inner.iter().flat_map(stages).collect(),
            _ => vec![value],
        }
    }
    let decoder = &file["decoder"];
    let stages = stages(decoder);
    let find = |kind: &str| stages.iter().copied().find(|s| s["type"] == kind);
    if find("ByteLevel").is_some() {
        return Ok(Spelling::ByteLevel);
    }
    if let Some(metaspace) = find("Metaspace") {
        // Before prepend_scheme there was add_prefix_space; both default to "in front of every text".
        let never = metaspace["prepend_scheme"] == "never" || metaspace["add_prefix_space"] == false;
        return Ok(Spelling::SentencePiece { space_prefix: !never });
    }
    if find("ByteFallback").is_some() || find("Replace").is_some_and(|r| r["pattern"]["String"] == "▁") {
        let strip = find("Strip").is_some_and(|s| s["content"] == " " && s["start"] == 1);
        return Ok(Spelling::SentencePiece { space_prefix: strip });
    }
    Err(format!("the decoder {}", decoder["type"].as_str().unwrap_or("none")))
}

struct Entry<'a> {
    id: u32,
    text: &'a str,
    added: Option<Added>,
}

#[derive(Clone, Copy)]
struct Added {
    special: bool,
    matching: Matching,
}

/// Tokens of the model's vocabulary and added ones, by ascending id, each id once.
fn entries(file: &Value) -> Result<Vec<Entry<'_>>, String> {
    let mut entries: Vec<Entry<'_>> = match &file["model"]["vocab"] {
        Value::Object(map) => map
            .iter()
            .map(|(text, id)| {
                let id = id_of(id).ok_or_else(|| format!("model.vocab gives {text:?} the id {id}"))?;
                Ok(Entry { id, text, added: None })
            })
            .collect::<Result<_, String>>()?,
        Value::Array(pieces) => (0..)
            .zip(pieces)
            .map(|(id, piece)| {
                let text = piece[0].as_str().ok_or_else(|| format!("model.vocab[{id}] has no text"))?;
                Ok(Entry { id, text, added: None })
            })
            .collect::<Result<_, String>>()?,
        _ => return Err("model.vocab is missing".into()),
    };
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(text)) = (id_of(&token["id"]), token["content"].as_str()) else {
            return Err(format!("added_tokens has an entry without id or content: {token}"));
        };
        let is = |key: &str| token[key] == true;
        let matching =
            Matching { strip_left: is("lstrip"), strip_right: is("rstrip"), single_word: is("single_word") };
        entries.push(Entry { id, text, added: Some(Added { special: is("special"), matching }) });
    }
    // An added token replaces the vocabulary's entry with its id.
    entries.sort_by_key(|e| (e.id, e.added.is_none()));
    entries.dedup_by_key(|e| e.id);
    let last = entries.last().map_or(0, |e| e.id as usize);
    if last > 4 * entries.len() + 65_536 {
        return Err(format!("it gives {} tokens ids up to {last}", entries.len()));
    }
    Ok(entries)
}

fn fill(entries: &[Entry<'_>], spelling: Spelling, byte_fallback: bool) -> Result<Vocabulary, String> {
    let bytes: usize = entries.iter().map(|e| e.text.len()).sum();
    u32::try_from(bytes).map_err(|_| "its vocabulary is longer than 4 GiB".to_owned())?;
    let mut vocabulary = Vocabulary::with_capacity(entries.len(), bytes);
    for entry in entries {
        while vocabulary.len() < entry.id as usize {
            vocabulary.push("", TokenKind::Normal, |_| {});
        }
        let byte = byte_token(entry.text).filter(|_| byte_fallback);
        let kind = match entry.added {
            Some(Added { special: true, .. }) => TokenKind::Special,
            Some(_) => TokenKind::UserDefined,
            None if byte.is_some() => TokenKind::Byte,
            None => TokenKind::Normal,
        };
        vocabulary.push(entry.text, kind, |out| match (kind, spelling) {
            (TokenKind::Special, _) => {}
            (TokenKind::Byte, _) => out.extend(byte),
            (_, Spelling::ByteLevel) => byte_level::push_bytes(entry.text, out),
            (_, Spelling::SentencePiece { .. }) => push_piece(entry.text, out),
        });
    }
    Ok(vocabulary)
}

/// Takes the stages out of the file.
fn pipeline(file: &mut Value) -> Result<Pipeline, String> {
    fn stage<T: serde::de::DeserializeOwned>(file: &mut Value, name: &str) -> Result<Option<T>, String> {
        let value = file[name].take();
        if value.is_null() {
            return Ok(None);
        }
        serde_json::from_value(value).map(Some).map_err(|e| format!("its {name} is not understood: {e}"))
    }
    // Dropout is for training; answers are to be the same each time.
    if let Some(dropout) = file["model"].get_mut("dropout") {
        *dropout = Value::Null;
    }
    let mut later = file["pre_tokenizer"].clone();
    never_prepend(&mut later);
    Ok(Pipeline {
        normalizer: stage(file, "normalizer")?,
        first: stage(file, "pre_tokenizer")?,
        later: if later.is_null() {
            None
        } else {
            Some(
                serde_json::from_value(later)
                    .map_err(|e| format!("its pre_tokenizer is not understood: {e}"))?,
            )
        },
        model: stage(file, "model")?.ok_or("model is missing")?,
    })
}

/// Metaspace with the scheme "first" puts a space in front of a sequence and not of text after a token.
fn never_prepend(pre_tokenizer: &mut Value) {
    if pre_tokenizer["prepend_scheme"] == "first" {
        pre_tokenizer["prepend_scheme"] = "never".into();
    }
    if let Some(Value::Array(inner)) = pre_tokenizer.get_mut("pretokenizers") {
        inner.iter_mut().for_each(never_prepend);
    }
}

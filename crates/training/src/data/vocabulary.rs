//! A vocabulary of one's own, for a model that is trained from nothing: byte-level BPE, as GPT-2 has it (Sennrich et al.,
//! "Neural machine translation of rare words with subword units", ACL 2016), learned by the `tokenizers` crate.
//!
//! Every byte is a token, so every text has one; the rest are the merges that shorten the training text most. The same
//! text gives the same vocabulary.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder};

use super::source::{self, Document};
use super::{BadLines, DataError, TextDocuments};

const END_OF_TEXT: &str = "<|endoftext|>";
const TURN: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
/// Tokens that no text can be without: the bytes and the special ones.
const LEAST: usize = 256 + 1 + TURN.len();
/// More than any model has.
const MOST: usize = 1 << 20;
/// The template for conversations, ChatML.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                        '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                        {% endif %}";
/// Documents between reading and counting.
const AHEAD: usize = 64;

/// A vocabulary to learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabularyConfig {
    /// Files and folders, as in [`super::DataConfig`].
    pub paths: Vec<PathBuf>,
    /// What becomes of bad lines; those that are passed over are counted and named when the data is read.
    pub bad_lines: BadLines,
    /// Tokens, special ones and bytes among them; fewer where the text has no more to merge.
    pub size: usize,
}

/// Learns a vocabulary and writes it into `folder` as `tokenizer.json` and `tokenizer_config.json`; returns its size.
/// `<|endoftext|>` ends a text. Where the data holds conversations, the vocabulary has a chat template, ChatML.
///
/// # Errors
/// [`DataError`]: what can't be read or written, a size that can't be, data without text.
pub fn train_vocabulary(config: &VocabularyConfig, folder: &Path) -> Result<usize, DataError> {
    if !(LEAST..=MOST).contains(&config.size) {
        let expected = "a vocabulary has from 259 tokens (the bytes and three special ones) to 1,048,576";
        return Err(DataError::Setting { name: "vocabulary", value: config.size.to_string(), expected });
    }
    let fail = |e: tokenizers::Error| DataError::Vocabulary { reason: e.to_string() };
    let files = source::files(&config.paths)?;
    let specials = [END_OF_TEXT, TURN[0], TURN[1]].map(|token| AddedToken::from(token, true));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(config.size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(specials.to_vec())
        .build();
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(ByteLevel::new(false, true, true).into()))
    .with_decoder(Some(ByteLevel::new(false, true, true).into()))
    .build()
    .map_err(fail)?;
    let (sender, texts) = mpsc::sync_channel(AHEAD);
    let (learned, read) = std::thread::scope(|scope| {
        let (files, bad_lines) = (&files, config.bad_lines);
        let reader = scope.spawn(move || read(files, bad_lines, &sender));
        let learned = tokenizer.train(&mut trainer, texts.into_iter()).map(|_| ());
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (learned, read)
    });
    let Found { texts, chats } = read?;
    learned.map_err(fail)?;
    if texts == 0 {
        let named: Vec<String> = files.iter().take(3).map(|path| path.display().to_string()).collect();
        let more = if files.len() > named.len() { ", …" } else { "" };
        let message = format!(
            "there is no text to learn a vocabulary from in {}{more}; name other data in [data], or `stories = \"4M\"`",
            named.join(", ")
        );
        return Err(DataError::Empty { message });
    }
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "unk_token": null,
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
    });
    if chats > 0 {
        settings["chat_template"] = TEMPLATE.into();
    }
    fs::create_dir_all(folder).map_err(DataError::io(folder))?;
    write(&folder.join("tokenizer.json"), &tokenizer.to_string(true).map_err(fail)?)?;
    write(&folder.join("tokenizer_config.json"), &format!("{settings:#}"))?;
    Ok(tokenizer.get_vocab_size(true))
}

fn write(path: &Path, text: &str) -> Result<(), DataError> {
    fs::write(path, text).map_err(DataError::io(path))
}

/// What was read.
#[derive(Default)]
struct Found {
    texts: u64,
    chats: u64,
}

/// Sends all texts, up to a bad line where those are fatal; ends early where nobody listens any more.
fn read(
    files: &[PathBuf],
    bad_lines: BadLines,
    texts: &mpsc::SyncSender<String>,
) -> Result<Found, DataError> {
    let mut counts = Found::default();
    for path in files {
        source::read(path, TextDocuments::File, &mut |found| {
            let mut send = |text: &str| {
                counts.texts += u64::from(!text.trim().is_empty());
                // Whoever learns says why it stopped.
                let _ = texts.send(text.to_owned());
            };
            match found.document {
                Ok(Document::Text { text, .. }) => send(&text),
                Ok(Document::Chat { messages, .. }) => {
                    messages.iter().filter_map(|m| m["content"].as_str()).for_each(send);
                    counts.chats += 1;
                }
                Err(reason) if bad_lines == BadLines::Fatal => {
                    return Err(DataError::Line(source::bad(path, found.line, reason)));
                }
                Err(_) => {}
            }
            Ok(())
        })?;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use consort_model::Tokenizer;
    use consort_model::chat::ChatTemplate;
    use consort_model::tokenizer::Specials;

    use serde_json::Value;

    use super::*;

    fn learn(name: &str, content: &str, size: usize) -> (tempfile::TempDir, usize) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let config = VocabularyConfig { paths: vec![path], size, bad_lines: BadLines::Skip };
        let size = train_vocabulary(&config, &folder.path().join("out")).unwrap();
        (folder, size)
    }

    #[test]
    fn a_vocabulary_is_learned_and_read_back() {
        let text = "the cat sat on the mat and the dog sat on the cat\n".repeat(50);
        let (folder, size) = learn("a.txt", &text, 300);
        assert!((270..=300).contains(&size), "{size} tokens");
        let tokenizer = Tokenizer::from_folder(&folder.path().join("out")).unwrap();
        assert_eq!(tokenizer.vocab(), size);
        let ids = tokenizer.encode("the cat sat on ünïcode 猫", Specials::AsText);
        assert_eq!(tokenizer.decode(&ids), "the cat sat on ünïcode 猫");
        assert!(tokenizer.encode(" the cat sat", Specials::AsText).len() <= 4, "words are merged");
        assert_eq!(tokenizer.eos_text(), Some(END_OF_TEXT));
        let again = learn("a.txt", &text, 300).0;
        let json = |folder: &tempfile::TempDir| fs::read(folder.path().join("out/tokenizer.json")).unwrap();
        assert_eq!(json(&folder), json(&again), "the same text, the same vocabulary");
        assert!(
            consort_model::tokenizer::chat_template_source(&folder.path().join("out")).unwrap().is_none()
        );
    }

    #[test]
    fn conversations_bring_a_template() {
        let line = r#"{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello you"}]}"#;
        let (folder, _) = learn("a.jsonl", &format!("{line}\nnot json\n"), 300);
        let out = folder.path().join("out");
        let source = consort_model::tokenizer::chat_template_source(&out).unwrap().unwrap();
        let tokenizer = Tokenizer::from_folder(&out).unwrap();
        let messages: Vec<Value> = vec![json!({"role": "user", "content": "hello"})];
        let options = consort_model::chat::ChatOptions { add_generation_prompt: true, ..Default::default() };
        let ids = ChatTemplate::new(&source).unwrap().encode(&tokenizer, &messages, &options).unwrap();
        assert_eq!(tokenizer.token_id("<|im_start|>"), Some(ids[0]));
    }

    #[test]
    fn what_cannot_be_learned_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.txt"), "\n\n").unwrap();
        let (paths, bad_lines) = (vec![folder.path().join("a.txt")], BadLines::Fatal);
        let config = |size| VocabularyConfig { paths: paths.clone(), size, bad_lines };
        let small = train_vocabulary(&config(100), folder.path()).unwrap_err().to_string();
        assert!(small.starts_with("vocabulary is 100; a vocabulary has from 259"), "{small}");
        let empty = train_vocabulary(&config(300), folder.path()).unwrap_err().to_string();
        assert!(
            empty.contains("no text to learn a vocabulary from in ") && empty.contains("a.txt; name"),
            "{empty}"
        );
        // Not that there is no text: what is wrong with it.
        fs::write(&paths[0], b"caf\xe9 au lait\n").unwrap();
        let latin = train_vocabulary(&config(300), folder.path()).unwrap_err().to_string();
        assert!(
            latin.contains("a.txt:1: not UTF-8 text: byte 4") && latin.contains("bad_lines = "),
            "{latin}"
        );
    }
}

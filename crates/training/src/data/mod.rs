//! Training data: from files of text and conversations to samples of token ids.
//!
//! A [`Dataset`] is made once: documents are tokenized on all threads, packed into samples of at most `context` rows,
//! and kept in a cache that later runs and other workers map into memory. What it holds follows from the
//! files' content, the tokenizer and the settings, and from nothing else; in which order a job sees it is a function of
//! its seed ([`Order`]). So a cursor, one number, names a job's place in its data.
//!
//! Tokenizing takes the tokenizer's time, a few MB a second and thread; opening a cache takes the time to hash it.

mod cache;
mod encode;
mod error;
mod order;
mod pack;
mod source;
pub mod stories;
mod vocabulary;

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use consort_model::Tokenizer;
use consort_model::chat::ChatTemplate;
use consort_model::train::MicroBatch;
use serde::{Deserialize, Serialize};

pub use error::{BadLine, DataError};
pub use order::Order;
pub use vocabulary::{VocabularyConfig, train_vocabulary};

use cache::{Cache, Writer};
use encode::Encoded;
use source::{Document, Found};

/// Changes whenever the same input gives another cache.
const VERSION: u32 = 1;
/// Documents and bytes that are tokenized between two writes.
const BATCH_DOCUMENTS: usize = 1024;
const BATCH_BYTES: usize = 4 << 20;
/// Bad lines that a report names; it counts the others.
const NAMED_LINES: usize = 20;

/// What a text file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextDocuments {
    /// One document.
    #[default]
    File,
    /// A document a paragraph; blank lines are between them.
    Paragraph,
    /// A document a line.
    Line,
}

/// What becomes of lines that can't be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadLines {
    /// The first one ends it, by name.
    #[default]
    Fatal,
    /// They are counted, and the first ones named in the [`Report`].
    Skip,
}

/// What to make a data set of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataConfig {
    /// Files, and folders of files (`.txt`, `.text`, `.md`, `.jsonl`). `.jsonl` has an object a line with `text` or
    /// `messages`; every other file is text.
    pub paths: Vec<PathBuf>,
    /// What a text file is.
    pub text: TextDocuments,
    /// What becomes of bad lines.
    pub bad_lines: BadLines,
    /// Rows of a sample, at most: tokens that are predicted from those before them.
    pub context: usize,
    /// The folder for caches.
    pub cache: PathBuf,
}

/// How the model reads.
pub struct Reading<'a> {
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template, which conversations need.
    pub template: Option<&'a ChatTemplate>,
    /// What tells this tokenizer from others: a hash of its file.
    pub tokenizer_hash: &'a str,
}

/// What a data set holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Files read.
    pub files: u64,
    /// Documents with something to learn from.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Tokens that are predicted, each once an epoch.
    pub predicted: u64,
    /// Samples.
    pub samples: u64,
    /// Documents with nothing to learn from: empty, or nothing of the assistant's left.
    pub empty: u64,
    /// Conversations that are longer than a sample; their ends are left out.
    pub cut: u64,
    /// Lines that were skipped.
    pub skipped: u64,
    /// The first of them, as `file:line: reason`.
    pub skipped_lines: Vec<String>,
}

/// How far the making of a cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read of all files.
    pub bytes: u64,
    /// Bytes of all files.
    pub total: u64,
    /// Tokens so far.
    pub tokens: u64,
}

/// Samples of token ids.
#[derive(Debug)]
pub struct Dataset {
    cache: Cache,
    id: String,
}

impl Dataset {
    /// Opens the cache of this data, and makes it where there is none, on `threads` threads. `progress` hears of it now
    /// and then.
    ///
    /// # Errors
    /// [`DataError`]: what can't be read or written, the first bad line where those are fatal, data without a token to
    /// learn from, a cache that was changed.
    pub fn open(
        config: &DataConfig,
        reading: &Reading<'_>,
        threads: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Dataset, DataError> {
        if !(2..=1 << 24).contains(&config.context) {
            let expected = "a sample has from 2 to 16,777,216 rows";
            return Err(DataError::Setting { name: "context", value: config.context.to_string(), expected });
        }
        let files = source::files(&config.paths)?;
        let id = identity(config, reading, &files)?;
        let folder = config.cache.join(&id);
        if let Some(cache) = Cache::open(&folder)? {
            return Ok(Dataset { cache, id });
        }
        let writer = Writer::new(&folder, config.context)?;
        Maker { config, reading, threads: threads.max(1), writer, batch: Vec::new(), bytes: 0, first: true }
            .make(&files, progress)?;
        match Cache::open(&folder)? {
            Some(cache) => Ok(Dataset { cache, id }),
            None => Err(DataError::Cache { path: folder, reason: "it is gone".to_owned() }),
        }
    }

    /// What the data, the tokenizer and the settings come to: equal ids have equal samples.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it holds.
    pub fn report(&self) -> &Report {
        &self.cache.report
    }

    /// Samples: at least one.
    pub fn samples(&self) -> u64 {
        self.cache.samples()
    }

    /// The order in which a job with this seed sees the samples.
    pub fn order(&self, seed: u64) -> Order {
        Order::new(self.samples(), seed)
    }

    /// Appends a sample's sequences to a micro-batch.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn push(&self, index: u64, batch: &mut MicroBatch) {
        for (tokens, predicted) in self.cache.sample(index) {
            let tokens: Vec<u32> = tokens.collect();
            batch.push_weighted(&tokens, |i| if predicted[i] == 1 { 1.0 } else { 0.0 });
        }
    }

    /// Rows of a sample, and how many of them are predicted.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn rows(&self, index: u64) -> (usize, usize) {
        self.cache.sample(index).fold((0, 0), |(rows, predicted), (_, piece)| {
            (rows + piece.len() - 1, predicted + piece[1..].iter().filter(|&&p| p == 1).count())
        })
    }
}

/// What tells the content of these files and folders from other content.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Empty`] for a folder without files that can be learned from.
pub fn fingerprint(paths: &[PathBuf]) -> Result<String, DataError> {
    let mut hasher = blake3::Hasher::new();
    for path in source::files(paths)? {
        hasher.update(hash_file(&path).map_err(DataError::io(&path))?.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The name of the cache.
fn identity(config: &DataConfig, reading: &Reading<'_>, files: &[PathBuf]) -> Result<String, DataError> {
    let mut hasher = blake3::Hasher::new();
    // Lengths before texts, so that no two inputs run together.
    let mut say = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    say(&VERSION.to_le_bytes());
    say(&(config.context as u64).to_le_bytes());
    say(format!("{:?} {:?}", config.text, config.bad_lines).as_bytes());
    say(reading.tokenizer_hash.as_bytes());
    say(reading.template.map_or("", ChatTemplate::source).as_bytes());
    for path in files {
        let kind = path.extension().unwrap_or_default().to_ascii_lowercase();
        say(kind.as_encoded_bytes());
        say(hash_file(path).map_err(DataError::io(path))?.as_bytes());
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

fn hash_file(path: &Path) -> std::io::Result<blake3::Hash> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "not a regular file; name one that holds text",
        ));
    }
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        };
    }
}

/// The making of a cache.
struct Maker<'a> {
    config: &'a DataConfig,
    reading: &'a Reading<'a>,
    threads: usize,
    writer: Writer,
    /// What is to be tokenized next.
    batch: Vec<Task>,
    bytes: usize,
    /// The next part of a text begins a document.
    first: bool,
}

struct Task {
    path: PathBuf,
    line: u64,
    document: Document,
    first: bool,
}

impl Maker<'_> {
    fn make(mut self, files: &[PathBuf], progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
        let total = files.iter().filter_map(|path| Some(std::fs::metadata(path).ok()?.len())).sum();
        let mut before = 0;
        for path in files {
            let mut read = 0;
            source::read(path, self.config.text, &mut |found| {
                read = found.bytes;
                self.take(path, found)?;
                if self.bytes >= BATCH_BYTES || self.batch.len() >= BATCH_DOCUMENTS {
                    self.tokenize()?;
                    progress(Progress { bytes: before + read, total, tokens: self.writer.report.tokens });
                }
                Ok(())
            })?;
            before += read;
            self.writer.report.files += 1;
        }
        self.tokenize()?;
        progress(Progress { bytes: total, total, tokens: self.writer.report.tokens });
        if self.writer.report.predicted == 0 {
            let report = &self.writer.report;
            let message = format!(
                "nothing to learn from in {} files: {} documents are empty, {} lines were skipped; name other data in [data]",
                report.files, report.empty, report.skipped
            );
            return Err(DataError::Empty { message });
        }
        self.writer.finish()
    }

    fn take(&mut self, path: &Path, found: Found) -> Result<(), DataError> {
        let Found { line, document, .. } = found;
        match document {
            Ok(document) => {
                self.bytes += match &document {
                    Document::Text { text, .. } => text.len(),
                    Document::Chat { messages, .. } => 256 * messages.len(),
                };
                let ends = matches!(document, Document::Chat { .. } | Document::Text { last: true, .. });
                self.batch.push(Task { path: path.to_owned(), line, document, first: self.first });
                self.first = ends;
                Ok(())
            }
            Err(reason) => self.bad(source::bad(path, line, reason)),
        }
    }

    fn bad(&mut self, line: BadLine) -> Result<(), DataError> {
        if self.config.bad_lines == BadLines::Fatal {
            return Err(DataError::Line(line));
        }
        let report = &mut self.writer.report;
        report.skipped += 1;
        if report.skipped_lines.len() < NAMED_LINES {
            report.skipped_lines.push(line.to_string());
        }
        Ok(())
    }

    /// Tokenizes the batch on all threads and writes it in its order.
    fn tokenize(&mut self) -> Result<(), DataError> {
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        let reading = self.reading;
        // Small shares, so that a long document doesn't leave the other threads without work for long.
        let share = batch.len().div_ceil(self.threads * 8).max(1);
        let shares: Vec<&[Task]> = batch.chunks(share).collect();
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some(tasks) = shares.get(i) else { return done };
                let encoded: Vec<_> = tasks.iter().map(|task| encode_task(task, reading)).collect();
                done.push((i, encoded));
            }
        };
        let mut done: Vec<_> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads.min(shares.len())).map(|_| scope.spawn(work)).collect();
            let mut done = work();
            for other in others {
                match other.join() {
                    Ok(more) => done.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            done
        });
        done.sort_by_key(|(i, _)| *i);
        let encoded = done.into_iter().flat_map(|(_, encoded)| encoded);
        for (task, encoded) in batch.iter().zip(encoded) {
            match (encoded, &task.document) {
                (Ok(parts), Document::Text { last, .. }) => {
                    for part in parts {
                        self.writer.push(&part, false, *last)?;
                    }
                }
                (Ok(documents), Document::Chat { .. }) => {
                    for document in documents {
                        self.writer.push(&document, true, true)?;
                    }
                }
                (Err(_), Document::Chat { .. }) if reading.template.is_none() => {
                    return Err(DataError::NoTemplate { path: task.path.clone(), line: task.line });
                }
                (Err(reason), _) => self.bad(source::bad(&task.path, task.line, reason))?,
            }
        }
        Ok(())
    }
}

fn encode_task(task: &Task, reading: &Reading<'_>) -> Result<Vec<Encoded>, String> {
    match (&task.document, reading.template) {
        (Document::Text { text, last }, _) => {
            Ok(vec![encode::text(reading.tokenizer, text, task.first, *last)])
        }
        (Document::Chat { messages, tools }, Some(template)) => {
            encode::chat(reading.tokenizer, template, messages, tools)
        }
        (Document::Chat { .. }, None) => Err("no chat template".to_owned()),
    }
}

#[cfg(test)]
mod tests;

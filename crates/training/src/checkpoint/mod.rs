//! Checkpoints: a job's weights and all that it needs to go on, written while it trains on.
//!
//! A checkpoint is a folder in a store, `step-0000000120`, that is also a Hugging Face folder: its
//! `model-*.safetensors` with their index, `config.json` and the tokenizer load in `transformers` and serve as they are.
//! Beside them lie `optimizer-*.safetensors`, and `manifest.json` with the size and BLAKE3 sum of every file.
//!
//! Every worker writes its share of the tensors. A share is copied when the step ends, which is all that the step waits
//! for; a thread then writes it and a note of what it wrote. The first worker's thread waits for all notes and writes the
//! manifest. What has no manifest is no checkpoint, so a torn one is never taken for a good one; the manifest is written
//! last and removed first.
//!
//! A disk that is full, read-only or slow costs checkpoints and not the job: what went wrong is an [`Event`], and the
//! next one is tried when it is due. [`load`] takes the newest checkpoint whose every byte is right, and says which it
//! refused and why.

mod load;
mod part;
mod store;
mod writer;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use load::{Loaded, load, remove, steps};
pub(crate) use store::place;
pub use writer::{Event, Writer};

/// Bytes of tensors in one file, about.
const PART_BYTES: usize = 256 << 20;
/// The longest manifest or note that is read.
const MAX_MANIFEST: u64 = 16 << 20;
const MANIFEST: &str = "manifest.json";
/// How a manifest ends: its sum, and the brace.
const SUM: &str = ",\n  \"blake3\": \"";
const CLOSE: &str = "\n}";
const FORMAT: &str = "consort checkpoint 1";

/// Where checkpoints go and who writes them.
#[derive(Clone, Debug)]
pub struct CheckpointConfig {
    /// A folder, or `s3://bucket/prefix`.
    pub location: String,
    /// For a bucket: credentials, region, endpoint, by AWS's names (`aws_access_key_id`, `aws_endpoint`, …).
    pub options: Vec<(String, String)>,
    /// Checkpoints that are kept, at least 1; older ones are removed once a new one is complete.
    pub keep: usize,
    /// This worker's number, from 0.
    pub worker: usize,
    /// Workers that write. All of them name the same location and save the same steps.
    pub workers: usize,
    /// How long the first worker waits for the others' shares.
    pub patience: Duration,
    /// Small files that every checkpoint has beside the weights: `config.json`, the tokenizer's.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// What a job is besides its tensors: whatever the trainer needs to go on, such as its cursor and seed.
pub type JobState = serde_json::Value;

/// What `manifest.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    step: u64,
    /// Buffers of the optimizer.
    buffers: usize,
    job: JobState,
    files: Vec<Sum>,
}

impl Manifest {
    /// As JSON, whose last member is the BLAKE3 sum of all text before it.
    fn text(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.truncate(text.len() - CLOSE.len());
        let sum = blake3::hash(text.as_bytes()).to_hex();
        Ok(format!("{text}{SUM}{sum}\"{CLOSE}"))
    }

    /// Reads what [`Manifest::text`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    fn read(text: &[u8]) -> Result<Manifest, String> {
        let torn = || "it is torn or was changed".to_owned();
        let start = text.len().checked_sub(SUM.len() + 64 + 1 + CLOSE.len()).ok_or_else(torn)?;
        let (before, end) = text.split_at(start);
        let sum = format!("{SUM}{}\"{CLOSE}", blake3::hash(before).to_hex());
        if end != sum.as_bytes() {
            return Err(torn());
        }
        serde_json::from_slice(text).map_err(|e| e.to_string())
    }
}

/// What one worker wrote.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    files: Vec<Sum>,
    /// Names of its tensors, and the file that each is in.
    tensors: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sum {
    name: String,
    bytes: u64,
    blake3: String,
}

impl Sum {
    fn of(name: &str, bytes: &[u8]) -> Sum {
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        Sum { name: name.to_owned(), bytes: bytes.len() as u64, blake3 }
    }
}

/// The folder of a step's checkpoint.
fn folder(step: u64) -> String {
    format!("step-{step:010}")
}

/// The step that a folder of checkpoints is of.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    (digits.len() >= 10 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// The note of one worker of several.
fn note(worker: usize, workers: usize) -> String {
    format!("worker-{:05}-of-{workers:05}.json", worker + 1)
}

#[cfg(test)]
mod tests;

//! Training jobs: a launcher that meets, starts, watches and replaces workers, and what they tell each other.
//!
//! The launcher prepares the job once ([`prepare`]), opens the store where workers meet, writes where that is into the
//! job's folder ([`meeting`]) and starts one process for each worker ([`worker`]), the same program in a mode of its own. A
//! worker says what it does in lines of JSON on its standard output ([`said`]) and takes its launcher's end for its own: it
//! then writes a checkpoint and stops. What is lost is replaced, within a budget ([`replace`]). Everything that workers say
//! becomes metrics, a bar, and a file that `consort train status` explains ([`status`]).

pub(crate) mod again;
pub(crate) mod endpoint;
pub(crate) mod export;
pub(crate) mod finish;
pub(crate) mod holding;
pub(crate) mod launch;
pub(crate) mod meeting;
pub(crate) mod metrics;
pub(crate) mod prepare;
pub(crate) mod ranks;
pub(crate) mod replace;
pub(crate) mod said;
pub(crate) mod served;
pub(crate) mod show;
pub(crate) mod status;
pub(crate) mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use consort_training::job::{self, Job};

use crate::cli::UsageError;
use crate::written;

/// A job and the file that it came from.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    pub(crate) job: Job,
}

/// What a job's file is called where another one was named.
const FILE: &str = "a job's file, such as examples/train/tiny.toml (docs/training.md explains its keys)";

/// Reads a job's file.
pub(crate) fn read(path: &Path) -> Result<Source> {
    parse(path, written::text(path, FILE)?)
}

/// Reads a job from the text of its file.
pub(crate) fn parse(path: &Path, text: String) -> Result<Source> {
    let job = job::read(path, &text).map_err(|problems| UsageError(problems.to_string()))?;
    Ok(Source { path: path.to_owned(), text, job })
}

/// Where a job keeps what is neither the model nor a checkpoint.
pub(crate) fn work(job: &Job) -> PathBuf {
    job.out.join("job")
}

/// Writes a file so that readers see the old one or the new one.
pub(crate) fn publish(path: &Path, text: &str) -> std::io::Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, text)?;
    std::fs::rename(part, path)
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// 128 bits that nobody else knows.
pub(crate) fn secret() -> Result<String> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)
        .map_err(|error| anyhow!("no random numbers for the job's token: {error}"))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

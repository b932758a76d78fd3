//! What can be wrong with data.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// An error about training data. It names the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder can't be read, or the cache can't be written.
    #[error("{}: {error}{}", path.display(), cure(error.kind()))]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A line that says nothing that can be learned from.
    #[error("{0}; mend it, or have such lines skipped and counted: `bad_lines = \"skip\"` in [data]")]
    Line(BadLine),
    /// There is nothing to learn from.
    #[error("{message}")]
    Empty {
        /// What was looked at, and what is wanted.
        message: String,
    },
    /// A setting that makes no sense.
    #[error("{name} is {value}; {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Conversations need a chat template, and the model has none.
    #[error("{}:{line}: a conversation (`messages`), but the model has no chat template; use lines with `text`", path.display())]
    NoTemplate {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// A cache that is not what it says.
    #[error("{}: {reason}; remove it, and it is made again", path.display())]
    Cache {
        /// The cache's folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A vocabulary can't be made.
    #[error("the vocabulary can't be trained: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },
}

impl DataError {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> DataError + '_ {
        move |error| DataError::Io { path: path.to_owned(), error }
    }
}

/// What helps where a file can't be read or written.
fn cure(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "; mend `paths` in [data], which are relative to the job's file",
        io::ErrorKind::PermissionDenied => "; give this user the right to it",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room there",
        _ => "",
    }
}

/// A line that can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.reason)
    }
}

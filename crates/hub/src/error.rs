//! What can go wrong on the way to a model file.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::Tried;

/// An error of this crate; each variant says what the caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No model has this name.
    #[error("no model is called {name:?}{}; `consort models` lists the names, hf:org/repo names a repository on the model hub, and a path names a .gguf file or a folder", near_text(.near))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// Names that look like it, nearest first.
        near: Vec<String>,
    },
    /// A reference that can't be read.
    #[error("{reference:?} names no model: {reason}")]
    BadReference {
        /// What was asked for.
        reference: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A path that isn't there, or isn't a model.
    #[error("{path}: {reason}")]
    BadPath {
        /// The path.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Every source failed.
    #[error("could not fetch {model}:{}\nA download that was cut goes on where it stopped: try again, or check the network and proxy settings.", tried_text(.tried))]
    AllSourcesFailed {
        /// The model.
        model: String,
        /// Each source and why it didn't serve.
        tried: Vec<Tried>,
    },
    /// The disk or its permissions stood in the way.
    #[error("can't {action} {path}: {source}; {}", disk_cure(.source, .path))]
    Disk {
        /// What was tried: `write`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process has been fetching the same model for too long.
    #[error("another process has held {path} for {seconds} s; wait for it or end it, then try again")]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long we waited.
        seconds: u64,
    },
    /// A cached model is damaged.
    #[error("{model} is damaged: {reason}; `consort pull --force {model}` fetches it again")]
    Damaged {
        /// The model.
        model: String,
        /// What is wrong.
        reason: String,
    },
    /// A catalog that is no catalog.
    #[error("the catalog is unusable: {reason}")]
    Catalog {
        /// What is wrong.
        reason: String,
    },
    /// The HTTP client could not be set up.
    #[error("can't set up the HTTP client: {reason}")]
    Client {
        /// What is wrong.
        reason: String,
    },
}

fn near_text(near: &[String]) -> String {
    if near.is_empty() { String::new() } else { format!(" (did you mean {}?)", near.join(" or ")) }
}

fn tried_text(tried: &[Tried]) -> String {
    tried.iter().map(|t| format!("\n  {}: {}", t.source, t.reason)).collect()
}

fn disk_cure(source: &std::io::Error, path: &Path) -> String {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!(
            "free some space there (`consort models` lists what is cached) or put the cache elsewhere with CONSORT_HOME; what was fetched stays in {}",
            path.display()
        ),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "make it writable for this user or put the cache elsewhere with CONSORT_HOME".into()
        }
        _ => "check that folder, or put the cache elsewhere with CONSORT_HOME".into(),
    }
}

impl Error {
    pub(crate) fn disk(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Disk { action, path, source }
    }
}

//! What can go wrong with a model's files.

use std::path::PathBuf;

/// An error of this crate; each variant says what the caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error("can't read {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is damaged or hostile: a header that contradicts itself, or one that points outside the file.
    #[error("{path} is damaged: {reason}; fetch it again")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the name of the field or tensor.
        reason: String,
    },
    /// The file is sound but holds something this version doesn't run.
    #[error("{path}: {what} is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The thing: an architecture, a tensor type, a tokenizer.
        what: String,
        /// What would be.
        supported: String,
    },
    /// The model runs, but can't be trained.
    #[error("{what} can't be trained; what can: {supported}")]
    Untrainable {
        /// The thing that has no backward.
        what: String,
        /// What would be trainable.
        supported: String,
    },
    /// The file system said no to writing.
    #[error("can't write {path}: {source}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The chat template is wrong, or refused these messages.
    #[error("chat template: {reason}")]
    Template {
        /// What the template said.
        reason: String,
    },
    /// A batch doesn't fit the model.
    #[error("{reason}")]
    Batch {
        /// What doesn't fit.
        reason: String,
    },
    /// The compute layer refused.
    #[error(transparent)]
    Tensor(#[from] consort_tensor::Error),
}

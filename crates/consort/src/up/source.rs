//! Where a deployment comes from: a file that is watched, or the command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use consort_api::deployment::Deployment;
use consort_control::config;

/// Where a deployment comes from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// This file.
    File(PathBuf),
    /// The command line.
    Arguments,
}

impl Source {
    /// The file, where there is one.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            Source::File(path) => Some(path),
            Source::Arguments => None,
        }
    }
}

/// Reads a file, no more of it than a deployment may have.
pub(crate) fn text(path: &Path) -> Result<String> {
    use std::io::Read as _;
    let open = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(config::MOST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = open().with_context(|| format!("can't read {}", path.display()))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => {
            bail!("{} is not text: byte {} is no UTF-8", path.display(), error.utf8_error().valid_up_to())
        }
    }
}

/// Reads and checks a file.
pub(crate) fn read(path: &Path) -> Result<Deployment> {
    let text = text(path)?;
    Ok(config::read(&path.display().to_string(), &text)?)
}

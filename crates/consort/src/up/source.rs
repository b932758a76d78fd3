//! Where a deployment comes from: a file that is watched, or the command line.

use std::path::{Path, PathBuf};

use anyhow::Result;
use consort_api::deployment::Deployment;
use consort_control::config;

use crate::written;

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

/// What a deployment is called where another file was named.
const FILE: &str = "a deployment, such as examples/consort.toml (docs/fleet.md explains its keys)";

/// Reads a file, no more of it than a deployment may have.
pub(crate) fn text(path: &Path) -> Result<String> {
    written::text(path, FILE)
}

/// Reads and checks a file.
pub(crate) fn read(path: &Path) -> Result<Deployment> {
    let text = text(path)?;
    Ok(config::read(&path.display().to_string(), &text)?)
}

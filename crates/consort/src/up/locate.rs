//! Where the models' files are, and what they were when they were looked at.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Result;
use consort_api::deployment::Deployment;
use consort_control::launch::Located;
use consort_hub::Hub;

use crate::loading;

/// Files of a model folder that are looked at.
const MOST_FILES: usize = 1000;

/// The sources that a deployment names, each once.
pub(crate) fn sources(deployment: &Deployment) -> Vec<String> {
    let versions = deployment.models.iter().flat_map(|model| {
        std::iter::once(&model.stable).chain(model.canary.as_ref().map(|canary| &canary.version))
    });
    let mut sources: Vec<String> = versions.map(|version| version.source.clone()).collect();
    sources.sort();
    sources.dedup();
    sources
}

/// Locates every source, fetching what is missing, with progress.
pub(crate) fn first(hub: &Hub, deployment: &Deployment, quiet: bool) -> Result<BTreeMap<String, Located>> {
    let references: Vec<_> = sources(deployment)
        .into_iter()
        .map(|s| loading::reference(hub, &s).map(|r| (s, r)))
        .collect::<Result<_>>()?;
    let mut located = BTreeMap::new();
    for (source, reference) in references {
        let fetched = loading::fetch(hub, &reference, false, quiet)?;
        located.insert(source, look(fetched.path)?);
    }
    Ok(located)
}

/// Locates one source, in silence.
pub(crate) fn one(hub: &Hub, source: &str) -> Result<Located> {
    let reference = loading::reference(hub, source)?;
    look(hub.fetch(&reference, false, &mut |_| {})?.path)
}

/// What is at `path` now.
pub(crate) fn look(path: PathBuf) -> Result<Located> {
    let stamp = stamp(&path)?;
    Ok(Located { path, stamp })
}

/// Changes when the file does, or a file of the folder: length, time of change, and which file it is.
pub(crate) fn stamp(path: &Path) -> std::io::Result<String> {
    let about = std::fs::metadata(path)?;
    if !about.is_dir() {
        return Ok(of(&about));
    }
    let mut stamps = Vec::new();
    for entry in std::fs::read_dir(path)?.take(MOST_FILES) {
        let entry = entry?;
        stamps.push(format!("{:?} {}", entry.file_name(), of(&std::fs::metadata(entry.path())?)));
    }
    stamps.sort();
    Ok(stamps.join(";"))
}

fn of(about: &Metadata) -> String {
    let changed = about.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    #[cfg(unix)]
    let file = std::os::unix::fs::MetadataExt::ino(about);
    #[cfg(not(unix))]
    let file = 0;
    format!("{} {} {file}", about.len(), changed.unwrap_or_default().as_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_changes_with_its_file_and_a_missing_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        assert!(look(path.clone()).is_err());
        std::fs::write(&path, b"one").unwrap();
        let first = look(path.clone()).unwrap();
        assert_eq!(look(path.clone()).unwrap(), first);
        let whole = stamp(folder.path()).unwrap();
        std::fs::write(&path, b"three").unwrap();
        assert_ne!(look(path).unwrap(), first);
        assert_ne!(stamp(folder.path()).unwrap(), whole);
    }
}

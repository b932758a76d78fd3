//! The folder of fetched models: one folder a model, with a `consort.json` that says what is in it.
//!
//! The manifest is written last. A folder without one is a download under way (or cut), never a model.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::download::{finish, hash_file, with_suffix};
use crate::reference::safe_relative;
use crate::{Error, Event, ModelRef};

const MANIFEST: &str = "consort.json";

/// What a model's folder holds and where it came from.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Manifest {
    /// The reference that fetches it again.
    pub name: String,
    /// What to open, relative to the folder: a `.gguf` file, or `.` for the folder itself.
    pub open: String,
    /// Every file.
    pub files: Vec<FileRecord>,
    /// Which source served.
    pub source: String,
    /// The licence's name, where one is stated.
    pub licence: Option<String>,
    /// When it was complete, in seconds since 1970 UTC.
    pub fetched_unix_seconds: u64,
}

/// One file of a model.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct FileRecord {
    /// Relative to the model's folder, with `/`.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// A model that is here.
#[derive(Clone, Debug)]
pub struct Cached {
    /// What to give to the loader.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// Whether a model is here.
#[derive(Clone, Debug)]
pub enum Status {
    /// Whole, as far as sizes tell.
    Here(Cached),
    /// Not fetched, or not completely.
    Missing,
    /// Its manifest and its files disagree; the text says how.
    Damaged(String),
}

impl Manifest {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).fold(0, u64::saturating_add)
    }
}

/// The folder of models.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// Held while a model is fetched or removed; dropping it lets the next process in.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    pub(crate) fn new(root: PathBuf) -> Cache {
        Cache { root }
    }

    /// The folder for a model. References map to names that can't collide: the hub allows no `--` in its own.
    pub(crate) fn folder(&self, model: &ModelRef) -> PathBuf {
        let name = match model {
            ModelRef::Catalog(name) => name.clone(),
            ModelRef::HuggingFace { repo, revision, file } => {
                let mut name = format!("hf--{}", repo.replace('/', "--"));
                if revision != "main" {
                    name = format!("{name}@{revision}");
                }
                file.as_ref().map_or(name.clone(), |f| format!("{name}--{}", f.replace('/', "--")))
            }
            ModelRef::Path(path) => return path.clone(),
        };
        self.root.join(name)
    }

    /// Whether a model is here, by its manifest and the sizes of its files.
    pub(crate) fn status(&self, model: &ModelRef) -> Status {
        status_of(&self.folder(model))
    }

    /// Every model with a manifest, by name.
    pub(crate) fn list(&self) -> Result<Vec<(PathBuf, Status)>, Error> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::disk("list", &self.root)(e)),
        };
        let mut folders: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|path| path.join(MANIFEST).is_file())
            .collect();
        folders.sort();
        Ok(folders.into_iter().map(|folder| (folder.clone(), status_of(&folder))).collect())
    }

    /// Reads every byte of a cached model and holds it against the manifest's checksums.
    pub(crate) fn verify(&self, cached: &Cached, folder: &Path) -> Result<(), Error> {
        for record in &cached.manifest.files {
            let path = folder.join(&record.path);
            let got = hash_file(&path)?;
            if got.bytes != record.bytes || got.sha256 != record.sha256 {
                return Err(Error::Damaged {
                    model: cached.manifest.name.clone(),
                    reason: format!(
                        "{} has SHA-256 {} and {} bytes, expected {} and {}",
                        path.display(),
                        got.sha256,
                        got.bytes,
                        record.sha256,
                        record.bytes
                    ),
                });
            }
        }
        Ok(())
    }

    /// Removes a model's folder: manifest first, so that a cut leaves no half model.
    pub(crate) fn remove(&self, folder: &Path) -> Result<(), Error> {
        self.forget(folder)?;
        fs::remove_dir_all(folder).map_err(Error::disk("remove", folder))
    }

    /// Drops a model's manifest and its finished files, so that it is fetched anew.
    pub(crate) fn forget(&self, folder: &Path) -> Result<(), Error> {
        match fs::remove_file(folder.join(MANIFEST)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::disk("remove", folder)(e)),
            _ => Ok(()),
        }
    }

    /// Writes the manifest: from here on the model is here.
    pub(crate) fn commit(&self, folder: &Path, manifest: &Manifest) -> Result<Cached, Error> {
        let path = folder.join(MANIFEST);
        let part = with_suffix(&path, ".part");
        let text = serde_json::to_vec_pretty(manifest).unwrap_or_default();
        fs::write(&part, text).map_err(Error::disk("write", &part))?;
        finish(&part, &path)?;
        Ok(Cached { path: opened(folder, manifest), manifest: manifest.clone() })
    }

    /// Waits until no other process works on this model.
    pub(crate) fn lock(
        &self,
        folder: &Path,
        patience: Duration,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<Lock, Error> {
        let locks = self.root.join(".locks");
        fs::create_dir_all(&locks).map_err(Error::disk("create", &locks))?;
        let path = with_suffix(&locks.join(folder.file_name().unwrap_or_default()), ".lock");
        let file = File::create(&path).map_err(Error::disk("create", &path))?;
        let start = Instant::now();
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { _file: file }),
                // A file system without locks: go on; the rename at the end still keeps files whole.
                Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {
                    return Ok(Lock { _file: file });
                }
                Err(TryLockError::Error(e)) => return Err(Error::disk("lock", &path)(e)),
                Err(TryLockError::WouldBlock) => {}
            }
            if start.elapsed() >= patience {
                return Err(Error::Locked { path, seconds: patience.as_secs() });
            }
            if !told {
                report(Event::Waiting);
                told = true;
            }
            // Advisory locks have no deadline of their own.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn opened(folder: &Path, manifest: &Manifest) -> PathBuf {
    if manifest.open == "." { folder.to_path_buf() } else { folder.join(&manifest.open) }
}

fn status_of(folder: &Path) -> Status {
    let text = match fs::read(folder.join(MANIFEST)) {
        Ok(text) => text,
        Err(_) => return Status::Missing,
    };
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(e) => return Status::Damaged(format!("{}: {e}", folder.join(MANIFEST).display())),
    };
    // A manifest lies in a folder that others may write to: its paths are held to the same rule as a server's.
    let safe = |path: &str| safe_relative(path).is_some();
    if !(manifest.open == "." || safe(&manifest.open)) || manifest.files.iter().any(|f| !safe(&f.path)) {
        return Status::Damaged("its manifest names a path outside its folder".into());
    }
    for record in &manifest.files {
        let path = folder.join(&record.path);
        match fs::metadata(&path) {
            Ok(meta) if meta.len() == record.bytes => {}
            Ok(meta) => {
                let text = format!("{} has {} bytes, expected {}", path.display(), meta.len(), record.bytes);
                return Status::Damaged(text);
            }
            Err(e) => return Status::Damaged(format!("{}: {e}", path.display())),
        }
    }
    Status::Here(Cached { path: opened(folder, &manifest), manifest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_differ_between_references() {
        let cache = Cache::new("/m".into());
        let folder = |text: &str| cache.folder(&ModelRef::parse(text, crate::Catalog::builtin()).unwrap());
        let all = [
            folder("hf:a/b"),
            folder("hf:a/b@v1"),
            folder("hf:a/b/c.gguf"),
            folder("hf:a/b/c/d.gguf"),
            folder("gemma-3-270m"),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all.iter().skip(i + 1).all(|b| a != b), "{a:?}");
            assert_eq!(a.parent(), Some(Path::new("/m")));
        }
    }

    #[test]
    fn a_manifest_that_points_outside_is_damage() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x");
        fs::create_dir(&folder).unwrap();
        fs::write(
            folder.join(MANIFEST),
            r#"{"name":"x","open":"../../etc/passwd","files":[],"source":"","licence":null,"fetched_unix_seconds":0}"#,
        )
        .unwrap();
        assert!(matches!(status_of(&folder), Status::Damaged(_)));
    }
}

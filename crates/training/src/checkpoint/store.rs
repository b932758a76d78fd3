//! Where checkpoints lie: a folder of this machine (or of a shared file system), or a bucket of an S3-compatible store.
//!
//! Both are a flat map from names to bytes here. A file is whole or not there: in a folder it is written under another
//! name, flushed to the disk and renamed; a bucket shows an object when all of it has come.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStoreExt as _;
use object_store::aws::AmazonS3Builder;

/// A request to a bucket that takes longer has failed; the client tries again within it.
const DEADLINE: Duration = Duration::from_secs(600);
/// No checkpoint has more files.
const MAX_FILES: usize = 1 << 16;

/// A place for files.
pub(super) enum Store {
    Folder(PathBuf),
    Bucket(Bucket),
}

pub(super) struct Bucket {
    client: Arc<dyn object_store::ObjectStore>,
    prefix: object_store::path::Path,
    runtime: tokio::runtime::Runtime,
}

impl Store {
    /// The place that `location` names: a folder, or `s3://bucket/prefix` with `options` as AWS names them.
    pub(super) fn open(location: &str, options: &[(String, String)]) -> io::Result<Store> {
        let Some((bucket, prefix)) = place(location).map_err(io::Error::other)? else {
            return Ok(Store::Folder(PathBuf::from(location)));
        };
        let mut builder = AmazonS3Builder::new().with_bucket_name(bucket);
        for (key, value) in options {
            // Options for others (a profile's name, say) come along in the same way.
            if let Ok(key) = key.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        Ok(Store::Bucket(Bucket::new(Arc::new(builder.build()?), prefix)?))
    }

    /// Writes a file.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        match self {
            Store::Folder(folder) => put(&folder.join(name), bytes),
            Store::Bucket(bucket) => bucket.put(name, bytes),
        }
    }

    /// Reads a file of at most `limit` bytes; `None` where there is none.
    pub(super) fn get(&self, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        match self {
            Store::Folder(folder) => get(&folder.join(name), limit),
            Store::Bucket(bucket) => bucket.get(name, limit),
        }
    }

    /// Names of all files.
    pub(super) fn list(&self) -> io::Result<Vec<String>> {
        match self {
            Store::Folder(folder) => list(folder),
            Store::Bucket(bucket) => bucket.list(),
        }
    }

    /// Removes a file; one that isn't there is removed already.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match self {
            Store::Folder(folder) => {
                let path = folder.join(name);
                let removed = match fs::remove_file(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    removed => removed,
                };
                // The last file takes the folder with it.
                if let Some(parent) = path.parent().filter(|parent| parent != folder) {
                    let _ = fs::remove_dir(parent);
                }
                removed
            }
            Store::Bucket(bucket) => bucket.remove(name),
        }
    }
}

/// The bucket and the prefix that a location names; `None` for a folder.
///
/// # Errors
/// Why it names nothing.
pub(crate) fn place(location: &str) -> Result<Option<(&str, &str)>, String> {
    let Some((scheme, rest)) = location.split_once("://") else { return Ok(None) };
    if scheme != "s3" {
        return Err(format!("checkpoints go to a folder or to s3://bucket/prefix, not to {scheme}://"));
    }
    match rest.trim_matches('/').split_once('/').unwrap_or((rest.trim_matches('/'), "")) {
        ("", _) => Err("this names no bucket: write s3://bucket/prefix".to_owned()),
        found => Ok(Some(found)),
    }
}

fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let written = (|| {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        // The name too must outlive a power cut.
        #[cfg(unix)]
        File::open(parent)?.sync_all()?;
        Ok(())
    })();
    if written.is_err() {
        // What is left of a failed attempt only takes room.
        let _ = fs::remove_file(&part);
    }
    written
}

fn get(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let length = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata?.len(),
    };
    too_long(length, limit)?;
    fs::read(path).map(Some)
}

fn too_long(length: u64, limit: u64) -> io::Result<()> {
    if length <= limit {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("it has {length} bytes and should have at most {limit}"),
    ))
}

fn list(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let outer = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
        entries => entries?,
    };
    for entry in outer {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        for inner in fs::read_dir(entry.path())? {
            let name = (entry.file_name(), inner?.file_name());
            if let (Some(outer), Some(inner)) = (name.0.to_str(), name.1.to_str()) {
                names.push(format!("{outer}/{inner}"));
            }
            if names.len() > MAX_FILES {
                return Err(io::Error::other(format!("more than {MAX_FILES} files")));
            }
        }
    }
    names.sort();
    Ok(names)
}

impl Bucket {
    pub(super) fn new(client: Arc<dyn object_store::ObjectStore>, prefix: &str) -> io::Result<Bucket> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Bucket { client, prefix: object_store::path::Path::from(prefix), runtime })
    }

    fn wait<T>(&self, work: impl Future<Output = object_store::Result<T>>) -> io::Result<T> {
        self.runtime.block_on(async {
            let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {DEADLINE:?}"));
            Ok(tokio::time::timeout(DEADLINE, work).await.map_err(|_| late())??)
        })
    }

    fn path(&self, name: &str) -> object_store::path::Path {
        let mut path = self.prefix.clone();
        for part in name.split('/') {
            path = path.join(part);
        }
        path
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        /// Parts of an upload; a larger file is sent in several.
        const PIECE: usize = 16 << 20;
        let path = self.path(name);
        self.wait(async {
            if bytes.len() <= PIECE {
                return self.client.put(&path, bytes.to_vec().into()).await.map(|_| ());
            }
            let upload = self.client.put_multipart(&path).await?;
            let mut writer = object_store::WriteMultipart::new_with_chunk_size(upload, PIECE);
            for piece in bytes.chunks(PIECE) {
                writer.wait_for_capacity(2).await?;
                writer.write(piece);
            }
            writer.finish().await.map(|_| ())
        })
    }

    fn get(&self, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let found = self.wait(async {
            match self.client.get(&path).await {
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
                Ok(found) if found.meta.size > limit => Ok(Some(Err(found.meta.size))),
                Ok(found) => Ok(Some(Ok(found.bytes().await?))),
            }
        })?;
        match found {
            None => Ok(None),
            Some(Err(length)) => too_long(length, limit).map(|()| None),
            Some(Ok(bytes)) => Ok(Some(bytes.into())),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        use futures_util::TryStreamExt as _;
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let found: Vec<_> = self.wait(async {
            use futures_util::StreamExt as _;
            self.client.list(prefix).take(MAX_FILES).try_collect().await
        })?;
        let within = |path: &object_store::path::Path| {
            let parts: Vec<String> =
                path.prefix_match(&self.prefix)?.map(|part| part.as_ref().to_owned()).collect();
            (parts.len() == 2).then(|| parts.join("/"))
        };
        let mut names: Vec<String> = found.iter().filter_map(|meta| within(&meta.location)).collect();
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        self.wait(async {
            match self.client.delete(&path).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                removed => removed,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(store: &Store) {
        assert!(store.list().unwrap().is_empty());
        assert_eq!(store.get("a/b", 10).unwrap(), None);
        store.put("a/b", b"one").unwrap();
        store.put("a/b", b"other").unwrap();
        let large = vec![7; 40 << 20];
        store.put("a/large", &large).unwrap();
        store.put("c/d", b"").unwrap();
        assert_eq!(store.list().unwrap(), ["a/b", "a/large", "c/d"]);
        assert_eq!(store.get("a/b", 5).unwrap().unwrap(), b"other");
        assert!(store.get("a/large", 1 << 30).unwrap().unwrap() == large);
        let long = store.get("a/b", 4).unwrap_err();
        assert_eq!(long.to_string(), "it has 5 bytes and should have at most 4");
        for name in ["a/b", "a/b", "a/large", "c/d"] {
            store.remove(name).unwrap();
        }
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn a_folder_keeps_files() {
        let folder = tempfile::tempdir().unwrap();
        keeps(&Store::open(folder.path().join("x/y").to_str().unwrap(), &[]).unwrap());
        assert_eq!(fs::read_dir(folder.path().join("x/y")).unwrap().count(), 0, "empty folders go");
    }

    #[test]
    fn a_bucket_keeps_files() {
        for prefix in ["", "some/prefix"] {
            let client = Arc::new(object_store::memory::InMemory::new());
            keeps(&Store::Bucket(Bucket::new(client, prefix).unwrap()));
        }
    }
}

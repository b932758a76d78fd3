//! Files as memory: weights are read where the page cache has them, so nothing is copied before it is packed.
//!
//! Small files are read into memory; large ones are mapped, private and read-only. Pages of a mapping count as
//! this process's memory while they are resident, hence [`FileMap::drop_pages`]: packed weights and the file they
//! came from are then never both counted.
//!
//! **The hazard of a mapping.** A file that another process truncates while it is mapped has no bytes behind its
//! last pages, and reading them ends this process (`SIGBUS`); one that is overwritten in place changes under the
//! reader. No lock that other programs respect exists against either. What is done: the mapping has the length the
//! file had when it was opened, [`FileMap::still_whole`] asks again (callers do so before they read weights), and a
//! file replaced by rename, as every downloader here does, keeps its old bytes for those who opened it.

use std::fs::File;
use std::io::{self, Read};
use std::ops::{Deref, Range};
use std::path::Path;

/// Files up to this many bytes are read, not mapped: they cost less that way and can't be truncated later.
const READ_LIMIT: usize = 1 << 20;

/// The bytes of a file, read-only. Derefs to them.
#[derive(Debug)]
pub struct FileMap {
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Owned(Vec<u8>),
    #[cfg(unix)]
    Mapped(Mapping),
}

impl FileMap {
    /// Reads or maps the file.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` for something that is no regular file.
    pub fn open(path: &Path) -> io::Result<FileMap> {
        // Metadata before opening: opening a named pipe would wait for a writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, "larger than this machine's address space")
        })?;
        #[cfg(unix)]
        if len > READ_LIMIT {
            return Ok(FileMap { bytes: Bytes::Mapped(Mapping::new(file, len)?) });
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        file.take(len as u64).read_to_end(&mut bytes)?;
        Ok(FileMap { bytes: Bytes::Owned(bytes) })
    }

    /// Whether the file still has every byte the mapping promises. True for files that were read.
    pub fn still_whole(&self) -> bool {
        match &self.bytes {
            Bytes::Owned(_) => true,
            #[cfg(unix)]
            Bytes::Mapped(mapping) => mapping.file.metadata().is_ok_and(|m| m.len() >= mapping.len as u64),
        }
    }

    /// Says that the bytes will be read once from front to back: the system reads ahead further.
    pub fn advise_sequential(&self) {
        #[cfg(unix)]
        if let Bytes::Mapped(mapping) = &self.bytes {
            mapping.advise(0..mapping.len, libc::MADV_SEQUENTIAL);
        }
    }

    /// Gives the pages that touch `range` back to the system; they are read again if used again. No effect on
    /// files that were read. A range beyond the end is cut to it.
    pub fn drop_pages(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(mapping) = &self.bytes {
            mapping.advise(range.start.min(mapping.len)..range.end.min(mapping.len), libc::MADV_DONTNEED);
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl From<Vec<u8>> for FileMap {
    /// Bytes that are already in memory.
    fn from(bytes: Vec<u8>) -> FileMap {
        FileMap { bytes: Bytes::Owned(bytes) }
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Owned(bytes) => bytes,
            #[cfg(unix)]
            Bytes::Mapped(mapping) => mapping.bytes(),
        }
    }
}

/// A private read-only mapping of a whole file.
#[cfg(unix)]
#[derive(Debug)]
struct Mapping {
    start: std::ptr::NonNull<u8>,
    len: usize,
    /// Kept to ask for its length again.
    file: File,
}

#[cfg(unix)]
impl Mapping {
    fn new(file: File, len: usize) -> io::Result<Mapping> {
        use std::os::fd::AsRawFd;
        // SAFETY: a fresh mapping at an address the system picks, of an open descriptor, with a length above zero;
        // it replaces no memory that anything here refers to.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = std::ptr::NonNull::new(start.cast::<u8>()).ok_or_else(io::Error::last_os_error)?;
        Ok(Mapping { start, len, file })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `start..start + len` stays mapped and readable until `drop`, which needs `&mut self`. The bytes
        // don't change unless another process writes into the file in place: the hazard in the module's comment.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Advice for the whole pages that touch `range`; advice that the system refuses costs nothing.
    fn advise(&self, range: Range<usize>, advice: libc::c_int) {
        if range.is_empty() {
            return;
        }
        // SAFETY: `sysconf` reads a constant of the system.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
        let start = range.start - range.start % page;
        // SAFETY: `start` is a page's first byte and `start..range.end` lies inside the mapping. The mapping is
        // private and never written, so a page that is given back reads the same when it is read again.
        unsafe { libc::madvise(self.start.as_ptr().add(start).cast(), range.end - start, advice) };
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the region that `new` mapped; no slice of it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

// SAFETY: the mapping is read-only memory with no thread affinity, and `File` is `Send`.
#[cfg(unix)]
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads.
#[cfg(unix)]
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("consort-map-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn small_and_large_files_give_their_bytes_also_after_pages_are_dropped() {
        for len in [0, 1, READ_LIMIT, READ_LIMIT + 1, 3 * READ_LIMIT + 7] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            let path = file_of(&len.to_string(), &bytes);
            let map = FileMap::open(&path).unwrap();
            map.advise_sequential();
            assert!(*map == *bytes);
            map.drop_pages(0..len);
            map.drop_pages(len / 2..usize::MAX);
            assert!(*map == *bytes);
            assert!(map.still_whole());
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    #[cfg(unix)]
    fn a_truncated_file_is_noticed() {
        let path = file_of("truncated", &vec![1; 2 * READ_LIMIT]);
        let map = FileMap::open(&path).unwrap();
        assert!(map.still_whole());
        File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
        assert!(!map.still_whole());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_folder_is_refused() {
        assert!(FileMap::open(&std::env::temp_dir()).is_err());
    }
}

//! Tokens on disk, written once and mapped by every worker.
//!
//! A folder, named by what its content follows from, with four files of plain little-endian numbers and a manifest:
//!
//! | file | holds |
//! |---|---|
//! | `tokens` | token ids, 32 bits each |
//! | `predicted` | a byte a token: 1 where it is to be predicted |
//! | `pieces` | start (64 bits) and length (32 bits) of each piece, by sample |
//! | `samples` | the first piece of each sample, 64 bits each, and the number of pieces |
//!
//! It is written beside its place under another name and moved there whole, so a folder of that name is complete. Its
//! BLAKE3 sums are checked when it is opened.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use consort_tensor::map::FileMap;
use serde::{Deserialize, Serialize};

use super::encode::Encoded;
use super::pack::{self, Piece};
use super::{DataError, Report};

const TOKENS: &str = "tokens";
const PREDICTED: &str = "predicted";
const PIECES: &str = "pieces";
const SAMPLES: &str = "samples";
const MANIFEST: &str = "manifest.json";
const PIECE_BYTES: usize = 12;
/// No manifest that was written here is longer.
const MAX_MANIFEST: u64 = 1 << 20;

/// What is said of a cache's files.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    report: Report,
    files: Vec<Sum>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Sum {
    name: String,
    bytes: u64,
    blake3: String,
}

/// A cache under way. Dropped before [`Writer::finish`], it leaves nothing.
pub(super) struct Writer {
    folder: PathBuf,
    partial: PathBuf,
    tokens: Out,
    predicted: Out,
    /// Documents as pieces.
    pieces: Vec<Piece>,
    context: usize,
    /// The document under way: its first token, and whether a token behind it is predicted.
    start: u64,
    count: u64,
    learns: bool,
    whole: bool,
    pub(super) report: Report,
}

impl Writer {
    /// A cache that will stand at `folder`.
    pub(super) fn new(folder: &Path, context: usize) -> Result<Writer, DataError> {
        let parent = folder.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(DataError::io(parent))?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let partial = parent.join(format!(".{name}.{}", std::process::id()));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(DataError::io(&partial))?;
        }
        fs::create_dir(&partial).map_err(DataError::io(&partial))?;
        Ok(Writer {
            tokens: Out::create(&partial, TOKENS)?,
            predicted: Out::create(&partial, PREDICTED)?,
            folder: folder.to_owned(),
            partial,
            pieces: Vec::new(),
            context,
            start: 0,
            count: 0,
            learns: false,
            whole: false,
            report: Report::default(),
        })
    }

    /// Appends a document, or a part of one; `last` ends it. A `whole` one is cut short rather than continued in
    /// another sample.
    pub(super) fn push(&mut self, part: &Encoded, whole: bool, last: bool) -> Result<(), DataError> {
        for (token, predicted) in part.tokens.iter().zip(&part.predicted) {
            self.tokens.write(&token.to_le_bytes())?;
            self.predicted.write(&[u8::from(*predicted)])?;
            // A document's first token has nothing before it to be predicted from; nor has what is cut off.
            let kept = self.count > 0 && !(whole && self.count > self.context as u64);
            self.learns |= kept && *predicted;
            self.report.predicted += u64::from(kept && *predicted);
            self.count += 1;
        }
        self.whole = whole;
        if last {
            self.end_document();
        }
        Ok(())
    }

    fn end_document(&mut self) {
        let mut length = self.count;
        if self.whole && length > self.context as u64 + 1 {
            length = self.context as u64 + 1;
            self.report.cut += 1;
        }
        if self.learns {
            self.pieces.extend(pack::cut(self.start, length, self.context));
            self.report.documents += 1;
            self.report.tokens += length;
        } else {
            self.report.empty += 1;
        }
        self.start += self.count;
        (self.count, self.learns) = (0, false);
    }

    /// Packs the samples and moves the cache to its place.
    pub(super) fn finish(mut self) -> Result<(), DataError> {
        let (pieces, starts) = pack::pack(std::mem::take(&mut self.pieces), self.context);
        self.report.samples = starts.len() as u64 - 1;
        let mut out = Out::create(&self.partial, PIECES)?;
        for piece in &pieces {
            out.write(&piece.start.to_le_bytes())?;
            out.write(&piece.len.to_le_bytes())?;
        }
        let mut samples = Out::create(&self.partial, SAMPLES)?;
        for start in &starts {
            samples.write(&start.to_le_bytes())?;
        }
        let (tokens, predicted) = (self.tokens.take(), self.predicted.take());
        let files =
            [tokens, predicted, out, samples].into_iter().map(Out::finish).collect::<Result<_, _>>()?;
        let manifest = Manifest { report: self.report.clone(), files };
        let mut out = Out::create(&self.partial, MANIFEST)?;
        let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::other);
        out.write(&text.map_err(DataError::io(&self.partial))?)?;
        out.finish()?;
        match fs::rename(&self.partial, &self.folder) {
            // Another process was faster: what it made is the same.
            Err(_) if self.folder.join(MANIFEST).exists() => Ok(()),
            result => result.map_err(DataError::io(&self.folder)),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Gone already where it was moved; what can't be removed is in nobody's way.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// A file that is hashed as it is written.
struct Out {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    bytes: u64,
}

impl Out {
    fn create(folder: &Path, name: &str) -> Result<Out, DataError> {
        let path = folder.join(name);
        let file = File::create(&path).map_err(DataError::io(&path))?;
        let buffer = Vec::with_capacity(Out::BUFFER);
        Ok(Out {
            path,
            file: Some(BufWriter::with_capacity(0, file)),
            hasher: blake3::Hasher::new(),
            buffer,
            bytes: 0,
        })
    }

    const BUFFER: usize = 1 << 20;

    fn take(&mut self) -> Out {
        let path = self.path.clone();
        let empty = Out { path, file: None, hasher: blake3::Hasher::new(), buffer: Vec::new(), bytes: 0 };
        std::mem::replace(self, empty)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= Out::BUFFER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), DataError> {
        if let Some(file) = &mut self.file {
            file.write_all(&self.buffer).map_err(DataError::io(&self.path))?;
        }
        self.hasher.update(&self.buffer);
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<Sum, DataError> {
        self.flush()?;
        if let Some(mut file) = self.file.take() {
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(DataError::io(&self.path))?;
        }
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Sum { name, bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

/// A cache that was opened.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) report: Report,
    tokens: FileMap,
    predicted: FileMap,
    pieces: FileMap,
    samples: FileMap,
}

impl Cache {
    /// Opens and verifies a cache; `None` where there is none.
    pub(super) fn open(folder: &Path) -> Result<Option<Cache>, DataError> {
        let path = folder.join(MANIFEST);
        let length = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.map_err(DataError::io(&path))?.len(),
        };
        let wrong = |reason: String| DataError::Cache { path: folder.to_owned(), reason };
        if length > MAX_MANIFEST {
            return Err(wrong(format!("{MANIFEST} has {length} bytes")));
        }
        let text = fs::read(&path).map_err(DataError::io(&path))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|e| wrong(format!("{MANIFEST} can't be read: {e}")))?;
        let open = |name: &str| {
            let sum = manifest.files.iter().find(|sum| sum.name == name);
            let sum = sum.ok_or_else(|| wrong(format!("{MANIFEST} doesn't name {name}")))?;
            let path = folder.join(name);
            let map = FileMap::open(&path).map_err(DataError::io(&path))?;
            if map.len() as u64 != sum.bytes || blake3::hash(&map).to_hex().as_str() != sum.blake3 {
                return Err(wrong(format!("{name} is not what was written (torn, or changed since)")));
            }
            Ok(map)
        };
        let cache = Cache {
            tokens: open(TOKENS)?,
            predicted: open(PREDICTED)?,
            pieces: open(PIECES)?,
            samples: open(SAMPLES)?,
            report: manifest.report,
        };
        cache.check().map_err(wrong)?;
        Ok(Some(cache))
    }

    /// Sums say that the files are what somebody wrote; this, that no number in them leads out of them.
    fn check(&self) -> Result<(), String> {
        let count = self.tokens.len() / 4;
        let pieces = self.pieces.len() / PIECE_BYTES;
        let samples = self.samples.len() / 8;
        let whole = self.tokens.len().is_multiple_of(4)
            && self.pieces.len().is_multiple_of(PIECE_BYTES)
            && self.samples.len().is_multiple_of(8);
        if !whole || self.predicted.len() != count || samples == 0 {
            return Err("its files don't fit each other".to_owned());
        }
        let inside = |piece: Piece| {
            piece.len > 1
                && piece.start.checked_add(u64::from(piece.len)).is_some_and(|end| end <= count as u64)
        };
        if !(0..pieces).all(|i| inside(self.piece(i))) {
            return Err("a piece leaves the tokens".to_owned());
        }
        let starts = (0..samples).map(|i| number(&self.samples, i));
        let rising = starts.clone().zip(starts.skip(1)).all(|(a, b)| a < b);
        if !rising || number(&self.samples, 0) != 0 || number(&self.samples, samples - 1) != pieces as u64 {
            return Err("a sample leaves the pieces".to_owned());
        }
        Ok(())
    }

    fn piece(&self, index: usize) -> Piece {
        let bytes = &self.pieces[index * PIECE_BYTES..][..PIECE_BYTES];
        let len = bytes[8..].try_into().map_or(0, u32::from_le_bytes);
        Piece { start: number(bytes, 0), len }
    }

    pub(super) fn samples(&self) -> u64 {
        (self.samples.len() / 8 - 1) as u64
    }

    /// The pieces of a sample: token ids, and what is predicted.
    ///
    /// # Panics
    /// If there is no such sample.
    pub(super) fn sample(
        &self,
        index: u64,
    ) -> impl Iterator<Item = (impl Iterator<Item = u32> + '_, &[u8])> + '_ {
        assert!(index < self.samples(), "sample {index} of {}", self.samples());
        let index = index as usize;
        let pieces = number(&self.samples, index) as usize..number(&self.samples, index + 1) as usize;
        pieces.map(|i| {
            let piece = self.piece(i);
            let (start, len) = (piece.start as usize, piece.len as usize);
            let bytes = &self.tokens[4 * start..4 * (start + len)];
            let tokens = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (tokens, &self.predicted[start..start + len])
        })
    }
}

fn number(bytes: &[u8], index: usize) -> u64 {
    bytes[8 * index..][..8].try_into().map_or(0, u64::from_le_bytes)
}

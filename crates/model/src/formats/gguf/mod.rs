//! GGUF, versions 2 and 3: a header of typed pairs, a table of tensors, then the tensors' bytes.
//!
//! A file comes from strangers, so nothing in it is believed before it is compared with the file's length: counts
//! and lengths are checked before they move the cursor or size an allocation, sums and products are checked for
//! overflow, and what is kept of a value is its place in the file, never a copy. The header costs one pass; memory
//! is one entry a pair and a tensor.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod config;
mod cursor;
mod metadata;
mod tensors;
pub mod write;

use std::path::{Path, PathBuf};

use consort_tensor::map::FileMap;

use self::cursor::Cursor;
use self::metadata::{Kind, Metadata, Value, clip};
use self::tensors::TensorTable;
use super::weights::{Tensor, Weights};
use crate::Error;

pub(crate) use self::config::{config, names};

/// What a file starts with.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Where the tensors' bytes are aligned unless the file says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The largest alignment that is taken; real files use 32.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// An opened GGUF file: its header checked, its tensors' bytes known to be inside the file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: FileMap,
    version: u32,
    metadata: Metadata,
    tensors: TensorTable,
}

/// What is wrong with a header, before the file's path is added.
#[derive(Debug)]
enum Fault {
    Malformed(String),
    Unsupported { what: String, supported: &'static str },
}

impl Fault {
    fn at(self, path: &Path) -> Error {
        match self {
            Fault::Malformed(reason) => Error::Malformed { path: path.to_path_buf(), reason },
            Fault::Unsupported { what, supported } => {
                Error::Unsupported { path: path.to_path_buf(), what, supported: supported.into() }
            }
        }
    }
}

impl Gguf {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`], [`Error::Unsupported`].
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        let map = FileMap::open(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        Gguf::from_map(path, map)
    }

    /// Reads the header of a file that is already in memory; `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`].
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::from_map(path, FileMap::from(bytes))
    }

    fn from_map(path: &Path, map: FileMap) -> Result<Gguf, Error> {
        let (version, metadata, tensors) = read_header(&map).map_err(|fault| fault.at(path))?;
        Ok(Gguf { path: path.to_path_buf(), map, version, metadata, tensors })
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Whether the metadata has this key, of whatever type.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.get(key).is_some()
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else; so for every getter here.
    pub fn str(&self, key: &str) -> Result<Option<&str>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.kind != Kind::String {
            return Err(self.wrong_kind(key, value, "a string"));
        }
        Ok(Some(self.text(value.bytes.start + 8..value.bytes.end)))
    }

    /// An integer that fits 32 bits, whatever width the file gives it.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let integer = self.integer(value).ok_or_else(|| self.wrong_kind(key, value, "an integer"))?;
        u32::try_from(integer)
            .map(Some)
            .map_err(|_| self.malformed(format!("{key} is {integer}, out of range")))
    }

    /// A float, or an integer read as one.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else, an infinity or NaN.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let bytes = &self.map[value.bytes.clone()];
        let float = match value.kind {
            Kind::F32 => f32::from_le_bytes(fixed(bytes)),
            Kind::F64 => f64::from_le_bytes(fixed(bytes)) as f32,
            _ => self.integer(value).ok_or_else(|| self.wrong_kind(key, value, "a float"))? as f32,
        };
        if !float.is_finite() {
            return Err(self.malformed(format!("{key} is {float}")));
        }
        Ok(Some(float))
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.kind != Kind::Bool {
            return Err(self.wrong_kind(key, value, "a boolean"));
        }
        Ok(Some(self.map[value.bytes.start] == 1))
    }

    /// The strings of an array, as the file has them: nothing is copied.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.element != Some(Kind::String) {
            return Err(self.wrong_kind(key, value, "an array of strings"));
        }
        Ok(Some(Strings { gguf: self, at: value.bytes.start, left: value.count }))
    }

    /// An array of floats.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn array_f32(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.element != Some(Kind::F32) {
            return Err(self.wrong_kind(key, value, "an array of 32-bit floats"));
        }
        let bytes = &self.map[value.bytes.clone()];
        Ok(Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(fixed(b))).collect()))
    }

    /// An array of 32-bit integers, signed or not; larger values than `i32::MAX` are refused.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn array_i32(&self, key: &str) -> Result<Option<Vec<i32>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let bytes = &self.map[value.bytes.clone()];
        match value.element {
            Some(Kind::I32) => {
                Ok(Some(bytes.chunks_exact(4).map(|b| i32::from_le_bytes(fixed(b))).collect()))
            }
            Some(Kind::U32) => bytes
                .chunks_exact(4)
                .map(|b| i32::try_from(u32::from_le_bytes(fixed(b))))
                .collect::<Result<_, _>>()
                .map(Some)
                .map_err(|_| self.malformed(format!("{key} holds a number out of range"))),
            _ => Err(self.wrong_kind(key, value, "an array of 32-bit integers")),
        }
    }

    /// An array of booleans.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the key holds something else.
    pub fn array_bool(&self, key: &str) -> Result<Option<Vec<bool>>, Error> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        if value.element != Some(Kind::Bool) {
            return Err(self.wrong_kind(key, value, "an array of booleans"));
        }
        Ok(Some(self.map[value.bytes.clone()].iter().map(|&b| b == 1).collect()))
    }

    /// Whether the key holds an array.
    pub fn is_array(&self, key: &str) -> bool {
        self.metadata.get(key).is_some_and(|value| value.kind == Kind::Array)
    }

    fn integer(&self, value: &Value) -> Option<i128> {
        let bytes = &self.map[value.bytes.clone()];
        Some(match value.kind {
            Kind::U8 => i128::from(bytes[0]),
            Kind::I8 => i128::from(bytes[0] as i8),
            Kind::U16 => i128::from(u16::from_le_bytes(fixed(bytes))),
            Kind::I16 => i128::from(i16::from_le_bytes(fixed(bytes))),
            Kind::U32 => i128::from(u32::from_le_bytes(fixed(bytes))),
            Kind::I32 => i128::from(i32::from_le_bytes(fixed(bytes))),
            Kind::U64 => i128::from(u64::from_le_bytes(fixed(bytes))),
            Kind::I64 => i128::from(i64::from_le_bytes(fixed(bytes))),
            _ => return None,
        })
    }

    /// Text that was found to be UTF-8 when the header was read. A file overwritten since then gives an empty string.
    fn text(&self, range: std::ops::Range<usize>) -> &str {
        std::str::from_utf8(&self.map[range]).unwrap_or_default()
    }

    fn wrong_kind(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.malformed(format!("{key} is {}, not {wanted}", value.kind.name()))
    }

    pub(crate) fn malformed(&self, reason: String) -> Error {
        Error::Malformed { path: self.path.clone(), reason }
    }

    pub(crate) fn unsupported(&self, what: impl Into<String>, supported: &str) -> Error {
        Error::Unsupported { path: self.path.clone(), what: what.into(), supported: supported.into() }
    }
}

impl Weights for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, Error> {
        let Some(info) = self.tensors.get(name) else { return Ok(None) };
        Ok(Some(Tensor { dtype: info.dtype, dims: &info.dims, bytes: &self.map[info.bytes.clone()] }))
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.names()
    }

    fn still_whole(&self) -> bool {
        self.map.still_whole()
    }

    fn release(&self, name: &str) {
        if let Some(info) = self.tensors.get(name) {
            self.map.drop_pages(info.bytes.clone());
        }
    }

    fn hash_text(&self, hasher: &mut blake3::Hasher) -> Result<(), Error> {
        for (key, value) in self.metadata.sorted() {
            if key.starts_with("tokenizer.") {
                hasher.update(&(key.len() as u64).to_le_bytes());
                hasher.update(key.as_bytes());
                hasher.update(&(value.bytes.len() as u64).to_le_bytes());
                hasher.update(&self.map[value.bytes.clone()]);
            }
        }
        Ok(())
    }
}

/// The strings of an array, in order.
#[derive(Clone)]
pub struct Strings<'a> {
    gguf: &'a Gguf,
    at: usize,
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        self.left = self.left.checked_sub(1)?;
        // The header's reader walked these strings; reading them with the same checks keeps this free of panics
        // even if the file was overwritten since.
        let mut cursor = Cursor::new(&self.gguf.map, self.at);
        let text = cursor.string("a string").unwrap_or_default();
        self.at = cursor.position();
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

fn read_header(bytes: &[u8]) -> Result<(u32, Metadata, TensorTable), Fault> {
    let mut cursor = Cursor::new(bytes, 0);
    if &cursor.array("the magic number")? != MAGIC {
        return Err(Fault::Malformed("it doesn't start with GGUF".into()));
    }
    let version = check_version(cursor.u32("the version")?)?;
    let tensor_count = cursor.u64("the tensor count")?;
    let pair_count = cursor.u64("the metadata count")?;
    let metadata = Metadata::read(&mut cursor, pair_count)?;
    let alignment = alignment(bytes, &metadata)?;
    refuse_split(bytes, &metadata)?;
    let tensors = TensorTable::read(&mut cursor, tensor_count, alignment)?;
    Ok((version, metadata, tensors))
}

fn check_version(version: u32) -> Result<u32, Fault> {
    let supported = "little-endian GGUF versions 2 and 3";
    match version {
        2 | 3 => Ok(version),
        _ if matches!(version.swap_bytes(), 1..=3) => {
            Err(Fault::Unsupported { what: "big-endian GGUF".into(), supported })
        }
        _ => Err(Fault::Unsupported { what: format!("GGUF version {version}"), supported }),
    }
}

fn small_integer(bytes: &[u8], metadata: &Metadata, key: &str) -> Result<Option<u64>, Fault> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    let payload = &bytes[value.bytes.clone()];
    match value.kind {
        Kind::U16 => Ok(Some(u64::from(u16::from_le_bytes(fixed(payload))))),
        Kind::U32 => Ok(Some(u64::from(u32::from_le_bytes(fixed(payload))))),
        Kind::U64 => Ok(Some(u64::from_le_bytes(fixed(payload)))),
        kind => Err(Fault::Malformed(format!("{} is {}, not a count", clip(key), kind.name()))),
    }
}

fn alignment(bytes: &[u8], metadata: &Metadata) -> Result<u64, Fault> {
    let alignment = small_integer(bytes, metadata, "general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(Fault::Malformed(format!(
            "general.alignment is {alignment}; a power of two up to {MAX_ALIGNMENT} makes sense"
        )));
    }
    Ok(alignment)
}

fn refuse_split(bytes: &[u8], metadata: &Metadata) -> Result<(), Fault> {
    match small_integer(bytes, metadata, "split.count")? {
        Some(parts) if parts > 1 => Err(Fault::Unsupported {
            what: format!("a model split into {parts} GGUF files"),
            supported: "one file (`llama-gguf-split --merge` joins the parts)",
        }),
        _ => Ok(()),
    }
}

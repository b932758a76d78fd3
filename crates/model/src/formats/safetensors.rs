//! One safetensors file: eight bytes of length, a JSON header, then the tensors' bytes.
//!
//! Read strictly and in full before anything is used: the header's length is compared with the file's, the JSON's
//! nesting is bounded by its reader, names come once, and a tensor's place is inside the file and exactly as long as
//! its type and shape need.
//!
//! Format: <https://github.com/huggingface/safetensors#format>.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use consort_tensor::DType;
use consort_tensor::map::FileMap;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::weights::Tensor;
use crate::Error;

/// The longest header that is read; the format's own limit.
const MAX_HEADER_BYTES: usize = 100_000_000;
/// Tensors in one file; the largest models have a few thousand.
const MAX_TENSORS: usize = 1 << 16;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// What a tensor's type may be.
const SUPPORTED_TYPES: &str = "F32, F16, BF16";

/// An opened safetensors file, its header checked.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    map: FileMap,
    tensors: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: StoredType,
    dims: Vec<usize>,
    bytes: Range<usize>,
}

/// Files hold integer buffers too; only a tensor that is used must have a type that runs.
#[derive(Debug)]
enum StoredType {
    Runs(DType),
    Foreign(String),
}

impl Safetensors {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`].
    pub fn open(path: &Path) -> Result<Safetensors, Error> {
        let map = FileMap::open(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        Safetensors::from_map(path, map)
    }

    /// Reads the header of a file that is already in memory; `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Malformed`].
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Safetensors, Error> {
        Safetensors::from_map(path, FileMap::from(bytes))
    }

    fn from_map(path: &Path, map: FileMap) -> Result<Safetensors, Error> {
        let tensors =
            read_header(&map).map_err(|reason| Error::Malformed { path: path.to_path_buf(), reason })?;
        Ok(Safetensors { path: path.to_path_buf(), map, tensors })
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, Error> {
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        match &entry.dtype {
            StoredType::Runs(dtype) => {
                Ok(Some(Tensor { dtype: *dtype, dims: &entry.dims, bytes: &self.map[entry.bytes.clone()] }))
            }
            StoredType::Foreign(dtype) => Err(Error::Unsupported {
                path: self.path.clone(),
                what: format!("the tensor type {dtype} (of {})", clip(name)),
                supported: SUPPORTED_TYPES.into(),
            }),
        }
    }

    /// Whether it has a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensors' names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn still_whole(&self) -> bool {
        self.map.still_whole()
    }

    pub(crate) fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.map.drop_pages(entry.bytes.clone());
        }
    }
}

fn read_header(bytes: &[u8]) -> Result<HashMap<String, Entry>, String> {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(format!("it has {} bytes, too few for a header", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header_len = usize::try_from(length)
        .ok()
        .filter(|&n| n <= rest.len().min(MAX_HEADER_BYTES))
        .ok_or_else(|| format!("its header claims {length} bytes, {} are left", rest.len()))?;
    let (header, data) = rest.split_at(header_len);
    if header.first() != Some(&b'{') {
        return Err("its header is not a JSON object".into());
    }
    let Header(raw) = serde_json::from_slice(header).map_err(|e| format!("its header can't be read: {e}"))?;
    let data_start = 8 + header_len;
    raw.into_iter()
        .map(|(name, raw)| {
            let entry = place(raw, data.len(), data_start)
                .map_err(|reason| format!("the tensor {} {reason}", clip(&name)))?;
            Ok((name, entry))
        })
        .collect()
}

/// Checks an entry against the data's length.
fn place(raw: RawEntry, data_len: usize, data_start: usize) -> Result<Entry, String> {
    let (begin, end) = raw.data_offsets;
    let inside = |at: u64| usize::try_from(at).ok().filter(|&at| at <= data_len);
    let (Some(begin), Some(end)) = (inside(begin), inside(end)) else {
        return Err(format!("needs bytes {begin}..{end} of the data, which has {data_len}"));
    };
    if begin > end || raw.shape.len() > MAX_DIMS {
        return Err(format!("has the place {begin}..{end} and {} dimensions", raw.shape.len()));
    }
    let dims = raw.shape.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
    let dims = dims.map_err(|_| format!("has the shape {:?}", raw.shape))?;
    let dtype = match raw.dtype.as_str() {
        "F32" => StoredType::Runs(DType::F32),
        "F16" => StoredType::Runs(DType::F16),
        "BF16" => StoredType::Runs(DType::BF16),
        _ => StoredType::Foreign(clip(&raw.dtype)),
    };
    if let StoredType::Runs(dtype) = &dtype {
        let needed = dims
            .iter()
            .try_fold(1usize, |product, &dim| product.checked_mul(dim))
            .and_then(|values| dtype.bytes(values));
        if needed != Some(end - begin) {
            let has = end - begin;
            return Err(format!("has {has} bytes, which is not {} of the shape {dims:?}", dtype.name()));
        }
    }
    Ok(Entry { dtype, dims, bytes: data_start + begin..data_start + end })
}

/// The header as JSON has it.
struct Header(HashMap<String, RawEntry>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = HashMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if tensors.len() == MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            let entry = map.next_value()?;
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("the tensor {} comes twice", clip(&name))));
            }
            tensors.insert(name, entry);
        }
        Ok(Header(tensors))
    }
}

/// A name from the file, short enough for an error message.
fn clip(name: &str) -> String {
    name.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn read(header: &str, data: &[u8]) -> Result<Safetensors, Error> {
        Safetensors::from_bytes(Path::new("test"), file(header, data))
    }

    #[test]
    fn tensors_have_their_bytes() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},
            "b":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#;
        let data: Vec<u8> = (0..16).collect();
        let file = read(header, &data).unwrap();
        let a = file.tensor("a").unwrap().unwrap();
        assert_eq!((a.dtype, a.dims, a.bytes), (DType::F32, &[1, 2][..], &data[..8]));
        assert!(matches!(file.tensor("b"), Err(Error::Unsupported { what, .. }) if what.contains("I64")));
        assert!(file.tensor("c").unwrap().is_none());
    }

    #[test]
    fn contradictions_are_refused() {
        let entry = |fields: &str| format!(r#"{{"a":{{{fields}}}}}"#);
        for fields in [
            r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#,
            r#""dtype":"F32","shape":[2],"data_offsets":[8,16]"#,
            r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#,
            r#""dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]"#,
            r#""dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]"#,
            r#""dtype":"F32","shape":[-1],"data_offsets":[0,8]"#,
            r#""dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1"#,
            r#""dtype":"F32","shape":[2]"#,
        ] {
            assert!(matches!(read(&entry(fields), &[0; 8]), Err(Error::Malformed { .. })), "{fields}");
        }
        let twice = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(read(twice, &[0; 8]).is_err());
        assert!(read(&format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000)), &[]).is_err());
        assert!(read(&format!("{{\"__metadata__\":{}", "[".repeat(100_000)), &[]).is_err());
    }
}

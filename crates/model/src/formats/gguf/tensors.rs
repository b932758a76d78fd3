//! GGUF's table of tensors: names, types, shapes and places, each checked against the file.

use std::collections::HashMap;
use std::ops::Range;

use consort_tensor::DType;

use super::Fault;
use super::cursor::Cursor;
use super::metadata::clip;

/// Tensors in one file; the largest models have a few thousand.
const MAX_TENSORS: u64 = 1 << 16;
/// GGML's own limit of dimensions.
const MAX_DIMS: u32 = 4;

/// A tensor's type, shape and bytes.
#[derive(Debug)]
pub(super) struct TensorInfo {
    pub(super) dtype: DType,
    /// Outermost first (a matrix: rows, columns); the file has them the other way round.
    pub(super) dims: Vec<usize>,
    /// Where in the file.
    pub(super) bytes: Range<usize>,
}

/// Tensors by name.
#[derive(Debug, Default)]
pub(super) struct TensorTable {
    tensors: HashMap<String, TensorInfo>,
}

impl TensorTable {
    /// Reads `count` entries; their data starts at the next multiple of `alignment` after the table.
    pub(super) fn read(cursor: &mut Cursor<'_>, count: u64, alignment: u64) -> Result<TensorTable, Fault> {
        if count > MAX_TENSORS {
            return Err(Fault::Malformed(format!(
                "it claims {count} tensors; {MAX_TENSORS} at most are read"
            )));
        }
        let mut tensors = HashMap::new();
        for index in 0..count {
            let name = cursor.string(&format!("the name of tensor {index}"))?;
            if name.is_empty() {
                return Err(Fault::Malformed(format!("tensor {index} has no name")));
            }
            let info = read_entry(cursor, clip(name), alignment)?;
            if tensors.insert(name.to_string(), info).is_some() {
                return Err(Fault::Malformed(format!("the tensor {} comes twice", clip(name))));
            }
        }
        let file_len = cursor.position() + cursor.left();
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            info.bytes = place(&info.bytes, data_start, file_len).ok_or_else(|| {
                Fault::Malformed(format!(
                    "the tensor {} needs bytes {}..{} of the data, which has {}",
                    clip(name),
                    info.bytes.start,
                    info.bytes.end,
                    (file_len as u64).saturating_sub(data_start),
                ))
            })?;
        }
        Ok(TensorTable { tensors })
    }

    pub(super) fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    pub(super) fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }
}

/// One entry; `bytes` is still relative to the start of the data.
fn read_entry(cursor: &mut Cursor<'_>, name: &str, alignment: u64) -> Result<TensorInfo, Fault> {
    let malformed = |reason: String| Fault::Malformed(format!("the tensor {name} {reason}"));
    let n_dims = cursor.u32(name)?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(malformed(format!("has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")));
    }
    let mut dims = Vec::with_capacity(MAX_DIMS as usize);
    for _ in 0..n_dims {
        let dim = cursor.u64(name)?;
        let dim = usize::try_from(dim).ok().filter(|&d| d > 0 && d <= isize::MAX as usize);
        dims.push(dim.ok_or_else(|| malformed("has a dimension that is 0 or too large".into()))?);
    }
    let dtype = dtype_of(cursor.u32(name)?, name)?;
    let offset = cursor.u64(name)?;
    if !offset.is_multiple_of(alignment) {
        return Err(malformed(format!(
            "starts at {offset}, which is no multiple of the alignment {alignment}"
        )));
    }
    if !dims[0].is_multiple_of(dtype.block_len()) {
        return Err(malformed(format!(
            "has rows of {} values, no whole number of {} blocks ({} values each)",
            dims[0],
            dtype.name(),
            dtype.block_len()
        )));
    }
    let bytes = dims
        .iter()
        .try_fold(1usize, |product, &dim| product.checked_mul(dim))
        .and_then(|values| dtype.bytes(values))
        .ok_or_else(|| malformed(format!("has more values than memory: {dims:?}")))?;
    let start = usize::try_from(offset).map_err(|_| malformed(format!("starts at {offset}")))?;
    let end = start.checked_add(bytes).ok_or_else(|| malformed(format!("starts at {offset}")))?;
    dims.reverse();
    Ok(TensorInfo { dtype, dims, bytes: start..end })
}

/// The range in the file, or `None` where it leaves it.
fn place(relative: &Range<usize>, data_start: u64, file_len: usize) -> Option<Range<usize>> {
    let base = usize::try_from(data_start).ok()?;
    let start = base.checked_add(relative.start)?;
    let end = base.checked_add(relative.end)?;
    (end <= file_len).then_some(start..end)
}

fn dtype_of(id: u32, tensor: &str) -> Result<DType, Fault> {
    Ok(match id {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        10 => DType::Q2_K,
        11 => DType::Q3_K,
        12 => DType::Q4_K,
        13 => DType::Q5_K,
        14 => DType::Q6_K,
        30 => DType::BF16,
        _ => {
            let name = foreign_type(id).map_or_else(|| format!("number {id}"), str::to_string);
            return Err(Fault::Unsupported {
                what: format!("the tensor type {name} (of {tensor})"),
                supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
            });
        }
    })
}

/// GGML types that exist but are not run here, so that a refusal can name them.
fn foreign_type(id: u32) -> Option<&'static str> {
    Some(match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

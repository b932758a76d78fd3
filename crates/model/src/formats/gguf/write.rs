//! Writing GGUF, version 3: a header, the metadata, a table of tensors, and their bytes one after the other.
//!
//! Tensors are made while they are written, so that one of them at a time is in memory. What this writes, [`super`] and
//! llama.cpp read. Source: the format's description in the ggml repository (`docs/gguf.md`).

use std::io::{self, Write};

use consort_tensor::DType;

/// Where tensors begin: multiples of this many bytes, the format's default.
const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    U32(u32),
    /// A number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// Text.
    Text(String),
    /// An array of texts.
    Texts(Vec<String>),
    /// An array of whole numbers.
    I32s(Vec<i32>),
}

/// A tensor to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// How values are stored; a row is a whole number of its blocks.
    pub dtype: DType,
}

/// Writes a file. `bytes(i)` gives tensor `i`'s, as many as its type and shape have. Names are written as they come: a
/// reader refuses one that comes twice.
///
/// # Errors
/// What `out` says.
///
/// # Panics
/// If a tensor has another number of bytes.
pub fn write(
    out: &mut impl Write,
    metadata: &[(String, Value)],
    tensors: &[Tensor],
    mut bytes: impl FnMut(usize) -> Vec<u8>,
) -> io::Result<()> {
    let mut head = Vec::new();
    head.extend_from_slice(super::MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    head.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut head, key);
        put(&mut head, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut head, &tensor.name);
        head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        // The file has the innermost first.
        for dim in tensor.shape.iter().rev() {
            head.extend_from_slice(&(*dim as u64).to_le_bytes());
        }
        head.extend_from_slice(&type_id(tensor.dtype).to_le_bytes());
        head.extend_from_slice(&(offset as u64).to_le_bytes());
        offset = (offset + length(tensor)).next_multiple_of(ALIGNMENT);
    }
    pad(&mut head);
    out.write_all(&head)?;
    for (i, tensor) in tensors.iter().enumerate() {
        let mut bytes = bytes(i);
        assert_eq!(bytes.len(), length(tensor), "the bytes of {}", tensor.name);
        pad(&mut bytes);
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn length(tensor: &Tensor) -> usize {
    tensor.dtype.bytes(tensor.shape.iter().product()).unwrap_or(0)
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    // Numbers of the format's types.
    const U32: u32 = 4;
    const I32: u32 = 5;
    const F32: u32 = 6;
    const BOOL: u32 = 7;
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    let mut kind = |kinds: &[u32]| kinds.iter().for_each(|kind| out.extend_from_slice(&kind.to_le_bytes()));
    match value {
        Value::U32(value) => kind(&[U32, *value]),
        Value::F32(value) => kind(&[F32, value.to_bits()]),
        Value::Bool(value) => {
            kind(&[BOOL]);
            out.push(u8::from(*value));
        }
        Value::Text(value) => {
            kind(&[TEXT]);
            text(out, value);
        }
        Value::Texts(values) => {
            kind(&[ARRAY, TEXT]);
            out.extend_from_slice(&(values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| text(out, value));
        }
        Value::I32s(values) => {
            kind(&[ARRAY, I32]);
            out.extend_from_slice(&(values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
    }
}

/// GGML's number of a type.
fn type_id(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q5_0 => 6,
        DType::Q5_1 => 7,
        DType::Q8_0 => 8,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 12,
        DType::Q5_K => 13,
        DType::Q6_K => 14,
        DType::BF16 => 30,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Gguf;
    use super::*;
    use crate::formats::weights::Weights;

    #[test]
    fn what_is_written_is_read() {
        let metadata = [
            ("a".to_owned(), Value::Text("text".into())),
            ("b".to_owned(), Value::U32(7)),
            ("c".to_owned(), Value::F32(0.5)),
            ("d".to_owned(), Value::Bool(true)),
            ("e".to_owned(), Value::Texts(vec!["x".into(), "ü".into()])),
            ("f".to_owned(), Value::I32s(vec![1, -3])),
        ];
        let tensors = [
            Tensor { name: "one".into(), shape: vec![3], dtype: DType::F32 },
            Tensor { name: "two".into(), shape: vec![2, 32], dtype: DType::Q8_0 },
        ];
        let mut file = Vec::new();
        write(&mut file, &metadata, &tensors, |i| vec![i as u8 + 1; [12, 68][i]]).unwrap();
        let gguf = Gguf::from_bytes(std::path::Path::new("x.gguf"), file).unwrap();
        assert_eq!(gguf.str("a").unwrap(), Some("text"));
        assert_eq!((gguf.u32("b").unwrap(), gguf.f32("c").unwrap()), (Some(7), Some(0.5)));
        assert_eq!(gguf.bool("d").unwrap(), Some(true));
        assert_eq!(gguf.strings("e").unwrap().unwrap().collect::<Vec<_>>(), ["x", "ü"]);
        assert_eq!(gguf.array_i32("f").unwrap(), Some(vec![1, -3]));
        let two = gguf.tensor("two").unwrap().unwrap();
        assert_eq!((two.dims, two.dtype, two.bytes), (&[2usize, 32][..], DType::Q8_0, &[2u8; 68][..]));
        assert_eq!(gguf.tensor("one").unwrap().unwrap().bytes, [1; 12]);
    }
}

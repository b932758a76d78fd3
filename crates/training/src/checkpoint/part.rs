//! One file of a checkpoint: tensors as safetensors, made in memory in one pass.
//!
//! The bytes that go to the store are the snapshot itself, so a step waits for one copy of what this worker keeps and
//! for nothing else.

use serde_json::{Map, Value, json};

/// Tensors under a name.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// A tensor to write: its name, shape and values.
pub(super) struct Tensor<'a> {
    pub(super) name: String,
    pub(super) shape: &'a [usize],
    pub(super) values: &'a [f32],
}

impl Part {
    /// Fills a part, in the memory that it has.
    pub(super) fn fill(&mut self, name: String, tensors: &[Tensor<'_>]) {
        let mut header = Map::new();
        // What `transformers` looks for before it loads.
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut end = 0;
        for tensor in tensors {
            let start = end;
            end += 4 * tensor.values.len();
            let entry = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]});
            header.insert(tensor.name.clone(), entry);
        }
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let data = 8 + header.len();
        self.name = name;
        self.bytes.resize(data + end, 0);
        self.bytes[..8].copy_from_slice(&(header.len() as u64).to_le_bytes());
        self.bytes[8..data].copy_from_slice(header.as_bytes());
        let mut rest = &mut self.bytes[data..];
        for tensor in tensors {
            let (own, after) = rest.split_at_mut(4 * tensor.values.len());
            for (bytes, value) in own.chunks_exact_mut(4).zip(tensor.values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            rest = after;
        }
    }
}

/// Copies a tensor of a part into `values`.
///
/// # Errors
/// What doesn't fit.
pub(super) fn read(
    part: &safetensors::SafeTensors<'_>,
    name: &str,
    shape: &[usize],
    values: &mut [f32],
) -> Result<(), String> {
    let view = part.tensor(name).map_err(|_| format!("{name} is missing"))?;
    if view.dtype() != safetensors::Dtype::F32 || view.shape() != shape {
        return Err(format!("{name} is {:?} {:?} and should be F32 {shape:?}", view.dtype(), view.shape()));
    }
    if view.data().len() != 4 * values.len() {
        return Err(format!("{name} has {} bytes and should have {}", view.data().len(), 4 * values.len()));
    }
    for (value, bytes) in values.iter_mut().zip(view.data().chunks_exact(4)) {
        *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_read_as_it_was_written() {
        let values: Vec<f32> = (0..12).map(|i| i as f32 / 7.0 - 1.0).collect();
        let tensors = || {
            [
                Tensor { name: "a".into(), shape: &[2, 3], values: &values[..6] },
                Tensor { name: "b".into(), shape: &[6], values: &values[6..] },
            ]
        };
        let mut part = Part::default();
        part.fill("first".into(), &tensors());
        part.fill("second".into(), &tensors()[1..]);
        part.fill("x.safetensors".into(), &tensors());
        let read_back = safetensors::SafeTensors::deserialize(&part.bytes).unwrap();
        let mut back = vec![0.0; 6];
        read(&read_back, "b", &[6], &mut back).unwrap();
        assert_eq!(back, values[6..]);
        assert_eq!(
            read(&read_back, "a", &[3, 2], &mut back).unwrap_err(),
            "a is F32 [2, 3] and should be F32 [3, 2]"
        );
        assert_eq!(read(&read_back, "c", &[6], &mut back).unwrap_err(), "c is missing");
    }
}

//! From a file's tensors to a [`Model`]: every tensor is checked against the architecture, hashed, packed and let go.
//!
//! Hashing and packing share the pool one tensor at a time, so that the second reads what the first brought into
//! the caches, and peak memory is the packed weights plus the largest tensor: that one goes first.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;

use consort_tensor::matrix::{GatedMatrix, Matrix};
use consort_tensor::quant::dequantize;
use consort_tensor::rope::Rope;
use consort_tensor::{DType, Pool};

use super::{Attention, FeedForward, Layer, Model, ModelConfig, Projection};
use crate::Error;
use crate::formats::names::{Names, Part};
use crate::formats::weights::{Tensor, Weights};

/// Bytes of a tensor that one thread hashes at a time.
const HASH_CHUNK: usize = 256 << 10;

impl Model {
    /// Builds the model that `config` describes from tensors called as `names` says.
    ///
    /// # Errors
    /// [`Error::Malformed`] where a tensor is missing or has another shape, [`Error::Unsupported`] where a layer has
    /// a tensor that this decoder wouldn't use, [`Error::Tensor`] where memory is refused.
    pub(crate) fn build(
        config: &ModelConfig,
        names: &Names,
        weights: &dyn Weights,
        pool: &Pool,
    ) -> Result<Model, Error> {
        let mut builder =
            Builder { config, names, weights, pool, hasher: blake3::Hasher::new(), used: HashSet::new() };
        let embedding = builder.matrix(names.embedding(), config.vocab, config.hidden)?;
        let head = match config.tied_head {
            true => None,
            false => Some(builder.matrix(names.head(), config.vocab, config.hidden)?),
        };
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            layers.push(builder.layer(layer)?);
        }
        let final_norm = builder.norm(names.final_norm(), config.hidden)?;
        let rope = builder.rope()?;
        let sliding_rope = config.sliding.as_ref().map(|window| {
            Rope::new(window.rope.inverse_frequencies(config.head_dim), window.rope.magnitude())
        });
        builder.refuse_left_over_tensors()?;
        let weights_hash = builder.finish_hash()?;
        Ok(Model {
            config: config.clone(),
            embedding,
            layers,
            final_norm,
            head,
            rope,
            sliding_rope,
            weights_hash,
        })
    }
}

struct Builder<'a> {
    config: &'a ModelConfig,
    names: &'a Names,
    weights: &'a dyn Weights,
    pool: &'a Pool,
    hasher: blake3::Hasher,
    used: HashSet<String>,
}

impl<'a> Builder<'a> {
    fn layer(&mut self, layer: usize) -> Result<Layer, Error> {
        Ok(Layer { attention: self.attention(layer)?, feed_forward: self.feed_forward(layer)? })
    }

    fn attention(&mut self, layer: usize) -> Result<Attention, Error> {
        let config = self.config;
        let (hidden, q, kv) =
            (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let query_key_norms = match config.query_key_norm {
            true => Some((
                self.norm(self.names.part(layer, Part::QueryNorm), config.head_dim)?,
                self.norm(self.names.part(layer, Part::KeyNorm), config.head_dim)?,
            )),
            false => None,
        };
        Ok(Attention {
            norm: self.norm(self.names.part(layer, Part::AttentionNorm), hidden)?,
            query: self.projection(layer, Part::Query, q, hidden)?,
            key: self.projection(layer, Part::Key, kv, hidden)?,
            value: self.projection(layer, Part::Value, kv, hidden)?,
            output: self.projection(layer, Part::Output, hidden, q)?,
            query_key_norms,
            post_norm: self.post_norm(layer, Part::PostAttentionNorm)?,
        })
    }

    fn feed_forward(&mut self, layer: usize) -> Result<FeedForward, Error> {
        let (hidden, ffn) = (self.config.hidden, self.config.ffn);
        let (gate_name, up_name) = (self.names.part(layer, Part::Gate), self.names.part(layer, Part::Up));
        let gate = self.take(&gate_name, &[ffn, hidden])?;
        let up = self.take(&up_name, &[ffn, hidden])?;
        let gate_up =
            GatedMatrix::pack(self.pool, (gate.dtype, gate.bytes), (up.dtype, up.bytes), ffn, hidden)?;
        self.weights.release(&gate_name);
        self.weights.release(&up_name);
        Ok(FeedForward {
            norm: self.norm(self.names.part(layer, Part::FfnNorm), hidden)?,
            gate_up,
            down: self.matrix(self.names.part(layer, Part::Down), hidden, ffn)?,
            post_norm: self.post_norm(layer, Part::PostFfnNorm)?,
        })
    }

    /// A projection of attention with its bias. Queries and keys get the row order that the decoder rotates.
    fn projection(
        &mut self,
        layer: usize,
        part: Part,
        rows: usize,
        cols: usize,
    ) -> Result<Projection, Error> {
        let config = self.config;
        let heads = match part {
            Part::Query if self.names.interleaved_rope => Some(config.heads),
            Part::Key if self.names.interleaved_rope => Some(config.kv_heads),
            _ => None,
        };
        let name = self.names.part(layer, part);
        let tensor = self.take(&name, &[rows, cols])?;
        let weights = match heads {
            None => Matrix::pack(self.pool, tensor.dtype, tensor.bytes, rows, cols)?,
            Some(heads) => {
                let halves = pairs_to_halves(tensor.bytes, heads, config.head_dim);
                Matrix::pack(self.pool, tensor.dtype, &halves, rows, cols)?
            }
        };
        self.weights.release(&name);
        let bias_name = self.names.bias(layer, part);
        let bias = match self.weights.tensor(&bias_name)? {
            Some(_) => {
                let bias = self.vector(&bias_name, rows)?;
                Some(heads.map_or(bias.clone(), |heads| pairs_to_halves(&bias, heads, config.head_dim)))
            }
            None if config.family == "qwen2" && part != Part::Output => return Err(self.missing(&bias_name)),
            None => None,
        };
        Ok(Projection { weights, bias })
    }

    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> Result<Matrix, Error> {
        let tensor = self.take(&name, &[rows, cols])?;
        let matrix = Matrix::pack(self.pool, tensor.dtype, tensor.bytes, rows, cols)?;
        self.weights.release(&name);
        Ok(matrix)
    }

    fn norm(&mut self, name: String, len: usize) -> Result<Vec<f32>, Error> {
        let mut norm = self.vector(&name, len)?;
        if self.names.norms_less_one {
            norm.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(norm)
    }

    fn post_norm(&mut self, layer: usize, part: Part) -> Result<Option<Vec<f32>>, Error> {
        match self.config.post_norms {
            true => self.norm(self.names.part(layer, part), self.config.hidden).map(Some),
            false => Ok(None),
        }
    }

    /// Positions of layers that see everything; some GGUF files carry divisors of the frequencies.
    fn rope(&mut self) -> Result<Rope, Error> {
        let mut frequencies = self.config.rope.inverse_frequencies(self.config.head_dim);
        if let Some(name) = self.names.rope_divisors()
            && self.weights.tensor(name)?.is_some()
        {
            let divisors = self.vector(name, frequencies.len())?;
            for (frequency, divisor) in frequencies.iter_mut().zip(divisors) {
                if !(divisor.is_finite() && divisor > 0.0) {
                    return Err(self.malformed(format!("{name} holds {divisor}")));
                }
                *frequency /= f64::from(divisor);
            }
        }
        Ok(Rope::new(frequencies, self.config.rope.magnitude()))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.take(name, &[len])?;
        let mut values = vec![0.0; len];
        dequantize(tensor.dtype, tensor.bytes, &mut values);
        Ok(values)
    }

    /// The tensor of that name and shape, hashed and marked as used.
    fn take(&mut self, name: &str, dims: &[usize]) -> Result<Tensor<'a>, Error> {
        if !self.weights.still_whole() {
            return Err(self.malformed("it became shorter while it was read".into()));
        }
        let tensor = self.weights.tensor(name)?.ok_or_else(|| self.missing(name))?;
        if tensor.dims != dims {
            return Err(
                self.malformed(format!("the tensor {name} has the shape {:?}, not {dims:?}", tensor.dims))
            );
        }
        self.hash_tensor(name, &tensor);
        self.used.insert(name.to_string());
        Ok(tensor)
    }

    /// A tensor that a layer has and this decoder would leave out changes the answer, so it is refused.
    fn refuse_left_over_tensors(&self) -> Result<(), Error> {
        let prefix = self.names.layers_prefix();
        let mut left_over: Vec<&str> = self
            .weights
            .names()
            .into_iter()
            .filter(|name| {
                name.starts_with(&prefix) && !self.used.contains(*name) && !self.names.ignorable(name)
            })
            .collect();
        left_over.sort_unstable();
        match left_over.first() {
            None => Ok(()),
            Some(name) => Err(Error::Unsupported {
                path: self.weights.path().to_path_buf(),
                what: format!("the tensor {} in a {} model", clip(name), self.config.family),
                supported: format!("layers of {}", self.known_tensors()),
            }),
        }
    }

    fn known_tensors(&self) -> String {
        let known: Vec<String> = Part::ALL
            .iter()
            .map(|&part| self.names.part(0, part))
            .filter(|name| self.used.contains(name))
            .collect();
        known.join(", ")
    }

    fn hash_tensor(&mut self, name: &str, tensor: &Tensor<'_>) {
        let kind = dtype_number(tensor.dtype);
        self.hasher.update(&(name.len() as u64).to_le_bytes());
        self.hasher.update(name.as_bytes());
        self.hasher.update(&[kind, tensor.dims.len() as u8]);
        for &dim in tensor.dims {
            self.hasher.update(&(dim as u64).to_le_bytes());
        }
        if tensor.bytes.len() <= HASH_CHUNK {
            self.hasher.update(blake3::hash(tensor.bytes).as_bytes());
            return;
        }
        let chunks = tensor.bytes.len().div_ceil(HASH_CHUNK);
        let digests = Mutex::new(vec![[0; blake3::OUT_LEN]; chunks]);
        self.pool.run(|worker| {
            while let Some(chunk) = worker.claim(chunks) {
                let end = (HASH_CHUNK * (chunk + 1)).min(tensor.bytes.len());
                let digest = blake3::hash(&tensor.bytes[HASH_CHUNK * chunk..end]);
                digests.lock().unwrap_or_else(PoisonError::into_inner)[chunk] = digest.into();
            }
        });
        for digest in digests.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.hasher.update(&digest);
        }
    }

    fn finish_hash(mut self) -> Result<String, Error> {
        self.hasher.update(self.config.identity().as_bytes());
        self.weights.hash_text(&mut self.hasher)?;
        Ok(self.hasher.finalize().to_hex()[..16].to_string())
    }

    fn missing(&self, name: &str) -> Error {
        self.malformed(format!("the tensor {name} is missing"))
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { path: self.weights.path().to_path_buf(), reason }
    }
}

/// A number of our own for the hash, so that it doesn't hang on the order of an enum elsewhere.
fn dtype_number(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::Q4_0 => 3,
        DType::Q4_1 => 4,
        DType::Q5_0 => 5,
        DType::Q5_1 => 6,
        DType::Q8_0 => 7,
        DType::Q2_K => 8,
        DType::Q3_K => 9,
        DType::Q4_K => 10,
        DType::Q5_K => 11,
        DType::Q6_K => 12,
    }
}

/// Reorders rows from neighbouring pairs to two halves, head by head: row `2i + s` of a head becomes row
/// `s · head_dim/2 + i`. A row is `items.len() / (heads * head_dim)` items.
pub(crate) fn pairs_to_halves<T: Copy>(items: &[T], heads: usize, head_dim: usize) -> Vec<T> {
    let row = items.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(items.len());
    for head in items.chunks_exact(row * head_dim) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let from = (2 * pair + half) * row;
                out.extend_from_slice(&head[from..from + row]);
            }
        }
    }
    out
}

/// A name from the file, short enough for an error message.
fn clip(name: &str) -> String {
    name.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_head_by_head() {
        let rows: Vec<u32> = (0..8).flat_map(|r| [10 * r, 10 * r + 1]).collect();
        let halves = pairs_to_halves(&rows, 2, 4);
        assert_eq!(halves, [0, 1, 20, 21, 10, 11, 30, 31, 40, 41, 60, 61, 50, 51, 70, 71]);
    }
}

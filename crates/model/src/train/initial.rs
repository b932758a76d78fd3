//! Where weights come from: a seed, or a model file.

use std::sync::{Mutex, PoisonError};

use consort_base::philox4x32;
use consort_tensor::Pool;
use consort_tensor::quant::dequantize;

use super::Layout;
use super::layout::{Parameter, Role};
use crate::Error;
use crate::arch::ModelConfig;
use crate::arch::build::pairs_to_halves;
use crate::formats::names::{Names, Part};
use crate::formats::weights::Weights;

/// Values that one thread draws at a time.
const CHUNK: usize = 1 << 14;

/// Initial weights: matrices normal around 0, norms 1, biases 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normal {
    /// The seed; a value is a function of it, the tensor's place and its own.
    pub seed: u64,
    /// Standard deviation of matrices. Those that write into the residual stream have it divided by the root of twice
    /// the layers, so that the stream doesn't grow with depth (Radford et al. 2019).
    pub deviation: f32,
}

impl Normal {
    /// The deviation 0.02 that most decoders begin with.
    pub fn new(seed: u64) -> Normal {
        Normal { seed, deviation: 0.02 }
    }
}

impl Layout {
    /// Fills `weights` with initial values.
    ///
    /// # Panics
    /// If `weights` doesn't have the layout's length.
    pub fn initialize(&self, pool: &Pool, normal: Normal, weights: &mut [f32]) {
        assert_eq!(weights.len(), self.len(), "weights of this layout");
        weights.fill(0.0);
        let residual = 1.0 / (2.0 * self.layers.len() as f32).sqrt();
        for (number, parameter) in self.parameters().iter().enumerate() {
            let values = &mut weights[parameter.range.clone()];
            let deviation = match parameter.role {
                Role::Bias(..) => continue,
                _ if parameter.shape.len() == 1 => {
                    values.fill(1.0);
                    continue;
                }
                Role::Weight(_, Part::Output | Part::Down) => normal.deviation * residual,
                _ => normal.deviation,
            };
            let chunks = Mutex::new(values.chunks_mut(CHUNK).enumerate());
            let next = || chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
            pool.run(|_| {
                while let Some((chunk, values)) = next() {
                    draw(normal.seed, number as u32, chunk * CHUNK, deviation, values);
                }
            });
        }
    }

    /// Reads a file's tensors into `weights`.
    pub(crate) fn read(
        &self,
        config: &ModelConfig,
        names: &Names,
        source: &dyn Weights,
        weights: &mut [f32],
    ) -> Result<(), Error> {
        assert_eq!(weights.len(), self.len(), "weights of this layout");
        let malformed = |reason: String| Error::Malformed { path: source.path().to_path_buf(), reason };
        self.refuse_what_is_left_out(config, names, source)?;
        weights.fill(0.0);
        for parameter in self.parameters() {
            if !source.still_whole() {
                return Err(malformed("it became shorter while it was read".into()));
            }
            let name = name_in(names, parameter);
            let tensor =
                source.tensor(&name)?.ok_or_else(|| malformed(format!("the tensor {name} is missing")))?;
            if tensor.dims != parameter.shape {
                let (dims, shape) = (tensor.dims, &parameter.shape);
                return Err(malformed(format!("the tensor {name} has the shape {dims:?}, not {shape:?}")));
            }
            let values = &mut weights[parameter.range.clone()];
            dequantize(tensor.dtype, tensor.bytes, values);
            let heads = match parameter.role {
                Role::Weight(_, Part::Query) | Role::Bias(_, Part::Query) => Some(config.heads),
                Role::Weight(_, Part::Key) | Role::Bias(_, Part::Key) => Some(config.kv_heads),
                _ => None,
            };
            if let Some(heads) = heads.filter(|_| names.interleaved_rope) {
                values.copy_from_slice(&pairs_to_halves(values, heads, config.head_dim));
            }
            source.release(&name);
        }
        Ok(())
    }

    /// A tensor of a layer that the layout doesn't have would be lost.
    fn refuse_what_is_left_out(
        &self,
        config: &ModelConfig,
        names: &Names,
        source: &dyn Weights,
    ) -> Result<(), Error> {
        let known: std::collections::HashSet<String> =
            self.parameters().iter().map(|parameter| name_in(names, parameter)).collect();
        let prefix = names.layers_prefix();
        let lost = |name: &&str| {
            let divisors = names.rope_divisors() == Some(*name);
            divisors || (name.starts_with(&prefix) && !known.contains(*name) && !names.ignorable(name))
        };
        match source.names().into_iter().filter(lost).min() {
            None => Ok(()),
            Some(name) => Err(Error::Untrainable {
                what: format!(
                    "the tensor {} of this {} model",
                    name.chars().take(80).collect::<String>(),
                    config.family
                ),
                supported: "models whose layers have nothing else than their family's own tensors".into(),
            }),
        }
    }
}

fn name_in(names: &Names, parameter: &Parameter) -> String {
    match parameter.role {
        Role::Embedding => names.embedding(),
        Role::Head => names.head(),
        Role::FinalNorm => names.final_norm(),
        Role::Weight(layer, part) => names.part(layer, part),
        Role::Bias(layer, part) => names.bias(layer, part),
    }
}

/// Normal numbers (Box and Muller) from a counter-based generator: value `first + i` of tensor `number`.
fn draw(seed: u64, number: u32, first: usize, deviation: f32, values: &mut [f32]) {
    let key = [seed as u32, (seed >> 32) as u32];
    for (group, values) in values.chunks_mut(4).enumerate() {
        let index = (first / 4 + group) as u64;
        let words = philox4x32([index as u32, (index >> 32) as u32, number, 0], key);
        let uniform = words.map(|word| (f64::from(word) + 0.5) / 4_294_967_296.0);
        let mut normal = [0.0; 4];
        for pair in 0..2 {
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * uniform[2 * pair + 1]);
            let radius = libm::sqrt(-2.0 * libm::log(uniform[2 * pair]));
            (normal[2 * pair], normal[2 * pair + 1]) = (radius * cos, radius * sin);
        }
        for (value, normal) in values.iter_mut().zip(normal) {
            *value = normal as f32 * deviation;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decoder::tests::tiny;
    use super::*;

    #[test]
    fn initial_weights_follow_the_seed_alone() {
        let layout = Layout::new(&tiny("qwen2")).unwrap();
        let pools = [1, 3].map(|threads| Pool::new(threads, consort_tensor::Cpu::detect()));
        let mut first = vec![9.0; layout.len()];
        layout.initialize(&pools[0], Normal::new(5), &mut first);
        let mut again = vec![7.0; layout.len()];
        layout.initialize(&pools[1], Normal::new(5), &mut again);
        assert_eq!(first, again);
        layout.initialize(&pools[1], Normal::new(6), &mut again);
        assert_ne!(first, again);
        let of = |name: &str| &first[layout.parameter(name).unwrap().range.clone()];
        assert!(of("model.norm.weight").iter().all(|&x| x == 1.0));
        assert!(of("model.layers.0.self_attn.q_proj.bias").iter().all(|&x| x == 0.0));
    }

    #[test]
    fn draws_are_normal() {
        let mut values = vec![0.0; 100_000];
        draw(1, 2, 0, 2.0, &mut values);
        let n = values.len() as f64;
        let moment = |power: i32| values.iter().map(|&x| (f64::from(x) / 2.0).powi(power)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.1);
        let mut part = vec![0.0; 100];
        draw(1, 2, 40, 2.0, &mut part);
        assert_eq!(part, values[40..140]);
    }
}

//! The products in plain Rust: the specification that every other family follows bit for bit.
//!
//! Each output element is one chain over the input columns, started at +0.0. `fma` is fused: one rounding.
//!
//! - **Quantized weights**, for each block of 32 columns in order (each half of 16 where the type scales halves):
//!   `dot = Σ code · a − offset · Σ a`, exact in `i32`; `sum = fma(dot as f32, scale * a_scale, sum)`; and where
//!   the type has a minimum `sum = fma(min, a_scale * (Σ a) as f32, sum)`.
//!   `a` are the row's activations as [`quantize`](super::quantize::quantize) makes them.
//! - **F32 and F16 weights**: `sum = fma(w, x, sum)` for each column in order.
//! - **BF16 weights**: the same on inputs rounded to bf16. Here AVX-512 differs: its dot product of pairs is its
//!   own ([`Numerics::ByFamily`](crate::matrix::Numerics)).
//!
//! Nothing is added across lanes and no chain is split, so an element depends on its row of weights and its row of
//! inputs alone: not on the batch, the tile it falls into, or the number of threads.

use super::tile::{BLOCK_WORDS, HALF_WORDS, Kernel, Sums, Tile};
use crate::DType;
use crate::matrix::format::{Format, with_format};
use crate::matrix::panel::{BLOCK, LANES, float_at, lane_codes, lane_scales};

/// The kernel for weights of `dtype`.
pub(crate) fn kernel(dtype: DType) -> Kernel {
    with_format!(dtype, F => quantized::<F>, _ => floats)
}

fn quantized<F: Format>(tile: &Tile<'_>, sums: &mut Sums) {
    let (codes, scales) = tile.panel.split_at(tile.layout.code_bytes);
    sums.0 = [[0.0; LANES]; _];
    for block in 0..tile.layout.cols / BLOCK {
        for lane in 0..LANES {
            let weights = lane_codes(F::INT, codes, block, lane);
            let both = [0, 1].map(|half| lane_scales(F::INT, scales, block, half, lane));
            for row in 0..tile.rows {
                let inputs = InputBlock::read(tile, block, row);
                let sum = &mut sums.0[row][lane];
                if F::INT.halves() {
                    for (half, &(scale, min)) in both.iter().enumerate() {
                        let range = half * BLOCK / 2..(half + 1) * BLOCK / 2;
                        let (negative_sum, scaled_sum) = inputs.halves[half];
                        let dot = dot::<F>(&weights[range.clone()], &inputs.codes[range], negative_sum);
                        *sum = add::<F>(*sum, dot, scale * inputs.scale, min, scaled_sum);
                    }
                } else {
                    let (scale, min) = both[0];
                    let dot = dot::<F>(&weights, &inputs.codes, inputs.negative_sum);
                    *sum = add::<F>(*sum, dot, scale * inputs.scale, min, inputs.scaled_sum);
                }
            }
        }
    }
}

/// `Σ code · a − offset · Σ a`.
fn dot<F: Format>(weights: &[u8], inputs: &[i8], negative_sum: i32) -> i32 {
    let start = F::INT.offset_bits.map_or(0, |bits| negative_sum << bits);
    weights.iter().zip(inputs).fold(start, |dot, (&w, &a)| dot + i32::from(w) * i32::from(a))
}

fn add<F: Format>(sum: f32, dot: i32, scale: f32, min: f32, scaled_sum: f32) -> f32 {
    let sum = (dot as f32).mul_add(scale, sum);
    if F::INT.min() { min.mul_add(scaled_sum, sum) } else { sum }
}

/// One row's part of a prepared block.
struct InputBlock {
    codes: [i8; BLOCK],
    scale: f32,
    scaled_sum: f32,
    negative_sum: i32,
    /// (−sum, scale × sum) of each half.
    halves: [(i32, f32); 2],
}

impl InputBlock {
    fn read(tile: &Tile<'_>, block: usize, row: usize) -> InputBlock {
        let words = &tile.words[block * BLOCK_WORDS * tile.rows..][..BLOCK_WORDS * tile.rows];
        let word = |index: usize| words[index * tile.rows + row];
        let halves = &tile.halves[block * HALF_WORDS * tile.rows..][..HALF_WORDS * tile.rows];
        let half = |index: usize| halves[index * tile.rows + row];
        InputBlock {
            codes: std::array::from_fn(|k| word(k / 4).to_le_bytes()[k % 4] as i8),
            scale: f32::from_bits(word(8)),
            scaled_sum: f32::from_bits(word(9)),
            negative_sum: word(10) as i32,
            halves: [(half(0) as i32, f32::from_bits(half(2))), (half(1) as i32, f32::from_bits(half(3)))],
        }
    }
}

fn floats(tile: &Tile<'_>, sums: &mut Sums) {
    let dtype = tile.layout.dtype;
    sums.0 = [[0.0; LANES]; _];
    for k in 0..tile.layout.cols {
        for row in 0..tile.rows {
            let x = match dtype {
                DType::BF16 => f32::from_bits(tile.words[k / 2 * tile.rows + row] >> (k % 2 * 16) << 16),
                _ => f32::from_bits(tile.words[k * tile.rows + row]),
            };
            for (lane, sum) in sums.0[row].iter_mut().enumerate() {
                *sum = float_at(dtype, tile.panel, k, lane).mul_add(x, *sum);
            }
        }
    }
}

//! Panels: sixteen output rows side by side, the unit in which weights are stored, read and split over threads.
//!
//! A panel is contiguous, so a thread that owns a range of panels streams one range of memory. Its codes come
//! first and its scales after them: codes then stay aligned to cache lines in every format, and a register of codes
//! never straddles two. What is read here, plainly and one lane at a time, is the meaning of the layout.

use half::{bf16, f16};

use super::format::{Codes, IntFormat, PLANE, Scales, int_format};
use crate::DType;
use crate::quant::{half_at, word_at};

/// Output rows in a panel.
pub(crate) const LANES: usize = 16;

/// Columns in a block of a quantized type.
pub(crate) const BLOCK: usize = 32;

/// The shape of a matrix's panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) dtype: DType,
    pub(crate) cols: usize,
    /// Bytes of a panel, a multiple of 64.
    pub(crate) bytes: usize,
    /// Bytes of its codes; the scale table follows.
    pub(crate) code_bytes: usize,
}

impl Layout {
    /// The layout for rows of `cols` values; `None` if a panel's bytes overflow. `cols` is whole blocks.
    pub(crate) fn new(dtype: DType, cols: usize) -> Option<Layout> {
        let (code_bytes, scale_bytes) = match int_format(dtype) {
            Some(format) => {
                let (entry, blocks) = format.scale_entry();
                let count = cols / BLOCK;
                (count.checked_mul(format.planes() * PLANE)?, count.div_ceil(blocks).checked_mul(entry)?)
            }
            None => match dtype {
                DType::F32 => (cols.checked_mul(4 * LANES)?, 0),
                DType::F16 => (cols.checked_mul(2 * LANES)?, 0),
                _ => (cols.div_ceil(2).checked_mul(4 * LANES)?, 0),
            },
        };
        let bytes = code_bytes.checked_add(scale_bytes)?.checked_next_multiple_of(64)?;
        Some(Layout { dtype, cols, bytes, code_bytes })
    }

    /// Writes lane `lane` of `panel` as `f32` into `out[..cols]`: what [`crate::quant::dequantize`] gives.
    pub(crate) fn lane(&self, panel: &[u8], lane: usize, out: &mut [f32]) {
        match int_format(self.dtype) {
            Some(format) => {
                let (codes, scales) = panel.split_at(self.code_bytes);
                let offset = format.offset_bits.map_or(0.0, |bits| (1u32 << bits) as f32);
                for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let decoded = lane_codes(format, codes, block, lane);
                    for (half, (out, codes)) in
                        out.chunks_exact_mut(BLOCK / 2).zip(decoded.chunks_exact(BLOCK / 2)).enumerate()
                    {
                        let (scale, min) = lane_scales(format, scales, block, half, lane);
                        for (y, &code) in out.iter_mut().zip(codes) {
                            *y = scale * (f32::from(code) - offset);
                            if format.min() {
                                *y += min;
                            }
                        }
                    }
                }
            }
            None => {
                for (k, y) in out.iter_mut().enumerate() {
                    *y = float_at(self.dtype, panel, k, lane);
                }
            }
        }
    }
}

/// The weight of a float panel at column `k`, lane `lane`.
#[inline]
pub(crate) fn float_at(dtype: DType, panel: &[u8], k: usize, lane: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(word_at(panel, (k * LANES + lane) * 4)),
        DType::F16 => {
            let at = (k * LANES + lane) * 2;
            f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
        }
        _ => {
            let at = (k / 2 * LANES + lane) * 4 + k % 2 * 2;
            bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
        }
    }
}

/// The 32 unsigned codes of one lane in one block.
#[inline]
pub(crate) fn lane_codes(format: IntFormat, codes: &[u8], block: usize, lane: usize) -> [u8; BLOCK] {
    let block = &codes[block * format.planes() * PLANE..][..format.planes() * PLANE];
    let plane = |index: usize, j: usize| block[index * PLANE + lane * 4 + j];
    let nibble = |g: usize, j: usize| plane(g % 4, j) >> (g / 4 * 4) & 15;
    let two = |first: usize, g: usize, j: usize| plane(first + g / 4, j) >> (g % 4 * 2) & 3;
    let one = |first: usize, g: usize, j: usize| plane(first, j) >> g & 1;
    std::array::from_fn(|k| {
        let (g, j) = (k / 4, k % 4);
        match format.codes {
            Codes::Byte => plane(g, j),
            Codes::Nibble => nibble(g, j),
            Codes::NibbleOne => nibble(g, j) | one(4, g, j) << 4,
            Codes::NibbleTwo => nibble(g, j) | two(4, g, j) << 4,
            Codes::Two => two(0, g, j),
            Codes::TwoOne => two(0, g, j) | one(2, g, j) << 2,
        }
    })
}

/// The scale and the minimum (0 where the format has none) of one lane in one half of a block.
#[inline]
pub(crate) fn lane_scales(
    format: IntFormat,
    scales: &[u8],
    block: usize,
    half: usize,
    lane: usize,
) -> (f32, f32) {
    let (bytes, blocks) = format.scale_entry();
    let entry = &scales[block / blocks * bytes..][..bytes];
    let sub = block % blocks;
    let (d, m) = (half_at(entry, lane * 2), if format.min() { half_at(entry, 32 + lane * 2) } else { 0.0 });
    match format.scales {
        Scales::Plain | Scales::PlainMin => (d, m),
        Scales::SubMin => {
            let at = 64 + sub * 32 + lane;
            (d * f32::from(entry[at]), m * f32::from(entry[at + 16]))
        }
        Scales::HalfSigned => (d * f32::from(entry[32 + (sub * 2 + half) * 16 + lane] as i8), 0.0),
        Scales::HalfMin => {
            let byte = entry[64 + (sub * 2 + half) * 16 + lane];
            (d * f32::from(byte & 15), m * f32::from(byte >> 4))
        }
    }
}

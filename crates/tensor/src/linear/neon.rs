//! The products with NEON and its byte dot product: four output rows a register, half a panel at a time.
//!
//! `sdot` multiplies signed bytes and adds four of them to 32 bits, so every format's codes go in as they are (they
//! stay below 64) but for the eight-bit ones, whose offset is taken off first. Two instructions are written as
//! assembly: `sdot`, which the standard library does not offer on stable Rust, and the conversion from half precision,
//! likewise.

#![allow(clippy::needless_range_loop, reason = "rows index several arrays of registers and pointers at once")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::tile::{BLOCK_WORDS, HALF_WORDS, Kernel, Sums, Tile};
use crate::DType;
use crate::matrix::format::{Codes, Format, PLANE, Scales, with_format};
use crate::matrix::panel::BLOCK;

/// Most input rows in a pass.
const PASS: usize = 4;

/// Registers of four lanes in a pass: half a panel.
const QUADS: usize = 2;

/// The kernel for weights of `dtype` and any number of rows.
pub(super) fn kernel(dtype: DType) -> Kernel {
    with_format!(dtype, F => quantized::<F>, _ => match dtype {
        DType::F32 => floats::<F32>,
        DType::F16 => floats::<F16>,
        _ => floats::<Bf16>,
    })
}

/// Calls `$pass::<$T, ROWS>(tile, first row, half, sums)` until all rows and both halves are done.
macro_rules! passes {
    ($pass:ident, $T:ty, $tile:ident, $sums:ident) => {
        for half in 0..2 {
            for first in (0..$tile.rows).step_by(PASS) {
                // SAFETY: the caller has checked the tile's lengths.
                unsafe {
                    match $tile.rows - first {
                        1 => $pass::<$T, 1>($tile, first, half, $sums),
                        2 => $pass::<$T, 2>($tile, first, half, $sums),
                        3 => $pass::<$T, 3>($tile, first, half, $sums),
                        _ => $pass::<$T, PASS>($tile, first, half, $sums),
                    }
                }
            }
        }
    };
}

/// Adds to each lane the products of its four signed bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, weights: int8x16_t, inputs: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {weights:v}.16b, {inputs:v}.16b",
            sum = inout(vreg) sum,
            weights = in(vreg) weights,
            inputs = in(vreg) inputs,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Four half-precision numbers as `f32`.
///
/// # Safety
/// `at` has eight readable bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn widen(at: *const u8) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the caller's promise; the assembly is arithmetic on registers.
    unsafe {
        let halves = vld1_u8(at);
        asm!(
            "fcvtl {wide:v}.4s, {halves:v}.4h",
            wide = lateout(vreg) wide,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

#[target_feature(enable = "neon,dotprod")]
fn quantized<F: Format>(tile: &Tile<'_>, sums: &mut Sums) {
    let blocks = tile.layout.cols / BLOCK;
    assert!(
        tile.panel.len() == tile.layout.bytes
            && tile.words.len() == blocks * BLOCK_WORDS * tile.rows
            && tile.halves.len() == blocks * HALF_WORDS * tile.rows
    );
    passes!(quantized_pass, F, tile, sums);
}

/// # Safety
/// `tile` has the lengths that [`quantized`] asserts, and rows `first..first + ROWS`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn quantized_pass<F: Format, const ROWS: usize>(
    tile: &Tile<'_>,
    first: usize,
    half: usize,
    sums: &mut Sums,
) {
    let rows = tile.rows;
    let mut total = [[vdupq_n_f32(0.0); QUADS]; ROWS];
    // SAFETY: `layout` describes the panel; the pointers into words and halves stay inside one block's
    // `BLOCK_WORDS * rows` and `HALF_WORDS * rows` of them.
    unsafe {
        let table = tile.panel.as_ptr().add(tile.layout.code_bytes);
        for block in 0..tile.layout.cols / BLOCK {
            let planes = tile.panel.as_ptr().add(block * F::INT.planes() * PLANE);
            let words = tile.words.as_ptr().add(block * BLOCK_WORDS * rows + first);
            let halves = tile.halves.as_ptr().add(block * HALF_WORDS * rows + first);
            let mut dots = [[vdupq_n_s32(0); QUADS]; ROWS];
            // Where sums start: −offset · Σ a; eight-bit codes are taken as signed, without an offset.
            let start = |negative: *const u32, row: usize| match (F::INT.codes, F::INT.offset_bits) {
                (Codes::Byte, _) | (_, None) => vdupq_n_s32(0),
                (_, Some(bits)) => vdupq_n_s32((*negative.add(row) as i32) << bits),
            };
            macro_rules! group {
                ($g:literal) => {{
                    let mut weights = [vdupq_n_s8(0); QUADS];
                    for (quad, weights) in weights.iter_mut().enumerate() {
                        *weights = codes::<F, $g>(planes.add((half * QUADS + quad) * 16));
                    }
                    for row in 0..ROWS {
                        let inputs = vreinterpretq_s8_u32(vdupq_n_u32(*words.add($g * rows + row)));
                        for quad in 0..QUADS {
                            dots[row][quad] = dot(dots[row][quad], weights[quad], inputs);
                        }
                    }
                }};
            }
            macro_rules! finish {
                ($half:literal, $sums:expr) => {
                    for quad in 0..QUADS {
                        let (scale, min) = scales::<F, $half>(table, block, half * QUADS + quad);
                        for row in 0..ROWS {
                            let sum = &mut total[row][quad];
                            let input_scale = f32::from_bits(*words.add(8 * rows + row));
                            *sum = vfmaq_f32(
                                *sum,
                                vcvtq_f32_s32(dots[row][quad]),
                                vmulq_n_f32(scale, input_scale),
                            );
                            if F::INT.min() {
                                *sum = vfmaq_f32(*sum, min, vdupq_n_f32(f32::from_bits(*$sums.add(row))));
                            }
                        }
                    }
                };
            }
            if F::INT.halves() {
                macro_rules! half {
                    ($half:literal: $($g:literal)*) => {{
                        for row in 0..ROWS {
                            dots[row] = [start(halves.add($half * rows), row); QUADS];
                        }
                        $(group!($g);)*
                        finish!($half, halves.add((2 + $half) * rows));
                    }};
                }
                half!(0: 0 1 2 3);
                half!(1: 4 5 6 7);
            } else {
                for row in 0..ROWS {
                    dots[row] = [start(words.add(10 * rows), row); QUADS];
                }
                group!(0);
                group!(4);
                group!(1);
                group!(5);
                group!(2);
                group!(6);
                group!(3);
                group!(7);
                finish!(0, words.add(9 * rows));
            }
        }
    }
    store(&total, first, half, sums);
}

/// The codes of group `G` for four lanes, as signed bytes; of eight-bit ones the offset is taken off.
///
/// # Safety
/// The block's planes are readable at `planes`, which is at the four lanes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes<F: Format, const G: usize>(planes: *const u8) -> int8x16_t {
    // SAFETY: formats have as many planes as are read here, and the caller has them readable.
    let plane = |index: usize| unsafe { vld1q_u8(planes.add(index * PLANE)) };
    // A negative shift goes right.
    let to = |x, from: usize, to: usize| vshlq_u8(x, vdupq_n_s8(to as i8 - from as i8));
    let mask = |x, bits: u8| vandq_u8(x, vdupq_n_u8(bits));
    let nibble = || mask(to(plane(G % 4), G / 4 * 4, 0), 0x0f);
    let merge = |low, x, bits: u8| vorrq_u8(low, mask(x, bits));
    vreinterpretq_s8_u8(match F::INT.codes {
        Codes::Byte => veorq_u8(plane(G), vdupq_n_u8(0x80)),
        Codes::Nibble => nibble(),
        Codes::NibbleOne => merge(nibble(), to(plane(4), G, 4), 0x10),
        Codes::NibbleTwo => merge(nibble(), to(plane(4 + G / 4), G % 4 * 2, 4), 0x30),
        Codes::Two => mask(to(plane(G / 4), G % 4 * 2, 0), 3),
        Codes::TwoOne => merge(mask(to(plane(G / 4), G % 4 * 2, 0), 3), to(plane(2), G, 2), 4),
    })
}

/// The scales and minimums of lanes `4 * quad..` in half `HALF` of block `block`.
///
/// # Safety
/// `table` is the panel's scale table and has the block's entry.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn scales<F: Format, const HALF: usize>(
    table: *const u8,
    block: usize,
    quad: usize,
) -> (float32x4_t, float32x4_t) {
    let (bytes, blocks) = F::INT.scale_entry();
    let sub = block % blocks;
    let entry = table.wrapping_add(block / blocks * bytes);
    // SAFETY: inside the entry, by the layout that `Scales` describes; likewise below.
    let wide = |at: usize| unsafe { widen(entry.add(at + quad * 8)) };
    // SAFETY: as above.
    let word = |at: usize| unsafe { entry.add(at + quad * 4).cast::<u32>().read_unaligned() };
    let unsigned = |word: u32| {
        let bytes = vcreate_u8(u64::from(word));
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
    };
    match F::INT.scales {
        Scales::Plain => (wide(0), vdupq_n_f32(0.0)),
        Scales::PlainMin => (wide(0), wide(32)),
        Scales::SubMin => {
            let at = 64 + sub * 32;
            (vmulq_f32(wide(0), unsigned(word(at))), vmulq_f32(wide(32), unsigned(word(at + 16))))
        }
        Scales::HalfSigned => {
            let bytes = vcreate_s8(u64::from(word(32 + (sub * 2 + HALF) * 16)));
            let scale = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
            (vmulq_f32(wide(0), scale), vdupq_n_f32(0.0))
        }
        Scales::HalfMin => {
            let both = word(64 + (sub * 2 + HALF) * 16);
            let (scale, min) = (unsigned(both & 0x0f0f_0f0f), unsigned(both >> 4 & 0x0f0f_0f0f));
            (vmulq_f32(wide(0), scale), vmulq_f32(wide(32), min))
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store<const ROWS: usize>(
    total: &[[float32x4_t; QUADS]; ROWS],
    first: usize,
    half: usize,
    sums: &mut Sums,
) {
    for (total, sums) in total.iter().zip(&mut sums.0[first..]) {
        for (quad, total) in total.iter().enumerate() {
            let lanes = &mut sums[(half * QUADS + quad) * 4..][..4];
            // SAFETY: four values.
            unsafe { vst1q_f32(lanes.as_mut_ptr(), *total) }
        }
    }
}

/// A float type's weights, column by column.
trait Floats {
    /// Four lanes of column `k`.
    ///
    /// # Safety
    /// The panel has the column.
    unsafe fn load(panel: *const u8, k: usize, quad: usize) -> float32x4_t;

    /// Input column `k` of row `row` of a tile of `rows`.
    ///
    /// # Safety
    /// `words` has the column.
    unsafe fn input(words: *const u32, k: usize, rows: usize, row: usize) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { *words.add(k * rows + row) })
    }
}

struct F32;
struct F16;
struct Bf16;

impl Floats for F32 {
    #[inline(always)]
    unsafe fn load(panel: *const u8, k: usize, quad: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(panel.add(k * 64 + quad * 16).cast()) }
    }
}

impl Floats for F16 {
    #[inline(always)]
    unsafe fn load(panel: *const u8, k: usize, quad: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { widen(panel.add(k * 32 + quad * 8)) }
    }
}

impl Floats for Bf16 {
    #[inline(always)]
    unsafe fn load(panel: *const u8, k: usize, quad: usize) -> float32x4_t {
        // SAFETY: the caller's promise. A bf16 is the upper half of an f32; a lane has the even column low.
        unsafe {
            let pair = vld1q_u32(panel.add(k / 2 * 64 + quad * 16).cast());
            let odd = vandq_u32(pair, vdupq_n_u32(0xffff_0000));
            vreinterpretq_f32_u32(if k.is_multiple_of(2) { vshlq_n_u32::<16>(pair) } else { odd })
        }
    }

    #[inline(always)]
    unsafe fn input(words: *const u32, k: usize, rows: usize, row: usize) -> f32 {
        // SAFETY: the caller's promise.
        let pair = unsafe { *words.add(k / 2 * rows + row) };
        f32::from_bits(if k.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 })
    }
}

#[target_feature(enable = "neon")]
fn floats<W: Floats>(tile: &Tile<'_>, sums: &mut Sums) {
    let pairs = tile.layout.dtype == DType::BF16;
    let columns = if pairs { tile.layout.cols.div_ceil(2) } else { tile.layout.cols };
    assert!(tile.panel.len() == tile.layout.bytes && tile.words.len() == columns * tile.rows);
    passes!(floats_pass, W, tile, sums);
}

/// # Safety
/// `tile` has the lengths that [`floats`] asserts, and rows `first..first + ROWS`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn floats_pass<W: Floats, const ROWS: usize>(
    tile: &Tile<'_>,
    first: usize,
    half: usize,
    sums: &mut Sums,
) {
    let mut total = [[vdupq_n_f32(0.0); QUADS]; ROWS];
    for k in 0..tile.layout.cols {
        for quad in 0..QUADS {
            // SAFETY: `k` is a column of the panel and of the inputs.
            unsafe {
                let weights = W::load(tile.panel.as_ptr(), k, half * QUADS + quad);
                for (row, total) in total.iter_mut().enumerate() {
                    let input = W::input(tile.words.as_ptr(), k, tile.rows, first + row);
                    total[quad] = vfmaq_f32(total[quad], weights, vdupq_n_f32(input));
                }
            }
        }
    }
    store(&total, first, half, sums);
}

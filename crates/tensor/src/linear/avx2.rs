//! The products with AVX2, FMA and F16C: eight output rows a register, half a panel at a time.
//!
//! There are sixteen registers, so a pass keeps four input rows at most. Without a byte dot product that adds to
//! 32 bits, pairs of products are added in 16 bits (`vpmaddubsw`), for as many groups of columns as the codes'
//! size leaves room, and widened then; all of it is exact, so the bits are those of the other families. Codes of
//! eight bits would overflow as unsigned numbers: there the weights' magnitudes meet inputs with the weights' signs.

#![allow(clippy::needless_range_loop, reason = "rows index several arrays of registers and pointers at once")]

use std::arch::x86_64::*;

use super::tile::{BLOCK_WORDS, HALF_WORDS, Kernel, Sums, Tile};
use crate::DType;
use crate::matrix::format::{Codes, Format, PLANE, Scales, with_format};
use crate::matrix::panel::BLOCK;

/// Most input rows in a pass.
const PASS: usize = 4;

/// Bytes of a plane, or values of a column, that half a panel takes.
const HALF_PLANE: usize = 32;
const HALF_LANES: usize = 8;

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

#[target_feature(enable = "avx2,fma,f16c")]
fn quantized<F: Format>(tile: &Tile<'_>, sums: &mut Sums) {
    let blocks = tile.layout.cols / BLOCK;
    assert!(
        tile.panel.len() == tile.layout.bytes
            && tile.words.len() == blocks * BLOCK_WORDS * tile.rows
            && tile.halves.len() == blocks * HALF_WORDS * tile.rows
    );
    passes!(quantized_pass, F, tile, sums);
}

/// Groups of columns whose products fit 16 bits when added: twice 127 times the largest code each.
const fn groups_in_16_bits(codes: Codes) -> usize {
    match codes {
        Codes::Byte => 1,
        Codes::NibbleTwo => 2,
        Codes::NibbleOne => 4,
        Codes::Nibble | Codes::Two | Codes::TwoOne => 8,
    }
}

/// # Safety
/// `tile` has the lengths that [`quantized`] asserts, and rows `first..first + ROWS`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantized_pass<F: Format, const ROWS: usize>(
    tile: &Tile<'_>,
    first: usize,
    half: usize,
    sums: &mut Sums,
) {
    let rows = tile.rows;
    let ones = _mm256_set1_epi16(1);
    let mut total = [_mm256_setzero_ps(); ROWS];
    // SAFETY: `layout` describes the panel; the pointers into words and halves stay inside one block's
    // `BLOCK_WORDS * rows` and `HALF_WORDS * rows` of them.
    unsafe {
        let table = tile.panel.as_ptr().add(tile.layout.code_bytes);
        for block in 0..tile.layout.cols / BLOCK {
            let planes = tile.panel.as_ptr().add(block * F::INT.planes() * PLANE + half * HALF_PLANE);
            let words = tile.words.as_ptr().add(block * BLOCK_WORDS * rows + first);
            let halves = tile.halves.as_ptr().add(block * HALF_WORDS * rows + first);
            let mut dots = [_mm256_setzero_si256(); ROWS];
            let mut pairs = [_mm256_setzero_si256(); ROWS];
            // `done`: groups added to `pairs` since they were last widened, this one included.
            macro_rules! group {
                ($g:literal, $done:expr) => {{
                    let codes = codes::<F, $g>(planes);
                    for row in 0..ROWS {
                        let inputs = _mm256_set1_epi32(*words.add($g * rows + row) as i32);
                        let products = if F::INT.codes as u8 == Codes::Byte as u8 {
                            _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(inputs, codes))
                        } else {
                            _mm256_maddubs_epi16(codes, inputs)
                        };
                        pairs[row] = _mm256_add_epi16(pairs[row], products);
                        if $done % groups_in_16_bits(F::INT.codes) == 0 {
                            dots[row] = _mm256_add_epi32(dots[row], _mm256_madd_epi16(pairs[row], ones));
                            pairs[row] = _mm256_setzero_si256();
                        }
                    }
                }};
            }
            // Where sums start: −offset · Σ a; eight-bit codes are taken as signed, without an offset.
            let start = |negative: *const u32, row: usize| match (F::INT.codes, F::INT.offset_bits) {
                (Codes::Byte, _) | (_, None) => _mm256_setzero_si256(),
                (_, Some(bits)) => _mm256_set1_epi32((*negative.add(row) as i32) << bits),
            };
            if F::INT.halves() {
                macro_rules! half {
                    ($half:literal: $($g:literal)*) => {{
                        for row in 0..ROWS {
                            dots[row] = start(halves.add($half * rows), row);
                        }
                        $(group!($g, $g % 4 + 1);)*
                        for row in 0..ROWS {
                            dots[row] = _mm256_add_epi32(dots[row], _mm256_madd_epi16(pairs[row], ones));
                            pairs[row] = _mm256_setzero_si256();
                        }
                        let (scale, min) = scales::<F, $half>(table, block, half);
                        for row in 0..ROWS {
                            let scale = _mm256_mul_ps(scale, broadcast(words.add(8 * rows + row)));
                            total[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[row]), scale, total[row]);
                            if F::INT.min() {
                                let sum = broadcast(halves.add((2 + $half) * rows + row));
                                total[row] = _mm256_fmadd_ps(min, sum, total[row]);
                            }
                        }
                    }};
                }
                half!(0: 0 1 2 3);
                half!(1: 4 5 6 7);
            } else {
                for row in 0..ROWS {
                    dots[row] = start(words.add(10 * rows), row);
                }
                group!(0, 1);
                group!(4, 2);
                group!(1, 3);
                group!(5, 4);
                group!(2, 5);
                group!(6, 6);
                group!(3, 7);
                group!(7, 8);
                let (scale, min) = scales::<F, 0>(table, block, half);
                for row in 0..ROWS {
                    let scale = _mm256_mul_ps(scale, broadcast(words.add(8 * rows + row)));
                    total[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[row]), scale, total[row]);
                    if F::INT.min() {
                        total[row] = _mm256_fmadd_ps(min, broadcast(words.add(9 * rows + row)), total[row]);
                    }
                }
            }
        }
    }
    store(&total, first, half, sums);
}

/// The codes of group `G` for eight lanes: unsigned, but for eight-bit ones, whose offset is taken off.
///
/// # Safety
/// The block's planes are readable at `planes`, which is at the half's lanes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn codes<F: Format, const G: usize>(planes: *const u8) -> __m256i {
    // SAFETY: formats have as many planes as are read here, and the caller has them readable.
    let plane = |index: usize| unsafe { _mm256_loadu_si256(planes.add(index * PLANE).cast()) };
    // Shifts of 16-bit units: bits that cross from one byte into the other are masked away.
    let to = |x, from: usize, to: usize| {
        let by = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
        if from > to { _mm256_srl_epi16(x, by) } else { _mm256_sll_epi16(x, by) }
    };
    let mask = |x, bits: u8| _mm256_and_si256(x, _mm256_set1_epi8(bits as i8));
    let nibble = || mask(to(plane(G % 4), G / 4 * 4, 0), 0x0f);
    let merge = |low, x, bits: u8| _mm256_or_si256(low, mask(x, bits));
    match F::INT.codes {
        Codes::Byte => _mm256_xor_si256(plane(G), _mm256_set1_epi8(i8::MIN)),
        Codes::Nibble => nibble(),
        Codes::NibbleOne => merge(nibble(), to(plane(4), G, 4), 0x10),
        Codes::NibbleTwo => merge(nibble(), to(plane(4 + G / 4), G % 4 * 2, 4), 0x30),
        Codes::Two => mask(to(plane(G / 4), G % 4 * 2, 0), 3),
        Codes::TwoOne => merge(mask(to(plane(G / 4), G % 4 * 2, 0), 3), to(plane(2), G, 2), 4),
    }
}

/// The scales and minimums of eight lanes in half `HALF` of block `block`.
///
/// # Safety
/// `table` is the panel's scale table and has the block's entry.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales<F: Format, const HALF: usize>(
    table: *const u8,
    block: usize,
    half: usize,
) -> (__m256, __m256) {
    let (bytes, blocks) = F::INT.scale_entry();
    let sub = block % blocks;
    let entry = table.wrapping_add(block / blocks * bytes);
    // SAFETY: inside the entry, by the layout that `Scales` describes; likewise below.
    let wide = |at: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(entry.add(at + half * 16).cast())) };
    // SAFETY: as above.
    let eight = |at: usize| unsafe { _mm_loadl_epi64(entry.add(at + half * HALF_LANES).cast()) };
    let unsigned = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(at)));
    match F::INT.scales {
        Scales::Plain => (wide(0), _mm256_setzero_ps()),
        Scales::PlainMin => (wide(0), wide(32)),
        Scales::SubMin => {
            let at = 64 + sub * 32;
            (_mm256_mul_ps(wide(0), unsigned(at)), _mm256_mul_ps(wide(32), unsigned(at + 16)))
        }
        Scales::HalfSigned => {
            let scale = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(32 + (sub * 2 + HALF) * 16)));
            (_mm256_mul_ps(wide(0), scale), _mm256_setzero_ps())
        }
        Scales::HalfMin => {
            let both = _mm256_cvtepu8_epi32(eight(64 + (sub * 2 + HALF) * 16));
            let scale = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
            let min = _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(both));
            (_mm256_mul_ps(wide(0), scale), _mm256_mul_ps(wide(32), min))
        }
    }
}

/// The `f32` at `at` in every lane.
///
/// # Safety
/// `at` is readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn broadcast(at: *const u32) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_set1_ps(f32::from_bits(unsafe { *at }))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store<const ROWS: usize>(total: &[__m256; ROWS], first: usize, half: usize, sums: &mut Sums) {
    for (total, sums) in total.iter().zip(&mut sums.0[first..]) {
        let lanes = &mut sums[half * HALF_LANES..][..HALF_LANES];
        // SAFETY: eight values.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), *total) }
    }
}

/// A float type's weights, column by column.
trait Floats {
    /// Eight lanes of column `k`.
    ///
    /// # Safety
    /// AVX2 and F16C are there, and the panel has the column.
    unsafe fn load(panel: *const u8, k: usize, half: usize) -> __m256;

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
    unsafe fn load(panel: *const u8, k: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(panel.add(k * 64 + half * 32).cast()) }
    }
}

impl Floats for F16 {
    #[inline(always)]
    unsafe fn load(panel: *const u8, k: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(panel.add(k * 32 + half * 16).cast())) }
    }
}

impl Floats for Bf16 {
    #[inline(always)]
    unsafe fn load(panel: *const u8, k: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise. A bf16 is the upper half of an f32; a lane has the even column low.
        unsafe {
            let pair = _mm256_loadu_si256(panel.add(k / 2 * 64 + half * 32).cast());
            let even = _mm256_slli_epi32::<16>(pair);
            let odd = _mm256_and_si256(pair, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            _mm256_castsi256_ps(if k.is_multiple_of(2) { even } else { odd })
        }
    }

    #[inline(always)]
    unsafe fn input(words: *const u32, k: usize, rows: usize, row: usize) -> f32 {
        // SAFETY: the caller's promise.
        let pair = unsafe { *words.add(k / 2 * rows + row) };
        f32::from_bits(if k.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 })
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn floats<W: Floats>(tile: &Tile<'_>, sums: &mut Sums) {
    let pairs = tile.layout.dtype == DType::BF16;
    let columns = if pairs { tile.layout.cols.div_ceil(2) } else { tile.layout.cols };
    assert!(tile.panel.len() == tile.layout.bytes && tile.words.len() == columns * tile.rows);
    passes!(floats_pass, W, tile, sums);
}

/// # Safety
/// `tile` has the lengths that [`floats`] asserts, and rows `first..first + ROWS`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats_pass<W: Floats, const ROWS: usize>(
    tile: &Tile<'_>,
    first: usize,
    half: usize,
    sums: &mut Sums,
) {
    let mut total = [_mm256_setzero_ps(); ROWS];
    for k in 0..tile.layout.cols {
        // SAFETY: `k` is a column of the panel and of the inputs.
        unsafe {
            let weights = W::load(tile.panel.as_ptr(), k, half);
            for (row, total) in total.iter_mut().enumerate() {
                let input = W::input(tile.words.as_ptr(), k, tile.rows, first + row);
                *total = _mm256_fmadd_ps(weights, _mm256_set1_ps(input), *total);
            }
        }
    }
    store(&total, first, half, sums);
}

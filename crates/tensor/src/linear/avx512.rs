//! The products with AVX-512 (VNNI; BF16 for bf16 weights): sixteen output rows a register.
//!
//! A kernel is compiled for each format and each number of input rows in a tile, so that all sums stay in registers:
//! with twelve rows 12 integer and 12 float sums, one register of codes, scale and minimum. Codes are unpacked
//! in registers just before use. Activations come as 32-bit broadcasts folded into the dot product, so a block of 32
//! columns costs `8·rows` dot products, at most `3·rows` further operations on the two multiplying ports, and an
//! unpacking that is shared by the rows and mostly goes to the other ports.

#![allow(clippy::needless_range_loop, reason = "rows index several arrays of registers and pointers at once")]

use std::arch::x86_64::*;

use super::tile::{BLOCK_WORDS, HALF_WORDS, Kernel, Sums, Tile};
use crate::DType;
use crate::matrix::format::{Codes, Format, PLANE, Scales, with_format};
use crate::matrix::panel::BLOCK;

/// `$function::<…, ROWS>` for a number of rows known at run time.
macro_rules! by_rows {
    ($rows:expr, $R:ident => $kernel:expr) => {
        match $rows {
            1 => {
                const $R: usize = 1;
                $kernel
            }
            2 => {
                const $R: usize = 2;
                $kernel
            }
            3 => {
                const $R: usize = 3;
                $kernel
            }
            4 => {
                const $R: usize = 4;
                $kernel
            }
            5 => {
                const $R: usize = 5;
                $kernel
            }
            6 => {
                const $R: usize = 6;
                $kernel
            }
            7 => {
                const $R: usize = 7;
                $kernel
            }
            8 => {
                const $R: usize = 8;
                $kernel
            }
            9 => {
                const $R: usize = 9;
                $kernel
            }
            10 => {
                const $R: usize = 10;
                $kernel
            }
            11 => {
                const $R: usize = 11;
                $kernel
            }
            _ => {
                const $R: usize = 12;
                $kernel
            }
        }
    };
}

/// The kernel for weights of `dtype` and tiles of `rows` rows.
pub(super) fn kernel(dtype: DType, rows: usize) -> Kernel {
    with_format!(dtype, F => by_rows!(rows, ROWS => quantized::<F, ROWS>), _ => match dtype {
        DType::F32 => by_rows!(rows, ROWS => floats::<false, ROWS>),
        DType::F16 => by_rows!(rows, ROWS => floats::<true, ROWS>),
        _ => by_rows!(rows, ROWS => bf16::<ROWS>),
    })
}

/// Asks for `lines` cache lines at `at`; any address is allowed.
///
/// One or two rows read on at once and want them in the first level. More rows take longer than the first level's
/// few misses can wait for, so they ask for the second one, which takes more of them at a time.
#[inline(always)]
fn prefetch<const ROWS: usize>(at: *const u8, lines: usize) {
    for line in 0..lines {
        let at = at.wrapping_add(line * 64).cast();
        // SAFETY: a hint; it faults on no address.
        unsafe { if ROWS <= 2 { _mm_prefetch::<_MM_HINT_T0>(at) } else { _mm_prefetch::<_MM_HINT_T1>(at) } }
    }
}

/// The codes of group `G` of the block whose planes start at `planes`.
///
/// # Safety
/// The block's planes are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn codes<F: Format, const G: usize>(planes: *const u8) -> __m512i {
    // SAFETY: formats have as many planes as are read here, and the caller has them readable.
    let plane = |index: usize| unsafe { _mm512_loadu_si512(planes.add(index * PLANE).cast()) };
    // Shifts of 16-bit units: bits that cross from one byte into the other are masked away.
    let left = |x, by: usize| _mm512_sllv_epi16(x, _mm512_set1_epi16(by as i16));
    let right = |x, by: usize| _mm512_srlv_epi16(x, _mm512_set1_epi16(by as i16));
    let to = |x, from: usize, to: usize| if from > to { right(x, from - to) } else { left(x, to - from) };
    let mask = |x, bits: u8| _mm512_and_si512(x, _mm512_set1_epi8(bits as i8));
    let nibble = || mask(to(plane(G % 4), G / 4 * 4, 0), 0x0f);
    // `low | (x & bits)` in one instruction.
    let merge = |low, x, bits: u8| _mm512_ternarylogic_epi32::<0xf8>(low, x, _mm512_set1_epi8(bits as i8));
    match F::INT.codes {
        Codes::Byte => plane(G),
        Codes::Nibble => nibble(),
        Codes::NibbleOne => merge(nibble(), to(plane(4), G, 4), 0x10),
        Codes::NibbleTwo => merge(nibble(), to(plane(4 + G / 4), G % 4 * 2, 4), 0x30),
        Codes::Two => mask(to(plane(G / 4), G % 4 * 2, 0), 3),
        Codes::TwoOne => merge(mask(to(plane(G / 4), G % 4 * 2, 0), 3), to(plane(2), G, 2), 4),
    }
}

/// The scale and the minimum of half `HALF` of block `block`.
///
/// # Safety
/// `table` is the panel's scale table and has the block's entry.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn scales<F: Format, const HALF: usize>(table: *const u8, block: usize) -> (__m512, __m512) {
    let (bytes, blocks) = F::INT.scale_entry();
    let sub = block % blocks;
    // SAFETY: `at` stays inside the entry, by the layout that `Scales` describes; likewise below.
    let half = |at: usize| unsafe {
        _mm512_cvtph_ps(_mm256_loadu_si256(table.add(block / blocks * bytes + at).cast()))
    };
    // SAFETY: as above.
    let bytes = |at: usize| unsafe { _mm_loadu_si128(table.add(block / blocks * bytes + at).cast()) };
    let unsigned = |x| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
    match F::INT.scales {
        Scales::Plain => (half(0), _mm512_setzero_ps()),
        Scales::PlainMin => (half(0), half(32)),
        Scales::SubMin => {
            let at = 64 + sub * 32;
            (_mm512_mul_ps(half(0), unsigned(bytes(at))), _mm512_mul_ps(half(32), unsigned(bytes(at + 16))))
        }
        Scales::HalfSigned => {
            let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(32 + (sub * 2 + HALF) * 16)));
            (_mm512_mul_ps(half(0), scale), _mm512_setzero_ps())
        }
        Scales::HalfMin => {
            let both = _mm512_cvtepu8_epi32(bytes(64 + (sub * 2 + HALF) * 16));
            let scale = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
            let min = _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(both));
            (_mm512_mul_ps(half(0), scale), _mm512_mul_ps(half(32), min))
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn quantized<F: Format, const ROWS: usize>(tile: &Tile<'_>, sums: &mut Sums) {
    let blocks = tile.layout.cols / BLOCK;
    assert!(
        tile.panel.len() == tile.layout.bytes
            && tile.words.len() == blocks * BLOCK_WORDS * ROWS
            && tile.halves.len() == blocks * HALF_WORDS * ROWS
    );
    let code_bytes = F::INT.planes() * PLANE;
    // A block's share of the panel, in whole cache lines; a little more than the panel in all.
    let (entry, served) = F::INT.scale_entry();
    let lines = (code_bytes + entry / served).div_ceil(64);
    let mut ahead = tile.ahead;
    let (mut planes, mut words, mut halves) =
        (tile.panel.as_ptr(), tile.words.as_ptr(), tile.halves.as_ptr());
    let mut total = [_mm512_setzero_ps(); ROWS];
    // SAFETY: `layout` describes the panel, `words` and `halves` have the lengths asserted above, and pointers
    // advance by one block for each of `blocks` blocks.
    unsafe {
        let table = tile.panel.as_ptr().add(tile.layout.code_bytes);
        for block in 0..blocks {
            macro_rules! groups {
                ($dots:ident: $($g:literal)*) => {$({
                    // Spread over the block: a burst would fill the miss queue and hold up the loads behind it.
                    if !ahead.is_null() {
                        prefetch::<ROWS>(ahead.wrapping_add($g * lines / 8 * 64), ($g + 1) * lines / 8 - $g * lines / 8);
                    }
                    let codes = codes::<F, $g>(planes);
                    for row in 0..ROWS {
                        let inputs = _mm512_set1_epi32(*words.add($g * ROWS + row) as i32);
                        $dots[row] = _mm512_dpbusd_epi32($dots[row], codes, inputs);
                    }
                })*};
            }
            // Where sums start: −offset · Σ a.
            let start = |negative: *const u32, row: usize| match F::INT.offset_bits {
                Some(bits) => _mm512_sllv_epi32(
                    _mm512_set1_epi32(*negative.add(row) as i32),
                    _mm512_set1_epi32(bits as i32),
                ),
                None => _mm512_setzero_si512(),
            };
            let mut dots = [_mm512_setzero_si512(); ROWS];
            if F::INT.halves() {
                macro_rules! half {
                    ($half:literal: $($g:literal)*) => {{
                        for row in 0..ROWS {
                            dots[row] = start(halves.add($half * ROWS), row);
                        }
                        groups!(dots: $($g)*);
                        let (scale, min) = scales::<F, $half>(table, block);
                        for row in 0..ROWS {
                            let scale = _mm512_mul_ps(scale, broadcast(words.add(8 * ROWS + row)));
                            total[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[row]), scale, total[row]);
                            if F::INT.min() {
                                let sum = broadcast(halves.add((2 + $half) * ROWS + row));
                                total[row] = _mm512_fmadd_ps(min, sum, total[row]);
                            }
                        }
                    }};
                }
                half!(0: 0 1 2 3);
                half!(1: 4 5 6 7);
            } else {
                for row in 0..ROWS {
                    dots[row] = start(words.add(10 * ROWS), row);
                }
                // A plane of nibbles has groups i and i + 4.
                groups!(dots: 0 4 1 5 2 6 3 7);
                let (scale, min) = scales::<F, 0>(table, block);
                for row in 0..ROWS {
                    let scale = _mm512_mul_ps(scale, broadcast(words.add(8 * ROWS + row)));
                    total[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[row]), scale, total[row]);
                    if F::INT.min() {
                        total[row] = _mm512_fmadd_ps(min, broadcast(words.add(9 * ROWS + row)), total[row]);
                    }
                }
            }
            if !ahead.is_null() {
                ahead = ahead.wrapping_add(lines * 64);
            }
            planes = planes.add(code_bytes);
            words = words.add(BLOCK_WORDS * ROWS);
            halves = halves.add(HALF_WORDS * ROWS);
        }
    }
    store(&total, sums);
}

/// The `f32` at `at` in every lane.
///
/// # Safety
/// `at` is readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(at: *const u32) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_set1_ps(f32::from_bits(unsafe { *at }))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const ROWS: usize>(total: &[__m512; ROWS], sums: &mut Sums) {
    for (total, sums) in total.iter().zip(&mut sums.0) {
        // SAFETY: sixteen values.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *total) }
    }
}

/// F32 weights, or F16 ones (`HALF`) widened as they are read.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn floats<const HALF: bool, const ROWS: usize>(tile: &Tile<'_>, sums: &mut Sums) {
    let cols = tile.layout.cols;
    let column_bytes = if HALF { 32 } else { 64 };
    assert!(tile.panel.len() >= cols * column_bytes && tile.words.len() == cols * ROWS);
    let (panel, words) = (tile.panel.as_ptr(), tile.words.as_ptr());
    let mut total = [_mm512_setzero_ps(); ROWS];
    for k in 0..cols {
        // Two columns of f16 share a line.
        if !tile.ahead.is_null() && (!HALF || k % 2 == 0) {
            prefetch::<ROWS>(tile.ahead.wrapping_add(k * column_bytes), 1);
        }
        // SAFETY: `k < cols`, and the lengths are asserted above.
        unsafe {
            let at = panel.add(k * column_bytes);
            let weights = if HALF {
                _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()))
            } else {
                _mm512_loadu_ps(at.cast())
            };
            for row in 0..ROWS {
                total[row] = _mm512_fmadd_ps(weights, broadcast(words.add(k * ROWS + row)), total[row]);
            }
        }
    }
    store(&total, sums);
}

/// BF16 weights: the hardware's dot product of pairs, one chain.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn bf16<const ROWS: usize>(tile: &Tile<'_>, sums: &mut Sums) {
    let pairs = tile.layout.cols.div_ceil(2);
    assert!(tile.panel.len() >= pairs * 64 && tile.words.len() == pairs * ROWS);
    let (panel, words) = (tile.panel.as_ptr(), tile.words.as_ptr());
    let mut total = [_mm512_setzero_ps(); ROWS];
    for pair in 0..pairs {
        if !tile.ahead.is_null() {
            prefetch::<ROWS>(tile.ahead.wrapping_add(pair * 64), 1);
        }
        // SAFETY: `pair < pairs`, and the lengths are asserted above. Any 512 bits are 32 bf16 numbers.
        unsafe {
            let weights: __m512bh = std::mem::transmute(_mm512_loadu_si512(panel.add(pair * 64).cast()));
            for row in 0..ROWS {
                let inputs = _mm512_set1_epi32(*words.add(pair * ROWS + row) as i32);
                total[row] =
                    _mm512_dpbf16_ps(total[row], weights, std::mem::transmute::<__m512i, __m512bh>(inputs));
            }
        }
    }
    store(&total, sums);
}

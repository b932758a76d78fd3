//! Rounding with AVX-512, four rows at a time: the same bits as the general code, a third of its time.
//!
//! Alone, a row spends its time on what crosses lanes (its largest magnitude, its sums) and on eight stores of one
//! word each, since words of different rows lie side by side. Four rows share both: a 4 × 4 transposition reduces
//! four maxima or sums at once, and turns rows of words into words of rows. All of it is exact in any order.

use std::arch::x86_64::*;

use super::TINY;
use crate::linear::inputs::Columns;
use crate::linear::tile::{BLOCK_WORDS, HALF_WORDS};
use crate::matrix::panel::BLOCK;

/// Rows at a time.
const ROWS: usize = 4;

/// As [`super::Quantize`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in crate::linear) fn quantize(columns: Columns<'_>) {
    let Columns { x, cols, columns, words, halves } = columns;
    let rows = x.len() / cols;
    let blocks = columns.len() / BLOCK;
    assert!(rows > 0 && rows * cols == x.len() && columns.end <= cols && columns.len() == blocks * BLOCK);
    assert!(words.len() == blocks * BLOCK_WORDS * rows && halves.len() == blocks * HALF_WORDS * rows);
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        // Missing rows repeat the last one and are not stored.
        let starts: [*const f32; ROWS] =
            std::array::from_fn(|r| x[(first + r.min(count - 1)) * cols + columns.start..].as_ptr());
        let mask = (1u8 << count) - 1;
        for block in 0..blocks {
            let rounded = round(starts.map(|start| start.wrapping_add(block * BLOCK)));
            // SAFETY: `block < blocks` and `first + count <= rows`, the mask leaves out what is past them, and words
            // and halves have the lengths asserted.
            unsafe {
                let words = words.as_mut_ptr().add(block * BLOCK_WORDS * rows + first);
                for (index, group) in rounded.words.into_iter().enumerate() {
                    _mm_mask_storeu_epi32(words.add(index * rows).cast(), mask, group);
                }
                let halves = halves.as_mut_ptr().add(block * HALF_WORDS * rows + first);
                for (index, half) in rounded.halves.into_iter().enumerate() {
                    _mm_mask_storeu_epi32(halves.add(index * rows).cast(), mask, half);
                }
            }
        }
    }
}

/// A block of four rows: word *w* of each row side by side.
struct Rounded {
    words: [__m128i; BLOCK_WORDS],
    halves: [__m128i; HALF_WORDS],
}

/// # Safety
/// A block can be read at each of `starts`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn round(starts: [*const f32; ROWS]) -> Rounded {
    // SAFETY: the caller's promise: a block is two vectors.
    let x = starts.map(|x| unsafe { [_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))] });
    // Magnitudes compare as their bits do; an infinity is above all numbers and a NaN above that.
    let magnitudes = x.map(|[low, high]| {
        let bits = |x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff));
        let most = _mm512_max_epu32(bits(low), bits(high));
        let most = _mm256_max_epu32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
        _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most))
    });
    let [a, b, c, d] = transpose(magnitudes);
    let largest = _mm_max_epu32(_mm_max_epu32(a, b), _mm_max_epu32(c, d));
    let bits = |x: f32| _mm_set1_epi32(x.to_bits() as i32);
    let tiny = _mm_cmplt_epu32_mask(largest, bits(TINY));
    let numbers = !tiny & _mm_cmple_epu32_mask(largest, bits(f32::MAX));
    let limit = _mm_set1_ps(127.0);
    let inverse = _mm_maskz_div_ps(numbers, limit, _mm_castsi128_ps(largest));
    let scale = _mm_mask_div_ps(_mm_set1_ps(f32::NAN), numbers, _mm_castsi128_ps(largest), limit);
    let scale = _mm_mask_mov_ps(scale, tiny, _mm_setzero_ps());

    let inverse = [
        _mm512_broadcastss_ps(inverse),
        _mm512_broadcastss_ps(_mm_shuffle_ps::<0b01_01_01_01>(inverse, inverse)),
        _mm512_broadcastss_ps(_mm_shuffle_ps::<0b10_10_10_10>(inverse, inverse)),
        _mm512_broadcastss_ps(_mm_shuffle_ps::<0b11_11_11_11>(inverse, inverse)),
    ];
    let codes: [__m256i; ROWS] = std::array::from_fn(|r| {
        // Conversion rounds to the nearest, ties to even.
        let bytes = |x| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse[r])));
        let all = _mm256_set_m128i(bytes(x[r][1]), bytes(x[r][0]));
        _mm256_maskz_mov_epi32(0u8.wrapping_sub(numbers >> r & 1), all)
    });

    // Sums of four codes each, then of the four words of a half.
    let sums = codes.map(|codes| _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), codes));
    let half = |quarters: [__m128i; 4]| {
        let [a, b, c, d] = transpose(quarters);
        _mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(c, d))
    };
    let first = half(sums.map(|sums| _mm256_castsi256_si128(sums)));
    let second = half(sums.map(|sums| _mm256_extracti128_si256::<1>(sums)));
    let negative = |x| _mm_sub_epi32(_mm_setzero_si128(), x);
    let scaled = |x| _mm_castps_si128(_mm_mul_ps(scale, _mm_cvtepi32_ps(x)));
    let sum = _mm_add_epi32(first, second);

    let [w0, w1, w2, w3] = transpose(codes.map(|codes| _mm256_castsi256_si128(codes)));
    let [w4, w5, w6, w7] = transpose(codes.map(|codes| _mm256_extracti128_si256::<1>(codes)));
    Rounded {
        words: [w0, w1, w2, w3, w4, w5, w6, w7, _mm_castps_si128(scale), scaled(sum), negative(sum)],
        halves: [negative(first), negative(second), scaled(first), scaled(second)],
    }
}

/// Word *w* of each of four rows side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn transpose([a, b, c, d]: [__m128i; 4]) -> [__m128i; 4] {
    let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
    [
        _mm_unpacklo_epi64(ab, cd),
        _mm_unpackhi_epi64(ab, cd),
        _mm_unpacklo_epi64(ab_high, cd_high),
        _mm_unpackhi_epi64(ab_high, cd_high),
    ]
}

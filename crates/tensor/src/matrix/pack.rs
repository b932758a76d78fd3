//! From file order to panels: sixteen rows are read side by side and their 32-bit words transposed.
//!
//! Where a format's own words already are what a plane wants (Q4_0, Q4_1, Q8_0), packing is that transposition
//! alone; the others are rearranged a word, that is four columns, at a time. Reads run along each row, writes
//! stay inside one panel, which is in the cache, so packing is bound by the memory it reads and first touches.

use super::format::{IntFormat, PLANE, int_format};
use super::panel::{BLOCK, LANES, Layout};
use crate::DType;
use crate::quant::{k_scale_and_min, q3_k_scale, word_at};

/// Packs up to sixteen rows (`rows`: their file bytes, in order) into `panel`, which is all zero.
pub(crate) fn pack_panel(layout: &Layout, rows: &[u8], panel: &mut [u8]) {
    let Some(row_bytes) = layout.dtype.bytes(layout.cols).filter(|&bytes| bytes > 0) else { return };
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        match int_format(layout.dtype) {
            Some(format) => {
                let (codes, scales) = panel.split_at_mut(layout.code_bytes);
                pack_codes(layout.dtype, row, lane, codes);
                for (index, block) in row.chunks_exact(layout.dtype.block_bytes()).enumerate() {
                    let (bytes, _) = format.scale_entry();
                    pack_scales(layout.dtype, block, lane, &mut scales[index * bytes..][..bytes]);
                }
            }
            None => pack_floats(layout.dtype, row, lane, panel),
        }
    }
}

fn pack_floats(dtype: DType, row: &[u8], lane: usize, panel: &mut [u8]) {
    if dtype == DType::F16 {
        for (value, to) in row.chunks_exact(2).zip(panel.chunks_exact_mut(2 * LANES)) {
            to[lane * 2..][..2].copy_from_slice(value);
        }
        return;
    }
    // Four bytes a lane: one f32, or a pair of bf16 (the second missing at the end of an odd row).
    for (word, to) in row.chunks(4).zip(panel.chunks_exact_mut(4 * LANES)) {
        to[lane * 4..][..word.len()].copy_from_slice(word);
    }
}

/// The words of the planes of one lane in one block; as many as the format has planes.
type Words = [u32; 8];

fn pack_codes(dtype: DType, row: &[u8], lane: usize, codes: &mut [u8]) {
    match dtype {
        DType::Q4_0 => pack_words(dtype, row, lane, codes, |b, _| nibbles(b, 2)),
        DType::Q4_1 => pack_words(dtype, row, lane, codes, |b, _| nibbles(b, 4)),
        DType::Q5_0 => pack_words(dtype, row, lane, codes, |b, _| nibbles_and_bits(b, 6, word_at(b, 2))),
        DType::Q5_1 => pack_words(dtype, row, lane, codes, |b, _| nibbles_and_bits(b, 8, word_at(b, 4))),
        // Signed bytes become unsigned ones with an offset of 128.
        DType::Q8_0 => pack_words(dtype, row, lane, codes, |b, _| {
            std::array::from_fn(|g| word_at(b, 2 + 4 * g) ^ 0x8080_8080)
        }),
        DType::Q2_K => pack_words(dtype, row, lane, codes, |b, sub| two_bits(b, 16, sub)),
        DType::Q3_K => pack_words(dtype, row, lane, codes, |b, sub| {
            let mut words = two_bits(b, 32, sub);
            words[2] = one_bit(b, 0, sub);
            words
        }),
        DType::Q4_K => pack_words(dtype, row, lane, codes, |b, sub| k_nibbles(b, 16 + sub / 2 * 32, sub % 2)),
        DType::Q5_K => pack_words(dtype, row, lane, codes, |b, sub| {
            let mut words = k_nibbles(b, 48 + sub / 2 * 32, sub % 2);
            words[4] = one_bit(b, 16, sub);
            words
        }),
        DType::Q6_K => pack_words(dtype, row, lane, codes, |b, sub| {
            let mut words = k_nibbles(b, sub / 4 * 64 + sub % 2 * 32, sub / 2 % 2);
            let high = two_bits(b, 128, sub);
            (words[4], words[5]) = (high[0], high[1]);
            words
        }),
        DType::F32 | DType::F16 | DType::BF16 => {}
    }
}

/// Writes what `words` makes of each block of 32 (number `sub` in its file block) to lane `lane`.
#[inline(always)]
fn pack_words(
    dtype: DType,
    row: &[u8],
    lane: usize,
    codes: &mut [u8],
    words: impl Fn(&[u8], usize) -> Words,
) {
    let planes = int_format(dtype).map_or(0, IntFormat::planes);
    let subs = dtype.block_len() / BLOCK;
    let blocks = row.chunks_exact(dtype.block_bytes()).zip(codes.chunks_exact_mut(subs * planes * PLANE));
    for (block, codes) in blocks {
        for (sub, codes) in codes.chunks_exact_mut(planes * PLANE).enumerate() {
            let words = words(block, sub);
            for (word, plane) in words.iter().zip(codes.chunks_exact_mut(PLANE)) {
                plane[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// The file's own nibble words: byte `j` has value `j` low and `j + 16` high, as the planes do.
#[inline(always)]
fn nibbles(block: &[u8], at: usize) -> Words {
    std::array::from_fn(|i| if i < 4 { word_at(block, at + 4 * i) } else { 0 })
}

/// The same with a plane of fifth bits from `high`, whose bit `k` belongs to value `k`.
#[inline(always)]
fn nibbles_and_bits(block: &[u8], at: usize, high: u32) -> Words {
    let mut words = nibbles(block, at);
    let mut bytes = [0u8; 4];
    for (j, byte) in bytes.iter_mut().enumerate() {
        // Every fourth bit from `j` on, moved together.
        let mut bits = high >> j & 0x1111_1111;
        bits = (bits | bits >> 3) & 0x0303_0303;
        bits = (bits | bits >> 6) & 0x000f_000f;
        *byte = (bits | bits >> 12) as u8;
    }
    words[4] = u32::from_le_bytes(bytes);
    words
}

/// The low (`high` = 0) or high (1) nibbles of the 32 bytes at `at`, two groups a word.
#[inline(always)]
fn k_nibbles(block: &[u8], at: usize, high: usize) -> Words {
    let nibble = |i: usize| word_at(block, at + 4 * i) >> (4 * high) & 0x0f0f_0f0f;
    std::array::from_fn(|i| if i < 4 { nibble(i) | nibble(i + 4) << 4 } else { 0 })
}

/// The two planes of sub-block `sub` from the format's 2-bit codes at `at`.
#[inline(always)]
fn two_bits(block: &[u8], at: usize, sub: usize) -> Words {
    let mut words = [0; 8];
    for g in 0..8 {
        let bits = word_at(block, at + sub / 4 * 32 + 4 * g) >> (sub % 4 * 2) & 0x0303_0303;
        words[g / 4] |= bits << (g % 4 * 2);
    }
    words
}

/// The plane of sub-block `sub` from 32 bytes at `at` that hold its bit at position `sub`.
#[inline(always)]
fn one_bit(block: &[u8], at: usize, sub: usize) -> u32 {
    (0..8).map(|g| (word_at(block, at + 4 * g) >> sub & 0x0101_0101) << g).sum()
}

/// Writes the scales of one file block into its entry of the scale table.
fn pack_scales(dtype: DType, block: &[u8], lane: usize, entry: &mut [u8]) {
    let mut half =
        |at: usize, from: usize| entry[at + lane * 2..][..2].copy_from_slice(&block[from..from + 2]);
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => half(0, 0),
        DType::Q4_1 | DType::Q5_1 => {
            half(0, 0);
            half(32, 2);
        }
        DType::Q4_K | DType::Q5_K => {
            half(0, 0);
            half(32, 2);
            negate_half(entry, 32 + lane * 2);
            for sub in 0..8 {
                let (scale, min) = k_scale_and_min(&block[4..16], sub);
                entry[64 + sub * 32 + lane] = scale;
                entry[64 + sub * 32 + 16 + lane] = min;
            }
        }
        DType::Q2_K => {
            half(0, 80);
            half(32, 82);
            negate_half(entry, 32 + lane * 2);
            for (sub, &scale) in block[..16].iter().enumerate() {
                entry[64 + sub * 16 + lane] = scale;
            }
        }
        DType::Q3_K => {
            half(0, 108);
            for sub in 0..16 {
                entry[32 + sub * 16 + lane] = q3_k_scale(&block[96..108], sub) as u8;
            }
        }
        DType::Q6_K => {
            half(0, 208);
            for (sub, &scale) in block[192..208].iter().enumerate() {
                entry[32 + sub * 16 + lane] = scale;
            }
        }
        DType::F32 | DType::F16 | DType::BF16 => {}
    }
}

/// Flips the sign of the half-precision number at byte `at`: minimums are subtracted in the file, added here.
fn negate_half(entry: &mut [u8], at: usize) {
    entry[at + 1] ^= 0x80;
}

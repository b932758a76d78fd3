//! The block formats: how each turns into `f32`. Plain code, and the reference for every packed kernel.
//!
//! Layouts are GGML's (`ggml-common.h`). A block of 32 holds a scale `d` (and a minimum `m`) in half precision
//! and 32 small codes; a K block of 256 holds sixteen or eight sub-blocks whose own small integer scales multiply
//! the block's `d`. Every product of a scale and a sub-scale is exact in `f32`, so the order of operations below
//! leaves one rounding (none where there is no minimum), and any reader of the format gets the same bits.

use half::{bf16, f16};

use crate::DType;

/// Turns `out.len()` values of `dtype` stored in `bytes` into `f32`. Exact: each value is the format's own formula in `f32`.
///
/// # Panics
/// If `bytes` is not exactly `dtype.bytes(out.len())` long.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        dtype.bytes(out.len()),
        Some(bytes.len()),
        "{} values of {} don't fit the bytes",
        out.len(),
        dtype.name()
    );
    let decode: fn(&[u8], &mut [f32]) = match dtype {
        DType::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::F16 => |b, y| y[0] = half_at(b, 0),
        DType::BF16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::Q4_0 => q4_0,
        DType::Q4_1 => q4_1,
        DType::Q5_0 => q5_0,
        DType::Q5_1 => q5_1,
        DType::Q8_0 => q8_0,
        DType::Q2_K => q2_k,
        DType::Q3_K => q3_k,
        DType::Q4_K => q4_k,
        DType::Q5_K => q5_k,
        DType::Q6_K => q6_k,
    };
    for (block, values) in
        bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len()))
    {
        decode(block, values);
    }
}

/// The half-precision number at byte `at`.
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The little-endian word at byte `at`.
pub(crate) fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Code `k` of 32 nibbles in 16 bytes: the first sixteen are the low halves.
fn nibble(codes: &[u8], k: usize) -> u8 {
    if k < 16 { codes[k] & 15 } else { codes[k - 16] >> 4 }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (k, y) in out.iter_mut().enumerate() {
        *y = d * (f32::from(nibble(&block[2..], k)) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (k, y) in out.iter_mut().enumerate() {
        *y = d * f32::from(nibble(&block[4..], k)) + m;
    }
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, high) = (half_at(block, 0), word_at(block, 2));
    for (k, y) in out.iter_mut().enumerate() {
        let code = nibble(&block[6..], k) | ((high >> k & 1) as u8 * 16);
        *y = d * (f32::from(code) - 16.0);
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, high) = (half_at(block, 0), half_at(block, 2), word_at(block, 4));
    for (k, y) in out.iter_mut().enumerate() {
        let code = nibble(&block[8..], k) | ((high >> k & 1) as u8 * 16);
        *y = d * f32::from(code) + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (y, &code) in out.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(code as i8);
    }
}

/// Two bits of value `k` of 256: each 32 bytes hold 128 values in four planes.
fn two_bits(codes: &[u8], k: usize) -> u8 {
    codes[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3
}

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (k, y) in out.iter_mut().enumerate() {
        let scale = scales[k / 16];
        *y = d * f32::from(scale & 15) * f32::from(two_bits(codes, k)) - dmin * f32::from(scale >> 4);
    }
}

/// The sixteen 6-bit scales of a Q3_K block, in -32..32: low four bits first, then the high pairs.
pub(crate) fn q3_k_scale(packed: &[u8], index: usize) -> i8 {
    let low = if index < 8 { packed[index] & 15 } else { packed[index - 8] >> 4 };
    let high = packed[8 + index % 4] >> (index / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (k, y) in out.iter_mut().enumerate() {
        let code = two_bits(codes, k) | (high[k % 32] >> (k / 32) & 1) << 2;
        *y = d * f32::from(q3_k_scale(scales, k / 16)) * (f32::from(code) - 4.0);
    }
}

/// The 6-bit scale and minimum of sub-block `index` (0..8) of a Q4_K or Q5_K block, from its 12 packed bytes.
pub(crate) fn k_scale_and_min(packed: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        return (packed[index] & 63, packed[index + 4] & 63);
    }
    let low = packed[index + 4];
    (low & 15 | packed[index - 4] >> 6 << 4, low >> 4 | packed[index] >> 6 << 4)
}

/// Code `k` of 256 nibbles: each 32 bytes hold one sub-block in the low halves and the next in the high ones.
fn k_nibble(codes: &[u8], k: usize) -> u8 {
    codes[k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (k, y) in out.iter_mut().enumerate() {
        let (scale, min) = k_scale_and_min(&block[4..16], k / 32);
        *y = d * f32::from(scale) * f32::from(k_nibble(&block[16..], k)) - dmin * f32::from(min);
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (k, y) in out.iter_mut().enumerate() {
        let (scale, min) = k_scale_and_min(&block[4..16], k / 32);
        let code = k_nibble(&block[48..], k) | (block[16 + k % 32] >> (k / 32) & 1) << 4;
        *y = d * f32::from(scale) * f32::from(code) - dmin * f32::from(min);
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (k, y) in out.iter_mut().enumerate() {
        let code = low[k / 128 * 64 + k % 64] >> (k % 128 / 64 * 4) & 15 | two_bits(high, k) << 4;
        *y = d * f32::from(scales[k / 16] as i8) * (f32::from(code) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
        dequantize(dtype, bytes, &mut out);
        out
    }

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    #[test]
    fn floats_are_read_as_they_are() {
        assert_eq!(decode(DType::F32, &1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(decode(DType::F16, &half(-0.25)), [-0.25]);
        assert_eq!(decode(DType::BF16, &bf16::from_f32(3.0).to_le_bytes()), [3.0]);
    }

    #[test]
    fn legacy_blocks_split_nibbles_into_halves() {
        let codes: Vec<u8> = (0..16).map(|j| j | (15 - j) << 4).collect();
        let q4_1 = decode(DType::Q4_1, &[&half(2.0)[..], &half(-1.0), &codes].concat());
        let q4_0 = decode(DType::Q4_0, &[&half(2.0)[..], &codes].concat());
        let high = 0x8000_0001u32.to_le_bytes();
        let q5_1 = decode(DType::Q5_1, &[&half(2.0)[..], &half(-1.0), &high, &codes].concat());
        let q5_0 = decode(DType::Q5_0, &[&half(2.0)[..], &high, &codes].concat());
        for k in 0..32 {
            let code = if k < 16 { k } else { 31 - k } as f32;
            let high = if k == 0 || k == 31 { 16.0 } else { 0.0 };
            assert_eq!(q4_1[k], 2.0 * code - 1.0, "{k}");
            assert_eq!(q4_0[k], 2.0 * (code - 8.0), "{k}");
            assert_eq!(q5_1[k], 2.0 * (code + high) - 1.0, "{k}");
            assert_eq!(q5_0[k], 2.0 * (code + high - 16.0), "{k}");
        }
        let bytes: Vec<u8> = (0..32).map(|k| (k as i8 - 16) as u8).collect();
        let q8_0 = decode(DType::Q8_0, &[&half(0.5)[..], &bytes].concat());
        assert!((0..32).all(|k| q8_0[k] == 0.5 * (k as f32 - 16.0)));
    }

    #[test]
    fn k_scales_come_from_their_split_bits() {
        // Every scale of a Q4_K block has its own value: scale i = 7i + 1, min i = 63 - 5i, packed by hand.
        let (scale, min) = (|i: usize| 7 * i as u8 + 1, |i: usize| 63 - 5 * i as u8);
        let mut packed = [0u8; 12];
        for i in 0..4 {
            packed[i] = scale(i) | scale(i + 4) >> 4 << 6;
            packed[i + 4] = min(i) | min(i + 4) >> 4 << 6;
            packed[i + 8] = scale(i + 4) & 15 | (min(i + 4) & 15) << 4;
        }
        assert!((0..8).all(|i| k_scale_and_min(&packed, i) == (scale(i), min(i))));

        let scale = |i: usize| 4 * i as u8 + 2;
        let mut packed = [0u8; 12];
        for i in 0..16 {
            packed[i % 8] |= (scale(i) & 15) << (i / 8 * 4);
            packed[8 + i % 4] |= scale(i) >> 4 << (i / 4 * 2);
        }
        assert!((0..16).all(|i| q3_k_scale(&packed, i) == scale(i) as i8 - 32));
    }

    #[test]
    fn k_blocks_place_codes_where_the_format_says() {
        // One code set at a time: the value it changes must be the one the format's description names.
        for k in [0usize, 1, 31, 32, 63, 64, 127, 128, 200, 255] {
            let mut q6 = vec![0u8; 210];
            (q6[208], q6[209]) = (half(1.0)[0], half(1.0)[1]);
            q6[192..208].fill(1);
            q6[k / 128 * 64 + k % 64] = 5 << (k % 128 / 64 * 4);
            q6[128 + k / 128 * 32 + k % 32] = 2 << (k % 128 / 32 * 2);
            let y = decode(DType::Q6_K, &q6);
            assert!((0..256).all(|i| y[i] == if i == k { 5.0 } else { -32.0 }), "{k}");

            let mut q5 = vec![0u8; 176];
            (q5[0], q5[1]) = (half(1.0)[0], half(1.0)[1]);
            q5[4..8].fill(1);
            q5[12..16].fill(1);
            q5[48 + k / 64 * 32 + k % 32] = 3 << (k % 64 / 32 * 4);
            q5[16 + k % 32] = 1 << (k / 32);
            let y = decode(DType::Q5_K, &q5);
            assert!((0..256).all(|i| y[i] == if i == k { 19.0 } else { 0.0 }), "{k}");
        }
    }

    #[test]
    #[should_panic(expected = "don't fit")]
    fn a_wrong_length_is_our_own_bug() {
        dequantize(DType::Q4_0, &[0; 17], &mut [0.0; 32]);
    }
}

//! Products of every type against a plain reference, and against each other across families, batches and threads.

use super::quantize::{Block, quantize};
use super::*;
use crate::lanes::Scalar;
use crate::matrix::{InputKind, Numerics};
use crate::quant::dequantize;
use crate::test_support::{bits, pools, uniform};

/// A fixed sequence of bytes that looks random.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Random weights: every code and sub-scale possible, block scales of both signs and moderate size.
pub(crate) fn weights(dtype: DType, seed: u64, values: usize) -> Vec<u8> {
    let mut bytes = noise(seed, dtype.bytes(values).unwrap());
    let scales: &[usize] = match dtype {
        DType::F32 => {
            return uniform(seed, values).iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        DType::F16 | DType::BF16 => &[0],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for &at in scales {
            // Sign and mantissa stay random; exponents between 2^-8 and 2^-1 (in bf16: 2^-3 and 2^0).
            let exponent =
                if dtype == DType::BF16 { 0x3e | block[at + 1] & 1 } else { 0x1c + (block[at + 1] & 0x1c) };
            let mantissa = if dtype == DType::BF16 { 0 } else { block[at + 1] & 3 };
            block[at + 1] = block[at + 1] & 0x80 | exponent | mantissa;
        }
    }
    bytes
}

/// The inputs as the weights see them: quantized and back, rounded to bf16, or themselves.
fn seen(kind: InputKind, x: &[f32], cols: usize) -> Vec<f64> {
    match kind {
        InputKind::F32 => x.iter().map(|&x| f64::from(x)).collect(),
        InputKind::Bf16 => x.iter().map(|&x| half::bf16::from_f32(x).to_f64()).collect(),
        InputKind::Int8 => {
            let mut seen = Vec::new();
            for x in x.chunks(cols).flat_map(|row| row.chunks(32)) {
                let block = quantize(Scalar, x);
                seen.extend(block.codes.map(|code| f64::from(block.scale) * f64::from(code)));
            }
            seen
        }
    }
}

fn product(pool: &Pool, matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut inputs = Inputs::new();
    inputs.prepare(pool, x, matrix.cols(), matrix.input_kind());
    let mut out = vec![0.0; inputs.rows() * matrix.rows()];
    linear(pool, &inputs, &mut [Product { weights: matrix, bias: None, out: &mut out, accumulate: false }]);
    out
}

/// Shapes with whole and partial panels, one and many blocks.
fn shapes(dtype: DType) -> Vec<(usize, usize)> {
    let unit = dtype.block_len();
    match unit {
        1 => vec![(1, 1), (17, 33), (48, 64), (35, 100)],
        32 => vec![(1, 32), (16, 64), (37, 96), (50, 32 * 9)],
        _ => vec![(1, 256), (37, 512), (16, 768)],
    }
}

#[test]
fn agrees_with_f64() {
    for dtype in DType::ALL {
        for (rows, cols) in shapes(dtype) {
            let bytes = weights(dtype, 7, rows * cols);
            let mut plain = vec![0.0; rows * cols];
            dequantize(dtype, &bytes, &mut plain);
            let x = uniform(3, 5 * cols);
            for pool in pools() {
                let matrix = Matrix::pack(&pool, dtype, &bytes, rows, cols).unwrap();
                let seen = seen(matrix.input_kind(), &x, cols);
                let out = product(&pool, &matrix, &x);
                for (index, &got) in out.iter().enumerate() {
                    let (n, row) = (index / rows, index % rows);
                    let terms = seen[n * cols..][..cols].iter().zip(&plain[row * cols..][..cols]);
                    let terms: Vec<f64> = terms.map(|(&x, &w)| x * f64::from(w)).collect();
                    // An offset or a minimum may cancel, so the yardstick is the largest possible sum.
                    let scale: f64 = terms.iter().map(|t| t.abs()).sum::<f64>()
                        + f64::from(plain[row * cols..][..cols].iter().fold(0f32, |m, w| m.max(w.abs())));
                    let error = (f64::from(got) - terms.iter().sum::<f64>()).abs();
                    assert!(
                        error <= 1e-5 * scale,
                        "{} {rows}x{cols} at {n},{row}: {got}, off by {error:e} ({:?})",
                        dtype.name(),
                        pool.cpu().family()
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_independent_of_company_threads_and_family() {
    for dtype in DType::ALL {
        let (rows, cols) = *shapes(dtype).last().unwrap();
        let bytes = weights(dtype, 11, rows * cols);
        let x = uniform(5, 90 * cols);
        let mut expected: Option<Vec<u32>> = None;
        for pool in pools() {
            let matrix = Matrix::pack(&pool, dtype, &bytes, rows, cols).unwrap();
            let all = bits(&product(&pool, &matrix, &x));
            for n in (1..=30).chain([70, 80, 90]) {
                let first = 90 - n;
                let some = product(&pool, &matrix, &x[first * cols..]);
                assert!(bits(&some) == all[first * rows..], "{} of {n} rows", dtype.name());
            }
            if InputKind::of(dtype).numerics() == Numerics::ByFamily {
                continue;
            }
            let same = *expected.get_or_insert_with(|| all.clone()) == all;
            assert!(same, "{} on {:?}, {} threads", dtype.name(), pool.cpu().family(), pool.threads());
        }
    }
}

#[test]
fn a_packed_row_is_the_files_row() {
    for dtype in DType::ALL {
        for (rows, cols) in shapes(dtype) {
            let bytes = weights(dtype, 13, rows * cols);
            let mut plain = vec![0.0; rows * cols];
            dequantize(dtype, &bytes, &mut plain);
            for pool in pools() {
                let matrix = Matrix::pack(&pool, dtype, &bytes, rows, cols).unwrap();
                let mut row = vec![0.0; cols];
                for index in 0..rows {
                    matrix.row(index, &mut row);
                    assert_eq!(
                        bits(&row),
                        bits(&plain[index * cols..][..cols]),
                        "{} {rows}x{cols}",
                        dtype.name()
                    );
                }
            }
        }
    }
}

#[test]
fn bias_and_residual_come_after_the_product_in_this_order() {
    let (rows, cols, n) = (37, 64, 14);
    for pool in pools() {
        let one =
            Matrix::pack(&pool, DType::Q4_0, &weights(DType::Q4_0, 1, rows * cols), rows, cols).unwrap();
        let two = Matrix::pack(&pool, DType::Q8_0, &weights(DType::Q8_0, 2, 20 * cols), 20, cols).unwrap();
        let (x, bias, old) = (uniform(3, n * cols), uniform(4, rows), uniform(5, n * 20));
        let (plain_one, plain_two) = (product(&pool, &one, &x), product(&pool, &two, &x));
        let mut inputs = Inputs::new();
        inputs.prepare(&pool, &x, cols, InputKind::Int8);
        let (mut out_one, mut out_two) = (vec![f32::NAN; n * rows], old.clone());
        linear(
            &pool,
            &inputs,
            &mut [
                Product { weights: &one, bias: Some(&bias), out: &mut out_one, accumulate: false },
                Product { weights: &two, bias: Some(&bias[..20]), out: &mut out_two, accumulate: true },
            ],
        );
        for i in 0..n * rows {
            assert_eq!(out_one[i].to_bits(), (plain_one[i] + bias[i % rows]).to_bits());
        }
        for i in 0..n * 20 {
            assert_eq!(out_two[i].to_bits(), ((plain_two[i] + bias[i % 20]) + old[i]).to_bits());
        }
    }
}

#[test]
fn gated_is_the_two_products_and_the_activation() {
    let cases = [(DType::Q4_1, DType::Q4_1), (DType::Q4_0, DType::Q8_0), (DType::BF16, DType::BF16)];
    for (rows, cols) in [(37, 96), (160, 64)] {
        for (gate, up) in cases {
            for n in [1, 13, 90] {
                let (gate_bytes, up_bytes) = (weights(gate, 1, rows * cols), weights(up, 2, rows * cols));
                let x = uniform(9, n * cols);
                for pool in pools() {
                    let joined =
                        GatedMatrix::pack(&pool, (gate, &gate_bytes), (up, &up_bytes), rows, cols).unwrap();
                    let mut inputs = Inputs::new();
                    inputs.prepare(&pool, &x, cols, joined.input_kind());
                    let mut out = vec![0.0; n * rows];
                    gated(&pool, &inputs, &joined, Activation::Silu, &mut out);
                    let apart = |dtype, bytes| {
                        product(&pool, &Matrix::pack(&pool, dtype, bytes, rows, cols).unwrap(), &x)
                    };
                    let (gates, ups) = (apart(gate, &gate_bytes[..]), apart(up, &up_bytes[..]));
                    for i in 0..n * rows {
                        let want = Activation::Silu.apply(gates[i]) * ups[i];
                        assert_eq!(out[i].to_bits(), want.to_bits(), "{i}: {} and {}", out[i], want);
                    }
                }
            }
        }
    }
}

#[test]
fn a_gate_and_an_up_that_want_different_inputs_are_stored_as_floats() {
    let (rows, cols) = (5, 64);
    let (gate, up) = (weights(DType::Q4_0, 1, rows * cols), weights(DType::BF16, 2, rows * cols));
    let pool = Pool::new(1, Cpu::detect());
    let joined = GatedMatrix::pack(&pool, (DType::Q4_0, &gate), (DType::BF16, &up), rows, cols).unwrap();
    assert_eq!(joined.input_kind(), InputKind::F32);
    let (mut gate_row, mut up_row) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
    dequantize(DType::Q4_0, &gate, &mut gate_row);
    dequantize(DType::BF16, &up, &mut up_row);
    let x = uniform(9, cols);
    let mut inputs = Inputs::new();
    inputs.prepare(&pool, &x, cols, InputKind::F32);
    let mut out = vec![0.0; rows];
    gated(&pool, &inputs, &joined, Activation::Silu, &mut out);
    for (row, &got) in out.iter().enumerate() {
        let chain = |w: &[f32]| w.iter().zip(&x).fold(0f32, |sum, (w, &x)| w.mul_add(x, sum));
        let (gate, up) = (chain(&gate_row[row * cols..][..cols]), chain(&up_row[row * cols..][..cols]));
        assert_eq!(got.to_bits(), (Activation::Silu.apply(gate) * up).to_bits());
    }
}

#[test]
fn what_is_not_a_number_stays_visible() {
    let cols = 64;
    for pool in pools() {
        let matrix = Matrix::pack(&pool, DType::Q4_1, &weights(DType::Q4_1, 1, 3 * cols), 3, cols).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = uniform(1, 2 * cols);
            x[cols + 40] = bad;
            let out = product(&pool, &matrix, &x);
            assert!(out[..3].iter().all(|y| y.is_finite()) && out[3..].iter().all(|y| y.is_nan()));
        }
        for tiny in [0.0, -0.0, 1e-40, 1e-31] {
            assert!(product(&pool, &matrix, &[tiny; 64]).iter().all(|&y| y == 0.0));
        }
    }
}

#[test]
fn quantized_inputs_are_the_nearest_codes() {
    let mut x: Vec<f32> = (0..32).map(|i| i as f32 - 16.0).collect();
    x[0] = 127.0;
    (x[1], x[2], x[3]) = (0.5, 1.5, -2.5);
    let Block { codes, scale, .. } = quantize(Scalar, &x);
    assert_eq!(scale, 1.0);
    assert_eq!(codes[..4], [127, 0, 2, -2]);
    assert!((4..32).all(|i| codes[i] == i as i8 - 16));
}

#[test]
fn bytes_that_do_not_fit_are_refused() {
    let pool = Pool::new(1, Cpu::detect());
    let error = |dtype, len: usize, rows, cols| {
        Matrix::pack(&pool, dtype, &vec![0; len], rows, cols).err().unwrap().to_string()
    };
    assert!(error(DType::Q4_0, 18, 1, 33).contains("not a whole number"));
    assert!(error(DType::Q4_K, 144, 1, 32).contains("not a whole number"));
    assert!(error(DType::Q4_0, 17, 1, 32).contains("needs 18 bytes, got 17"));
    assert!(error(DType::F32, 16, usize::MAX, 4).contains("needs"));
    assert!(error(DType::F32, 16, 4, usize::MAX / 2).contains("needs"));
    assert!(error(DType::Q8_0, 0, usize::MAX, usize::MAX & !31).contains("needs"));
    // No columns: no bytes, whatever the rows; more panels than memory must not be asked for.
    let empty = Matrix::pack(&pool, DType::F32, &[], usize::MAX, 0);
    assert!(empty.is_ok_and(|matrix| matrix.packed_bytes() == 0));
}

#[test]
#[should_panic(expected = "inputs for Q4_0 weights")]
fn inputs_of_another_kind_are_our_own_bug() {
    let pool = Pool::new(1, Cpu::detect());
    let matrix = Matrix::pack(&pool, DType::Q4_0, &[0; 18], 1, 32).unwrap();
    let mut inputs = Inputs::new();
    inputs.prepare(&pool, &[0.0; 32], 32, InputKind::F32);
    linear(
        &pool,
        &inputs,
        &mut [Product { weights: &matrix, bias: None, out: &mut [0.0], accumulate: false }],
    );
}

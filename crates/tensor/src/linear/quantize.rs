//! Rows of activations as blocks of 32 signed bytes with one scale: what int8 products read.
//!
//! A token of a small model rounds 100,000 values, so this runs on vectors too: two of them hold a block, and all
//! that crosses lanes is exact in any order (a maximum, and sums of whole numbers below 2²⁴).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use super::inputs::Columns;
use super::tile::{BLOCK_WORDS, HALF_WORDS};
use crate::lanes::{Kernel, LANES, Lanes};
use crate::matrix::panel::BLOCK;

/// The largest magnitude that counts as zero, so that its inverse is finite.
pub(crate) const TINY: f32 = f32::from_bits(27 << 23);

/// Columns of a tile as blocks.
pub(super) struct Quantize<'a>(pub(super) Columns<'a>);

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Columns { x, cols, columns, words, halves } = self.0;
        let rows = x.len() / cols;
        let blocks = columns.len() / BLOCK;
        assert!(words.len() == blocks * BLOCK_WORDS * rows && halves.len() == blocks * HALF_WORDS * rows);
        for (row, x) in x.chunks_exact(cols).enumerate() {
            for (index, x) in x[columns.clone()].chunks_exact(BLOCK).enumerate() {
                let block = quantize(l, x);
                // SAFETY: `index < blocks` and `row < rows`, and the words and halves have the lengths asserted.
                unsafe {
                    let words = words.as_mut_ptr().add(index * BLOCK_WORDS * rows + row);
                    for (group, codes) in block.codes.as_chunks::<4>().0.iter().enumerate() {
                        words.add(group * rows).write(u32::from_le_bytes(codes.map(|code| code as u8)));
                    }
                    let [first, second] = block.sums;
                    words.add(8 * rows).write(block.scale.to_bits());
                    words.add(9 * rows).write((block.scale * (first + second) as f32).to_bits());
                    words.add(10 * rows).write(-(first + second) as u32);
                    let halves = halves.as_mut_ptr().add(index * HALF_WORDS * rows + row);
                    halves.write(-first as u32);
                    halves.add(rows).write(-second as u32);
                    halves.add(2 * rows).write((block.scale * first as f32).to_bits());
                    halves.add(3 * rows).write((block.scale * second as f32).to_bits());
                }
            }
        }
    }
}

/// A rounded block.
pub(super) struct Block {
    pub(super) codes: [i8; BLOCK],
    pub(super) scale: f32,
    /// Of the codes of each half.
    sums: [i32; 2],
}

/// One block of activations as signed bytes, and the scale they are multiples of: the largest magnitude / 127, codes
/// rounded to nearest even. A block with an infinity or a NaN gets a NaN scale, so that it can't pass for numbers.
#[inline(always)]
pub(super) fn quantize<L: Lanes>(l: L, x: &[f32]) -> Block {
    let (low, high) = (l.load(x), l.load(&x[LANES..]));
    let largest = l.largest_magnitude(low, high);
    let mut codes = [0; BLOCK];
    if !(TINY..=f32::MAX).contains(&largest) {
        return Block { codes, scale: if largest < TINY { 0.0 } else { f32::NAN }, sums: [0; 2] };
    }
    let inverse = l.splat(127.0 / largest);
    let (low, high) = (l.round(l.mul(low, inverse)), l.round(l.mul(high, inverse)));
    let (first, second) = codes.split_at_mut(LANES);
    l.store_bytes(low, first);
    l.store_bytes(high, second);
    Block { codes, scale: largest / 127.0, sums: [l.sum(low) as i32, l.sum(high) as i32] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::{self, Scalar};
    use crate::test_support::{cpus, uniform};

    #[test]
    fn codes_are_the_nearest_and_their_sums_are_theirs() {
        for scale in [1e-28, 1e-3, 1.0, 1e30] {
            let x: Vec<f32> = uniform(3, BLOCK).iter().map(|x| x * scale).collect();
            let block = quantize(Scalar, &x);
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert_eq!(block.scale, largest / 127.0);
            for (code, x) in block.codes.iter().zip(&x) {
                assert_eq!(*code, (x * (127.0 / largest)).round_ties_even() as i8);
            }
            let sum = |codes: &[i8]| codes.iter().map(|&c| i32::from(c)).sum::<i32>();
            assert_eq!(block.sums, [sum(&block.codes[..16]), sum(&block.codes[16..])]);
        }
    }

    #[test]
    fn families_agree_whatever_the_block_holds() {
        let cols = 3 * BLOCK;
        for special in [0.0, -0.0, 1e-40, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
            let mut x = uniform(9, 5 * cols);
            x[BLOCK..2 * BLOCK].fill(0.0);
            x[BLOCK + 21] = special;
            x[2 * cols + 3] = special;
            let mut expected: Option<(Vec<u32>, Vec<u32>)> = None;
            for cpu in cpus() {
                let mut words = vec![7; 5 * cols / BLOCK * BLOCK_WORDS];
                let mut halves = vec![7; 5 * cols / BLOCK * HALF_WORDS];
                let columns =
                    Columns { x: &x, cols, columns: 0..cols, words: &mut words, halves: &mut halves };
                lanes::dispatch(cpu, Quantize(columns));
                let got = (words, halves);
                assert!(*expected.get_or_insert_with(|| got.clone()) == got, "{special} on {cpu:?}");
            }
        }
    }

    /// Four rows at a time give what one at a time does: any number of rows, any part of the columns.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn four_rows_at_a_time_are_as_one() {
        if !cpus().any(|cpu| cpu.family() == crate::Family::Avx512) {
            return;
        }
        let cols = 5 * BLOCK;
        for rows in 1..=12 {
            let mut x = uniform(rows as u64, rows * cols);
            let specials =
                [0.0, -0.0, 1e-40, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN];
            for (i, special) in specials.into_iter().enumerate() {
                x[i % rows * cols + i % 5 * BLOCK..][..BLOCK].fill(0.0);
                x[i % rows * cols + i % 5 * BLOCK + 3 * i] = special;
            }
            for columns in [0..cols, BLOCK..3 * BLOCK] {
                let blocks = columns.len() / BLOCK;
                let run = |four: bool| {
                    let mut words = vec![7; rows * blocks * BLOCK_WORDS];
                    let mut halves = vec![7; rows * blocks * HALF_WORDS];
                    let (x, columns) = (&x[..], columns.clone());
                    let columns = Columns { x, cols, columns, words: &mut words, halves: &mut halves };
                    match four {
                        // SAFETY: the family was found above.
                        true => unsafe { avx512::quantize(columns) },
                        false => Quantize(columns).call(Scalar),
                    }
                    (words, halves)
                };
                assert!(run(true) == run(false), "{rows} rows, columns {columns:?}");
            }
        }
    }
}

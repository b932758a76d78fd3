//! Work on many rows, and sums over rows in a fixed order.

use std::ops::Range;

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;

/// Rows that are summed from the first to the last before blocks are added.
pub(crate) const BLOCK_ROWS: usize = 64;
/// Values of a row of [`clear`].
const CLEARED: usize = 256;
/// Values below which a fork and join costs more than it gives.
const FORK_VALUES: usize = 16 * 1024;

/// Values from one row of `width` values to the next in a matrix whose rows products read side by side: whole cache lines,
/// an odd number of them, so that the same column of many rows doesn't fall into the same set of a cache. Saturates.
pub fn pitch(width: usize) -> usize {
    (width.div_ceil(LANES) | 1).saturating_mul(LANES)
}

/// Calls `work` once with every range of [`BLOCK_ROWS`] rows (the last may be shorter), on all threads where there
/// are enough values.
pub(crate) fn each_block(pool: &Pool, rows: usize, cols: usize, work: impl Fn(usize, Range<usize>) + Sync) {
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let run = |block: usize| work(block, block * BLOCK_ROWS..rows.min((block + 1) * BLOCK_ROWS));
    if blocks < 2 || rows.saturating_mul(cols) < FORK_VALUES {
        (0..blocks).for_each(run);
    } else {
        pool.run(|worker| {
            while let Some(block) = worker.claim(blocks) {
                run(block);
            }
        });
    }
}

/// Sums over rows: `work` adds a block's rows into a vector of `cols` zeros; blocks are then added to `out` in order.
pub(crate) fn sum_blocks(
    pool: &Pool,
    rows: usize,
    out: &mut [f32],
    work: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let cols = out.len();
    let mut partial = vec![0.0f32; rows.div_ceil(BLOCK_ROWS) * cols];
    let parts = Disjoint::new(&mut partial);
    each_block(pool, rows, cols, |block, rows| {
        // SAFETY: a block is worked on once.
        work(rows, unsafe { parts.part(block * cols..(block + 1) * cols) });
    });
    for block in partial.chunks_exact(cols.max(1)) {
        for (out, x) in out.iter_mut().zip(block) {
            *out += x;
        }
    }
}

/// `out[col] += Σ rows x[row · stride + col]` for `out.len()` columns: the gradient of a bias.
///
/// # Panics
/// If a row leaves `x`.
pub fn add_column_sums(pool: &Pool, x: &[f32], stride: usize, out: &mut [f32]) {
    let cols = out.len();
    assert!(cols <= stride, "rows of {cols} values overlap at a stride of {stride}");
    let rows = (x.len() + stride - cols) / stride.max(1);
    sum_blocks(pool, rows, out, |rows, sums| {
        for row in rows {
            lanes::dispatch(pool.cpu(), AddTo { sums, x: &x[row * stride..][..cols] });
        }
    });
}

/// Adds `bias` to the first values of every row.
///
/// # Panics
/// If `x` is not whole rows of `stride` values.
pub fn add_bias(pool: &Pool, x: &mut [f32], stride: usize, bias: &[f32]) {
    crate::norm::each_row(pool, x, stride, |_, x| {
        for row in x.chunks_exact_mut(stride) {
            lanes::dispatch(pool.cpu(), AddTo { sums: &mut row[..bias.len()], x: bias });
        }
    });
}

/// `out = x`, on all threads.
///
/// # Panics
/// If lengths differ.
pub fn copy(pool: &Pool, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a copy has its source's length");
    let parts = Disjoint::new(out);
    let len = x.len();
    each_block(pool, len.div_ceil(LANES), LANES, |_, vectors| {
        let range = vectors.start * LANES..len.min(vectors.end * LANES);
        // SAFETY: blocks don't overlap.
        unsafe { parts.part(range.clone()) }.copy_from_slice(&x[range]);
    });
}

/// `out = 0`, on all threads.
pub fn clear(pool: &Pool, out: &mut [f32]) {
    let len = out.len();
    let parts = Disjoint::new(out);
    each_block(pool, len.div_ceil(CLEARED), CLEARED, |_, pieces| {
        // SAFETY: blocks don't overlap.
        unsafe { parts.part(pieces.start * CLEARED..len.min(pieces.end * CLEARED)) }.fill(0.0);
    });
}

/// `out += x`, on all threads.
///
/// # Panics
/// If lengths differ.
pub fn add(pool: &Pool, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "both sides of a sum have one length");
    let parts = Disjoint::new(out);
    let len = x.len();
    each_block(pool, len.div_ceil(LANES), LANES, |_, vectors| {
        let range = vectors.start * LANES..len.min(vectors.end * LANES);
        // SAFETY: blocks don't overlap.
        let sums = unsafe { parts.part(range.clone()) };
        lanes::dispatch(pool.cpu(), AddTo { sums, x: &x[range] });
    });
}

/// `sums += x`.
struct AddTo<'a> {
    sums: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for AddTo<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        for (sum, x) in self.sums.chunks_mut(LANES).zip(self.x.chunks(LANES)) {
            let n = sum.len();
            l.store_first(l.add(l.load_first(sum, n), l.load_first(x, n)), sum, n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    #[test]
    fn column_sums_have_one_order() {
        let (rows, stride, cols) = (500, 50, 37);
        let x = uniform(1, rows * stride);
        let mut want = vec![1.0f32; cols];
        for block in x.chunks(BLOCK_ROWS * stride) {
            let mut sums = vec![0.0f32; cols];
            for row in block.chunks(stride) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            want.iter_mut().zip(sums).for_each(|(want, sum)| *want += sum);
        }
        for pool in pools() {
            let mut out = vec![1.0; cols];
            add_column_sums(&pool, &x, stride, &mut out);
            assert_eq!(bits(&out), bits(&want));
        }
    }

    #[test]
    fn copies_and_sums_reach_every_value() {
        for pool in pools() {
            for len in [0, 1, 17, 100_003] {
                let x = uniform(1, len);
                let mut out = vec![9.0; len];
                copy(&pool, &x, &mut out);
                assert_eq!(out, x);
                add(&pool, &x, &mut out);
                assert!(out.iter().zip(&x).all(|(out, x)| *out == 2.0 * x));
                clear(&pool, &mut out);
                assert!(out.iter().all(|&x| x == 0.0));
            }
        }
    }

    #[test]
    fn a_bias_goes_to_every_row() {
        for pool in pools() {
            let mut x = vec![1.0; 3 * 20];
            add_bias(&pool, &mut x, 20, &uniform(1, 17));
            for row in x.chunks(20) {
                let want: Vec<f32> = uniform(1, 17).iter().map(|b| 1.0 + b).chain([1.0; 3]).collect();
                assert_eq!(row, want);
            }
        }
    }
}

//! RMS normalization (Zhang & Sennrich 2019).
//!
//! The sum of squares has one order: value *i* goes to lane *i* mod 16 by a fused multiply-add, then the lanes
//! are added in a tree. A row of 576 values takes about 60 ns; only many rows are worth a fork and join.

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;

/// Rows are shared among threads from this many values on: less is done before a worker has woken.
pub(crate) const FORK_VALUES: usize = 16 * 1024;

/// `out[i] = x[i] / sqrt(mean(x²) + eps) * weight`, for rows of `weight.len()` values.
///
/// # Panics
/// If `x` is not whole rows or `out` has another length.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a norm's output has its input's length");
    each_row(pool, out, weight.len(), |rows, out| {
        let x = &x[rows.start * weight.len()..rows.end * weight.len()];
        lanes::dispatch(pool.cpu(), Norm { x, weight, eps, out });
    });
}

/// The same in place (per-head query and key norms, Gemma's post-norms).
///
/// # Panics
/// If `x` is not whole rows.
pub fn rms_norm_in_place(pool: &Pool, x: &mut [f32], weight: &[f32], eps: f32) {
    each_row(pool, x, weight.len(), |_, x| lanes::dispatch(pool.cpu(), NormInPlace { x, weight, eps }));
}

/// `x += rms_norm(y)`: Gemma's norm after a block, added to the residual stream.
///
/// # Panics
/// If `x` is not whole rows or `y` has another length.
pub fn add_rms_norm(pool: &Pool, x: &mut [f32], y: &[f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), y.len(), "the two sides of a sum have one length");
    each_row(pool, x, weight.len(), |rows, x| {
        let y = &y[rows.start * weight.len()..rows.end * weight.len()];
        lanes::dispatch(pool.cpu(), AddNorm { x, y, weight, eps });
    });
}

/// Calls `work` with ranges of rows of `out` and their values; on all threads where there are enough.
pub(crate) fn each_row(
    pool: &Pool,
    out: &mut [f32],
    cols: usize,
    work: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) {
    if out.is_empty() {
        return;
    }
    assert!(cols > 0 && out.len().is_multiple_of(cols), "{} values are not rows of {cols}", out.len());
    let rows = out.len() / cols;
    if rows < 2 || out.len() < FORK_VALUES {
        return work(0..rows, out);
    }
    let parts = Disjoint::new(out);
    pool.run(|worker| {
        let rows = worker.split(rows, 1);
        // SAFETY: the ranges of different workers don't overlap, and each worker takes its own once.
        let out = unsafe { parts.part(rows.start * cols..rows.end * cols) };
        work(rows, out);
    });
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms<L: Lanes>(l: L, x: &[f32], eps: f32) -> f32 {
    let mut sum = l.splat(0.0);
    let mut vectors = x.chunks_exact(LANES);
    for x in &mut vectors {
        let x = l.load(x);
        sum = l.fma(x, x, sum);
    }
    let rest = vectors.remainder();
    let rest = l.load_first(rest, rest.len());
    let sum = l.sum(l.fma(rest, rest, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            let inverse = l.splat(inverse_rms(l, x, self.eps));
            let vectors = x.chunks(LANES).zip(self.weight.chunks(LANES));
            for ((x, weight), out) in vectors.zip(out.chunks_mut(LANES)) {
                if x.len() == LANES {
                    l.store(l.mul(l.mul(l.load(x), inverse), l.load(weight)), out);
                } else {
                    let n = x.len();
                    let (x, weight) = (l.load_first(x, n), l.load_first(weight, n));
                    l.store_first(l.mul(l.mul(x, inverse), weight), out, n);
                }
            }
        }
    }
}

struct NormInPlace<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for NormInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        for row in self.x.chunks_exact_mut(self.weight.len()) {
            let inverse = l.splat(inverse_rms(l, row, self.eps));
            for (x, weight) in row.chunks_mut(LANES).zip(self.weight.chunks(LANES)) {
                let n = x.len();
                let normed = l.mul(l.mul(l.load_first(x, n), inverse), l.load_first(weight, n));
                l.store_first(normed, x, n);
            }
        }
    }
}

struct AddNorm<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for AddNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        for (x, y) in self.x.chunks_exact_mut(cols).zip(self.y.chunks_exact(cols)) {
            let inverse = l.splat(inverse_rms(l, y, self.eps));
            let vectors = y.chunks(LANES).zip(self.weight.chunks(LANES));
            for ((y, weight), x) in vectors.zip(x.chunks_mut(LANES)) {
                let n = x.len();
                let normed = l.mul(l.load_first(y, n), inverse);
                l.store_first(l.fma(normed, l.load_first(weight, n), l.load_first(x, n)), x, n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    #[test]
    fn agrees_with_f64() {
        for cols in [1, 15, 16, 64, 100, 576] {
            let (x, weight) = (uniform(1, 3 * cols), uniform(2, cols));
            let mut out = vec![0.0; x.len()];
            let pool = Pool::new(1, crate::Cpu::detect());
            rms_norm(&pool, &x, &weight, 1e-5, &mut out);
            for (row, out) in x.chunks(cols).zip(out.chunks(cols)) {
                let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / cols as f64;
                for i in 0..cols {
                    let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!((f64::from(out[i]) - want).abs() < 1e-6, "{cols} {i}");
                }
            }
        }
    }

    #[test]
    fn rows_are_independent_of_company_threads_and_family() {
        for cols in [64, 100, 576] {
            let (x, y, weight) = (uniform(1, 70 * cols), uniform(3, 70 * cols), uniform(2, cols));
            let mut expected: Option<[Vec<u32>; 3]> = None;
            for pool in pools() {
                let mut normed = vec![0.0; x.len()];
                rms_norm(&pool, &x, &weight, 1e-5, &mut normed);
                let mut in_place = x.clone();
                rms_norm_in_place(&pool, &mut in_place, &weight, 1e-5);
                assert_eq!(bits(&normed), bits(&in_place));
                let mut added = y.clone();
                add_rms_norm(&pool, &mut added, &x, &weight, 1e-5);
                let mut alone = vec![0.0; cols];
                rms_norm(&pool, &x[65 * cols..66 * cols], &weight, 1e-5, &mut alone);
                assert_eq!(bits(&alone), bits(&normed[65 * cols..66 * cols]));
                let got = [bits(&normed), bits(&in_place), bits(&added)];
                assert!(*expected.get_or_insert_with(|| got.clone()) == got);
            }
        }
    }
}

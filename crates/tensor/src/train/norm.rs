//! RMS normalization, forward and backward, of whole rows and of each head inside a row.
//!
//! With `r = 1/√(mean(x²) + ε)` and `y = x·r·w`:
//! `dx = r·w·dy − x·r³·mean(w·dy·x)` and `dw = Σ rows dy·x·r`.
//! `r` is computed again in backward: that reads nothing that isn't read anyway.

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::norm::inverse_rms;
use crate::pool::Disjoint;

use super::rows::{each_block, sum_blocks};

/// Where the vectors that are normalized lie: `per_row` neighbours of as many values as the weight has, from `start`
/// on, in rows of `stride` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors {
    /// The first vector's first value in a row.
    pub start: usize,
    /// Vectors of a row.
    pub per_row: usize,
    /// Values from one row to the next.
    pub stride: usize,
}

impl Vectors {
    /// One vector a row.
    pub fn rows(len: usize) -> Vectors {
        Vectors { start: 0, per_row: 1, stride: len }
    }

    /// Rows in `len` values.
    ///
    /// # Panics
    /// If those are no whole rows, or vectors of `width` values leave a row.
    fn count(&self, len: usize, width: usize) -> usize {
        assert!(width > 0 && self.start + self.per_row * width <= self.stride, "{self:?} of {width} values");
        assert!(len.is_multiple_of(self.stride), "{len} values are not rows of {}", self.stride);
        len / self.stride
    }
}

/// `out = x / √(mean(x²) + eps) · weight` for every vector; what lies between vectors stays.
///
/// # Panics
/// If shapes don't fit.
pub fn rms_norm(pool: &Pool, at: Vectors, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a norm's output has its input's length");
    let rows = at.count(x.len(), weight.len());
    let parts = Disjoint::new(out);
    each_block(pool, rows, at.stride, |_, rows| {
        let values = rows.start * at.stride..rows.end * at.stride;
        // SAFETY: blocks of rows don't overlap.
        let out = unsafe { parts.part(values.clone()) };
        lanes::dispatch(pool.cpu(), Forward { at, x: &x[values], weight, eps, out });
    });
}

/// Adds to `dweight` and either replaces `dx` or, with `add`, adds to it. `dx` and `dy` may not be the same memory;
/// see [`rms_norm_backward_in_place`] for that.
///
/// # Panics
/// If shapes don't fit.
#[allow(clippy::too_many_arguments, reason = "a backward has all of its forward and the gradients")]
pub fn rms_norm_backward(
    pool: &Pool,
    at: Vectors,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    (dx, add): (&mut [f32], bool),
    dweight: &mut [f32],
) {
    assert_eq!(x.len(), dy.len(), "a gradient has its value's length");
    assert_eq!(x.len(), dx.len(), "a gradient has its value's length");
    assert_eq!(weight.len(), dweight.len(), "a gradient has its value's length");
    let rows = at.count(x.len(), weight.len());
    let parts = Disjoint::new(dx);
    sum_blocks(pool, rows, dweight, |rows, dweight| {
        let values = rows.start * at.stride..rows.end * at.stride;
        // SAFETY: blocks of rows don't overlap.
        let dx = unsafe { parts.part(values.clone()) };
        let (x, dy) = (&x[values.clone()], Some(&dy[values]));
        lanes::dispatch(pool.cpu(), Backward { at, x, weight, eps, dy, dx, add, dweight });
    });
}

/// As [`rms_norm_backward`]; `d` holds the gradient of the output before and that of the input after.
///
/// # Panics
/// If shapes don't fit.
pub fn rms_norm_backward_in_place(
    pool: &Pool,
    at: Vectors,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    d: &mut [f32],
    dweight: &mut [f32],
) {
    assert_eq!(x.len(), d.len(), "a gradient has its value's length");
    assert_eq!(weight.len(), dweight.len(), "a gradient has its value's length");
    let rows = at.count(x.len(), weight.len());
    let parts = Disjoint::new(d);
    sum_blocks(pool, rows, dweight, |rows, dweight| {
        let values = rows.start * at.stride..rows.end * at.stride;
        // SAFETY: blocks of rows don't overlap.
        let dx = unsafe { parts.part(values.clone()) };
        let x = &x[values];
        lanes::dispatch(pool.cpu(), Backward { at, x, weight, eps, dy: None, dx, add: false, dweight });
    });
}

struct Forward<'a> {
    at: Vectors,
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        let vectors = self.at.start..self.at.start + self.at.per_row * cols;
        let rows = self.x.chunks_exact(self.at.stride).zip(self.out.chunks_exact_mut(self.at.stride));
        for (x, out) in rows {
            let each = x[vectors.clone()].chunks_exact(cols).zip(out[vectors.clone()].chunks_exact_mut(cols));
            for (x, out) in each {
                let inverse = l.splat(inverse_rms(l, x, self.eps));
                let pieces = x.chunks(LANES).zip(self.weight.chunks(LANES));
                for ((x, weight), out) in pieces.zip(out.chunks_mut(LANES)) {
                    let n = x.len();
                    let (x, weight) = (l.load_first(x, n), l.load_first(weight, n));
                    l.store_first(l.mul(l.mul(x, inverse), weight), out, n);
                }
            }
        }
    }
}

struct Backward<'a> {
    at: Vectors,
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    /// `None` where it is in `dx`.
    dy: Option<&'a [f32]>,
    dx: &'a mut [f32],
    add: bool,
    dweight: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        for row in 0..self.x.len() / self.at.stride {
            for vector in 0..self.at.per_row {
                let from = row * self.at.stride + self.at.start + vector * cols;
                let x = &self.x[from..from + cols];
                let dx = &mut self.dx[from..from + cols];
                let dy = self.dy.map(|dy| &dy[from..from + cols]);
                let inverse = inverse_rms(l, x, self.eps);
                let mut dot = l.splat(0.0);
                for (i, (x, weight)) in x.chunks(LANES).zip(self.weight.chunks(LANES)).enumerate() {
                    let n = x.len();
                    let dy = l.load_first(&dy.unwrap_or(dx)[i * LANES..], n);
                    let scaled = l.mul(dy, l.load_first(weight, n));
                    dot = l.fma(scaled, l.load_first(x, n), dot);
                }
                let back = l.splat(-inverse * inverse * inverse * l.sum(dot) / cols as f32);
                let inverse = l.splat(inverse);
                let pieces = x.chunks(LANES).zip(self.weight.chunks(LANES));
                for (i, ((x, weight), dweight)) in pieces.zip(self.dweight.chunks_mut(LANES)).enumerate() {
                    let n = x.len();
                    let x = l.load_first(x, n);
                    let before = l.load_first(&dx[i * LANES..], n);
                    let dy = dy.map_or(before, |dy| l.load_first(&dy[i * LANES..], n));
                    let scaled = l.mul(dy, l.load_first(weight, n));
                    let d = l.fma(x, back, l.mul(scaled, inverse));
                    let d = if self.add { l.add(before, d) } else { d };
                    l.store_first(d, &mut dx[i * LANES..], n);
                    let sum = l.fma(l.mul(x, inverse), dy, l.load_first(dweight, n));
                    l.store_first(sum, dweight, n);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{assert_gradient, bits, pools, uniform};

    const AT: Vectors = Vectors { start: 3, per_row: 2, stride: 60 };
    const COLS: usize = 25;

    fn loss(x: &[f64], weight: &[f64], dy: &[f64]) -> f64 {
        let mut loss = 0.0;
        for (row, dy) in x.chunks(AT.stride).zip(dy.chunks(AT.stride)) {
            let vectors = AT.start..AT.start + AT.per_row * COLS;
            for (x, dy) in row[vectors.clone()].chunks(COLS).zip(dy[vectors].chunks(COLS)) {
                let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / COLS as f64 + 1e-5).sqrt();
                loss += x.iter().zip(weight).zip(dy).map(|((x, w), dy)| x * r * w * dy).sum::<f64>();
            }
        }
        loss
    }

    #[test]
    fn gradients_are_those_of_the_forward_and_the_same_bits_everywhere() {
        let rows = 130;
        let (x, weight, dy) = (uniform(1, rows * AT.stride), uniform(2, COLS), uniform(3, rows * AT.stride));
        let mut first: Option<[Vec<u32>; 3]> = None;
        for pool in pools() {
            let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![0.0; COLS]);
            rms_norm_backward(&pool, AT, &x, &weight, 1e-5, &dy, (&mut dx, false), &mut dweight);
            assert_gradient(&[&x, &weight, &dy], 0, &dx, 1e-4, |v| loss(&v[0], &v[1], &v[2]));
            assert_gradient(&[&x, &weight, &dy], 1, &dweight, 1e-4, |v| loss(&v[0], &v[1], &v[2]));
            let mut added = vec![1.0; x.len()];
            rms_norm_backward(&pool, AT, &x, &weight, 1e-5, &dy, (&mut added, true), &mut [0.0; COLS]);
            let between = |i: usize| i % AT.stride < AT.start || i % AT.stride >= AT.start + 2 * COLS;
            assert!(added.iter().zip(&dx).enumerate().all(|(i, (a, d))| between(i) || *a == 1.0 + d));
            let (mut place, mut again) = (dy.clone(), vec![0.0; COLS]);
            rms_norm_backward_in_place(&pool, AT, &x, &weight, 1e-5, &mut place, &mut again);
            assert_eq!(bits(&again), bits(&dweight));
            assert!(place.iter().zip(&dx).enumerate().all(|(i, (a, d))| between(i) || a == d));
            let mut out = x.clone();
            rms_norm(&pool, AT, &x, &weight, 1e-5, &mut out);
            let got = [bits(&dx), bits(&dweight), bits(&out)];
            assert!(*first.get_or_insert_with(|| got.clone()) == got);
        }
    }
}

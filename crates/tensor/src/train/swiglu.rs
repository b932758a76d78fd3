//! The gated non-linearity, `silu(gate) · up`, forward and backward.
//!
//! A row holds its gates, then its ups, as one product with both weights writes them. With `s = sigmoid(gate)`:
//! `dup = d·gate·s` and `dgate = d·up·s·(1 + gate·(1 − s))`. Backward writes both over the values themselves, which
//! nobody needs afterwards.

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;

use super::rows::each_block;

/// `out = silu(gate) · up`: `gate_up` has rows of `2 · width` values, `out` of `width`, at these strides.
///
/// # Panics
/// If lengths don't fit.
pub fn swiglu(pool: &Pool, width: usize, (gate_up, from): (&[f32], usize), (out, to): (&mut [f32], usize)) {
    let rows = rows(width, (gate_up.len(), from), (out.len(), to));
    let parts = Disjoint::new(out);
    each_block(pool, rows, 2 * width, |_, rows| {
        // SAFETY: blocks of rows don't overlap.
        let out = unsafe { parts.part(rows.start * to..rows.end * to) };
        let gate_up = &gate_up[rows.start * from..rows.end * from];
        lanes::dispatch(pool.cpu(), Forward { width, gate_up: (gate_up, from), out: (out, to) });
    });
}

/// Replaces gates and ups by their gradients; `d` is the gradient of the output.
///
/// # Panics
/// If lengths don't fit.
pub fn swiglu_backward(
    pool: &Pool,
    width: usize,
    (gate_up, to): (&mut [f32], usize),
    (d, from): (&[f32], usize),
) {
    let rows = rows(width, (gate_up.len(), to), (d.len(), from));
    let parts = Disjoint::new(gate_up);
    each_block(pool, rows, 2 * width, |_, rows| {
        // SAFETY: blocks of rows don't overlap.
        let gate_up = unsafe { parts.part(rows.start * to..rows.end * to) };
        let d = &d[rows.start * from..rows.end * from];
        lanes::dispatch(pool.cpu(), Backward { width, gate_up: (gate_up, to), d: (d, from) });
    });
}

/// How many rows two matrices of these lengths and strides have.
///
/// # Panics
/// If it isn't the same number of whole rows.
fn rows(width: usize, (both, both_stride): (usize, usize), (one, one_stride): (usize, usize)) -> usize {
    assert!(width > 0 && 2 * width <= both_stride && width <= one_stride, "rows of {width}");
    let rows = one / one_stride;
    assert!(
        one == rows * one_stride && both == rows * both_stride,
        "{both} and {one} values are {rows} rows"
    );
    rows
}

struct Forward<'a> {
    width: usize,
    gate_up: (&'a [f32], usize),
    out: (&'a mut [f32], usize),
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let rows = self.gate_up.0.chunks_exact(self.gate_up.1).zip(self.out.0.chunks_exact_mut(self.out.1));
        for (gate_up, out) in rows {
            let (gate, up) = gate_up[..2 * self.width].split_at(self.width);
            let pieces = gate.chunks(LANES).zip(up.chunks(LANES));
            for ((gate, up), out) in pieces.zip(out[..self.width].chunks_mut(LANES)) {
                let n = out.len();
                if n == LANES {
                    l.store(l.mul(l.silu(l.load(gate)), l.load(up)), out);
                } else {
                    let (gate, up) = (l.load_first(gate, n), l.load_first(up, n));
                    l.store_first(l.mul(l.silu(gate), up), out, n);
                }
            }
        }
    }
}

struct Backward<'a> {
    width: usize,
    gate_up: (&'a mut [f32], usize),
    d: (&'a [f32], usize),
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let rows = self.gate_up.0.chunks_exact_mut(self.gate_up.1).zip(self.d.0.chunks_exact(self.d.1));
        for (gate_up, d) in rows {
            let (gates, ups) = gate_up[..2 * self.width].split_at_mut(self.width);
            let pieces = gates.chunks_mut(LANES).zip(ups.chunks_mut(LANES));
            for ((gates, ups), d) in pieces.zip(d[..self.width].chunks(LANES)) {
                let n = d.len();
                if n == LANES {
                    let (dgate, dup) = slopes(l, l.load(gates), l.load(ups), l.load(d));
                    l.store(dgate, gates);
                    l.store(dup, ups);
                } else {
                    let (gate, up, d) = (l.load_first(gates, n), l.load_first(ups, n), l.load_first(d, n));
                    let (dgate, dup) = slopes(l, gate, up, d);
                    l.store_first(dgate, gates, n);
                    l.store_first(dup, ups, n);
                }
            }
        }
    }
}

/// Gradients of sixteen gates and ups.
#[inline(always)]
fn slopes<L: Lanes>(l: L, gate: L::V, up: L::V, d: L::V) -> (L::V, L::V) {
    let one = l.splat(1.0);
    let s = l.div(one, l.add(one, l.exp(l.sub(l.splat(0.0), gate))));
    let silu = l.mul(gate, s);
    let slope = l.fma(silu, l.sub(one, s), s);
    (l.mul(l.mul(d, up), slope), l.mul(d, silu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{assert_gradient, bits, pools, uniform};

    #[test]
    fn gradients_are_those_of_the_forward_and_the_same_bits_everywhere() {
        let (rows, width) = (140, 19);
        let x: Vec<f32> = uniform(1, rows * 2 * width).iter().map(|x| 8.0 * x).collect();
        let d = uniform(2, rows * width);
        let loss = |x: &[f64], d: &[f64]| -> f64 {
            let rows = x.chunks(2 * width).zip(d.chunks(width));
            rows.map(|(x, d)| {
                (0..width).map(|i| d[i] * x[i + width] * x[i] / (1.0 + (-x[i]).exp())).sum::<f64>()
            })
            .sum()
        };
        let mut first: Option<[Vec<u32>; 2]> = None;
        for pool in pools() {
            let mut out = vec![0.0; d.len()];
            swiglu(&pool, width, (&x, 2 * width), (&mut out, width));
            let got: f64 = out.iter().zip(&d).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum();
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert!((got - loss(&wide(&x), &wide(&d))).abs() < 1e-4);
            let mut dx = x.clone();
            swiglu_backward(&pool, width, (&mut dx, 2 * width), (&d, width));
            assert_gradient(&[&x, &d], 0, &dx, 1e-4, |v| loss(&v[0], &v[1]));
            let got = [bits(&out), bits(&dx)];
            // Rows further apart: the same values, and nothing is written between them.
            let apart = |x: &[f32], width: usize| -> Vec<f32> {
                x.chunks(width).flat_map(|x| x.iter().copied().chain([7.0; 3])).collect()
            };
            let mut far = apart(&vec![0.0; d.len()], width);
            let (x_far, d_far) = (apart(&x, 2 * width), apart(&d, width));
            swiglu(&pool, width, (&x_far, 2 * width + 3), (&mut far, width + 3));
            assert!(bits(&far) == bits(&apart(&out, width)));
            let mut dx_far = x_far.clone();
            swiglu_backward(&pool, width, (&mut dx_far, 2 * width + 3), (&d_far, width + 3));
            assert!(bits(&dx_far) == bits(&apart(&dx, 2 * width)));
            assert!(*first.get_or_insert_with(|| got.clone()) == got);
        }
    }
}

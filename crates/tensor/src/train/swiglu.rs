//! The gated non-linearity, `silu(gate) · up`, forward and backward.
//!
//! A row holds its gates, then its ups, as one product with both weights writes them. With `s = sigmoid(gate)`:
//! `dup = d·gate·s` and `dgate = d·up·s·(1 + gate·(1 − s))`. Backward writes both over the values themselves, which
//! nobody needs afterwards.

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;

use super::rows::each_block;

/// `out = silu(gate) · up`: `gate_up` has rows of `2 · width` values, `out` of `width`.
///
/// # Panics
/// If lengths don't fit.
pub fn swiglu(pool: &Pool, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width),
        "rows of {width}"
    );
    let rows = out.len() / width;
    let parts = Disjoint::new(out);
    each_block(pool, rows, 2 * width, |_, rows| {
        // SAFETY: blocks of rows don't overlap.
        let out = unsafe { parts.part(rows.start * width..rows.end * width) };
        let gate_up = &gate_up[2 * rows.start * width..2 * rows.end * width];
        lanes::dispatch(pool.cpu(), Forward { gate_up, width, out });
    });
}

/// Replaces gates and ups by their gradients; `d` is the gradient of the output.
///
/// # Panics
/// If lengths don't fit.
pub fn swiglu_backward(pool: &Pool, gate_up: &mut [f32], width: usize, d: &[f32]) {
    assert!(width > 0 && gate_up.len() == 2 * d.len() && d.len().is_multiple_of(width), "rows of {width}");
    let rows = d.len() / width;
    let parts = Disjoint::new(gate_up);
    each_block(pool, rows, 2 * width, |_, rows| {
        // SAFETY: blocks of rows don't overlap.
        let gate_up = unsafe { parts.part(2 * rows.start * width..2 * rows.end * width) };
        let d = &d[rows.start * width..rows.end * width];
        lanes::dispatch(pool.cpu(), Backward { gate_up, width, d });
    });
}

struct Forward<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let rows = self.gate_up.chunks_exact(2 * self.width).zip(self.out.chunks_exact_mut(self.width));
        for (gate_up, out) in rows {
            let (gate, up) = gate_up.split_at(self.width);
            let pieces = gate.chunks(LANES).zip(up.chunks(LANES));
            for ((gate, up), out) in pieces.zip(out.chunks_mut(LANES)) {
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
    gate_up: &'a mut [f32],
    width: usize,
    d: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let rows = self.gate_up.chunks_exact_mut(2 * self.width).zip(self.d.chunks_exact(self.width));
        for (gate_up, d) in rows {
            let (gates, ups) = gate_up.split_at_mut(self.width);
            let pieces = gates.chunks_mut(LANES).zip(ups.chunks_mut(LANES));
            for ((gates, ups), d) in pieces.zip(d.chunks(LANES)) {
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
            swiglu(&pool, &x, width, &mut out);
            let got: f64 = out.iter().zip(&d).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum();
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert!((got - loss(&wide(&x), &wide(&d))).abs() < 1e-4);
            let mut dx = x.clone();
            swiglu_backward(&pool, &mut dx, width, &d);
            assert_gradient(&[&x, &d], 0, &dx, 1e-4, |v| loss(&v[0], &v[1]));
            let got = [bits(&out), bits(&dx)];
            assert!(*first.get_or_insert_with(|| got.clone()) == got);
        }
    }
}

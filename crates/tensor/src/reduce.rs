//! Reductions over a row of logits.
//!
//! One pass of sixteen lanes each, 49,152 values in 4 µs and 9 µs: too little for a fork and join.

use crate::Cpu;
use crate::lanes::{self, Kernel, LANES, Lanes};

/// The index of the largest value; of equals the first. NaN never wins; an all-NaN or empty row gives 0.
pub fn argmax(cpu: Cpu, row: &[f32]) -> usize {
    let largest = lanes::dispatch(cpu, Largest(row));
    // By chunks without an early exit inside, which the compiler vectorises.
    let chunk = row
        .chunks(LANES * LANES)
        .position(|chunk| chunk.iter().fold(false, |found, &x| found | (x == largest)));
    let start = chunk.unwrap_or(0) * LANES * LANES;
    row[start..].iter().position(|&x| x == largest).map_or(0, |i| start + i)
}

/// `ln Σ exp(x)`, in one fixed order of lanes: value *i* is added in lane *i* mod 16, then the lanes in a tree.
///
/// An empty row, or one of `-inf` alone, gives `-inf`; a `+inf` in it gives `+inf`, a NaN NaN.
pub fn log_sum_exp(cpu: Cpu, row: &[f32]) -> f32 {
    let largest = lanes::dispatch(cpu, Largest(row));
    if largest.is_infinite() && !row.iter().any(|x| x.is_nan()) {
        return largest;
    }
    let sum = lanes::dispatch(cpu, SumExp(row, largest));
    (f64::from(largest) + f64::from(sum).ln()) as f32
}

/// The largest value, NaN aside; `-inf` if there is none.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) -> f32 {
        // Four vectors side by side hide the latency; a maximum doesn't depend on its order.
        let mut best = [l.splat(f32::NEG_INFINITY); 4];
        let mut quads = self.0.chunks_exact(4 * LANES);
        for quad in &mut quads {
            for (best, x) in best.iter_mut().zip(quad.chunks_exact(LANES)) {
                *best = l.max(l.load(x), *best);
            }
        }
        let all = l.max(l.max(best[0], best[1]), l.max(best[2], best[3]));
        let rest = quads.remainder().iter().copied();
        rest.fold(l.largest(all), |best, x| if x > best { x } else { best })
    }
}

/// `Σ exp(x - largest)`.
struct SumExp<'a>(&'a [f32], f32);

impl Kernel for SumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) -> f32 {
        let largest = l.splat(self.1);
        let mut sum = l.splat(0.0);
        let mut rows = self.0.chunks_exact(LANES);
        for x in &mut rows {
            sum = l.add(sum, l.exp(l.sub(l.load(x), largest)));
        }
        let mut last = [f32::NEG_INFINITY; LANES];
        let rest = rows.remainder();
        last[..rest.len()].copy_from_slice(rest);
        l.sum(l.add(sum, l.exp(l.sub(l.load(&last), largest))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{cpus, uniform};

    #[test]
    fn argmax_takes_the_first_of_equals_and_never_nan() {
        for cpu in cpus() {
            assert_eq!(argmax(cpu, &[]), 0);
            assert_eq!(argmax(cpu, &[f32::NAN; 40]), 0);
            assert_eq!(argmax(cpu, &[f32::NEG_INFINITY; 40]), 0);
            let mut row = uniform(1, 1000);
            for (at, value) in
                [(17, 2.0), (900, 2.0), (3, f32::NAN), (999, f32::NAN), (50, f32::NEG_INFINITY)]
            {
                row[at] = value;
            }
            assert_eq!(argmax(cpu, &row), 17);
            row[998] = 3.0;
            assert_eq!(argmax(cpu, &row), 998);
        }
    }

    #[test]
    fn log_sum_exp_agrees_with_f64_and_over_families() {
        for len in [1, 15, 16, 17, 1000, 49152] {
            let row: Vec<f32> = uniform(2, len).iter().map(|x| x * 40.0).collect();
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from(x - largest).exp()).sum();
            let exact = f64::from(largest) + sum.ln();
            let bits: Vec<u32> = cpus().map(|cpu| log_sum_exp(cpu, &row).to_bits()).collect();
            assert!(bits.iter().all(|&b| b == bits[0]));
            assert!((f64::from(f32::from_bits(bits[0])) - exact).abs() < 1e-5, "{len}");
        }
        let cpu = Cpu::detect();
        assert_eq!(log_sum_exp(cpu, &[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(cpu, &[f32::NEG_INFINITY; 20]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(cpu, &[1.0, f32::INFINITY]), f32::INFINITY);
        assert!(log_sum_exp(cpu, &[1.0, f32::NAN]).is_nan());
    }
}

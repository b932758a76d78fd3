//! Top-p on whole numbers. A token's weight is `⌊2²⁸ · e^x⌋`, relative to the likeliest token's 2²⁸; sums of whole
//! numbers have no order, so the fast selection and the plain one agree on every token at the boundary. Tokens
//! less likely than 2⁻²⁸ of the likeliest weigh nothing: together they could hold 0.02 % of the probability at most
//! (49,152 tokens), and less than the likeliest's 4·10⁻⁹ each.
//!
//! The exponential is a polynomial of adds and multiplications, written so that the compiler vectorises it and no
//! machine computes it otherwise. Its relative error is below 3·10⁻⁷.

use consort_tensor::{Cpu, reduce};

use super::peaks::{Candidate, Peaks, Row};

/// The likeliest token's weight.
const SCALE: f32 = (1u32 << 28) as f32;

/// Below this the weight is 0: ln 2⁻²⁸ is −19.41.
const FLOOR: f32 = -19.5;

/// `⌊2²⁸ · e^x⌋` for `x <= 0`; 0 for NaN.
#[inline(always)]
pub fn weight(x: f32) -> u32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few bits, so its multiples by small integers are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to an integer that stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;

    let clamped = if x > FLOOR { x } else { FLOOR };
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    // e^r for |r| <= ln 2 / 2 (Taylor to the sixth power).
    let mut e = 1.0 / 720.0;
    for factor in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        e = e * r + factor;
    }
    let exponent = (shifted.to_bits() << 23).wrapping_add(e.to_bits());
    let scaled = f32::from_bits(exponent) * SCALE;
    let kept = if x > FLOOR { scaled } else { 0.0 };
    kept as i32 as u32
}

/// The weight that a set must reach to hold `top_p` of `total`; at least 1.
pub fn target(total: u64, top_p: f64) -> u64 {
    ((total as f64 * top_p).ceil() as u64).clamp(1, total.max(1))
}

/// Moves the shortest prefix of the order (likeliest first, lower ids first) whose weight reaches `target` to the
/// front, in no order, and returns its length; all of them if they don't reach it. Expected time O(n): halves the
/// stretch that holds the boundary instead of sorting.
pub fn nucleus(candidates: &mut [Candidate], target: u64) -> usize {
    const SORTED: usize = 32;
    let (mut low, mut high) = (0, candidates.len());
    let mut missing = target;
    while high - low > SORTED {
        let half = (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(half, Candidate::order);
        let mass: u64 = candidates[low..low + half].iter().map(|c| u64::from(weight(c.x))).sum();
        if mass >= missing {
            high = low + half;
        } else {
            missing -= mass;
            low += half;
        }
    }
    candidates[low..high].sort_unstable_by(Candidate::order);
    for (index, candidate) in candidates[low..high].iter().enumerate() {
        let weight = u64::from(weight(candidate.x));
        if weight >= missing {
            return low + index + 1;
        }
        missing -= weight;
    }
    high
}

/// The sum of a whole row's weights, from the vectorised log-sum-exp of its tempered values (into `tempered`): exact
/// to about 10⁻⁶, the same in every family of kernels, and ten times as fast as adding them up.
pub fn total(cpu: Cpu, row: Row<'_>, tempered: &mut Vec<f32>) -> u64 {
    row.tempered(tempered);
    let sum = f64::from(SCALE) * libm::exp(f64::from(reduce::log_sum_exp(cpu, tempered)));
    if sum.is_finite() {
        return sum as u64;
    }
    // A NaN in the row: it is banned and weighs nothing.
    tempered.iter().map(|&x| u64::from(weight(x))).sum()
}

/// The nucleus of a whole row, into `out`.
pub fn nucleus_of_row(
    cpu: Cpu,
    row: Row<'_>,
    peaks: &Peaks,
    top_p: f64,
    tempered: &mut Vec<f32>,
    out: &mut Vec<Candidate>,
) {
    let target = target(total(cpu, row, tempered), top_p);
    // Most nuclei lie within a few nats of the likeliest token.
    for floor in [-4.0, -8.0, -12.0, f32::NEG_INFINITY] {
        peaks.at_least(row, floor, out);
        let mass: u64 = out.iter().map(|candidate| u64::from(weight(candidate.x))).sum();
        if mass >= target || floor == f32::NEG_INFINITY {
            let kept = nucleus(out, target);
            out.truncate(kept);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_exponential() {
        assert_eq!(weight(0.0), 1 << 28);
        for step in 0..200_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp() * f64::from(SCALE);
            let error = (f64::from(weight(x)) - exact).abs();
            assert!(error <= 1.0 + exact * 3e-7, "e^{x}: {} instead of {exact}", weight(x));
        }
        for x in [-20.0, -1e9, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(weight(x), 0, "e^{x}");
        }
    }

    #[test]
    fn a_target_is_within_reach() {
        assert_eq!(target(100, 0.5), 50);
        assert_eq!(target(100, 0.501), 51);
        assert_eq!(target(100, 1e-9), 1);
        assert_eq!(target(100, 1.0), 100);
        assert_eq!(target(0, 0.5), 1);
    }
}

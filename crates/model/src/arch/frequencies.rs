//! Rotary frequencies and the ways to stretch them past the context a model was trained for.
//!
//! A pair of values *i* turns by `position · theta^(−2i/dim)`. Stretching divides some of these frequencies:
//! all of them (linear), the slow ones (Llama 3), or a ramp between fast and slow together with a larger magnitude
//! (YaRN, Peng et al. 2023). All in `f64`, once at load.

use std::f64::consts::TAU;

/// How a layer rotates queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// A way to stretch rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: frequencies that turn less than `low_freq_factor` times in the original context are divided by
    /// `factor`, those above `high_freq_factor` stay, between them a straight line.
    Llama3 {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Turns below which a frequency is slow.
        low_freq_factor: f64,
        /// Turns above which it is fast.
        high_freq_factor: f64,
        /// Positions the model was trained for first.
        original_context: f64,
    },
    /// YaRN.
    Yarn {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Turns above which a frequency stays.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Positions the model was trained for first.
        original_context: f64,
        /// Multiplies sines and cosines.
        magnitude: f64,
        /// Whether the ramp's ends are rounded to whole pairs.
        whole_pairs: bool,
    },
}

/// YaRN's magnitude for a factor, where the file doesn't give one.
pub(crate) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// As trained, with the base `theta`.
    pub fn plain(theta: f64) -> RopeConfig {
        RopeConfig { theta, scaling: RopeScaling::None }
    }

    /// What is impossible about these numbers, if anything.
    pub(crate) fn contradiction(&self) -> Option<String> {
        let mut positive = vec![("rope theta", self.theta)];
        match self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive.push(("rope factor", factor)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive.extend([
                    ("rope factor", factor),
                    ("rope low_freq_factor", low_freq_factor),
                    ("rope high_freq_factor above low_freq_factor", high_freq_factor - low_freq_factor),
                    ("rope original context", original_context),
                ]);
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, magnitude, .. } => {
                positive.extend([
                    ("rope factor", factor),
                    ("rope beta_slow", beta_slow),
                    ("rope beta_fast above beta_slow", beta_fast - beta_slow),
                    ("rope original context", original_context),
                    ("rope attention factor", magnitude),
                    ("rope theta above 1", self.theta - 1.0),
                ]);
            }
        }
        positive.iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)).map(|(what, x)| format!("{what} is {x}"))
    }

    /// Multiplies sines and cosines.
    pub(crate) fn magnitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { magnitude, .. } => magnitude,
            _ => 1.0,
        }
    }

    /// One frequency a pair, `dim / 2` of them, in radians a position.
    pub(crate) fn inverse_frequencies(&self, dim: usize) -> Vec<f64> {
        let plain: Vec<f64> = (0..dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64)).collect();
        match self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.into_iter().map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
                .into_iter()
                .map(|f| {
                    let turns = original_context * f / TAU;
                    let keep =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, whole_pairs, .. } => {
                // The pair that turns `turns` times in the original context.
                let pair = |turns: f64| {
                    dim as f64 * (original_context / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if whole_pairs {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                if high <= low {
                    high = low + 0.001;
                }
                let stretch = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let at = |(i, f): (usize, f64)| f * (1.0 - stretch(i)) + f / factor * stretch(i);
                plain.into_iter().enumerate().map(at).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 10_000.0, scaling }
    }

    #[test]
    fn plain_frequencies_fall_from_one_to_nearly_the_inverse_base() {
        let f = rope(RopeScaling::None).inverse_frequencies(8);
        for (got, want) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = rope(RopeScaling::None).inverse_frequencies(64);
        let scaled = rope(scaling).inverse_frequencies(64);
        assert_eq!(plain[0], scaled[0]);
        assert!((scaled[31] - plain[31] / 8.0).abs() < 1e-15);
        assert!(scaled.windows(2).all(|w| w[1] < w[0]));
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096.0,
            magnitude: yarn_magnitude(4.0, 1.0),
            whole_pairs: true,
        };
        let plain = rope(RopeScaling::None).inverse_frequencies(64);
        let scaled = rope(scaling).inverse_frequencies(64);
        assert_eq!(plain[0], scaled[0]);
        assert!((scaled[31] - plain[31] / 4.0).abs() < 1e-15);
        assert!((yarn_magnitude(4.0, 1.0) - 1.138_629_436).abs() < 1e-8);
    }

    #[test]
    fn numbers_that_divide_by_zero_are_named() {
        let scaling = RopeScaling::Linear { factor: 0.0 };
        assert!(rope(scaling).contradiction().is_some_and(|c| c.contains("factor")));
        assert!(RopeConfig::plain(f64::NAN).contradiction().is_some());
        assert!(RopeConfig::plain(10_000.0).contradiction().is_none());
    }
}

//! The learning rate as a function of the step: a straight line up, then constant, linear or cosine.
//!
//! A function of the step alone, so that a resumed job continues at the rate it would have had.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What the rate does after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// It stays.
    Constant,
    /// A straight line down to `final_share` of it at the last step.
    Linear,
    /// Half a cosine down to `final_share` of it at the last step (Loshchilov and Hutter 2017).
    #[default]
    Cosine,
}

/// A schedule of learning rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The rate after the warm-up.
    pub learning_rate: f64,
    /// Steps of the warm-up: step *s* of them has `(s + 1) / warmup_steps` of the rate.
    pub warmup_steps: u64,
    /// Steps in all; later ones have the last step's rate.
    pub steps: u64,
    /// What the rate does after the warm-up.
    pub decay: Decay,
    /// What is left of the rate at the end, 0 to 1.
    pub final_share: f64,
}

impl Schedule {
    /// What is wrong with these numbers, if anything.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |name, value: String, expected| Err(Error::Setting { name, value, expected });
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return wrong("learning_rate", self.learning_rate.to_string(), "a number above 0");
        }
        if !(0.0..=1.0).contains(&self.final_share) {
            return wrong("final_share", self.final_share.to_string(), "a number from 0 to 1");
        }
        if self.steps == 0 {
            return wrong("steps", "0".into(), "a count from 1 on");
        }
        if self.warmup_steps > self.steps {
            return wrong("warmup_steps", self.warmup_steps.to_string(), "at most the steps in all");
        }
        Ok(())
    }

    /// The rate of step `step`, from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        // The last step has the final share, so the way down has one step less than it covers.
        let way = self.steps.saturating_sub(self.warmup_steps).saturating_sub(1).max(1);
        let done = ((step - self.warmup_steps) as f64 / way as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (PI * done).cos()),
        };
        match self.decay {
            Decay::Constant => self.learning_rate,
            _ => self.learning_rate * (self.final_share + (1.0 - self.final_share) * left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule { learning_rate: 1.0, warmup_steps: 4, steps: 15, decay, final_share: 0.1 }
    }

    #[test]
    fn rises_in_a_line_and_falls_as_asked() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let s = schedule(decay);
            s.check().unwrap();
            let up: Vec<f64> = (0..5).map(|step| s.at(step)).collect();
            assert_eq!(up, [0.25, 0.5, 0.75, 1.0, 1.0]);
            let (middle, end) = match decay {
                Decay::Constant => (1.0, 1.0),
                _ => (0.55, 0.1),
            };
            assert!((s.at(9) - middle).abs() < 1e-12 && (s.at(14) - end).abs() < 1e-12, "{decay:?}");
            assert!((s.at(1000) - end).abs() < 1e-12);
            assert!((4..14).all(|step| s.at(step + 1) <= s.at(step)));
        }
    }

    #[test]
    fn extremes_are_numbers_and_nonsense_is_refused() {
        let one = Schedule { warmup_steps: 0, steps: 1, ..schedule(Decay::Cosine) };
        one.check().unwrap();
        assert_eq!(one.at(0), 1.0);
        let all_warm = Schedule { warmup_steps: 15, ..schedule(Decay::Linear) };
        all_warm.check().unwrap();
        assert_eq!(all_warm.at(14), 1.0);
        for wrong in [
            Schedule { learning_rate: f64::NAN, ..one },
            Schedule { learning_rate: 0.0, ..one },
            Schedule { final_share: 1.5, ..one },
            Schedule { steps: 0, ..one },
            Schedule { warmup_steps: 2, ..one },
        ] {
            assert!(matches!(wrong.check(), Err(Error::Setting { .. })), "{wrong:?}");
        }
    }
}

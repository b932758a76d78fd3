//! Whether a worker that is gone is replaced, and when: a pure state machine.
//!
//! A worker may die of bad luck, and then a new one is all that is needed. Or it dies of something that will kill the
//! next one too: then replacements come ever slower, and after so many in a row without a step in between there are
//! no more. The others go on.

use std::time::Duration;

use consort_base::Backoff;

/// Replacements in a row without a step of the job.
const MOST: u32 = 8;
const PAUSES: Backoff = Backoff { base: Duration::from_millis(100), cap: Duration::from_secs(20) };

/// What is decided about a worker that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// A new one is started then.
    At(Duration),
    /// There have been enough.
    Enough,
}

/// Replacements so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Replacements {
    in_a_row: u32,
    /// The step that the job had taken when the last one was decided.
    step: u64,
}

impl Replacements {
    /// A worker is gone at `now`; the job has taken `step` steps.
    pub(crate) fn gone(&mut self, now: Duration, step: u64) -> Decision {
        if step > self.step {
            self.in_a_row = 0;
        }
        self.step = step;
        if self.in_a_row >= MOST {
            return Decision::Enough;
        }
        // The first one is bad luck.
        let pause = if self.in_a_row == 0 { Duration::ZERO } else { PAUSES.ceiling(self.in_a_row) };
        self.in_a_row += 1;
        Decision::At(now + pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_luck_is_replaced_at_once_and_a_curse_not_for_ever() {
        let mut replacements = Replacements::default();
        let second = Duration::from_secs(1);
        for step in 1..50 {
            assert_eq!(replacements.gone(second, step), Decision::At(second), "the job goes on");
        }
        let mut last = Duration::ZERO;
        for _ in 1..MOST {
            let Decision::At(when) = replacements.gone(second, 49) else { panic!("too early") };
            assert!(when >= last && when <= second + PAUSES.cap);
            last = when;
        }
        assert_eq!(replacements.gone(second, 49), Decision::Enough);
        assert_eq!(replacements.gone(second, 50), Decision::At(second), "a step is hope");
    }
}

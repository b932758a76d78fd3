//! How often a candidate scores the incumbent's answers: a share of them, one at a time, and for at most a tenth of the
//! time.
//!
//! Scoring is a prefill on replicas that have clients to serve. A share alone would not bound it (a tenth of a flood is a
//! flood); so each scoring is followed by a rest nine times as long as it took. What is left out is not queued: the next
//! answer is as good a sample.

use std::time::{Duration, Instant};

/// A rest is so many times as long as the scoring before it.
const REST: u32 = 9;

/// Whether a scoring is under way, and until when there is to be none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    busy: bool,
    rests_until: Option<Instant>,
}

impl Pace {
    /// Whether the answer that is complete `now` is to be scored, being one of `percent` in a hundred; `random` decides.
    /// Who gets a yes says [`Pace::done`] in the end, whatever happens.
    pub(crate) fn take(&mut self, now: Instant, percent: u32, random: u64) -> bool {
        let rests = self.rests_until.is_some_and(|until| now < until);
        let taken = !self.busy && !rests && random % 100 < u64::from(percent);
        self.busy |= taken;
        taken
    }

    /// A scoring that took so long is over.
    pub(crate) fn done(&mut self, now: Instant, took: Duration) {
        *self = Pace { busy: false, rests_until: now.checked_add(took.saturating_mul(REST)) };
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    #[test]
    fn scoring_is_a_share_of_answers_and_a_tenth_of_the_time() {
        let (start, mut rng) = (Instant::now(), Philox::new(3, 0));
        // An answer each millisecond; a scoring takes 20.
        let mut taken_at = |percent| {
            let (mut pace, mut until, mut taken) = (Pace::default(), None, 0);
            for ms in 0..100_000 {
                let now = start + Duration::from_millis(ms);
                if until == Some(now) {
                    pace.done(now, Duration::from_millis(20));
                }
                if pace.take(now, percent, rng.next_u64()) {
                    assert!(until.is_none_or(|until| until <= now), "one at a time");
                    (until, taken) = (Some(now + Duration::from_millis(20)), taken + 1);
                }
            }
            taken
        };
        assert_eq!(taken_at(0), 0);
        let all = taken_at(100);
        assert!((450..=500).contains(&all), "{all} of 20 ms in 100 s");
        let few = taken_at(1);
        assert!(
            (300..370).contains(&few),
            "{few}: a rest of 180 ms, then about 100 answers until one is drawn"
        );
    }
}

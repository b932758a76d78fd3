//! What becomes of a job's last checkpoint where its place takes none: a pure state machine.
//!
//! Any other checkpoint may fail: the next one is tried when it is due, and until then the workers have what it would have
//! held. Behind the last one comes nothing, and with its workers the trained weights would be gone. So the first worker
//! keeps them and tries again, at once and then with pauses that grow, until somebody has mended the place or the limit
//! is over. It writes the whole checkpoint itself, so that it needs nobody: every worker has all weights.

use std::time::Duration;

use consort_base::Backoff;

/// How long weights are kept that can't be written.
pub const HOLD: Duration = Duration::from_secs(600);

const PAUSES: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(30) };

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The next attempt, at this moment.
    At(Duration),
    /// It is over.
    GiveUp,
}

/// Attempts so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holding {
    attempts: u32,
    /// When the first one failed.
    since: Option<Duration>,
}

impl Holding {
    /// An attempt has failed at `now`, since any fixed beginning.
    pub(super) fn failed(&mut self, now: Duration) -> Next {
        let end = *self.since.get_or_insert(now) + HOLD;
        // A share that another worker didn't write needs no pause: this one writes all.
        let pause = self.attempts.checked_sub(1).map_or(Duration::ZERO, |attempt| PAUSES.ceiling(attempt));
        self.attempts = self.attempts.saturating_add(1);
        // The last attempt is at the very end.
        if now >= end { Next::GiveUp } else { Next::At((now + pause).min(end)) }
    }

    /// How long it goes on from `now`.
    pub(super) fn left(&self, now: Duration) -> Duration {
        self.since.map_or(HOLD, |since| (since + HOLD).saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tries_at_once_then_ever_less_often_and_not_for_ever() {
        let (mut holding, begun, took) =
            (Holding::default(), Duration::from_secs(7), Duration::from_millis(20));
        let (mut now, mut pauses) = (begun, Vec::new());
        while let Next::At(when) = holding.failed(now) {
            pauses.push((when - now).as_secs());
            now = when + took;
        }
        assert_eq!(pauses[..8], [0, 1, 2, 4, 8, 16, 30, 30]);
        assert!(pauses.len() > 20 && pauses.len() < 40, "{pauses:?}");
        assert!(now >= begun + HOLD && now < begun + HOLD + Duration::from_secs(1));
        assert_eq!(holding.left(begun + Duration::from_secs(1)), HOLD - Duration::from_secs(1));
        assert_eq!(holding.left(now), Duration::ZERO);
    }
}

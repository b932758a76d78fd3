//! What becomes of a job's last checkpoint where its place takes none.
//!
//! Any other checkpoint may fail: the next one is tried when it is due, and until then the workers have what it would have
//! held. Behind the last one comes nothing, and with its workers the trained weights would be gone. So who has all of them
//! (the first worker, or the launcher of a job around servers) keeps them and tries again, at once and then with pauses
//! that grow, until somebody has mended the place or the limit is over. It writes the whole checkpoint itself, so that it
//! needs nobody.
//!
//! When it is tried, and how often, is a pure state machine; [`keep`] runs it.

use std::time::{Duration, Instant};

use consort_base::Backoff;

use super::event::{Control, Holding as Told};

/// How long weights are kept that can't be written.
pub const HOLD: Duration = Duration::from_secs(600);

/// How often it is said, and heard whether it shall go on.
const LOOK: Duration = Duration::from_secs(1);

const PAUSES: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(30) };

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The next attempt, at this moment.
    At(Duration),
    /// It is over.
    GiveUp,
}

/// Attempts so far.
#[derive(Clone, Copy, Debug, Default)]
struct Holding {
    attempts: u32,
    /// When the first one failed.
    since: Option<Duration>,
}

impl Holding {
    /// An attempt has failed at `now`, since any fixed beginning.
    fn failed(&mut self, now: Duration) -> Next {
        let end = *self.since.get_or_insert(now) + HOLD;
        // A share that another worker didn't write needs no pause: this one writes all.
        let pause = self.attempts.checked_sub(1).map_or(Duration::ZERO, |attempt| PAUSES.ceiling(attempt));
        self.attempts = self.attempts.saturating_add(1);
        // The last attempt is at the very end.
        if now >= end { Next::GiveUp } else { Next::At((now + pause).min(end)) }
    }

    /// How long it goes on from `now`.
    fn left(&self, now: Duration) -> Duration {
        self.since.map_or(HOLD, |since| (since + HOLD).saturating_sub(now))
    }
}

/// Who has trained weights that aren't written.
pub trait Keeper {
    /// Says so; [`Control::Stop`] gives them up.
    fn tell(&mut self, told: Told) -> Control;

    /// Writes all of them; the reason where that failed.
    fn attempt(&mut self) -> Option<String>;
}

/// Keeps the weights of `step`, which couldn't be written for `reason`, and has them written: until that works, somebody
/// gives them up, or [`HOLD`] is over. `bytes` is what the whole checkpoint takes. Whether they are written.
pub fn keep(keeper: &mut dyn Keeper, step: u64, bytes: u64, reason: String) -> bool {
    let (begun, mut holding, mut reason) = (Instant::now(), Holding::default(), reason);
    while let Next::At(when) = holding.failed(begun.elapsed()) {
        loop {
            let now = begun.elapsed();
            let again = when.saturating_sub(now);
            let told = Told {
                step,
                reason: reason.clone(),
                bytes,
                again_ms: again.as_millis() as u64,
                left_ms: holding.left(now).as_millis() as u64,
            };
            if keeper.tell(told) == Control::Stop {
                return false;
            }
            if again.is_zero() {
                break;
            }
            // Nobody tells when a disk has room.
            std::thread::sleep(again.min(LOOK));
        }
        match keeper.attempt() {
            None => return true,
            Some(failed) => reason = failed,
        }
    }
    false
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

    #[test]
    fn what_is_kept_is_written_or_given_up() {
        struct Place {
            fails: usize,
            told: Vec<Told>,
            gives_up: bool,
        }
        impl Keeper for Place {
            fn tell(&mut self, told: Told) -> Control {
                self.told.push(told);
                if self.gives_up { Control::Stop } else { Control::Go }
            }

            fn attempt(&mut self) -> Option<String> {
                self.fails = self.fails.checked_sub(1)?;
                Some("still full".into())
            }
        }
        let mut mended = Place { fails: 1, told: Vec::new(), gives_up: false };
        assert!(keep(&mut mended, 7, 99, "full".into()));
        let said: Vec<&str> = mended.told.iter().map(|told| told.reason.as_str()).collect();
        assert_eq!((said[0], said[said.len() - 1]), ("full", "still full"));
        assert!(mended.told.iter().all(|told| (told.step, told.bytes) == (7, 99)));
        let mut left = Place { gives_up: true, ..mended };
        left.told.clear();
        assert!(!keep(&mut left, 7, 99, "full".into()) && left.told.len() == 1);
    }
}

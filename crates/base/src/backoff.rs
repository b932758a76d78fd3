//! How long to wait before trying again: exponential backoff with full jitter (Brooker, "Exponential backoff and
//! jitter", AWS architecture blog, 2015).
//!
//! Full jitter spreads callers over the whole interval, so that those who failed together don't come back
//! together. The randomness is an argument: the same number gives the same delay.

use std::time::Duration;

/// Delays drawn from `[0, min(cap, base · 2^attempt))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first attempt's longest delay.
    pub base: Duration,
    /// No delay is longer.
    pub cap: Duration,
}

impl Backoff {
    /// The longest delay before attempt number `attempt` (0 is the first retry).
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let factor = 1u32.checked_shl(attempt).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.cap)
    }

    /// The delay before attempt number `attempt`, where `random` is uniform over all 64-bit numbers.
    pub fn delay(&self, attempt: u32, random: u64) -> Duration {
        let ceiling_ns = self.ceiling(attempt).as_nanos().min(u128::from(u64::MAX));
        let delay_ns = (ceiling_ns * u128::from(random)) >> 64;
        Duration::from_nanos(delay_ns as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Philox;

    const BACKOFF: Backoff = Backoff { base: Duration::from_millis(100), cap: Duration::from_secs(5) };

    #[test]
    fn ceilings_double_up_to_the_cap() {
        let ms: Vec<u128> = (0..8).map(|attempt| BACKOFF.ceiling(attempt).as_millis()).collect();
        assert_eq!(ms, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(BACKOFF.ceiling(u32::MAX), BACKOFF.cap);
    }

    #[test]
    fn delays_fill_the_interval() {
        let mut rng = Philox::new(3, 0);
        let delays: Vec<Duration> = (0..1000).map(|_| BACKOFF.delay(2, rng.next_u64())).collect();
        assert!(delays.iter().all(|&delay| delay < Duration::from_millis(400)));
        let mean_ms = delays.iter().map(Duration::as_millis).sum::<u128>() / 1000;
        assert!((180..220).contains(&mean_ms), "mean {mean_ms} ms");
        assert_eq!(BACKOFF.delay(2, 0), Duration::ZERO);
    }
}

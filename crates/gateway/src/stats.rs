//! Numbers of the recent past, in constant memory: rates over ten seconds, latencies over a minute.

use std::time::{Duration, Instant};

use consort_api::Latency;
use consort_base::histogram::{self, BUCKETS};

/// Seconds of a rate.
const SECONDS: usize = 10;
/// A distribution is of the last one to two of these.
const HALF: Duration = Duration::from_secs(30);

/// Something counted, a second.
#[derive(Clone, Debug)]
pub(crate) struct Rate {
    origin: Instant,
    /// The second's number and its count; one more than is summed, for the one that isn't over.
    seconds: [(u64, u64); SECONDS + 1],
}

impl Rate {
    pub(crate) fn new(now: Instant) -> Rate {
        Rate { origin: now, seconds: [(0, 0); SECONDS + 1] }
    }

    pub(crate) fn add(&mut self, now: Instant, count: u64) {
        let number = now.saturating_duration_since(self.origin).as_secs();
        let second = &mut self.seconds[number as usize % (SECONDS + 1)];
        if second.0 != number {
            *second = (number, 0);
        }
        second.1 += count;
    }

    /// Over the last ten seconds, or since the beginning where that is less.
    pub(crate) fn per_second(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.origin).as_secs_f64();
        let oldest = (age as u64).saturating_sub(SECONDS as u64 - 1);
        let sum: u64 =
            self.seconds.iter().filter(|(n, _)| *n >= oldest && *n <= age as u64).map(|(_, c)| c).sum();
        let span = (age - oldest as f64).max(1.0);
        sum as f64 / span
    }
}

/// A latency's distribution; quantiles are right to a fifth.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    since: Instant,
    now: Box<[u32; BUCKETS]>,
    before: Box<[u32; BUCKETS]>,
}

impl Latencies {
    pub(crate) fn new(now: Instant) -> Latencies {
        Latencies { since: now, now: Box::new([0; BUCKETS]), before: Box::new([0; BUCKETS]) }
    }

    fn turn(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age >= HALF {
            std::mem::swap(&mut self.now, &mut self.before);
            self.now.fill(0);
            if age >= 2 * HALF {
                self.before.fill(0);
            }
            self.since = now;
        }
    }

    pub(crate) fn add(&mut self, now: Instant, latency: Duration) {
        self.turn(now);
        let count = &mut self.now[histogram::bucket(latency)];
        *count = count.saturating_add(1);
    }

    pub(crate) fn wire(&mut self, now: Instant) -> Latency {
        self.turn(now);
        let counts = self.now.iter().zip(self.before.iter()).map(|(a, b)| u64::from(*a) + u64::from(*b));
        let quantile = |share| histogram::quantile_ms(counts.clone(), share).unwrap_or_default();
        Latency { count: counts.clone().sum(), p50_ms: quantile(0.5), p99_ms: quantile(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_last_ten_seconds() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        for ms in (0..20_000).step_by(10) {
            rate.add(start + Duration::from_millis(ms), 3);
        }
        let at = |ms| rate.per_second(start + Duration::from_millis(ms));
        assert!((290.0..310.0).contains(&at(19_999)), "{}", at(19_999));
        assert_eq!(at(40_000), 0.0);
    }

    #[test]
    fn quantiles_are_near_and_old_ones_go() {
        let start = Instant::now();
        let mut latencies = Latencies::new(start);
        for ms in 1..=1000 {
            latencies.add(start, Duration::from_millis(ms));
        }
        let latency = latencies.wire(start);
        assert_eq!(latency.count, 1000);
        assert!(
            (420.0..600.0).contains(&latency.p50_ms) && (825.0..1200.0).contains(&latency.p99_ms),
            "{latency:?}"
        );
        assert_eq!(latencies.wire(start + 3 * HALF), Latency::default());
    }
}

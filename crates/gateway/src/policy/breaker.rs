//! A circuit breaker for each replica: whether it can be talked to at all.
//!
//! Closed passes, Open rejects, HalfOpen lets one request through and waits for it. It counts requests that got no
//! response (no connection, a connection that broke before one); what a replica answers is the outlier detector's
//! affair. Open lasts longer each time, with full jitter, so that many gateways don't come back together.

use std::time::Instant;

use consort_api::BreakerState;
use consort_base::Backoff;

/// When a breaker opens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerSettings {
    /// Failures in a row.
    pub failures: u32,
    /// How long it stays open, by the number of times it opened in a row.
    pub open: Backoff,
}

impl Default for BreakerSettings {
    fn default() -> BreakerSettings {
        let open =
            Backoff { base: std::time::Duration::from_secs(1), cap: std::time::Duration::from_secs(15) };
        BreakerSettings { failures: 3, open }
    }
}

/// The state of one replica's breaker.
#[derive(Clone, Debug)]
pub(crate) struct Breaker {
    pub(crate) settings: BreakerSettings,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
        times: u32,
    },
    /// One probe is out.
    HalfOpen {
        times: u32,
    },
}

impl Breaker {
    pub(crate) fn new(settings: BreakerSettings) -> Breaker {
        Breaker { settings, state: State::Closed { failures: 0 } }
    }

    /// Whether a request would be let through.
    pub(crate) fn passes(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until, .. } => now >= until,
            State::HalfOpen { .. } => false,
        }
    }

    /// A request that passes goes out. In HalfOpen it is the probe.
    pub(crate) fn sent(&mut self, now: Instant) {
        if let State::Open { until, times } = self.state
            && now >= until
        {
            self.state = State::HalfOpen { times };
        }
    }

    /// A response came.
    pub(crate) fn success(&mut self) {
        self.state = State::Closed { failures: 0 };
    }

    /// None came; true where this opened it.
    pub(crate) fn failure(&mut self, now: Instant, random: u64) -> bool {
        let times = match &mut self.state {
            State::Closed { failures } => {
                *failures += 1;
                if *failures < self.settings.failures {
                    return false;
                }
                0
            }
            State::HalfOpen { times } => *times + 1,
            // A request that was sent before it opened.
            State::Open { .. } => return false,
        };
        // At least half of the ceiling: an open breaker that closes at once is none.
        let most = self.settings.open.ceiling(times);
        let until = now + most / 2 + self.settings.open.delay(times, random) / 2;
        self.state = State::Open { until, times };
        true
    }

    /// A request went out and nobody learnt how it ended: the client left. The next one is the probe.
    pub(crate) fn unknown(&mut self, now: Instant) {
        if let State::HalfOpen { times } = self.state {
            self.state = State::Open { until: now, times };
        }
    }

    pub(crate) fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use consort_base::Philox;

    use super::*;

    #[test]
    fn it_opens_probes_once_and_closes() {
        let now = Instant::now();
        let mut breaker = Breaker::new(BreakerSettings::default());
        assert!(!breaker.failure(now, 0));
        breaker.success();
        assert!(!breaker.failure(now, 0) && !breaker.failure(now, 0), "the count began anew");
        assert!(breaker.failure(now, 0));
        assert!(!breaker.passes(now));
        let later = now + Duration::from_millis(500);
        assert!(breaker.passes(later));
        breaker.sent(later);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert!(!breaker.passes(later), "one probe");
        breaker.unknown(later);
        assert!(breaker.passes(later), "the probe's client left: the next one may");
        breaker.sent(later);
        breaker.success();
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    /// A replica that is dead for a minute gets few requests, and all of them soon after it is back.
    #[test]
    fn a_dead_replica_costs_little() {
        for seed in 0..20 {
            let (start, mut rng) = (Instant::now(), Philox::new(seed, 0));
            let mut breaker = Breaker::new(BreakerSettings::default());
            let (mut wasted, mut back) = (0, None);
            for ms in 0..120_000u64 {
                let now = start + Duration::from_millis(ms);
                if !breaker.passes(now) {
                    continue;
                }
                breaker.sent(now);
                if ms < 60_000 {
                    wasted += 1;
                    breaker.failure(now, rng.next_u64());
                } else {
                    breaker.success();
                    back.get_or_insert(ms);
                }
            }
            assert!(wasted < 20, "seed {seed}: {wasted}");
            assert!(back.unwrap() <= 75_000, "seed {seed}: {back:?}");
        }
    }
}

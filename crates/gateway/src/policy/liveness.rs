//! Whether a replica is there at all, by asking it (`/ready`) again and again.
//!
//! A refused connection is certain and counts at once: the process is gone. A probe without an answer may be bad luck
//! or a busy machine, so it takes two in a row. A replica whose engine has work and makes no step for long hangs,
//! although its HTTP thread answers. A replica that becomes ready takes its share slowly, where asked to: its caches
//! are cold, and half of all traffic at once would show as a spike in everyone's latency.

use std::time::{Duration, Instant};

use consort_api::ReadyReport;

/// Probes without an answer until a replica counts as down.
const SILENT_PROBES: u32 = 2;
/// The least share of a replica that starts slowly: below it, it would never warm up.
const LEAST_SHARE: f64 = 0.1;

/// How a probe went.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Probe {
    /// It answered.
    Report(ReadyReport),
    /// It answered that it takes no requests: `true` where it is shutting down, else it is loading.
    NotReady { draining: bool },
    /// Nobody listens there.
    Refused,
    /// No answer in time.
    Silent,
    /// Something else answered.
    Wrong(String),
}

/// What is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Never yet ready.
    Starting,
    /// It takes requests.
    Ready,
    /// It takes no new ones.
    Draining,
    /// It doesn't answer, or not sensibly.
    Down(String),
}

/// What a probe changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    /// It takes requests now.
    Up,
    /// It takes no new ones; what runs there goes on.
    Out,
    /// What runs there is lost.
    Lost,
}

/// The state of one replica.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    pub(crate) life: Life,
    slow_start: Duration,
    pub(crate) stalled_after: Duration,
    ready_since: Option<Instant>,
    silent: u32,
}

impl Liveness {
    pub(crate) fn new(slow_start: Duration, stalled_after: Duration) -> Liveness {
        Liveness { life: Life::Starting, slow_start, stalled_after, ready_since: None, silent: 0 }
    }

    /// Takes a probe's outcome. `urgent`: somebody waits for a token from there, so one silent probe is enough.
    pub(crate) fn step(&mut self, now: Instant, probe: &Probe, urgent: bool) -> Change {
        if *probe == Probe::Silent {
            self.silent += 1;
            if self.silent < SILENT_PROBES && !urgent {
                return Change::None;
            }
        } else {
            self.silent = 0;
        }
        let next = match probe {
            Probe::Report(report) if Duration::from_millis(report.stalled_ms) > self.stalled_after => {
                Life::Down(format!("its engine has made no step for {} ms", report.stalled_ms))
            }
            Probe::Report(_) => Life::Ready,
            Probe::NotReady { draining: true } => Life::Draining,
            Probe::NotReady { draining: false } if self.life == Life::Starting => Life::Starting,
            Probe::NotReady { draining: false } => Life::Down("it is loading".to_owned()),
            // One that was never there may yet come.
            Probe::Refused if self.life == Life::Starting => Life::Starting,
            Probe::Refused => Life::Down("nobody listens there".to_owned()),
            Probe::Silent => Life::Down("it doesn't answer /ready".to_owned()),
            Probe::Wrong(what) => Life::Down(what.clone()),
        };
        let before = std::mem::replace(&mut self.life, next);
        match (&before, &self.life) {
            (Life::Ready, Life::Ready) => Change::None,
            (_, Life::Ready) => {
                self.ready_since = Some(now);
                Change::Up
            }
            (Life::Ready | Life::Draining, Life::Down(_)) => Change::Lost,
            (Life::Ready, _) => Change::Out,
            _ => Change::None,
        }
    }

    /// Its share of requests, 0 to 1.
    pub(crate) fn share(&self, now: Instant) -> f64 {
        match (&self.life, self.ready_since) {
            (Life::Ready, _) if self.slow_start.is_zero() => 1.0,
            (Life::Ready, Some(since)) => {
                let warm = now.saturating_duration_since(since).as_secs_f64() / self.slow_start.as_secs_f64();
                warm.clamp(LEAST_SHARE, 1.0)
            }
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ready() -> Probe {
        Probe::Report(ReadyReport::default())
    }

    #[test]
    fn it_comes_up_drains_and_goes_down() {
        let (now, mut liveness) = (Instant::now(), Liveness::new(Duration::ZERO, 10 * SECOND));
        assert_eq!(liveness.step(now, &Probe::Refused, false), Change::None);
        assert_eq!(liveness.life, Life::Starting, "not there yet is not down");
        assert_eq!(liveness.step(now, &ready(), false), Change::Up);
        assert_eq!(liveness.step(now, &Probe::Silent, false), Change::None);
        assert_eq!(liveness.step(now, &ready(), false), Change::None);
        assert_eq!(liveness.step(now, &Probe::Silent, false), Change::None, "the count began anew");
        assert_eq!(liveness.step(now, &Probe::Silent, false), Change::Lost);
        assert_eq!(liveness.step(now, &ready(), false), Change::Up);
        assert_eq!(liveness.step(now, &Probe::Silent, true), Change::Lost, "somebody waits");
        assert_eq!(liveness.step(now, &ready(), false), Change::Up);
        assert_eq!(liveness.step(now, &Probe::NotReady { draining: true }, false), Change::Out);
        assert_eq!(liveness.step(now, &Probe::Refused, false), Change::Lost, "what ran there is lost");
    }

    #[test]
    fn an_engine_that_stands_still_is_down_though_its_http_answers() {
        let (now, mut liveness) = (Instant::now(), Liveness::new(Duration::ZERO, 10 * SECOND));
        liveness.step(now, &ready(), false);
        let stalled = Probe::Report(ReadyReport { stalled_ms: 10_001, ..ReadyReport::default() });
        assert_eq!(liveness.step(now, &stalled, false), Change::Lost);
    }

    #[test]
    fn a_slow_start_takes_its_time() {
        let (now, mut liveness) = (Instant::now(), Liveness::new(10 * SECOND, 10 * SECOND));
        assert_eq!(liveness.share(now), 0.0);
        liveness.step(now, &ready(), false);
        let shares: Vec<f64> = [0, 5, 10, 60].map(|s| liveness.share(now + s * SECOND)).to_vec();
        assert_eq!(shares, [LEAST_SHARE, 0.5, 1.0, 1.0]);
    }
}

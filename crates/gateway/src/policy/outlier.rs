//! Takes a replica out that answers badly: consecutive failures, or too many in a window (Envoy's outlier detection).
//!
//! Only a replica's own failures count: a client's 4xx and a full queue's 429 say nothing about it. Each ejection lasts
//! longer than the one before, to a cap, and the count falls again while all goes well. The last replica is never
//! taken out: a bad one is better than none.

use std::time::{Duration, Instant};

/// Seconds of the window.
const WINDOW: usize = 10;

/// When a replica is taken out, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutlierSettings {
    /// Failures in a row.
    pub consecutive: u32,
    /// Or a share of successes below this, over ten seconds,
    pub success_ratio: f64,
    /// if there were at least so many requests.
    pub min_requests: u32,
    /// The first ejection's length; the n-th lasts n times as long.
    pub base: Duration,
    /// None lasts longer.
    pub cap: Duration,
}

impl Default for OutlierSettings {
    fn default() -> OutlierSettings {
        OutlierSettings {
            consecutive: 5,
            success_ratio: 0.5,
            min_requests: 20,
            base: Duration::from_secs(5),
            cap: Duration::from_secs(60),
        }
    }
}

/// One second's outcomes.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    number: u64,
    good: u32,
    bad: u32,
}

/// The state of one replica.
#[derive(Clone, Debug)]
pub(crate) struct Outlier {
    pub(crate) settings: OutlierSettings,
    origin: Instant,
    consecutive: u32,
    window: [Second; WINDOW],
    /// Ejections in a row, less one for each quiet spell.
    times: u32,
    until: Option<Instant>,
}

impl Outlier {
    pub(crate) fn new(now: Instant, settings: OutlierSettings) -> Outlier {
        Outlier { settings, origin: now, consecutive: 0, window: Default::default(), times: 0, until: None }
    }

    fn second(&mut self, now: Instant) -> &mut Second {
        let number = now.saturating_duration_since(self.origin).as_secs();
        let second = &mut self.window[number as usize % WINDOW];
        if second.number != number {
            *second = Second { number, ..Second::default() };
        }
        second
    }

    /// Notes how a request went; an ejection's length where it takes the replica out. `others`: there is another one.
    pub(crate) fn record(&mut self, now: Instant, success: bool, others: bool) -> Option<Duration> {
        let second = self.second(now);
        if success {
            second.good += 1;
            self.consecutive = 0;
            return None;
        }
        second.bad += 1;
        self.consecutive += 1;
        let oldest = now.saturating_duration_since(self.origin).as_secs().saturating_sub(WINDOW as u64 - 1);
        let recent = self.window.iter().filter(|second| second.number >= oldest);
        let (good, bad) = recent.fold((0, 0), |(good, bad), second| (good + second.good, bad + second.bad));
        let ratio = f64::from(good) / f64::from(good + bad);
        let poor = good + bad >= self.settings.min_requests && ratio < self.settings.success_ratio;
        if !others || self.ejected(now).is_some() || !(poor || self.consecutive >= self.settings.consecutive)
        {
            return None;
        }
        // For each quiet spell as long as the last ejection, one is forgiven.
        if let Some(until) = self.until {
            let spell = self.length().as_secs_f64().max(f64::MIN_POSITIVE);
            let quiet = now.saturating_duration_since(until).as_secs_f64() / spell;
            self.times = self.times.saturating_sub(quiet as u32);
        }
        self.times += 1;
        let length = self.length();
        self.until = Some(now + length);
        self.consecutive = 0;
        self.window = Default::default();
        Some(length)
    }

    fn length(&self) -> Duration {
        self.settings.base.saturating_mul(self.times).min(self.settings.cap)
    }

    /// How long it stays out yet.
    pub(crate) fn ejected(&self, now: Instant) -> Option<Duration> {
        self.until.and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// It was started anew: what was before says nothing.
    pub(crate) fn forget(&mut self) {
        (self.consecutive, self.window, self.until) = (0, Default::default(), None);
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn ejections_grow_and_shrink_and_never_take_the_last() {
        let start = Instant::now();
        let mut outlier = Outlier::new(start, OutlierSettings::default());
        let mut now = start;
        let fail = |outlier: &mut Outlier, now: Instant| -> Option<Duration> {
            (0..5).find_map(|_| outlier.record(now, false, true))
        };
        for n in 1..=14 {
            let length = fail(&mut outlier, now).unwrap();
            assert_eq!(length, (5 * n * SECOND).min(60 * SECOND));
            assert!(outlier.ejected(now + length - SECOND).is_some());
            now += length;
            assert_eq!(outlier.ejected(now), None);
        }
        let much_later = now + Duration::from_secs(3600);
        assert_eq!(fail(&mut outlier, much_later), Some(5 * SECOND), "all is forgiven");
        let mut last = Outlier::new(start, OutlierSettings::default());
        assert!((0..100).all(|_| last.record(start, false, false).is_none()));
    }

    #[test]
    fn a_ratio_counts_where_successes_come_between() {
        let (start, mut rng) = (Instant::now(), Philox::new(4, 0));
        let mut run = |bad_in_ten: u64| {
            let mut outlier =
                Outlier::new(start, OutlierSettings { consecutive: 1000, ..OutlierSettings::default() });
            (0..400u32).any(|i| {
                let now = start + i * Duration::from_millis(100);
                outlier.record(now, rng.next_u64() % 10 >= bad_in_ten, true).is_some()
            })
        };
        assert!(run(7));
        assert!(!run(1));
    }
}

//! How many replicas a version should have: a pure function of what is to be done, with its reason.
//!
//! The formula is that of Kubernetes' HorizontalPodAutoscaler: `ceil(now · load / target)`, nothing within a tolerance,
//! a window in which a lower (or higher) number must have been wanted throughout. The load is tokens, queued and
//! running, at the gateway and at the replicas, because a request's cost is its tokens: one of 8,000 is not one of 8.
//! Replicas that still start count as present, so that a burst isn't answered twice. To nothing only after an idle
//! time, and from nothing at once when a request waits.
//!
//! Cost: a few additions a call; the history holds one entry a change within the longer window, 4,096 at most.
//!
//! Source: Kubernetes documentation, "Horizontal Pod Autoscaling" (algorithm details, stabilisation window).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use consort_api::deployment::Version;

/// No growth in one decision is steeper than to twice as many (and one more): the load of a burst is seen before the
/// replicas it asked for can help.
const STEEPEST: u32 = 2;
/// Entries that the history holds at most; older ones are merged away.
const MOST_HISTORY: usize = 4096;

/// What a version has to do, and what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Replicas that are or will be there.
    pub replicas: u32,
    /// Tokens queued and running, everywhere.
    pub tokens: u64,
    /// Requests that wait for a replica.
    pub waiting: u64,
    /// Since the last request came; `None` where there never was one.
    pub idle: Option<Duration>,
}

/// A number of replicas and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// How many there should be.
    pub replicas: u32,
    /// Why, in a sentence.
    pub reason: String,
}

/// What was wanted lately, for the windows.
#[derive(Clone, Debug, Default)]
pub struct History {
    wanted: VecDeque<Span>,
    began: Option<Instant>,
}

/// A time in which about one number was wanted.
#[derive(Clone, Copy, Debug)]
struct Span {
    until: Instant,
    least: u32,
    most: u32,
}

/// How many replicas `version` should have at `now`.
pub fn decide(version: &Version, history: &mut History, now: Instant, load: &Load) -> Decision {
    let (min, max, rule) = (version.min, version.max, &version.autoscale);
    let began = *history.began.get_or_insert(now);
    let clamp = |n: u32| n.clamp(min, max);
    if min == max {
        return Decision { replicas: min, reason: format!("the file says {min}") };
    }
    if load.replicas == 0 && load.waiting > 0 {
        history.wanted.clear();
        let replicas = clamp(1);
        return Decision {
            replicas,
            reason: format!("{} requests wait and there is no replica", load.waiting),
        };
    }
    let (raw, why) = raw(rule.target_tokens, rule.tolerance, load);
    // One replica is the least while anything is to be done; none only after the idle time.
    let idle = load.idle.unwrap_or_else(|| now.saturating_duration_since(began));
    let busy = load.tokens > 0 || load.waiting > 0 || idle < rule.idle;
    let floor = if busy && load.replicas > 0 { min.max(1) } else { min };
    let wanted = raw.clamp(floor.min(max), max);
    history.note(now, wanted, rule.up_window.max(rule.down_window));

    // Up: the least that was wanted within the window; down: the most.
    let up = history.within(now, rule.up_window).map(|span| span.least).min().unwrap_or(wanted);
    let down = history.within(now, rule.down_window).map(|span| span.most).max().unwrap_or(wanted);
    let held = |window: Duration, other: u32| {
        format!("{why}; {other} was wanted within the last {} s", window.as_secs())
    };
    let (replicas, reason) = if wanted > load.replicas {
        let steep = (load.replicas * STEEPEST).max(load.replicas + 1);
        match up.min(steep) {
            up if up < wanted && up <= load.replicas => (load.replicas, held(rule.up_window, up)),
            up => (up, why),
        }
    } else if wanted < load.replicas {
        if down > wanted { (down.min(load.replicas), held(rule.down_window, down)) } else { (wanted, why) }
    } else {
        (wanted, why)
    };
    Decision { replicas: clamp(replicas), reason }
}

/// The formula, before windows and bounds.
fn raw(target: u32, tolerance: f64, load: &Load) -> (u32, String) {
    let target = f64::from(target.max(1));
    if load.tokens == 0 && load.waiting == 0 {
        return (0, "nothing is to be done".to_owned());
    }
    let each = load.tokens as f64 / f64::from(load.replicas.max(1));
    let ratio = each / target;
    let figures = format!("{each:.0} tokens a replica, {target:.0} wanted");
    if load.replicas > 0 && (ratio - 1.0).abs() <= tolerance + 1e-9 {
        return (load.replicas, format!("{figures}: within the tolerance"));
    }
    let wanted = (load.tokens as f64 / target).ceil().clamp(1.0, f64::from(u16::MAX));
    (wanted as u32, figures)
}

impl History {
    fn note(&mut self, now: Instant, wanted: u32, keep: Duration) {
        while self.wanted.front().is_some_and(|span| now.saturating_duration_since(span.until) > keep) {
            self.wanted.pop_front();
        }
        if let Some(last) = self.wanted.back_mut().filter(|last| (last.least, last.most) == (wanted, wanted))
        {
            last.until = now;
            return;
        }
        if self.wanted.len() >= MOST_HISTORY
            && let Some(oldest) = self.wanted.pop_front()
            && let Some(next) = self.wanted.front_mut()
        {
            (next.least, next.most) = (next.least.min(oldest.least), next.most.max(oldest.most));
        }
        self.wanted.push_back(Span { until: now, least: wanted, most: wanted });
    }

    /// The spans that reach into the window.
    fn within(&self, now: Instant, window: Duration) -> impl Iterator<Item = &Span> {
        self.wanted.iter().filter(move |span| now.saturating_duration_since(span.until) <= window)
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    fn version(min: u32, max: u32) -> Version {
        let mut version = Version::new("stable", "m", 1);
        (version.min, version.max) = (min, max);
        version.autoscale.target_tokens = 1000;
        version
    }

    fn load(replicas: u32, tokens: u64) -> Load {
        Load { replicas, tokens, waiting: 0, idle: Some(Duration::ZERO) }
    }

    fn once(version: &Version, load: Load) -> Decision {
        decide(version, &mut History::default(), Instant::now(), &load)
    }

    #[test]
    fn the_formula_its_tolerance_and_its_bounds() {
        let v = version(1, 10);
        for (replicas, tokens, expected) in [
            (2, 2000, 2),
            (2, 2200, 2),
            (2, 2201, 3),
            (4, 7900, 8),
            (2, 90_000, 4),
            (8, 900_000, 10),
            (4, 3601, 4),
            (4, 3000, 3),
            (4, 0, 1),
        ] {
            let decision = once(&v, load(replicas, tokens));
            assert_eq!(decision.replicas, expected, "{replicas} replicas, {tokens} tokens: {decision:?}");
        }
        assert_eq!(once(&version(3, 3), load(1, 90_000)).replicas, 3);
        assert!(once(&v, load(2, 5000)).reason.contains("2500 tokens a replica, 1000 wanted"));
    }

    #[test]
    fn down_waits_for_the_whole_window() {
        let v = version(1, 10);
        let (mut history, start) = (History::default(), Instant::now());
        let mut at = |seconds: u64, replicas, tokens| {
            decide(&v, &mut history, start + Duration::from_secs(seconds), &load(replicas, tokens))
        };
        assert_eq!(at(0, 4, 8000).replicas, 8);
        for second in 1..=300 {
            let decision = at(second, 8, 1000);
            assert_eq!(decision.replicas, 8, "{second}: {decision:?}");
            assert!(decision.reason.contains("within the last 300 s"));
        }
        assert_eq!(at(301, 8, 1000).replicas, 1);
    }

    #[test]
    fn to_nothing_after_idling_and_back_when_one_waits() {
        let v = version(0, 4);
        let mut idle = load(1, 0);
        idle.idle = Some(Duration::from_secs(599));
        assert_eq!(once(&v, idle).replicas, 1);
        idle.idle = Some(Duration::from_secs(600));
        assert_eq!(once(&v, idle).replicas, 0);
        let waits = Load { replicas: 0, tokens: 0, waiting: 1, idle: Some(Duration::ZERO) };
        let decision = once(&v, waits);
        assert_eq!(
            (decision.replicas, decision.reason.as_str()),
            (1, "1 requests wait and there is no replica")
        );
        // Nobody ever asked: the idle time counts from the start.
        let (mut history, start) = (History::default(), Instant::now());
        let never = Load { idle: None, ..load(1, 0) };
        assert_eq!(decide(&v, &mut history, start, &never).replicas, 1);
        assert_eq!(decide(&v, &mut history, start + Duration::from_secs(601), &never).replicas, 0);
        assert_eq!(once(&v, Load { idle: None, ..load(0, 0) }).replicas, 0);
    }

    /// A queue that drains at a rate for each replica, under load that comes and goes.
    #[test]
    fn under_any_load_it_stays_in_bounds_follows_and_settles() {
        for seed in 0..30 {
            let mut random = Philox::new(seed, 0);
            let v = version(random.below(3) as u32, 3 + random.below(6) as u32);
            let (mut history, start) = (History::default(), Instant::now());
            let (mut replicas, mut tokens, mut idle_since) = (v.min, 0u64, 0u64);
            let mut changes_when_steady = 0;
            for second in 0..4000u64 {
                let arriving = match second {
                    0..1000 => random.below(4000),
                    1000..2000 => 900,
                    _ => 0,
                };
                if arriving > 0 {
                    idle_since = second;
                }
                tokens = (tokens + arriving).saturating_sub(1000 * u64::from(replicas)).min(1 << 30);
                let load = Load {
                    replicas,
                    tokens,
                    waiting: u64::from(replicas == 0 && tokens > 0),
                    idle: Some(Duration::from_secs(second - idle_since)),
                };
                let decision = decide(&v, &mut history, start + Duration::from_secs(second), &load);
                assert!((v.min..=v.max).contains(&decision.replicas), "seed {seed}: {decision:?}");
                assert!(decision.replicas <= (2 * replicas).max(replicas + 1).max(v.min), "seed {seed}");
                assert!(!(decision.replicas == 0 && tokens > 0), "seed {seed}: nobody serves {tokens}");
                if (1700..2000).contains(&second) && decision.replicas != replicas {
                    changes_when_steady += 1;
                }
                replicas = decision.replicas;
            }
            assert!(changes_when_steady <= 1, "seed {seed}: it flaps");
            assert_eq!(replicas, v.min, "seed {seed}: nothing to do");
            assert!(history.wanted.len() <= MOST_HISTORY);
        }
    }

    /// The history once held 4,096 calls, four a second: a window longer than 17 minutes was cut to that.
    #[test]
    fn a_window_of_an_hour_is_an_hour_at_four_calls_a_second() {
        let (mut version, mut history, start) = (version(1, 8), History::default(), Instant::now());
        version.autoscale.down_window = Duration::from_secs(3600);
        let load = |replicas, tokens| Load { replicas, tokens, waiting: 0, idle: Some(Duration::ZERO) };
        let peak = decide(&version, &mut history, start, &load(4, 8000)).replicas;
        assert_eq!(peak, 8);
        // Quiet since, but for a flutter that fills the history.
        let mut last = peak;
        for tick in (1..4500u64).chain([4 * 3599, 4 * 3600]) {
            let now = start + Duration::from_millis(250 * tick);
            last = decide(&version, &mut history, now, &load(last, 1000 + 1000 * (tick % 2))).replicas;
            assert_eq!(last, 8, "after {} s", tick / 4);
        }
        let later = start + Duration::from_secs(3600 * 2 + 3);
        assert!(decide(&version, &mut history, later, &load(last, 1000)).replicas < 8);
    }
}

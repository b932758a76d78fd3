//! What one version of a model does: what the page shows, and what a rollout's judge compares.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{ShadowSnapshot, VersionSnapshot};
use consort_base::Histogram as Ever;

use crate::stats::Latencies;

/// What a version's requests came to.
pub(crate) struct VersionStats {
    pub(crate) requests: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(super) diverted: AtomicU64,
    pub(super) tokens: AtomicU64,
    latencies: Mutex<[(Latencies, Ever); 2]>,
    shadow: Mutex<ShadowSnapshot>,
}

/// What came of scoring one answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scored {
    /// So much less likely, in nats a token.
    Disagreement(f64),
    /// The candidate won't score it.
    Refused,
    /// Nothing can be said.
    Failed,
}

impl VersionStats {
    pub(crate) fn new() -> VersionStats {
        let now = Instant::now();
        VersionStats {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            diverted: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            latencies: Mutex::new([0, 1].map(|_| (Latencies::new(now), Ever::default()))),
            shadow: Mutex::default(),
        }
    }

    /// What is counted here; who is behind it, the caller fills in.
    pub(crate) fn snapshot(&self, now: Instant) -> VersionSnapshot {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let [first, inter] = &mut *latencies;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VersionSnapshot {
            requests: load(&self.requests),
            errors: load(&self.errors),
            diverted: load(&self.diverted),
            tokens: load(&self.tokens),
            first_token: first.0.wire(now),
            inter_token: inter.0.wire(now),
            first_token_ever: first.1.clone(),
            inter_token_ever: inter.1.clone(),
            shadow: *self.shadow.lock().unwrap_or_else(PoisonError::into_inner),
            ..VersionSnapshot::default()
        }
    }

    pub(super) fn add(&self, now: Instant, first: bool, latency: Duration) {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let (recent, ever) = &mut latencies[usize::from(!first)];
        recent.add(now, latency);
        ever.add(latency);
    }

    /// An answer of another version was scored, or was to be.
    pub(crate) fn scored(&self, scored: Scored) {
        let mut shadow = self.shadow.lock().unwrap_or_else(PoisonError::into_inner);
        match scored {
            Scored::Disagreement(nats) => {
                shadow.scored += 1;
                shadow.disagreement_sum += nats;
                shadow.disagreement_squares += nats * nats;
            }
            Scored::Refused => shadow.refused += 1,
            Scored::Failed => shadow.failed += 1,
        }
    }
}

//! What the gateway counts: totals for the snapshot, series for `/metrics`, one log line a request.
//!
//! Logs and metrics name keys by their ids, replicas, models, versions, routes and times. Prompts, answers and secrets
//! are never in them.

mod record;
mod series;
mod version;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{FleetSnapshot, GatewayTotals};

pub(crate) use record::{Place, Record, Tally};
use series::Series;
pub(crate) use series::Usual;
pub(crate) use version::{Scored, VersionStats};

use crate::stats::Rate;

/// Everything counted by one gateway.
pub(crate) struct Telemetry {
    pub(crate) started: Instant,
    requests: AtomicU64,
    errors: AtomicU64,
    refused: AtomicU64,
    /// Requests for answers under way.
    pub(crate) active: AtomicU64,
    streams: AtomicU64,
    retries: AtomicU64,
    resumes: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
    ejections: AtomicU64,
    rates: Mutex<(Rate, Rate)>,
    series: Series,
}

/// Things that happen and are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Retry,
    Resume,
    Hedge,
    HedgeWon,
    Ejection,
    Refused,
}

impl Telemetry {
    pub(crate) fn new() -> Telemetry {
        let now = Instant::now();
        let zero = || AtomicU64::new(0);
        Telemetry {
            started: now,
            requests: zero(),
            errors: zero(),
            refused: zero(),
            active: zero(),
            streams: zero(),
            retries: zero(),
            resumes: zero(),
            hedges: zero(),
            hedges_won: zero(),
            ejections: zero(),
            rates: Mutex::new((Rate::new(now), Rate::new(now))),
            series: Series::new(),
        }
    }

    pub(crate) fn count(&self, event: Event) {
        let (total, series) = match event {
            Event::Retry => (&self.retries, 0),
            Event::Resume => (&self.resumes, 1),
            Event::Hedge => (&self.hedges, 2),
            Event::HedgeWon => (&self.hedges_won, 3),
            Event::Ejection => (&self.ejections, 4),
            Event::Refused => (&self.refused, 5),
        };
        total.fetch_add(1, Ordering::Relaxed);
        self.series.counters[series].inc();
    }

    /// A replica failed a request, for this reason.
    pub(crate) fn failure(&self, replica: &str, reason: &str) {
        let labels = [("replica", replica.to_owned()), ("reason", reason.to_owned())];
        self.series.failures.get_or_create(&labels).inc();
    }

    /// Tokens went to a client.
    pub(crate) fn tokens(&self, now: Instant, count: u64) {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).1.add(now, count);
    }

    pub(crate) fn first_token(&self, now: Instant, version: &VersionStats, latency: Duration) {
        self.series.first_token.observe(latency.as_secs_f64());
        version.add(now, true, latency);
    }

    pub(crate) fn inter_token(&self, now: Instant, version: &VersionStats, latency: Duration) {
        self.series.inter_token.observe(latency.as_secs_f64());
        version.add(now, false, latency);
    }

    /// A version on trial failed a request, which another version answers.
    pub(crate) fn diverted(&self, model: &str, version: &str, stats: &VersionStats) {
        stats.requests.fetch_add(1, Ordering::Relaxed);
        stats.errors.fetch_add(1, Ordering::Relaxed);
        stats.diverted.fetch_add(1, Ordering::Relaxed);
        let labels = [("model", model), ("version", version), ("outcome", "diverted")];
        self.series.versions.get_or_create(&labels.map(|(name, value)| (name, value.to_owned()))).inc();
    }

    /// A client's pause while its answer moved to another replica.
    pub(crate) fn gap(&self, gap: Duration) {
        self.series.gaps.observe(gap.as_secs_f64());
    }

    pub(crate) fn totals(&self, now: Instant, queued: u64) -> GatewayTotals {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        GatewayTotals {
            requests: read(&self.requests),
            errors: read(&self.errors),
            refused: read(&self.refused),
            requests_per_second: rates.0.per_second(now),
            tokens_per_second: rates.1.per_second(now),
            streams: read(&self.streams),
            queued,
            retries: read(&self.retries),
            resumes: read(&self.resumes),
            hedges: read(&self.hedges),
            hedges_won: read(&self.hedges_won),
            ejections: read(&self.ejections),
        }
    }

    /// The text for Prometheus, with the numbers of now taken from `snapshot`.
    pub(crate) fn text(&self, snapshot: &FleetSnapshot) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.series.text(snapshot, load(&self.streams), load(&self.active))
    }
}

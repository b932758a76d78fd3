//! What the gateway counts: totals for the snapshot, series for `/metrics`, one log line a request.
//!
//! Logs and metrics name keys by their ids, replicas, models, versions, routes and times. Prompts, answers and secrets
//! are never in them.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{
    BreakerState, FleetSnapshot, GatewayTotals, ReplicaState, ShadowSnapshot, VersionSnapshot,
};
use consort_base::Histogram as Ever;
use consort_edge::Busy;
use consort_meter::trace::{Span, Trace};
use consort_meter::{Counter, Distribution, Family, Gauge, Histogram, Metrics};
use hyper::header::HeaderValue;

use crate::keys::Key;
use crate::stats::{Latencies, Rate};

type Labels<const N: usize> = [(&'static str, String); N];

const BOUNDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 15.0, 60.0];

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

struct Series {
    registry: Metrics,
    requests: Family<Labels<2>, Counter>,
    keys: Family<Labels<2>, Counter>,
    key_tokens: Family<Labels<1>, Counter>,
    versions: Family<Labels<3>, Counter>,
    version_tokens: Family<Labels<2>, Counter>,
    failures: Family<Labels<2>, Counter>,
    first_token: Histogram,
    inter_token: Histogram,
    duration: Histogram,
    gaps: Histogram,
    counters: [Counter; 6],
    gauges: Gauges,
}

/// Set when somebody scrapes.
struct Gauges {
    queued: Family<Labels<1>, Gauge>,
    streams: Gauge,
    active: Gauge,
    state: Family<Labels<2>, Gauge>,
    breaker: Family<Labels<1>, Gauge>,
    outstanding: Family<Labels<1>, Gauge>,
    outstanding_tokens: Family<Labels<1>, Gauge>,
    version_first_token: Family<Labels<2>, Distribution>,
    version_inter_token: Family<Labels<2>, Distribution>,
    shadow: Family<Labels<3>, Gauge>,
    disagreement: Family<Labels<2>, Gauge<f64, AtomicU64>>,
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

/// What a version's requests came to.
pub(crate) struct VersionStats {
    pub(crate) requests: AtomicU64,
    pub(crate) errors: AtomicU64,
    diverted: AtomicU64,
    tokens: AtomicU64,
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

    fn add(&self, now: Instant, first: bool, latency: Duration) {
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
        let gauges = &self.series.gauges;
        // A replica that is gone must not stay in the text.
        gauges.queued.clear();
        gauges.state.clear();
        gauges.breaker.clear();
        gauges.outstanding.clear();
        gauges.outstanding_tokens.clear();
        gauges.version_first_token.clear();
        gauges.version_inter_token.clear();
        gauges.shadow.clear();
        gauges.disagreement.clear();
        gauges.streams.set(self.streams.load(Ordering::Relaxed) as i64);
        gauges.active.set(self.active.load(Ordering::Relaxed) as i64);
        for model in &snapshot.models {
            gauges.queued.get_or_create(&[("model", model.name.clone())]).set(model.queued as i64);
            for version in &model.versions {
                gauges.version(&model.name, version);
            }
            for replica in model.versions.iter().flat_map(|version| &version.replicas) {
                let id = || [("replica", replica.id.clone())];
                for state in ALL_STATES {
                    let labels = [("replica", replica.id.clone()), ("state", state_name(state).to_owned())];
                    gauges.state.get_or_create(&labels).set(i64::from(replica.state == state));
                }
                gauges.breaker.get_or_create(&id()).set(match replica.breaker {
                    BreakerState::Closed => 0,
                    BreakerState::HalfOpen => 1,
                    BreakerState::Open => 2,
                });
                gauges.outstanding.get_or_create(&id()).set(replica.outstanding_requests as i64);
                gauges.outstanding_tokens.get_or_create(&id()).set(replica.outstanding_tokens as i64);
            }
        }
        self.series.registry.text()
    }
}

impl Gauges {
    /// The numbers of one version.
    fn version(&self, model: &str, version: &VersionSnapshot) {
        let labels = || [("model", model.to_owned()), ("version", version.name.clone())];
        let set = |family: &Family<Labels<2>, Distribution>, ever: &Ever| {
            family.get_or_create(&labels()).set(ever.coarse(SERIES_EVERY), ever.sum_seconds());
        };
        set(&self.version_first_token, &version.first_token_ever);
        set(&self.version_inter_token, &version.inter_token_ever);
        let shadow = &version.shadow;
        if shadow.scored + shadow.refused + shadow.failed == 0 {
            return;
        }
        let outcomes = [("scored", shadow.scored), ("refused", shadow.refused), ("failed", shadow.failed)];
        for (outcome, count) in outcomes {
            let [model, version] = labels();
            let labels = [model, version, ("outcome", outcome.to_owned())];
            self.shadow.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mean = shadow.disagreement_sum / (shadow.scored.max(1) as f64);
        self.disagreement.get_or_create(&labels()).set(mean);
    }
}

/// Buckets of ours that make one of a series by version: each is then about twice as wide as the one before.
const SERIES_EVERY: usize = 4;

const ALL_STATES: [ReplicaState; 6] = [
    ReplicaState::Starting,
    ReplicaState::Ready,
    ReplicaState::Degraded,
    ReplicaState::Ejected,
    ReplicaState::Draining,
    ReplicaState::Down,
];

fn state_name(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::Starting => "starting",
        ReplicaState::Ready => "ready",
        ReplicaState::Degraded => "degraded",
        ReplicaState::Ejected => "ejected",
        ReplicaState::Draining => "draining",
        ReplicaState::Down => "down",
    }
}

impl Series {
    fn new() -> Series {
        let registry = Metrics::new("consort_gateway");
        registry.info("build", "What runs here", &[("version", env!("CARGO_PKG_VERSION"))]);
        let counter = |name, help| registry.counter(name, help);
        Series {
            requests: registry.counters("requests", "Requests answered, by route and status"),
            keys: registry.counters("key_requests", "Requests for answers, by key and status"),
            key_tokens: registry.counters("key_tokens", "Tokens of prompts and answers, by key"),
            versions: registry.counters(
                "version_requests",
                "Requests for answers, by model, version and outcome (ok, client, error, diverted)",
            ),
            version_tokens: registry.counters("version_tokens", "Tokens of answers, by model and version"),
            failures: registry
                .counters("replica_failures", "Tries that came to nothing, by replica and reason"),
            first_token: registry.histogram(
                "time_to_first_token_seconds",
                "From a request's arrival to its first token",
                &BOUNDS,
            ),
            inter_token: registry.histogram(
                "inter_token_seconds",
                "Between two tokens of one answer",
                &BOUNDS,
            ),
            duration: registry.histogram(
                "request_seconds",
                "From a request's arrival to the end of its answer",
                &BOUNDS,
            ),
            gaps: registry.histogram(
                "resume_gap_seconds",
                "A client's pause while its answer moved to another replica",
                &BOUNDS,
            ),
            counters: [
                counter("retries", "Requests sent again before anything of their answer had been sent on"),
                counter("resumes", "Answers continued on another replica"),
                counter("hedges", "Second attempts for a slow first token"),
                counter("hedges_won", "Second attempts that were faster"),
                counter("ejections", "Replicas taken out for failing"),
                counter("refusals", "Requests refused with 429, by a key's limits or a full queue"),
            ],
            gauges: Gauges {
                queued: registry.gauges("queued", "Requests waiting here, by model"),
                streams: registry.gauge("streams", "Streams open"),
                active: registry.gauge("active", "Requests for answers under way"),
                state: registry.gauges("replica_state", "1 for the state a replica is in"),
                breaker: registry
                    .gauges("breaker_state", "A replica's breaker: 0 closed, 1 half open, 2 open"),
                outstanding: registry
                    .gauges("replica_outstanding_requests", "Requests sent there and not complete"),
                outstanding_tokens: registry
                    .gauges("replica_outstanding_tokens", "Tokens these are estimated to need yet"),
                version_first_token: registry.distributions(
                    "version_time_to_first_token_seconds",
                    "From a request's arrival to its first token, by model and version",
                ),
                version_inter_token: registry.distributions(
                    "version_inter_token_seconds",
                    "Between two tokens of one answer, by model and version",
                ),
                shadow: registry.gauges(
                    "shadow_answers",
                    "Answers that a candidate was to score, by model, version and outcome (scored, refused, failed)",
                ),
                disagreement: registry.gauges_f64(
                    "shadow_disagreement_nats",
                    "How much less likely, per token, a candidate finds the incumbent's answers, on average",
                ),
            },
            registry,
        }
    }
}

/// What one request comes to, told by whoever learns it.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) answer_tokens: AtomicU64,
    pub(crate) retries: AtomicU32,
    pub(crate) resumes: AtomicU32,
    /// Its stream ended with an error, although its status was 200.
    pub(crate) failed: AtomicBool,
    /// Its answer is complete.
    pub(crate) complete: AtomicBool,
    pub(crate) place: OnceLock<Place>,
    /// Where it went when the version it began with was on trial and failed it.
    pub(crate) diverted: OnceLock<Place>,
}

impl Tally {
    fn place(&self) -> Option<&Place> {
        self.diverted.get().or(self.place.get())
    }
}

/// Where a request went.
pub(crate) struct Place {
    pub(crate) model: String,
    pub(crate) version: String,
    pub(crate) stats: Arc<VersionStats>,
}

/// One request, from its arrival until its response's body is gone; then it is counted and logged.
pub(crate) struct Record {
    telemetry: Arc<Telemetry>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) key: Option<Arc<Key>>,
    /// Tokens the key's limits were charged with.
    pub(crate) charged: Option<u64>,
    route: &'static str,
    pub(crate) status: u16,
    pub(crate) streams: bool,
    pub(crate) request_id: HeaderValue,
    trace: Trace,
    arrived: Instant,
    counted: bool,
    /// Its connection has a request until its answer is gone.
    pub(crate) busy: Option<Busy>,
}

impl Record {
    pub(crate) fn new(telemetry: &Arc<Telemetry>, request_id: HeaderValue, trace: Trace) -> Record {
        Record {
            telemetry: telemetry.clone(),
            tally: Arc::default(),
            key: None,
            charged: None,
            route: "other",
            status: 0,
            streams: false,
            request_id,
            trace,
            arrived: Instant::now(),
            counted: false,
            busy: None,
        }
    }

    pub(crate) fn route(&mut self, route: &'static str) {
        self.route = route;
    }

    /// It asks for an answer.
    pub(crate) fn count(&mut self) {
        self.counted = true;
        let telemetry = &self.telemetry;
        telemetry.requests.fetch_add(1, Ordering::Relaxed);
        telemetry.active.fetch_add(1, Ordering::Relaxed);
        telemetry.rates.lock().unwrap_or_else(PoisonError::into_inner).0.add(Instant::now(), 1);
    }

    /// It streams.
    pub(crate) fn streaming(&mut self) {
        self.streams = true;
        self.telemetry.streams.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (now, tally, telemetry) = (Instant::now(), &self.tally, &self.telemetry);
        let took = now - self.arrived;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (prompt, answer) = (load(&tally.prompt_tokens), load(&tally.answer_tokens));
        let failed = tally.failed.load(Ordering::Relaxed);
        // 499, nginx's number for it: the client left before the answer was complete.
        let left = self.streams && !failed && !tally.complete.load(Ordering::Relaxed);
        let status = if self.status == 0 || left { 499 } else { self.status };
        if self.streams {
            telemetry.streams.fetch_sub(1, Ordering::Relaxed);
        }
        let series = &telemetry.series;
        series
            .requests
            .get_or_create(&[("route", self.route.to_owned()), ("status", status.to_string())])
            .inc();
        series.duration.observe(took.as_secs_f64());
        let key = self.key.as_ref().map_or("-", |key| key.id.as_str());
        if self.counted {
            telemetry.active.fetch_sub(1, Ordering::Relaxed);
            let error = failed || status >= 500;
            telemetry.errors.fetch_add(u64::from(error), Ordering::Relaxed);
            if status == 429 {
                telemetry.count(Event::Refused);
            }
            series.keys.get_or_create(&[("key", key.to_owned()), ("status", status.to_string())]).inc();
            series.key_tokens.get_or_create(&[("key", key.to_owned())]).inc_by(prompt + answer);
            if let Some(place) = tally.place() {
                place.stats.requests.fetch_add(1, Ordering::Relaxed);
                place.stats.errors.fetch_add(u64::from(error), Ordering::Relaxed);
                place.stats.tokens.fetch_add(answer, Ordering::Relaxed);
                let outcome = if error {
                    "error"
                } else if status >= 400 {
                    "client"
                } else {
                    "ok"
                };
                let (model, version) = (("model", place.model.clone()), ("version", place.version.clone()));
                series
                    .versions
                    .get_or_create(&[model.clone(), version.clone(), ("outcome", outcome.to_owned())])
                    .inc();
                series.version_tokens.get_or_create(&[model, version]).inc_by(answer);
            }
        }
        if let (Some(key), Some(charged)) = (&self.key, self.charged) {
            key.settle(now, charged, prompt + answer);
        }
        let (ms, request_id) = (took.as_secs_f64() * 1e3, self.request_id.to_str().unwrap_or_default());
        if !self.counted {
            tracing::debug!(route = self.route, status, ms, request_id, "request");
            return;
        }
        let place = tally.place();
        if self.trace.is_sampled() {
            let name = place.map_or("-", |place| place.model.as_str());
            let mut span = Span::ending(self.trace, self.route, took)
                .with("http.route", self.route)
                .with("http.response.status_code", u64::from(status))
                .with("consort.request_id", request_id)
                .with("consort.key", key)
                .with("gen_ai.request.model", name)
                .with("consort.version", place.map_or("-", |place| place.version.as_str()))
                .with("gen_ai.usage.input_tokens", prompt)
                .with("gen_ai.usage.output_tokens", answer)
                .with("consort.retries", u64::from(tally.retries.load(Ordering::Relaxed)))
                .with("consort.resumes", u64::from(tally.resumes.load(Ordering::Relaxed)));
            span.failed = failed || status >= 500;
            consort_meter::otlp::export(span);
        }
        tracing::info!(
            route = self.route,
            status,
            ms,
            request_id,
            trace_id = self.trace.id(),
            key,
            model = place.map_or("-", |place| &place.model),
            version = place.map_or("-", |place| &place.version),
            prompt_tokens = prompt,
            answer_tokens = answer,
            retries = tally.retries.load(Ordering::Relaxed),
            resumes = tally.resumes.load(Ordering::Relaxed),
            failed,
            "request"
        );
    }
}

//! The series of `/metrics`: what is counted as it happens, and what is read when somebody scrapes.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use consort_api::{BreakerState, FleetSnapshot, ReplicaState, VersionSnapshot};
use consort_base::Histogram as Ever;
use consort_meter::{Counter, Distribution, Family, Gauge, Histogram, Metrics};

/// Values of a series' labels, by their names.
pub(super) type Labels<const N: usize> = [(&'static str, String); N];

/// Counters of what is usual, found once: a request needn't make the texts of their labels.
#[derive(Default)]
pub(crate) struct Usual {
    /// Of requests that went well.
    well: OnceLock<Counter>,
    tokens: OnceLock<Counter>,
}

impl Usual {
    /// The counter of a request that went well, or another of the same family.
    pub(super) fn count<const N: usize>(
        &self,
        well: bool,
        family: &Family<Labels<N>, Counter>,
        labels: impl FnOnce() -> Labels<N>,
    ) {
        if well {
            self.well.get_or_init(|| family.get_or_create_owned(&labels())).inc();
        } else {
            family.get_or_create(&labels()).inc();
        }
    }

    pub(super) fn tokens<const N: usize>(
        &self,
        count: u64,
        family: &Family<Labels<N>, Counter>,
        labels: impl FnOnce() -> Labels<N>,
    ) {
        self.tokens.get_or_init(|| family.get_or_create_owned(&labels())).inc_by(count);
    }
}

const BOUNDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 15.0, 60.0];

/// The series of `/metrics`.
pub(super) struct Series {
    registry: Metrics,
    pub(super) requests: Family<Labels<2>, Counter>,
    /// By route; what isn't a route of ours is never usual.
    pub(super) routes: [(&'static str, Usual); 2],
    /// Of requests without a key.
    pub(super) keyless: Usual,
    pub(super) keys: Family<Labels<2>, Counter>,
    pub(super) key_tokens: Family<Labels<1>, Counter>,
    pub(super) versions: Family<Labels<3>, Counter>,
    pub(super) version_tokens: Family<Labels<2>, Counter>,
    pub(super) failures: Family<Labels<2>, Counter>,
    pub(super) first_token: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) duration: Histogram,
    pub(super) gaps: Histogram,
    pub(super) counters: [Counter; 6],
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
    pub(super) fn new() -> Series {
        let registry = Metrics::new("consort_gateway");
        registry.info("build", "What runs here", &[("version", env!("CARGO_PKG_VERSION"))]);
        let counter = |name, help| registry.counter(name, help);
        Series {
            requests: registry.counters("requests", "Requests answered, by route and status"),
            routes: ["/v1/chat/completions", "/v1/completions"].map(|route| (route, Usual::default())),
            keyless: Usual::default(),
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

    /// The text for Prometheus, with the numbers of now taken from `snapshot`.
    pub(super) fn text(&self, snapshot: &FleetSnapshot, streams: u64, active: u64) -> String {
        let gauges = &self.gauges;
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
        gauges.streams.set(streams as i64);
        gauges.active.set(active as i64);
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
        self.registry.text()
    }
}

//! What `/metrics` says.

use std::sync::Arc;
use std::time::Duration;

use consort_edge::Connections;
use consort_inference::STEP_ROW_BOUNDS;
use consort_meter::{Counter, Family, Histogram, Metrics, Sample, SampleKind, SampleSource};

use crate::engine::Slot;

/// `route` and `status`.
type RequestLabels = [(&'static str, String); 2];

/// The series the server moves itself.
pub(crate) struct ServerMetrics {
    registry: Metrics,
    requests: Family<RequestLabels, Counter>,
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    duration: Histogram,
}

const FIRST_TOKEN_BOUNDS: [f64; 14] =
    [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
const INTER_TOKEN_BOUNDS: [f64; 13] =
    [0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const DURATION_BOUNDS: [f64; 12] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

impl ServerMetrics {
    pub(crate) fn new(slot: &Slot, connections: &Arc<Connections>) -> ServerMetrics {
        let registry = Metrics::new("consort");
        let requests = registry.counters("requests", "Requests answered, by route and status");
        let first_token = registry.histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            &FIRST_TOKEN_BOUNDS,
        );
        let inter_token = registry.histogram(
            "inter_token_seconds",
            "Between two tokens of one answer",
            &INTER_TOKEN_BOUNDS,
        );
        let duration = registry.histogram(
            "request_seconds",
            "From a request's arrival to the end of its answer",
            &DURATION_BOUNDS,
        );
        registry.info("build", "What runs here", &[("version", env!("CARGO_PKG_VERSION"))]);
        registry.source(Arc::new(EngineNumbers { slot: slot.clone(), connections: connections.clone() }));
        ServerMetrics { registry, requests, first_token, inter_token, duration }
    }

    /// A request was answered.
    pub(crate) fn answered(&self, route: &'static str, status: u16, took: Duration) {
        self.requests.get_or_create(&[("route", route.to_owned()), ("status", status.to_string())]).inc();
        self.duration.observe(took.as_secs_f64());
    }

    pub(crate) fn text(&self) -> String {
        self.registry.text()
    }
}

/// The engine's own numbers, read at each scrape.
struct EngineNumbers {
    slot: Slot,
    connections: Arc<Connections>,
}

impl SampleSource for EngineNumbers {
    fn samples(&self) -> Vec<Sample> {
        let gauge = |name, help, value: usize| Sample { name, help, kind: SampleKind::Gauge(value as f64) };
        let counter = |name, help, value| Sample { name, help, kind: SampleKind::Counter(value) };
        let mut samples = vec![gauge("connections", "Connections open", self.connections.count())];
        let Some(replica) = self.slot.get() else { return samples };
        let stats = replica.engine.stats();
        let kv_use = stats.kv_blocks_used as f64 / stats.kv_blocks.max(1) as f64;
        let bounds = STEP_ROW_BOUNDS.iter().map(|bound| *bound as f64).chain([f64::MAX]);
        let buckets = bounds.zip(stats.step_rows.counts).collect();
        samples.extend([
            gauge("queued", "Requests waiting for their first step", stats.queued),
            gauge("running", "Sequences running", stats.running),
            gauge(
                "outstanding_tokens",
                "Tokens still to compute for all requests taken",
                stats.outstanding_tokens,
            ),
            gauge("kv_blocks", "Cache blocks in all", stats.kv_blocks),
            gauge("kv_blocks_used", "Cache blocks held by running sequences", stats.kv_blocks_used),
            Sample {
                name: "kv_use_ratio",
                help: "Share of cache blocks in use",
                kind: SampleKind::Gauge(kv_use),
            },
            counter(
                "prefix_lookup_tokens",
                "Prompt tokens looked up in the prefix cache",
                stats.prefix_lookup_tokens,
            ),
            counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
            counter("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
            counter("generated_tokens", "Tokens generated", stats.generated_tokens),
            Sample {
                name: "step_rows",
                help: "Rows of an engine step: the batch",
                kind: SampleKind::Histogram { buckets, sum: stats.step_rows.sum as f64 },
            },
            counter("preemptions", "Sequences preempted for want of cache", stats.preemptions),
            gauge(
                "stalled_milliseconds",
                "Since the last engine step, while busy",
                stats.stalled_ms as usize,
            ),
        ]);
        samples
    }
}

//! Logs, metrics and traces: how the other crates are watched, and no decision of its own.

mod logging;
mod metrics;
pub mod otlp;
pub mod trace;

pub use logging::{LogError, LogFormat, init_logging};
pub use metrics::{Distribution, Metrics, Sample, SampleKind, SampleSource};
// The two kinds of series that callers hold and move; re-exported so that one version of the crate is in use.
pub use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};

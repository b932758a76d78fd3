//! A registry of series and its text for Prometheus.
//!
//! Two ways in: series that a caller moves itself (a counter, a histogram), and a [`SampleSource`], read when somebody
//! scrapes, for numbers that another part keeps anyway. The second costs nothing between scrapes.

use std::fmt::{Debug, Write as _};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;

/// What a sample means.
#[derive(Clone, Debug, PartialEq)]
pub enum SampleKind {
    /// Only grows; `_total` is added to its name.
    Counter(u64),
    /// Goes up and down.
    Gauge(f64),
    /// How often values of which height were seen.
    Histogram {
        /// Each bucket's upper bound, ascending, with the values in it and in no lower one. Where the last isn't
        /// [`f64::MAX`], which reads `+Inf`, nothing was seen past it.
        buckets: Vec<(f64, u64)>,
        /// All values added up.
        sum: f64,
    },
}

/// One number with its name and meaning, read at a scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Without the registry's prefix.
    pub name: &'static str,
    /// A sentence.
    pub help: &'static str,
    /// The number.
    pub kind: SampleKind,
}

/// Numbers that somebody else keeps.
pub trait SampleSource: Send + Sync + 'static {
    /// The numbers now.
    fn samples(&self) -> Vec<Sample>;
}

/// The series of one process (or one server in it). Clones share them.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// An empty registry whose series' names start with `prefix_`.
    pub fn new(prefix: &str) -> Metrics {
        Metrics { registry: Arc::new(Mutex::new(Registry::with_prefix(prefix))) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Registry) -> T) -> T {
        // A panic while a series is added leaves the registry whole: go on with it.
        f(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A counter; its name ends with `_total` in the text.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.with(|r| r.register(name, help, counter.clone()));
        counter
    }

    /// A counter for each set of labels.
    pub fn counters<L>(&self, name: &str, help: &str) -> Family<L, Counter>
    where
        L: Clone + std::hash::Hash + Eq + EncodeLabelSet + Debug + Send + Sync + 'static,
    {
        let family = Family::<L, Counter>::default();
        self.with(|r| r.register(name, help, family.clone()));
        family
    }

    /// A gauge for each set of labels. Whoever sets them clears the family of what is gone.
    pub fn gauges<L>(&self, name: &str, help: &str) -> Family<L, Gauge>
    where
        L: Clone + std::hash::Hash + Eq + EncodeLabelSet + Debug + Send + Sync + 'static,
    {
        let family = Family::<L, Gauge>::default();
        self.with(|r| r.register(name, help, family.clone()));
        family
    }

    /// A gauge of any real number for each set of labels.
    pub fn gauges_f64<L>(&self, name: &str, help: &str) -> Family<L, Gauge<f64, AtomicU64>>
    where
        L: Clone + std::hash::Hash + Eq + EncodeLabelSet + Debug + Send + Sync + 'static,
    {
        let family = Family::<L, Gauge<f64, AtomicU64>>::default();
        self.with(|r| r.register(name, help, family.clone()));
        family
    }

    /// A gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.with(|r| r.register(name, help, gauge.clone()));
        gauge
    }

    /// A histogram of seconds with the given upper bounds.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        let histogram = Histogram::new(bounds.iter().copied());
        self.with(|r| r.register(name, help, histogram.clone()));
        histogram
    }

    /// A distribution for each set of labels, kept elsewhere and set at a scrape. Whoever sets them clears the family of
    /// what is gone.
    pub fn distributions<L>(&self, name: &str, help: &str) -> Family<L, Distribution>
    where
        L: Clone + std::hash::Hash + Eq + EncodeLabelSet + Debug + Send + Sync + 'static,
    {
        let family = Family::<L, Distribution>::default();
        self.with(|r| r.register(name, help, family.clone()));
        family
    }

    /// A constant: what runs here.
    pub fn info(&self, name: &str, help: &str, labels: &[(&str, &str)]) {
        let labels: Vec<(String, String)> =
            labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.with(|r| r.register(name, help, Info::new(labels)));
    }

    /// Numbers read at each scrape.
    pub fn source(&self, source: Arc<dyn SampleSource>) {
        self.with(|r| r.register_collector(Box::new(Adapter(source))));
    }

    /// Everything, in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if self.with(|r| text::encode(&mut out, r)).is_err() {
            // Writing to a String fails only where a series encodes wrongly; say so in the format's own comment.
            let _ = writeln!(out, "# a series could not be written");
        }
        out
    }
}

/// A histogram whose counts are somebody else's.
#[derive(Clone, Debug, Default)]
pub struct Distribution(Arc<Mutex<Counts>>);

/// Buckets by upper bound, and the sum of all values.
type Counts = (Vec<(f64, u64)>, f64);

impl Distribution {
    /// Says what has been counted: each bucket's upper bound, ascending, with the values in it and in no lower one; and
    /// all values added up.
    pub fn set(&self, buckets: Vec<(f64, u64)>, sum: f64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (buckets, sum);
    }
}

impl TypedMetric for Distribution {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Distribution {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (mut buckets, sum) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let count = buckets.iter().map(|(_, count)| count).sum();
        buckets.push((f64::MAX, 0));
        encoder.encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

struct Adapter(Arc<dyn SampleSource>);

impl Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SampleSource")
    }
}

impl Collector for Adapter {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for sample in self.0.samples() {
            match sample.kind {
                SampleKind::Counter(value) => {
                    let metric = ConstCounter::new(value);
                    let series =
                        encoder.encode_descriptor(sample.name, sample.help, None, metric.metric_type())?;
                    metric.encode(series)?;
                }
                SampleKind::Gauge(value) => {
                    let metric = ConstGauge::new(value);
                    let series =
                        encoder.encode_descriptor(sample.name, sample.help, None, metric.metric_type())?;
                    metric.encode(series)?;
                }
                SampleKind::Histogram { buckets, sum } => {
                    let mut series =
                        encoder.encode_descriptor(sample.name, sample.help, None, MetricType::Histogram)?;
                    let count = buckets.iter().map(|(_, count)| count).sum();
                    series.encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl SampleSource for Fixed {
        fn samples(&self) -> Vec<Sample> {
            vec![
                Sample { name: "steps", help: "Steps", kind: SampleKind::Counter(7) },
                Sample {
                    name: "rows",
                    help: "Rows",
                    kind: SampleKind::Histogram {
                        buckets: vec![(1.0, 2), (2.0, 3), (f64::MAX, 1)],
                        sum: 20.0,
                    },
                },
                Sample { name: "kv_use", help: "Share of the cache in use", kind: SampleKind::Gauge(0.5) },
            ]
        }
    }

    #[test]
    fn the_text_holds_moved_and_sampled_series() {
        let metrics = Metrics::new("consort");
        metrics.counter("requests", "Requests").inc();
        metrics.histogram("latency_seconds", "Latency", &[0.1, 1.0]).observe(0.5);
        metrics.info("build", "What runs here", &[("version", "1.2.3")]);
        metrics.source(Arc::new(Fixed));
        let family = metrics.distributions("wait_seconds", "Waiting");
        family.get_or_create(&[("version", "v2")]).set(vec![(0.5, 1), (1.0, 2)], 2.5);
        let text = metrics.text();
        for line in [
            "consort_requests_total 1",
            "consort_latency_seconds_bucket{le=\"1.0\"} 1",
            "consort_latency_seconds_bucket{le=\"0.1\"} 0",
            "consort_build_info{version=\"1.2.3\"} 1",
            "consort_steps_total 7",
            "consort_kv_use 0.5",
            "consort_rows_bucket{le=\"1.0\"} 2",
            "consort_rows_bucket{le=\"2.0\"} 5",
            "consort_rows_bucket{le=\"+Inf\"} 6",
            "consort_rows_count 6",
            "consort_rows_sum 20.0",
            "consort_wait_seconds_bucket{le=\"1.0\",version=\"v2\"} 3",
            "consort_wait_seconds_bucket{le=\"+Inf\",version=\"v2\"} 3",
            "consort_wait_seconds_sum{version=\"v2\"} 2.5",
            "consort_wait_seconds_count{version=\"v2\"} 3",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}

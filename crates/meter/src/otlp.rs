//! Sends spans to an OpenTelemetry collector: OTLP over HTTP with protobuf bodies, from a thread of its own.
//!
//! Whoever ends a span hands it to a bounded queue and goes on; a full queue drops it and counts it. The thread sends what
//! there is once a second or when a batch is full, with one deadline for each try; a collector that is away costs the
//! dropped spans and a line in the log now and then, nothing else. Five messages of the protocol are enough for that, so
//! they are written here and not by the SDK, which brings a runtime, a second HTTP client and a global pipeline.
//!
//! Cost: a span is about 300 bytes; the queue holds 2,048. Without a collector: one load of a global.
//!
//! Source: opentelemetry-proto, `opentelemetry/proto/trace/v1/trace.proto` and `collector/trace/v1`; the OTLP
//! specification, "OTLP/HTTP".

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::trace::{Span, Value};

/// Spans that may wait.
const QUEUE: usize = 2048;
/// Spans of one request to the collector.
const BATCH: usize = 512;
/// A batch waits so long for more.
const PAUSE: Duration = Duration::from_secs(1);
/// A request to the collector is over within this.
const PATIENCE: Duration = Duration::from_secs(5);
/// A collector that failed isn't asked again for so long, doubling with each failure up to the second.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

static EXPORTER: OnceLock<SyncSender<Span>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Why spans can't be exported.
#[derive(Debug, PartialEq, Eq)]
pub enum OtlpError {
    /// The address is no collector's.
    Endpoint {
        /// What was given.
        endpoint: String,
    },
    /// The process exports already, or no thread could be started.
    NotStarted,
}

impl std::fmt::Display for OtlpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OtlpError::Endpoint { endpoint } => write!(
                f,
                "{endpoint:?} is no collector's address; write it like http://127.0.0.1:4318 (a collector on this \
                 machine speaks TLS to those elsewhere)"
            ),
            OtlpError::NotStarted => write!(f, "the export of traces could not be started"),
        }
    }
}

impl std::error::Error for OtlpError {}

/// Exports this process's spans from now on, to `endpoint` (`http://host:4318`; `/v1/traces` is added), as `service`.
///
/// # Errors
/// [`OtlpError`]
pub fn start(endpoint: &str, service: &str) -> Result<(), OtlpError> {
    let wrong = || OtlpError::Endpoint { endpoint: endpoint.to_owned() };
    let rest = endpoint.strip_prefix("http://").ok_or_else(wrong)?;
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() || host.contains(['@', ' ', '?', '#']) || rest.contains(['?', '#', ' ']) {
        return Err(wrong());
    }
    let base = endpoint.trim_end_matches('/');
    let url = if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") };
    let (sender, receiver) = sync_channel(QUEUE);
    EXPORTER.set(sender).map_err(|_| OtlpError::NotStarted)?;
    let resource = vec![
        ("service.name", Value::from(service)),
        ("service.version", Value::from(env!("CARGO_PKG_VERSION"))),
        ("process.pid", Value::from(u64::from(std::process::id()))),
    ];
    let thread = std::thread::Builder::new().name("otlp".into());
    thread.spawn(move || run(&receiver, &url, &resource)).map(|_| ()).map_err(|_| OtlpError::NotStarted)
}

/// Whether spans are exported.
pub fn is_on() -> bool {
    EXPORTER.get().is_some()
}

/// Hands a span over, where its trace is sampled and there is a collector; never waits.
pub fn export(span: Span) {
    if let Some(exporter) = EXPORTER.get().filter(|_| span.trace.is_sampled())
        && exporter.try_send(span).is_err()
    {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Spans that were dropped: the queue was full, or the collector didn't take them.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

fn run(spans: &Receiver<Span>, url: &str, resource: &[(&'static str, Value)]) {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(PATIENCE))
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(true)
        .build();
    let agent = ureq::Agent::new_with_config(config);
    let (mut batch, mut rest, mut failures) = (Vec::new(), None::<Instant>, 0u32);
    while gather(spans, &mut batch) {
        if rest.is_some_and(|until| Instant::now() < until) {
            DROPPED.fetch_add(batch.len() as u64, Ordering::Relaxed);
            batch.clear();
            continue;
        }
        let body = encode(resource, &batch);
        match agent.post(url).content_type("application/x-protobuf").send(&body[..]) {
            Ok(_) => (failures, rest) = (0, None),
            Err(error) => {
                DROPPED.fetch_add(batch.len() as u64, Ordering::Relaxed);
                let pause = REST.0.saturating_mul(1 << failures.min(6)).min(REST.1);
                (failures, rest) = (failures.saturating_add(1), Some(Instant::now() + pause));
                tracing::warn!(%error, dropped = dropped(), "the trace collector doesn't take spans");
            }
        }
        batch.clear();
    }
}

/// Takes a batch: what comes within a second of its first span. False where nobody sends any more.
fn gather(spans: &Receiver<Span>, batch: &mut Vec<Span>) -> bool {
    let Ok(first) = spans.recv() else { return false };
    batch.push(first);
    let until = Instant::now() + PAUSE;
    while batch.len() < BATCH {
        match spans.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(span) => batch.push(span),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    true
}

/// An `ExportTraceServiceRequest`.
fn encode(resource: &[(&'static str, Value)], spans: &[Span]) -> Vec<u8> {
    let mut request = Message::default();
    request.message(1, |resource_spans| {
        resource_spans.message(1, |message| attributes(message, 1, resource));
        resource_spans.message(2, |scope_spans| {
            scope_spans.message(1, |scope| scope.bytes(1, b"consort"));
            spans.iter().for_each(|one| scope_spans.message(2, |message| span(message, one)));
        });
    });
    request.0
}

fn span(message: &mut Message, span: &Span) {
    const SERVER: u64 = 2;
    const ERROR: u64 = 2;
    let (trace, id, parent) = span.trace.ids();
    message.bytes(1, &trace.to_be_bytes());
    message.bytes(2, &id.to_be_bytes());
    if let Some(parent) = parent {
        message.bytes(4, &parent.to_be_bytes());
    }
    message.bytes(5, span.name.as_bytes());
    message.varint(6, SERVER);
    message.fixed64(7, span.began_ns);
    message.fixed64(8, span.ended_ns);
    attributes(message, 9, &span.attributes);
    if span.failed {
        message.message(15, |status| status.varint(3, ERROR));
    }
}

fn attributes(message: &mut Message, field: u32, attributes: &[(&'static str, Value)]) {
    for (key, value) in attributes {
        message.message(field, |pair| {
            pair.bytes(1, key.as_bytes());
            pair.message(2, |any| match value {
                Value::Text(text) => any.bytes(1, text.as_bytes()),
                Value::Flag(flag) => any.varint(2, u64::from(*flag)),
                // Two's complement, as protobuf writes an int64.
                Value::Int(number) => any.varint(3, number.cast_unsigned()),
            });
        });
    }
}

/// A protobuf message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value as u8 & 0x7f) | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u32, value: u64) {
        self.raw(u64::from(field) << 3);
        self.raw(value);
    }

    fn fixed64(&mut self, field: u32, value: u64) {
        self.raw(u64::from(field) << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.raw(u64::from(field) << 3 | 2);
        self.raw(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn message(&mut self, field: u32, write: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        write(&mut inner);
        self.bytes(field, &inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Trace;

    fn one() -> Span {
        let trace = Trace::of(Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), || 7);
        let mut span = Span::ending(trace, "POST /v1/completions", Duration::ZERO)
            .with("http.response.status_code", 200u64)
            .with("consort.failed", false)
            .with("consort.request_id", "req-1");
        (span.began_ns, span.ended_ns, span.failed) =
            (1_700_000_000_000_000_000, 1_700_000_000_250_000_000, true);
        span
    }

    /// Held against what the protocol's own Python package (`opentelemetry-proto`) makes of the same span:
    /// `ExportTraceServiceRequest.SerializeToString(deterministic=True)`, fields in the order of their numbers.
    #[test]
    fn a_span_is_written_as_the_protocols_own_package_writes_it() {
        let bytes = encode(&[("service.name", Value::from("consort gateway"))], &[one()]);
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("otlp_golden.hex").trim());
    }

    #[test]
    fn only_a_plain_address_of_a_collector_is_taken() {
        for wrong in
            ["", "collector:4318", "https://collector:4318", "http://", "http://u@host", "http://h/?a=b"]
        {
            assert!(matches!(start(wrong, "x"), Err(OtlpError::Endpoint { .. })), "{wrong}");
        }
        export(one());
        assert_eq!(dropped(), 0, "without a collector nothing is lost, for nothing was wanted");
    }

    #[test]
    fn a_batch_is_what_is_there_and_ends_with_its_senders() {
        let (sender, receiver) = sync_channel(QUEUE);
        (0..BATCH + 3).for_each(|_| sender.send(one()).unwrap());
        drop(sender);
        let mut batch = Vec::new();
        assert!(gather(&receiver, &mut batch) && batch.len() == BATCH);
        batch.clear();
        assert!(gather(&receiver, &mut batch) && batch.len() == 3);
        assert!(!gather(&receiver, &mut batch));
    }
}

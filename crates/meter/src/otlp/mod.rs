//! Sends spans to an OpenTelemetry collector: OTLP over HTTP with protobuf bodies, from a thread of its own.
//!
//! Whoever ends a span hands it to a bounded queue and goes on; a full queue drops it and counts it. The thread sends what
//! there is once a second or when a batch is full, with one deadline for each try; a collector that is away costs the
//! dropped spans and a line in the log now and then, nothing else. Five messages of the protocol are enough for that, so
//! they are written here and not by the SDK, which brings a runtime, a second HTTP client and a global pipeline.
//! [`Collector`] says where it is, whose certificate it has, and what it wants to be told.
//!
//! Cost: a span is about 300 bytes; the queue holds 2,048. Without a collector: one load of a global.
//!
//! Source: opentelemetry-proto, `opentelemetry/proto/trace/v1/trace.proto` and `collector/trace/v1`; the OTLP
//! specification, "OTLP/HTTP".

mod collector;
mod encode;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use collector::Door;
pub use collector::{Collector, OtlpError};
use encode::encode;

use crate::trace::{Span, Value};

/// Spans that may wait.
const QUEUE: usize = 2048;
/// Spans of one request to the collector.
const BATCH: usize = 512;
/// A batch waits so long for more.
const PAUSE: Duration = Duration::from_secs(1);
/// A collector that failed isn't asked again for so long, doubling with each failure up to the second.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

static EXPORTER: OnceLock<SyncSender<Span>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Exports this process's spans to `collector` from now on, as `service`.
///
/// # Errors
/// [`OtlpError`]
pub fn start(collector: &Collector, service: &str) -> Result<(), OtlpError> {
    let mut door = Door::open(collector)?;
    let (sender, receiver) = sync_channel(QUEUE);
    EXPORTER.set(sender).map_err(|_| OtlpError::NotStarted)?;
    let resource = vec![
        ("service.name", Value::from(service)),
        ("service.version", Value::from(env!("CARGO_PKG_VERSION"))),
        ("process.pid", Value::from(u64::from(std::process::id()))),
    ];
    let thread = std::thread::Builder::new().name("otlp".into());
    thread.spawn(move || run(&receiver, &mut door, &resource)).map(|_| ()).map_err(|_| OtlpError::NotStarted)
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

fn run(spans: &Receiver<Span>, door: &mut Door, resource: &[(&'static str, Value)]) {
    let (mut batch, mut rest, mut failures) = (Vec::new(), None::<Instant>, 0u32);
    while gather(spans, &mut batch) {
        if rest.is_some_and(|until| Instant::now() < until) {
            DROPPED.fetch_add(batch.len() as u64, Ordering::Relaxed);
            batch.clear();
            continue;
        }
        match door.post(&encode(resource, &batch)) {
            Ok(()) => (failures, rest) = (0, None),
            Err(error) => {
                DROPPED.fetch_add(batch.len() as u64, Ordering::Relaxed);
                let pause = REST.0.saturating_mul(1 << failures.min(6)).min(REST.1);
                (failures, rest) = (failures.saturating_add(1), Some(Instant::now() + pause));
                tracing::warn!(error, dropped = dropped(), "the trace collector doesn't take spans");
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

#[cfg(test)]
mod tests {
    use super::encode::tests::one;
    use super::*;

    #[test]
    fn without_a_collector_nothing_is_lost() {
        export(one());
        assert_eq!(dropped(), 0, "for nothing was wanted");
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

//! Spans as protobuf: the five messages of `opentelemetry/proto/trace/v1/trace.proto` that are needed.

use crate::trace::{Span, Value};

/// An `ExportTraceServiceRequest`.
pub(super) fn encode(resource: &[(&'static str, Value)], spans: &[Span]) -> Vec<u8> {
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
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::trace::Trace;

    pub(crate) fn one() -> Span {
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
        assert_eq!(hex, include_str!("golden.hex").trim());
    }
}

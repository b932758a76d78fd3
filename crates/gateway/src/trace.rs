//! One trace for a request across gateway and replica.

use consort_meter::trace::Trace;
pub(crate) use consort_meter::trace::put_hex;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The client's trace where it names one rightly, with a span of our own; a new one otherwise.
pub(crate) fn of(headers: &HeaderMap) -> Trace {
    let given = headers.get(&TRACEPARENT).and_then(|value| value.to_str().ok());
    Trace::of(given, crate::proxy::random)
}

/// For the replica.
pub(crate) fn header(trace: &Trace) -> HeaderValue {
    HeaderValue::from_bytes(&trace.header()).unwrap_or_else(|_| HeaderValue::from_static(""))
}

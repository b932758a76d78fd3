//! One request's own: its id, its time, and the record of how it went.

use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;
use consort_edge::Busy;
use consort_meter::trace::{Span, Trace};
use http_body::{Body as _, Frame, SizeHint};

use super::App;
use crate::error::{ApiError, ApiResult};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// How often a gateway wants a sign of life: it takes a longer silence for a hang.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("x-keep-alive-ms");
/// And how often it can have one.
const OFTEN: Duration = Duration::from_millis(10);

/// A request's id and time.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) id: HeaderValue,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Instant,
    /// A stream says something at least this often, where the server's own setting isn't less.
    pub(crate) keep_alive: Option<Duration>,
    /// The gateway's trace, or one that begins here.
    pub(crate) trace: Trace,
}

impl Context {
    /// Takes the client's id where it is a plain one, and its timeout up to the server's.
    pub(crate) fn new(headers: &HeaderMap, longest: Duration) -> ApiResult<Context> {
        let plain = |id: &&HeaderValue| {
            id.len() <= 64 && !id.is_empty() && id.as_bytes().iter().all(u8::is_ascii_graphic)
        };
        let id = headers.get(&REQUEST_ID).filter(plain).cloned().unwrap_or_else(fresh_id);
        let timeout = match headers.get(&TIMEOUT) {
            None => longest,
            Some(value) => {
                let ms =
                    value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok()).filter(|ms| *ms > 0);
                let ms = ms.ok_or_else(|| {
                    ApiError::param(
                        "X-Request-Timeout-Ms",
                        "X-Request-Timeout-Ms must be a whole number of milliseconds above 0",
                    )
                })?;
                Duration::from_millis(ms).min(longest)
            }
        };
        // Nothing but a comment hangs on it, so one that can't be read is none.
        let keep_alive = headers.get(&KEEP_ALIVE).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let keep_alive = keep_alive.map(|ms| Duration::from_millis(ms).max(OFTEN));
        let arrived = Instant::now();
        let traceparent = headers.get(&TRACEPARENT).and_then(|value| value.to_str().ok());
        let trace = Trace::of(traceparent, crate::params::random);
        Ok(Context { id, arrived, deadline: arrived + timeout, keep_alive, trace })
    }
}

/// An id for a request without one.
pub(crate) fn fresh_id() -> HeaderValue {
    HeaderValue::from_str(&format!("req-{:016x}", crate::params::random()))
        .unwrap_or_else(|_| HeaderValue::from_static("req"))
}

impl FromRequestParts<App> for Context {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Context, ApiError> {
        parts
            .extensions
            .get::<Context>()
            .cloned()
            .ok_or_else(|| ApiError::internal("a request without its context"))
    }
}

/// Notes how a request went when its response is over, however it ends.
pub(crate) struct Record {
    pub(crate) app: App,
    pub(crate) route: &'static str,
    pub(crate) status: u16,
    pub(crate) id: HeaderValue,
    pub(crate) arrived: Instant,
    pub(crate) trace: Option<Trace>,
    /// Keeps the connection from being closed as idle.
    pub(crate) _busy: Option<Busy>,
    pub(crate) complete: bool,
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.arrived.elapsed();
        // 499, nginx's number for it: the client left before the answer was complete.
        let status = if self.complete { self.status } else { 499 };
        self.app.metrics.answered(self.route, status, took);
        let id = self.id.to_str().unwrap_or_default();
        let ms = took.as_secs_f64() * 1e3;
        if matches!(self.route, "/health" | "/ready" | "/metrics") {
            tracing::debug!(route = self.route, status, ms, request_id = id, "request");
        } else {
            let trace = self.trace.map(|trace| trace.id()).unwrap_or_default();
            tracing::info!(route = self.route, status, ms, request_id = id, trace_id = trace, "request");
            // What is worth a span is an answer; the gateway's own questions belong to no request.
            let answers = matches!(self.route, "/v1/chat/completions" | "/v1/completions");
            if let Some(trace) = self.trace.filter(|trace| answers && trace.is_sampled()) {
                let mut span = Span::ending(trace, self.route, took)
                    .with("http.route", self.route)
                    .with("http.response.status_code", u64::from(status))
                    .with("consort.request_id", id);
                span.failed = status >= 500;
                consort_meter::otlp::export(span);
            }
        }
    }
}

/// A response's body with its record: the request is over when the body is.
pub(crate) struct Recorded {
    body: Body,
    record: Record,
}

impl Recorded {
    pub(crate) fn new(body: Body, mut record: Record) -> Recorded {
        record.complete |= body.is_end_stream();
        Recorded { body, record }
    }
}

impl http_body::Body for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        this.record.complete |= matches!(frame, Poll::Ready(None)) || this.body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

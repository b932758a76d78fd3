//! Reads a request's body within bounds of bytes and time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, HeaderMap};

use crate::error::{Outcome, Refusal};
use crate::settings::ClientSettings;

/// Bytes counted as in flight until dropped.
struct Held<'a> {
    counter: &'a AtomicUsize,
    bytes: usize,
}

impl Held<'_> {
    fn add(&mut self, bytes: usize, limit: usize) -> Outcome<()> {
        self.bytes += bytes;
        if self.counter.fetch_add(bytes, Ordering::Relaxed) + bytes > limit {
            let message = "too many large requests arrive at the same time; try again";
            return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message)
                .retry_after(Duration::from_secs(1)));
        }
        Ok(())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The whole body.
///
/// # Errors
/// 400, 408, 413, 415 or 429.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    settings: &ClientSettings,
    in_flight: &AtomicUsize,
) -> Outcome<Bytes> {
    if headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_encoding",
            "compressed bodies are not taken; send it without Content-Encoding",
        ));
    }
    let declared = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > settings.max_body_bytes as u64) {
        return Err(too_large(settings.max_body_bytes));
    }
    let mut held = Held { counter: in_flight, bytes: 0 };
    let collecting = collect(body, settings, &mut held);
    tokio::time::timeout(settings.body_timeout, collecting).await.map_err(|_| {
        let seconds = settings.body_timeout.as_secs_f32();
        let message = format!("the body was not complete after {seconds} s");
        Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
    })?
}

async fn collect(mut body: Incoming, settings: &ClientSettings, held: &mut Held<'_>) -> Outcome<Bytes> {
    let mut first = Bytes::new();
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let message = format!("the body broke off: {error}");
            Refusal::new(StatusCode::BAD_REQUEST, "incomplete_body", message)
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + bytes.len() + data.len() > settings.max_body_bytes {
            return Err(too_large(settings.max_body_bytes));
        }
        held.add(data.len(), settings.max_body_bytes_in_flight)?;
        // Most bodies come in one piece and need no copy.
        if first.is_empty() && bytes.is_empty() {
            first = data;
        } else {
            bytes.extend_from_slice(&std::mem::take(&mut first));
            bytes.extend_from_slice(&data);
        }
    }
    Ok(if bytes.is_empty() { first } else { bytes.freeze() })
}

fn too_large(limit: usize) -> Refusal {
    let message = format!("the body has more than the {limit} bytes that are taken");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

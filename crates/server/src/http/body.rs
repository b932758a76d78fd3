//! Reads a request's body as JSON, within bounds of bytes, time, depth and count.
//!
//! The limit holds while the body streams in, so a body without a length costs no more than one with. A second bound
//! covers all bodies at one time, until their requests are with the engine: many large ones that wait to be tokenized
//! cost what they cost while they arrive. JSON text is small beside the values it becomes (an array of zeros grows
//! thirty-fold), so values are counted before they are made. Depth is serde_json's own limit of 128.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::error::{ApiError, ApiResult};

/// Values (numbers, strings, lists, …) of one body.
const MAX_VALUES: usize = 300_000;

/// What bodies may cost.
#[derive(Clone)]
pub(crate) struct BodyLimits {
    pub(crate) max_bytes: usize,
    pub(crate) max_bytes_in_flight: usize,
    pub(crate) timeout: Duration,
    pub(crate) in_flight: Arc<AtomicUsize>,
}

/// What a value costs beside its text.
const VALUE_BYTES: usize = 64;

/// A body that was read.
pub(crate) struct Parsed {
    pub(crate) value: Value,
    /// Length of the text: no work on the request costs less than in proportion to it.
    pub(crate) bytes: usize,
    /// To be kept for as long as what the body became.
    pub(crate) held: Held,
}

/// Bytes counted as in flight until dropped.
pub(crate) struct Held {
    counter: Arc<AtomicUsize>,
    bytes: usize,
}

impl Held {
    fn add(&mut self, bytes: usize, limit: usize) -> ApiResult<()> {
        self.bytes += bytes;
        if self.counter.fetch_add(bytes, Ordering::Relaxed) + bytes > limit {
            return Err(ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "overloaded",
                "too many large requests arrive at the same time; try again",
            )
            .retry_after(1));
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The body as JSON.
pub(crate) async fn read_json(request: Request<Body>, limits: &BodyLimits) -> ApiResult<Parsed> {
    let (parts, body) = request.into_parts();
    if let Some(encoding) = parts.headers.get(CONTENT_ENCODING)
        && encoding != "identity"
    {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_encoding",
            "compressed bodies are not taken; send it without Content-Encoding",
        ));
    }
    let declared = parts.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limits.max_bytes as u64) {
        return Err(too_large(limits.max_bytes));
    }
    let mut held = Held { counter: limits.in_flight.clone(), bytes: 0 };
    let bytes =
        tokio::time::timeout(limits.timeout, collect(body, limits, &mut held)).await.map_err(|_| {
            let seconds = limits.timeout.as_secs_f32();
            ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "body_timeout",
                format!("the body was not complete after {seconds} s"),
            )
        })??;
    let text = text(&bytes)?;
    held.add(count_values(text) * VALUE_BYTES, limits.max_bytes_in_flight)?;
    Ok(Parsed { value: parse(text)?, bytes: bytes.len(), held })
}

async fn collect(mut body: Body, limits: &BodyLimits, held: &mut Held) -> ApiResult<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", format!("the body broke off: {error}"))
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.max_bytes {
            return Err(too_large(limits.max_bytes));
        }
        held.add(data.len(), limits.max_bytes_in_flight)?;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        format!("the body has more than the {limit} bytes that are taken"),
    )
}

fn invalid(message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
}

/// Text out of bytes, of not too many values.
fn text(bytes: &[u8]) -> ApiResult<&str> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| invalid(format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to())))?;
    if text.trim_ascii().is_empty() {
        return Err(invalid("the body is empty; send a JSON object".to_owned()));
    }
    if count_values(text) > MAX_VALUES {
        return Err(invalid(format!("the body holds more than {MAX_VALUES} values")));
    }
    Ok(text)
}

fn parse(text: &str) -> ApiResult<Value> {
    serde_json::from_str(text).map_err(|e| invalid(format!("the body is not valid JSON: {e}")))
}

/// An upper bound on the values in `text`: separators and brackets outside strings.
fn count_values(text: &str) -> usize {
    let (mut count, mut in_string, mut escaped) = (1, false, false);
    for byte in text.bytes() {
        if escaped {
            escaped = false;
        } else if in_string {
            match byte {
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => in_string = true,
                b',' | b'[' | b'{' => count += 1,
                _ => {}
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> ApiResult<Value> {
        text(bytes).and_then(parse)
    }

    fn message(bytes: &[u8]) -> String {
        let error = read(bytes).unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        error.message
    }

    #[test]
    fn hostile_json_is_a_clear_400() {
        for open in ["[", "{\"a\":"] {
            let deep = open.repeat(100_000);
            assert!(message(deep.as_bytes()).contains("recursion limit"), "{open}");
        }
        assert!(message(b"{\"a\": \"\xff\"}").contains("not UTF-8: byte 7"));
        assert!(message(br#"{"a": NaN}"#).contains("not valid JSON"));
        assert!(message(br#"{"a": 1e999}"#).contains("out of range"));
        assert!(message(br#"{"a": "\ud800"}"#).contains("not valid JSON"));
        assert!(message(b"  ").contains("empty"));
        assert!(message(b"{} x").contains("trailing"));
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(message(many.as_bytes()).contains("values"));
    }

    #[test]
    fn separators_in_strings_count_for_nothing() {
        assert_eq!(count_values(r#"{"a,[{\"": ",,,"}"#), 2);
        assert!(read(format!("\"{}\"", ",".repeat(2 * MAX_VALUES)).as_bytes()).is_ok());
    }

    #[tokio::test]
    async fn a_body_counts_for_as_long_as_it_is_held() {
        let limits = BodyLimits {
            max_bytes: 10_000,
            max_bytes_in_flight: 10_000,
            timeout: Duration::from_secs(60),
            in_flight: Arc::default(),
        };
        let ask = |body: String| read_json(Request::new(Body::from(body)), &limits);
        let long = || format!("{{\"a\": \"{}\"}}", "x".repeat(6_000));
        let first = ask(long()).await.unwrap();
        assert_eq!(ask(long()).await.err().map(|e| e.status), Some(StatusCode::TOO_MANY_REQUESTS));
        drop(first);
        assert_eq!(ask(long()).await.unwrap().bytes, long().len());
        // A short text of many values is a large body too.
        let many = format!("[{}0]", "0,".repeat(200));
        assert_eq!(ask(many).await.err().map(|e| e.status), Some(StatusCode::TOO_MANY_REQUESTS));
        assert_eq!(limits.in_flight.load(Ordering::Relaxed), 0);
    }
}

//! Errors as clients see them: a status and OpenAI's envelope, in the words replicas use too.

use std::time::Duration;

use bytes::Bytes;
use consort_api::{ErrorBody, ErrorObject};
use hyper::StatusCode;

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    pub(crate) code: &'static str,
    pub(crate) retry_after: Option<Duration>,
}

/// What a step of a request's handling comes to.
pub(crate) type Outcome<T> = Result<T, Refusal>;

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code, retry_after: None }
    }

    /// 400: the named parameter is wrong.
    pub(crate) fn param(param: impl Into<String>, message: impl Into<String>) -> Refusal {
        Refusal {
            param: Some(param.into()),
            ..Refusal::new(StatusCode::BAD_REQUEST, "invalid_value", message)
        }
    }

    /// 400: not JSON.
    pub(crate) fn json(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "invalid_json", message)
    }

    /// 503: nobody can answer now.
    pub(crate) fn unavailable(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
            .retry_after(Duration::from_secs(1))
    }

    /// 504: the request's time is up.
    pub(crate) fn deadline() -> Refusal {
        Refusal::new(
            StatusCode::GATEWAY_TIMEOUT,
            "deadline_exceeded",
            "the answer was not complete when the request's time was up",
        )
    }

    pub(crate) fn retry_after(self, delay: Duration) -> Refusal {
        Refusal { retry_after: Some(delay), ..self }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The envelope's JSON.
    pub(crate) fn body(&self) -> Bytes {
        let body = ErrorBody {
            error: ErrorObject {
                message: self.message.clone(),
                kind: self.kind().to_owned(),
                param: self.param.clone(),
                code: Some(self.code.to_owned()),
            },
        };
        // A struct of strings always serialises.
        serde_json::to_vec(&body).unwrap_or_default().into()
    }

    /// The last event of a stream that broke.
    pub(crate) fn event(&self) -> Bytes {
        let body = self.body();
        let mut event = Vec::with_capacity(body.len() + 24);
        event.extend_from_slice(b"event: error\ndata: ");
        event.extend_from_slice(&body);
        event.extend_from_slice(b"\n\n");
        event.into()
    }
}

//! The error envelope.

use serde::{Deserialize, Serialize};

/// Every answer that isn't 2xx, and the last event of a stream that broke.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorObject,
}

/// What went wrong, in OpenAI's four fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorObject {
    /// For a person: what is wrong and what to do.
    pub message: String,
    /// The family: `invalid_request_error`, `authentication_error`, `not_found_error`, `rate_limit_error`,
    /// `server_error`, `timeout_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault, as a path (`messages[2].content`).
    pub param: Option<String>,
    /// For a program: `context_length_exceeded`, `model_not_found`, `overloaded`, …
    pub code: Option<String>,
}

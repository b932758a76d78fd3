//! From answers to HTTP responses: one JSON body, or server-sent events.

mod chunk;
mod sse;
mod whole;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use consort_api::{PromptTokensDetails, Resume};
use consort_inference::Usage;
use consort_model::Tokenizer;

use crate::answer::AnswerSet;
use crate::error::{ApiError, ApiResult};

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// Everything about a response that isn't the answer itself.
pub(crate) struct Envelope {
    pub(crate) shape: Shape,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Answers to each prompt; choice `i` answers prompt `i / n`.
    pub(crate) n: usize,
    pub(crate) choices: usize,
    pub(crate) logprobs: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) include_usage: bool,
    /// For each choice, whether it goes on with an answer begun elsewhere: its first chunk was sent there.
    pub(crate) resumed: Vec<bool>,
    /// For each choice, the characters that were said there, an echoed prompt's included.
    pub(crate) said: Vec<usize>,
    /// For each prompt, what is put before its answers: its text and ids.
    pub(crate) echo: Option<Vec<Echo>>,
    pub(crate) keep_alive: Duration,
    pub(crate) seed: u64,
}

/// A prompt to repeat.
pub(crate) struct Echo {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
}

impl Envelope {
    /// `id` and `created` of a new answer, or those that a resumed one began with.
    pub(crate) fn identity(shape: Shape, resume: &Resume) -> (String, u64) {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        let id = resume.id.clone().unwrap_or_else(|| {
            format!("{prefix}-{:016x}{:08x}", crate::params::random(), crate::params::random() as u32)
        });
        (id, resume.created.unwrap_or_else(now))
    }

    /// The id of a call: a function of the answer's, so that a resumed answer has the same.
    fn call_id(&self, choice: usize, call: usize) -> String {
        let own = self.id.rsplit('-').next().unwrap_or(&self.id);
        format!("call_{own}_{choice}_{call}")
    }

    fn object(&self, chunk: bool) -> &'static str {
        match (self.shape, chunk) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Completion, _) => "text_completion",
        }
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Adds up the usage of choices; a prompt counts once, however many answers it gets.
#[derive(Clone, Copy, Debug, Default)]
struct UsageSum {
    total: Usage,
}

impl UsageSum {
    fn add(&mut self, choice: usize, n: usize, usage: Usage) {
        self.total.completion_tokens += usage.completion_tokens;
        if choice.is_multiple_of(n) {
            self.total.prompt_tokens += usage.prompt_tokens;
            self.total.cached_tokens += usage.cached_tokens;
        }
    }

    fn wire(&self) -> consort_api::Usage {
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = self.total;
        consort_api::Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }),
        }
    }
}

/// The response, whole or as a stream.
pub(crate) async fn respond(envelope: Envelope, set: AnswerSet, stream: bool) -> ApiResult<Response> {
    // What this answer can be had again with, where the request named no seed.
    let seed = HeaderValue::from(envelope.seed);
    let mut response = if stream {
        let mut response = Response::new(Body::new(sse::SseBody::new(envelope, set)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Asks proxies of nginx's kind not to collect the stream.
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        response
    } else {
        json(&whole::collect(envelope, set).await?)
    };
    response.headers_mut().insert(HeaderName::from_static("x-seed"), seed);
    Ok(response)
}

/// A 200 with a JSON body.
pub(crate) fn json(body: &impl serde::Serialize) -> Response {
    match serde_json::to_string(body) {
        Ok(text) => {
            let mut response = Response::new(Body::from(text));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => {
            use axum::response::IntoResponse as _;
            ApiError::internal(format!("the answer could not be written: {error}")).into_response()
        }
    }
}

//! What a replica is asked: the request with the gateway's fields, and what was said of its answer already.

use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::Protocol;
use hyper::header::{HeaderName, HeaderValue};

use super::Session;
use crate::error::Refusal;
use crate::fleet::Work;
use crate::proxy::attempt::Question;

/// The time a request has left, in milliseconds; replicas know it too.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// How often a replica is to give a sign of life on a stream.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("x-keep-alive-ms");

impl Session {
    fn question_headers(&self, protocol: Protocol) -> Result<Vec<(HeaderName, HeaderValue)>, Refusal> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(Refusal::deadline());
        }
        let mut headers = Vec::with_capacity(4);
        headers.extend_from_slice(&self.headers);
        if protocol == Protocol::Consort {
            let ms = |time: Duration| HeaderValue::from(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
            headers.push((TIMEOUT, ms(left)));
            // Two of three signs of life may be late before silence is a hang.
            headers.push((KEEP_ALIVE, ms(self.settings.replicas.silence_timeout / 3)));
        }
        Ok(headers)
    }

    /// What a replica is asked.
    pub(super) fn question(&self, protocol: Protocol) -> Result<Question, Refusal> {
        Ok(Question {
            path: self.call.shape.path(),
            headers: self.question_headers(protocol)?,
            body: match protocol {
                Protocol::Consort => self.body(),
                Protocol::OpenAi => self.call.plain_body(&self.model.name, &self.model.literal),
            },
            work: self.remaining(),
        })
    }

    fn body(&self) -> Bytes {
        if self.progress.resumes() {
            self.call.upstream_body(self.progress.emitted())
        } else {
            self.call.upstream_body(std::iter::empty())
        }
    }

    /// What is yet to be computed, about: what was said is read again.
    pub(super) fn remaining(&self) -> Work {
        let said = self.progress.tokens;
        let answer = self.call.answer_tokens().saturating_sub(said);
        Work { prompt: self.call.prompt_tokens() + said, answer }
    }
}

//! What a failure of a replica means: for the replica's health, for the request, and for the client's ears.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper::StatusCode;
use hyper::header::RETRY_AFTER;

use super::Session;
use crate::error::Refusal;
use crate::fleet::{Replica, Went};
use crate::proxy::attempt::{Failure, Refused};
use crate::telemetry::Event;

/// An answer goes on elsewhere so often. A replica that gives a token and breaks off, again and again, would otherwise
/// keep a request busy for as long as it may take.
const MOST_MOVES: u32 = 64;

impl Session {
    /// Takes note of a failure; what the client is told where there is no other way.
    pub(in crate::proxy) fn note(
        &mut self,
        replica: &Replica,
        failure: Failure,
    ) -> Result<Option<Box<Refused>>, Refusal> {
        let now = Instant::now();
        self.permit = None;
        let begun = self.progress.begun();
        let went = match &failure {
            Failure::Unreachable(_) => Went::Unreachable,
            Failure::Broken(_) | Failure::Garbage | Failure::Silent | Failure::Slow | Failure::Error(_) => {
                Went::Badly { lost: begun }
            }
            Failure::NotNow(refused) if refused.status == StatusCode::TOO_MANY_REQUESTS => {
                Went::Full(retry_after(refused))
            }
            Failure::NotNow(_)
            | Failure::Lost
            | Failure::HandedOver
            | Failure::OtherClass
            | Failure::Deadline => Went::Unknown,
        };
        let others = self.version().replicas.iter().any(|other| other.id != replica.id && other.is_up(now));
        if replica.went(now, went, others) {
            self.gateway.telemetry.count(Event::Ejection);
        }
        self.gateway.telemetry.failure(&replica.id, failure.name());
        if failure == Failure::Deadline {
            return Err(Refusal::deadline());
        }
        if !matches!(went, Went::Full(_)) {
            replica.suspected.notify_one();
        }
        tracing::warn!(
            replica = replica.id,
            failure = failure.name(),
            detail = detail(&failure),
            tokens = self.progress.tokens,
            request_id = self.request_id(),
            "a replica failed a request"
        );
        let full = matches!(went, Went::Full(_));
        if !full && self.leave_version() {
            self.tally.retries.fetch_add(1, Ordering::Relaxed);
            self.gateway.telemetry.count(Event::Retry);
            return Ok(None);
        }
        self.failed.push(replica.id.clone());
        if let Failure::NotNow(refused) | Failure::Error(refused) = failure {
            self.last_refusal = Some(refused);
        }
        if self.tries >= self.settings.retries.attempts {
            return match self.last_refusal.take().filter(|_| !begun) {
                Some(refused) => Ok(Some(refused)),
                None => Err(Refusal::unavailable(format!(
                    "{} replicas failed this request, one after the other; try again",
                    self.tries
                ))),
            };
        }
        if begun {
            self.moves += 1;
            if self.moves > MOST_MOVES {
                return Err(Refusal::unavailable(format!(
                    "this answer broke off {MOST_MOVES} times, each time after a few tokens; try again"
                )));
            }
            self.moved = true;
            self.tally.resumes.fetch_add(1, Ordering::Relaxed);
            self.gateway.telemetry.count(Event::Resume);
        } else {
            self.tally.retries.fetch_add(1, Ordering::Relaxed);
            self.gateway.telemetry.count(Event::Retry);
        }
        Ok(None)
    }

    fn request_id(&self) -> &str {
        self.headers[0].1.to_str().unwrap_or_default()
    }
}

/// When a full replica wants to be asked again.
fn retry_after(refused: &Refused) -> Duration {
    let seconds = refused.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(1)).clamp(Duration::from_secs(1), Duration::from_secs(30))
}

/// A failure's own words, as far as they hold nothing of an answer.
fn detail(failure: &Failure) -> String {
    match failure {
        Failure::Unreachable(error) | Failure::Broken(error) => error.clone(),
        Failure::NotNow(refused) | Failure::Error(refused) => refused.status.to_string(),
        _ => String::new(),
    }
}

/// What a replica said when it refused, as a refusal of ours: the stream is open, so its status is lost.
pub(super) fn broken(refused: &Refused) -> Refusal {
    let message = serde_json::from_slice::<consort_api::ErrorBody>(&refused.body)
        .map_or_else(|_| format!("a replica answered {}", refused.status), |body| body.error.message);
    Refusal::new(refused.status, "replica_error", message)
}

pub(super) fn error_code(data: &[u8]) -> Option<String> {
    serde_json::from_slice::<consort_api::ErrorBody>(data).ok()?.error.code
}

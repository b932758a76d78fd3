//! An answer under way: which replica gives it now, and what happens when that one can't go on.
//!
//! The loop is the product's main promise. Every chunk is judged and counted before it leaves ([`Progress`]); when a
//! replica is lost, for whatever reason, the next one is told what the client has and goes on behind it. A client sees
//! a pause and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::{Numerics, Usage};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::attempt::{Attempt, Failure, Foreign, Question, Refused, Reply};
use super::call::Call;
use super::chunk::Chunk;
use super::progress::{News, Progress};
use super::random;
use super::sse::Event;
use crate::Gateway;
use crate::error::Refusal;
use crate::fleet::{Model, Replica, Version};
use crate::policy::balance::{self, Candidate};

/// The time a request has left, in milliseconds; replicas know it too.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// What there is to tell the client next.
pub(crate) enum Next {
    /// A chunk that is news, as JSON text.
    Chunk(Bytes),
    /// The answer is complete.
    Done,
    /// It can't be completed.
    Failed(Refusal),
}

/// How an answer begins.
pub(crate) enum Opening {
    /// Chunks follow.
    Stream,
    /// The request is wrong, or nobody can take it: the response as a replica gave it.
    Refused(Box<Refused>),
    /// Somebody else's server answered as a whole.
    Whole(Box<Foreign>),
}

/// One request's way to its answer.
pub(crate) struct Session {
    gateway: Arc<Gateway>,
    pub(crate) call: Arc<Call>,
    pub(crate) model: Arc<Model>,
    version: usize,
    pub(crate) progress: Progress,
    deadline: Instant,
    /// Headers for replicas: the request's id, its trace.
    headers: HeaderMap,
    attempt: Option<Box<Attempt>>,
    /// Replicas that failed since the last news.
    failed: Vec<String>,
    /// Tries since the last news.
    tries: u32,
    /// The tokens when the last try began.
    tokens_before: u64,
    pub(crate) usage: Option<Usage>,
    /// The `x-seed` of the first replica's response.
    pub(crate) seed: Option<HeaderValue>,
    last_refusal: Option<Box<Refused>>,
}

impl Session {
    pub(crate) fn new(
        gateway: Arc<Gateway>,
        call: Arc<Call>,
        model: Arc<Model>,
        version: usize,
        headers: HeaderMap,
        deadline: Instant,
    ) -> Session {
        let progress = Progress::new(call.choices, call.emitted.clone());
        Session {
            gateway,
            model,
            version,
            progress,
            deadline,
            headers,
            attempt: None,
            failed: Vec::new(),
            tries: 0,
            tokens_before: 0,
            usage: None,
            seed: None,
            last_refusal: None,
            call,
        }
    }

    /// How long a client's stream may be silent.
    pub(crate) fn keep_alive(&self) -> Duration {
        self.gateway.settings.clients.keep_alive
    }

    fn version(&self) -> &Version {
        &self.model.versions[self.version]
    }

    /// The class of the answer's last part.
    pub(crate) fn fingerprint(&self) -> Option<&str> {
        self.progress.classes.last().map(String::as_str)
    }

    /// Finds a replica that takes the request.
    ///
    /// # Errors
    /// Where none does.
    pub(crate) async fn open(&mut self) -> Result<Opening, Refusal> {
        loop {
            let replica = self.choose().await?;
            let question = Question {
                path: self.call.shape.path(),
                headers: self.question_headers()?,
                body: self.body(),
                tokens: self.remaining_tokens(),
            };
            self.tries += 1;
            self.tokens_before = self.progress.tokens;
            let settings = &self.gateway.settings.replicas;
            let failure = match Attempt::start(&replica, question, settings, self.deadline).await {
                Ok(Reply::Stream(attempt)) => {
                    if self.seed.is_none() {
                        self.seed = attempt.headers.get("x-seed").cloned();
                    }
                    self.attempt = Some(attempt);
                    return Ok(Opening::Stream);
                }
                Ok(Reply::Refused(refused)) if !self.progress.begun() => {
                    return Ok(Opening::Refused(refused));
                }
                // It refuses to go on with what another began: this request is nothing for it.
                Ok(Reply::Refused(refused)) => Failure::Error(refused),
                Ok(Reply::Whole(foreign)) if !self.progress.begun() => return Ok(Opening::Whole(foreign)),
                Ok(Reply::Whole(_)) => Failure::Garbage,
                Err(failure) => failure,
            };
            if let Some(refused) = self.note(&replica, failure)? {
                return Ok(Opening::Refused(refused));
            }
        }
    }

    /// What there is to tell next.
    pub(crate) async fn next(&mut self) -> Next {
        loop {
            let Some(attempt) = &mut self.attempt else {
                match self.open().await {
                    Ok(Opening::Stream) => continue,
                    Ok(Opening::Refused(refused)) => return Next::Failed(broken(&refused)),
                    Ok(Opening::Whole(_)) => {
                        return Next::Failed(Refusal::unavailable("no replica goes on with it"));
                    }
                    Err(refusal) => return Next::Failed(refusal),
                }
            };
            let failure = match attempt.event(self.deadline).await {
                Ok(Event::Data { error: false, data }) => match self.chunk(&data) {
                    Ok(true) => return Next::Chunk(data),
                    Ok(false) => continue,
                    Err(failure) => failure,
                },
                Ok(Event::Data { error: true, data }) => match error_code(&data).as_deref() {
                    Some("handed_over") => Failure::HandedOver,
                    Some("deadline_exceeded") => Failure::Deadline,
                    _ => Failure::Broken(String::from_utf8_lossy(&data).chars().take(200).collect()),
                },
                Ok(Event::Done) if self.progress.complete() => {
                    if let Some(attempt) = self.attempt.take() {
                        attempt.finish().await;
                    }
                    return Next::Done;
                }
                Ok(Event::Done | Event::Comment) => Failure::Garbage,
                Err(failure) => failure,
            };
            let Some(attempt) = self.attempt.take() else { continue };
            let replica = attempt.ticket.replica.clone();
            drop(attempt);
            match self.note(&replica, failure) {
                Ok(Some(refused)) => return Next::Failed(broken(&refused)),
                Ok(None) => {}
                Err(refusal) => return Next::Failed(refusal),
            }
        }
    }

    /// Judges a chunk; true where it is news.
    fn chunk(&mut self, data: &Bytes) -> Result<bool, Failure> {
        let text = std::str::from_utf8(data).map_err(|_| Failure::Garbage)?;
        let chunk = Chunk::read(text).map_err(|_| Failure::Garbage)?;
        if let Some(class) = chunk.fingerprint {
            let known = self.progress.classes.last();
            if known.is_some_and(|known| known != class) && self.version().numerics == Numerics::SameClass {
                return Err(Failure::OtherClass);
            }
            if known.is_none_or(|known| known != class) {
                self.progress.note_class(class);
            }
        }
        let before = self.progress.tokens;
        let news = self.progress.judge(&chunk);
        if let Some(usage) = chunk.usage {
            self.usage = serde_json::from_str(usage).ok().or(self.usage);
        }
        match news {
            News::New => {
                let count = self.progress.tokens - before;
                if let Some(attempt) = &mut self.attempt {
                    attempt.ticket.done(count);
                }
                if count > 0 {
                    self.tries = 0;
                    self.failed.clear();
                }
                Ok(true)
            }
            News::Known => Ok(false),
            News::Foreign => Err(Failure::Garbage),
        }
    }

    /// Takes note of a failure; what the client is told where there is no other way.
    fn note(&mut self, replica: &Replica, failure: Failure) -> Result<Option<Box<Refused>>, Refusal> {
        if failure == Failure::Deadline {
            return Err(Refusal::deadline());
        }
        if matches!(
            failure,
            Failure::Unreachable(_) | Failure::Broken(_) | Failure::Garbage | Failure::Silent
        ) {
            replica.suspected.notify_one();
        }
        tracing::warn!(
            replica = replica.id,
            ?failure,
            tokens = self.progress.tokens,
            request_id = self.request_id(),
            "a replica failed a request"
        );
        self.failed.push(replica.id.clone());
        if let Failure::NotNow(refused) | Failure::Error(refused) = failure {
            self.last_refusal = Some(refused);
        }
        if self.tries >= self.gateway.settings.retries.attempts {
            return match self.last_refusal.take().filter(|_| !self.progress.begun()) {
                Some(refused) => Ok(Some(refused)),
                None => Err(Refusal::unavailable(format!(
                    "{} replicas failed this request, one after the other; try again",
                    self.tries
                ))),
            };
        }
        Ok(None)
    }

    fn request_id(&self) -> &str {
        self.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default()
    }

    /// A replica that may take the request; waits for one where there is none.
    async fn choose(&mut self) -> Result<Arc<Replica>, Refusal> {
        let give_up = (Instant::now() + self.gateway.settings.retries.wait).min(self.deadline);
        if self.tries > 0 && self.failed.len() >= self.version().replicas.len() {
            // Everyone had a turn: from now on with pauses.
            self.failed.clear();
            let delay = self.gateway.settings.retries.backoff.delay(self.tries, random());
            tokio::time::sleep(delay).await;
        }
        loop {
            let room = self.gateway.registry.room.notified();
            if let Some(replica) = self.pick() {
                return Ok(replica);
            }
            // Replicas are started anew under new ids; the fleet may be another by now.
            if let Some(model) = self.gateway.registry.models().get(&self.model.name)
                && !Arc::ptr_eq(model, &self.model)
            {
                let name = self.version().name.clone();
                self.version = model.versions.iter().position(|v| v.name == name).unwrap_or(0);
                self.model = Arc::clone(model);
                continue;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return Err(Refusal::deadline());
            }
            if now >= give_up {
                return Err(self.nobody());
            }
            // Woken where there is room, and now and then: a share grows with time.
            let pause = Duration::from_millis(50).min(give_up - now);
            tokio::select! {
                () = room => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn pick(&self) -> Option<Arc<Replica>> {
        let now = Instant::now();
        let version = self.version();
        let class = self.fingerprint();
        let limit = self.gateway.settings.replicas.max_outstanding as u64;
        let mut fit = Vec::with_capacity(version.replicas.len());
        for replica in &version.replicas {
            let share = replica.share(now);
            if share <= 0.0 || self.failed.contains(&replica.id) || replica.outstanding_requests() >= limit {
                continue;
            }
            let same = class.is_none_or(|class| replica.fingerprint().as_deref() == Some(class));
            if !same && version.numerics == Numerics::SameClass {
                continue;
            }
            fit.push((same, Candidate { tokens: replica.outstanding_tokens(), share }, replica));
        }
        // Another class only where none of the same is left.
        if fit.iter().any(|(same, ..)| *same) {
            fit.retain(|(same, ..)| *same);
        }
        let candidates: Vec<Candidate> = fit.iter().map(|(_, candidate, _)| *candidate).collect();
        let index = balance::pick(&candidates, self.remaining_tokens(), random())?;
        Some(Arc::clone(fit[index].2))
    }

    fn nobody(&self) -> Refusal {
        let version = self.version();
        let model = &self.model.name;
        if version.replicas.is_empty() {
            return Refusal::unavailable(format!("no replica of {model:?} runs"));
        }
        let other_class = self.fingerprint().is_some_and(|class| {
            version
                .replicas
                .iter()
                .any(|r| r.share(Instant::now()) > 0.0 && r.fingerprint().as_deref() != Some(class))
        });
        if other_class {
            return Refusal {
                code: "numerics_class_lost",
                ..Refusal::unavailable(
                    "the replica that gave this answer is lost, and the replicas that are left compute in another \
                     numerics class: they would go on with other tokens, which this deployment doesn't allow",
                )
            };
        }
        Refusal::unavailable(format!("no replica of {model:?} can take the request now; try again"))
    }

    fn question_headers(&self) -> Result<HeaderMap, Refusal> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(Refusal::deadline());
        }
        let mut headers = self.headers.clone();
        headers.insert(TIMEOUT, HeaderValue::from(u64::try_from(left.as_millis()).unwrap_or(u64::MAX)));
        Ok(headers)
    }

    fn body(&self) -> Bytes {
        if self.progress.resumes() {
            self.call.upstream_body(self.progress.emitted())
        } else {
            self.call.upstream_body(std::iter::empty())
        }
    }

    /// Tokens yet to be computed, about: what was said is read again.
    fn remaining_tokens(&self) -> u64 {
        self.call.prompt_tokens() + self.call.answer_tokens().saturating_sub(self.progress.tokens)
    }
}

/// What a replica said when it refused, as a refusal of ours: the stream is open, so its status is lost.
fn broken(refused: &Refused) -> Refusal {
    let message = serde_json::from_slice::<consort_api::ErrorBody>(&refused.body)
        .map_or_else(|_| format!("a replica answered {}", refused.status), |body| body.error.message);
    Refusal::new(refused.status, "replica_error", message)
}

fn error_code(data: &[u8]) -> Option<String> {
    serde_json::from_slice::<consort_api::ErrorBody>(data).ok()?.error.code
}

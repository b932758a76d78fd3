//! An answer under way: which replica gives it now, and what happens when that one can't go on.
//!
//! The loop is the product's main promise. Every chunk is judged and counted before it leaves ([`Progress`]); when a
//! replica is lost, for whatever reason, the next one is told what the client has and goes on behind it. A client sees
//! a pause and nothing else.

mod choose;
mod failures;
mod hedge;
mod news;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::Protocol;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use failures::{broken, error_code};

use super::attempt::{Attempt, Failure, Question, Refused, Reply};
use super::call::Call;
use super::plain::PlainAnswer;
use super::progress::Progress;
use super::shadow;
use super::sse::Event as Sse;
use crate::Gateway;
use crate::error::Refusal;
use crate::fleet::{Model, Running, Version, Went};
use crate::policy::affinity;
use crate::settings::Settings;
use crate::telemetry::{Place, Tally};

/// The time a request has left, in milliseconds; replicas know it too.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// How often a replica is to give a sign of life on a stream.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("x-keep-alive-ms");

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
    /// Somebody else's server answers in its own way.
    Plain(Box<PlainAnswer>),
}

/// What a session is made of.
pub(crate) struct Request {
    pub(crate) call: Arc<Call>,
    pub(crate) model: Arc<Model>,
    /// The version's index.
    pub(crate) version: usize,
    /// Headers for replicas: the request's id, its trace.
    pub(crate) headers: HeaderMap,
    pub(crate) deadline: Instant,
    /// Whose share it is waited in, and its weight.
    pub(crate) key: (String, u32),
    pub(crate) tally: Arc<Tally>,
}

/// One request's way to its answer.
pub(crate) struct Session {
    gateway: Arc<Gateway>,
    /// As they were when it began.
    settings: Arc<Settings>,
    pub(crate) call: Arc<Call>,
    pub(crate) model: Arc<Model>,
    version: usize,
    pub(crate) progress: Progress,
    deadline: Instant,
    headers: HeaderMap,
    key: (String, u32),
    tally: Arc<Tally>,
    /// Hashes of the prompt's beginnings.
    beginnings: Vec<u64>,
    attempt: Option<Box<Attempt>>,
    /// Replicas that failed since the last news.
    failed: Vec<String>,
    /// Tries since the last news.
    tries: u32,
    /// A retry's place in the budget, until it has news.
    permit: Option<Permit>,
    arrived: Instant,
    /// When the last try began, and when tokens last came.
    began: Instant,
    news: Option<Instant>,
    moved: bool,
    /// A second attempt was thought of.
    hedged: bool,
    running: Option<Running>,
    /// The `x-seed` of the first replica's response.
    pub(crate) seed: Option<HeaderValue>,
    last_refusal: Option<Box<Refused>>,
}

/// A place in the retry budget.
struct Permit(Arc<Gateway>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.budget().give_back();
    }
}

impl Session {
    pub(crate) fn new(gateway: Arc<Gateway>, request: Request) -> Session {
        let Request { call, model, version, headers, deadline, key, tally } = request;
        let (now, settings) = (Instant::now(), gateway.settings());
        let beginnings = if settings.replicas.affinity && model.versions[version].replicas.len() > 1 {
            affinity::beginnings(call.prompt_text())
        } else {
            Vec::new()
        };
        model.pending.arrived();
        gateway.purse().pay_in(&settings.hedging);
        tally.prompt_tokens.store(call.prompt_tokens(), Ordering::Relaxed);
        let session = Session {
            progress: Progress::new(call.choices, call.emitted.clone()),
            gateway,
            settings,
            model,
            version,
            deadline,
            headers,
            key,
            tally,
            beginnings,
            attempt: None,
            failed: Vec::new(),
            tries: 0,
            permit: None,
            arrived: now,
            began: now,
            news: None,
            moved: false,
            hedged: false,
            running: None,
            seed: None,
            last_refusal: None,
            call,
        };
        session.note_place();
        session
    }

    fn note_place(&self) {
        // The version that it began with; an answer never changes to another.
        let _ = self.tally.place.set(self.place_of(self.version()));
    }

    fn place_of(&self, version: &Version) -> Place {
        let (model, stats) = (self.model.name.clone(), version.stats.clone());
        Place { model, version: version.name.clone(), stats }
    }

    /// Whose it is.
    pub(crate) fn client(&self) -> &str {
        &self.key.0
    }

    /// How long a client's stream may be silent.
    pub(crate) fn keep_alive(&self) -> Duration {
        self.settings.clients.keep_alive
    }

    fn version(&self) -> &Version {
        &self.model.versions[self.version]
    }

    /// The class of the answer's last part.
    pub(crate) fn fingerprint(&self) -> Option<&str> {
        self.progress.classes.last().map(String::as_str)
    }

    /// Its client is gone: lets go of everything but what it takes to go on.
    pub(crate) fn suspend(&mut self) {
        (self.attempt, self.running, self.permit) = (None, None, None);
        (self.tries, self.hedged, self.moved) = (0, true, false);
        self.failed.clear();
    }

    /// Its client is back.
    pub(crate) fn resume(&mut self, deadline: Instant, tally: Arc<Tally>) {
        self.deadline = deadline;
        tally.prompt_tokens.store(self.call.prompt_tokens(), Ordering::Relaxed);
        self.tally = tally;
        self.news = None;
        (self.arrived, self.began) = (Instant::now(), Instant::now());
        self.note_place();
    }

    /// Its client has all of it.
    pub(crate) fn is_complete(&self) -> bool {
        self.tally.complete.load(Ordering::Relaxed)
    }

    /// Bytes of memory it keeps, about.
    pub(crate) fn bytes(&self) -> usize {
        self.call.body().len() + self.progress.bytes()
    }

    /// Its stream broke off with an error.
    pub(crate) fn failed(&self) {
        self.tally.failed.store(true, Ordering::Relaxed);
    }

    /// Its client has all of it.
    pub(crate) fn completed(&self) {
        self.tally.complete.store(true, Ordering::Relaxed);
    }

    /// Finds a replica that takes the request.
    ///
    /// # Errors
    /// Where none does.
    pub(crate) async fn open(&mut self) -> Result<Opening, Refusal> {
        loop {
            let replica = self.choose().await?;
            let question = self.question(replica.protocol)?;
            self.tries += 1;
            self.began = Instant::now();
            if self.running.is_none() {
                self.running = Some(self.model.pending.run());
            }
            if !self.beginnings.is_empty() {
                self.affinity().note(&self.beginnings, replica.home);
            }
            let settings = &self.settings.replicas;
            let failure = match Attempt::start(&replica, question, settings, self.deadline).await {
                Ok(Reply::Stream(attempt)) => {
                    if self.seed.is_none() {
                        self.seed = attempt.headers.get("x-seed").cloned();
                    }
                    self.attempt = Some(attempt);
                    return Ok(Opening::Stream);
                }
                Ok(Reply::Refused(refused)) if !self.progress.begun() => {
                    replica.went(Instant::now(), Went::Well, true);
                    return Ok(Opening::Refused(refused));
                }
                // It refuses to go on with what another began: this request is nothing for it.
                Ok(Reply::Refused(refused)) => Failure::Error(refused),
                Ok(Reply::Plain(plain)) => match plain.open(self.call.stream, self.deadline).await {
                    Ok(answer) => {
                        answer.count(&self.tally);
                        return Ok(Opening::Plain(Box::new(answer)));
                    }
                    Err(failure) => failure,
                },
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
                    Ok(Opening::Plain(_)) => {
                        return Next::Failed(Refusal::unavailable("no replica goes on with it"));
                    }
                    Err(refusal) => return Next::Failed(refusal),
                }
            };
            let hedging = &self.settings.hedging;
            let event = if hedging.enabled && self.news.is_none() && !self.hedged {
                self.first_event().await
            } else {
                attempt.event(self.deadline).await
            };
            let failure = match event {
                Ok(Sse::Data { error: false, data }) => match self.chunk(&data) {
                    Ok(true) => return Next::Chunk(data),
                    Ok(false) => continue,
                    Err(failure) => failure,
                },
                Ok(Sse::Data { error: true, data }) => match error_code(&data).as_deref() {
                    Some("handed_over") => Failure::HandedOver,
                    Some("deadline_exceeded") => Failure::Deadline,
                    _ => Failure::Broken("it ended the stream with an error".to_owned()),
                },
                Ok(Sse::Done) if self.progress.complete() => {
                    if let Some(mut attempt) = self.attempt.take() {
                        attempt.ticket.replica.went(Instant::now(), Went::Well, true);
                        attempt.ticket.settled = true;
                        let (call, said) = (&self.call, self.progress.emitted().next().unwrap_or_default());
                        let replica = &attempt.ticket.replica;
                        shadow::consider(&self.gateway, &self.model, self.version, call, said, replica);
                        attempt.finish().await;
                    }
                    self.running = None;
                    return Next::Done;
                }
                Ok(Sse::Done | Sse::Comment) => Failure::Garbage,
                Err(failure) => failure,
            };
            let Some(mut attempt) = self.attempt.take() else { continue };
            attempt.ticket.settled = true;
            let replica = attempt.ticket.replica.clone();
            drop(attempt);
            match self.note(&replica, failure) {
                Ok(Some(refused)) => return Next::Failed(broken(&refused)),
                Ok(None) => {}
                Err(refusal) => return Next::Failed(refusal),
            }
        }
    }

    /// When its time is up.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What the request comes to.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    fn question_headers(&self, protocol: Protocol) -> Result<HeaderMap, Refusal> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(Refusal::deadline());
        }
        let mut headers = self.headers.clone();
        if protocol == Protocol::Consort {
            let ms = |time: Duration| HeaderValue::from(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
            headers.insert(TIMEOUT, ms(left));
            // Two of three signs of life may be late before silence is a hang.
            headers.insert(KEEP_ALIVE, ms(self.settings.replicas.silence_timeout / 3));
        }
        Ok(headers)
    }

    /// What a replica is asked.
    fn question(&self, protocol: Protocol) -> Result<Question, Refusal> {
        Ok(Question {
            path: self.call.shape.path(),
            headers: self.question_headers(protocol)?,
            body: match protocol {
                Protocol::Consort => self.body(),
                Protocol::OpenAi => self.call.plain_body(&self.model.name, &self.model.literal),
            },
            tokens: self.remaining_tokens(),
        })
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

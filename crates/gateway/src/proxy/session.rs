//! An answer under way: which replica gives it now, and what happens when that one can't go on.
//!
//! The loop is the product's main promise. Every chunk is judged and counted before it leaves ([`Progress`]); when a
//! replica is lost, for whatever reason, the next one is told what the client has and goes on behind it. A client sees
//! a pause and nothing else.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::{Numerics, Usage};
use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};

use super::attempt::{Attempt, Failure, Foreign, Question, Refused, Reply};
use super::call::Call;
use super::chunk::Chunk;
use super::progress::{News, Progress};
use super::sse::Event as Sse;
use super::{random, shadow};
use crate::Gateway;
use crate::error::Refusal;
use crate::fleet::{self, Model, Replica, Running, Version, Went};
use crate::policy::affinity::{self, Affinity, Home};
use crate::policy::balance::{self, Candidate};
use crate::settings::Settings;
use crate::telemetry::{Event, Place, Tally};

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
            let question = Question {
                path: self.call.shape.path(),
                headers: self.question_headers()?,
                body: self.body(),
                tokens: self.remaining_tokens(),
            };
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
                Ok(Reply::Whole(mut foreign)) if !self.progress.begun() => {
                    replica.went(Instant::now(), Went::Well, true);
                    foreign.ticket.settled = true;
                    return Ok(Opening::Whole(foreign));
                }
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

    /// The first event: from a second replica too, where the first one is slow.
    async fn first_event(&mut self) -> Result<Sse, Failure> {
        let due = self.began + self.settings.hedging.after;
        let Some(mut first) = self.attempt.take() else { return Err(Failure::Garbage) };
        let outcome = self.race(&mut first, due).await;
        if self.attempt.is_none() {
            self.attempt = Some(first);
        }
        outcome
    }

    /// Puts the second attempt in place where that one was faster; the first is then dropped, which cancels it.
    async fn race(&mut self, first: &mut Attempt, due: Instant) -> Result<Sse, Failure> {
        tokio::select! {
            biased;
            event = first.event(self.deadline) => return event,
            () = tokio::time::sleep_until(due.into()) => self.hedged = true,
        }
        self.failed.push(first.ticket.replica.id.clone());
        let other = self.pick();
        self.failed.pop();
        let settings = &self.settings;
        let headers = self.question_headers().map_err(|_| Failure::Deadline)?;
        let Some(replica) = other.filter(|_| self.gateway.purse().take(&settings.hedging)) else {
            return first.event(self.deadline).await;
        };
        self.gateway.telemetry.count(Event::Hedge);
        let question = Question {
            path: self.call.shape.path(),
            headers,
            body: self.body(),
            tokens: self.remaining_tokens(),
        };
        let deadline = self.deadline;
        let second = async {
            let Ok(Reply::Stream(mut second)) =
                Attempt::start(&replica, question, &settings.replicas, deadline).await
            else {
                return None;
            };
            second.event(deadline).await.ok().map(|event| (second, event))
        };
        let won = {
            let mut second = std::pin::pin!(second);
            tokio::select! {
                biased;
                event = first.event(deadline) => return event,
                won = &mut second => won,
            }
        };
        match won {
            Some((second, event)) => {
                self.gateway.telemetry.count(Event::HedgeWon);
                first.ticket.settled = false;
                self.attempt = Some(second);
                Ok(event)
            }
            // It failed: nothing is lost but the try.
            None => first.event(deadline).await,
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
        if let Some(usage) = chunk.usage
            && let Ok(usage) = serde_json::from_str::<Usage>(usage)
        {
            self.tally.prompt_tokens.store(usage.prompt_tokens as u64, Ordering::Relaxed);
            self.tally.answer_tokens.store(usage.completion_tokens as u64, Ordering::Relaxed);
        }
        match news {
            News::New => {
                let count = self.progress.tokens - before;
                if count > 0 {
                    self.note_news(count);
                }
                Ok(true)
            }
            News::Known => Ok(false),
            News::Foreign => Err(Failure::Garbage),
        }
    }

    /// Tokens came that the client doesn't have.
    fn note_news(&mut self, count: u64) {
        let now = Instant::now();
        let telemetry = &self.gateway.telemetry;
        let stats = &self.model.versions[self.version].stats;
        telemetry.tokens(now, count);
        self.tally.answer_tokens.fetch_add(count, Ordering::Relaxed);
        let latency = match self.news {
            Some(last) => {
                telemetry.inter_token(now, stats, now - last);
                if std::mem::take(&mut self.moved) {
                    telemetry.gap(now - last);
                }
                now - last
            }
            None => {
                telemetry.first_token(now, stats, now - self.arrived);
                now - self.began
            }
        };
        if let Some(attempt) = &mut self.attempt {
            attempt.ticket.replica.gave(now, count, self.news.is_none(), latency);
            attempt.ticket.done(count);
        }
        self.news = Some(now);
        self.tries = 0;
        self.failed.clear();
        self.permit = None;
    }

    /// Takes note of a failure; what the client is told where there is no other way.
    fn note(&mut self, replica: &Replica, failure: Failure) -> Result<Option<Box<Refused>>, Refusal> {
        let now = Instant::now();
        self.permit = None;
        let begun = self.progress.begun();
        let went = match &failure {
            Failure::Unreachable(_) => Went::Unreachable,
            Failure::Broken(_) | Failure::Garbage | Failure::Silent | Failure::Error(_) => {
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
        self.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default()
    }

    /// A replica that may take the request; waits for one where there is none.
    async fn choose(&mut self) -> Result<Arc<Replica>, Refusal> {
        let give_up = (Instant::now() + self.settings.retries.wait).min(self.deadline);
        if self.tries > 0 {
            self.pause().await?;
        }
        // Who was let in once doesn't queue again.
        let fresh = self.tries == 0 && !self.progress.begun();
        let mut place = None;
        if fresh && !self.model.pending.is_empty() {
            place = Some(self.enter()?);
        }
        loop {
            let room = self.gateway.registry.room.clone();
            let room = room.notified();
            // Replicas are started anew under new ids: by the time one is lost, the fleet may be another.
            if !fresh {
                self.follow_fleet();
            }
            let turn = place.as_ref().is_none_or(fleet::Place::is_head);
            if turn && let Some(replica) = self.pick() {
                if let Some(place) = place {
                    place.serve();
                    // The next one may fit as well.
                    self.gateway.registry.room.notify_waiters();
                }
                return Ok(replica);
            }
            if turn && !self.failed.is_empty() {
                // None is left that hasn't failed this request: those that have get another turn, after a pause.
                self.failed.clear();
                tokio::time::sleep(self.settings.retries.backoff.delay(self.tries, random())).await;
                continue;
            }
            if fresh && place.is_none() {
                place = Some(self.enter()?);
            }
            if place.as_ref().is_some_and(fleet::Place::evicted) {
                return Err(full(&self.model.name));
            }
            if fresh && self.follow_fleet() {
                continue;
            }
            if !self.version().replicas.iter().any(|replica| replica.is_up(Instant::now()))
                && self.leave_version()
            {
                continue;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return Err(Refusal::deadline());
            }
            // A gateway that ends waits for nobody to come back.
            let ending = self.gateway.draining() && !self.version().replicas.iter().any(|r| r.is_up(now));
            if now >= give_up || ending {
                return Err(self.nobody());
            }
            // Woken where there is room, and now and then: a share grows with time, a breaker closes.
            let pause = Duration::from_millis(if turn { 50 } else { 1000 }).min(give_up - now);
            tokio::select! {
                () = room => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn enter(&self) -> Result<fleet::Place, Refusal> {
        let (key, weight) = &self.key;
        let bound = self.settings.replicas.max_pending;
        let place = self.model.pending.enter(key, *weight, self.remaining_tokens(), bound);
        place.ok_or_else(|| full(&self.model.name))
    }

    /// Takes the fleet as it is now; true where that changed something.
    fn follow_fleet(&mut self) -> bool {
        let models = self.gateway.registry.models();
        let Some(model) = models.get(&self.model.name).filter(|model| !Arc::ptr_eq(model, &self.model))
        else {
            return false;
        };
        let name = &self.version().name;
        let same = model.versions.iter().position(|v| v.name == *name);
        // An answer stays with its version: another one is another model. What hasn't begun may go to any.
        let heaviest = || (0..model.versions.len()).max_by_key(|i| model.versions[*i].weight);
        let Some(version) = same.or_else(|| heaviest().filter(|_| !self.progress.begun())) else {
            return false;
        };
        self.version = version;
        self.model = Arc::clone(model);
        true
    }

    /// Gives a request that hasn't begun to another version, where its own is on trial and there is one; whether it did.
    fn leave_version(&mut self) -> bool {
        if self.progress.begun() || !self.version().on_trial {
            return false;
        }
        let others =
            self.model.versions.iter().enumerate().filter(|(_, v)| !v.on_trial && !v.replicas.is_empty());
        let Some((other, place)) = others.max_by_key(|(_, v)| v.weight) else { return false };
        let place = self.place_of(place);
        let left = self.version();
        self.gateway.telemetry.diverted(&self.model.name, &left.name, &left.stats);
        let _ = self.tally.diverted.set(place);
        self.version = other;
        self.failed.clear();
        self.last_refusal = None;
        // Another version's prefix cache holds other keys and values.
        self.beginnings.clear();
        true
    }

    /// Before a retry: until the budget has room for it.
    async fn pause(&mut self) -> Result<(), Refusal> {
        let retries = self.settings.retries.clone();
        if self.progress.begun() {
            return Ok(());
        }
        let mut waits = 0;
        while self.permit.is_none() {
            let active = self.gateway.telemetry.active.load(Ordering::Relaxed);
            if self.gateway.budget().take(active, &retries.budget) {
                self.permit = Some(Permit(self.gateway.clone()));
                break;
            }
            if Instant::now() >= self.deadline {
                return Err(Refusal::deadline());
            }
            tokio::time::sleep(retries.backoff.delay(waits, random()).max(Duration::from_millis(1))).await;
            waits += 1;
        }
        Ok(())
    }

    fn affinity(&self) -> std::sync::MutexGuard<'_, Affinity> {
        self.version().affinity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pick(&self) -> Option<Arc<Replica>> {
        let now = Instant::now();
        let version = self.version();
        let class = self.fingerprint();
        let limit = self.settings.replicas.max_outstanding as u64;
        let mut fit = Vec::with_capacity(version.replicas.len());
        for replica in &version.replicas {
            // An answer that was let in once may go on anywhere: only new ones are held back by a full replica.
            let full = !self.progress.begun() && replica.outstanding_requests() >= limit;
            if full || self.failed.contains(&replica.id) {
                continue;
            }
            let fitness = replica.fitness(now);
            if fitness.share <= 0.0 {
                continue;
            }
            let same = class.is_none_or(|class| replica.fingerprint().as_deref() == Some(class));
            if !same && version.numerics == Numerics::SameClass {
                continue;
            }
            let candidate = Candidate { tokens: replica.outstanding_tokens(), share: fitness.share };
            // Another class, or one that said it is full, only where there is no better.
            let rank = (same, !fitness.degraded);
            fit.push((rank, Home { id: replica.home, candidate }, replica));
        }
        let best = fit.iter().map(|(rank, ..)| *rank).max()?;
        fit.retain(|(rank, ..)| *rank == best);
        let homes: Vec<Home> = fit.iter().map(|(_, home, _)| *home).collect();
        let cost = self.remaining_tokens();
        let near = if self.beginnings.is_empty() {
            None
        } else {
            self.affinity().choose(&homes, &self.beginnings, cost)
        };
        let index = near.or_else(|| {
            let candidates: Vec<Candidate> = homes.iter().map(|home| home.candidate).collect();
            balance::pick(&candidates, cost, random())
        })?;
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
                .any(|r| r.is_up(Instant::now()) && r.fingerprint().as_deref() != Some(class))
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

fn full(model: &str) -> Refusal {
    let message = format!("too many requests wait for {model:?}; try again");
    Refusal::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(Duration::from_secs(1))
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

//! An answer under way: which replica gives it now, and what happens when that one can't go on.
//!
//! The loop is the product's main promise. Every chunk is judged and counted before it leaves ([`Progress`]); when a
//! replica is lost, for whatever reason, the next one is told what the client has and goes on behind it. A client sees
//! a pause and nothing else.

mod choose;
mod failures;
mod hedge;
mod leave;
mod news;
mod question;
mod run;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use consort_api::deployment::Balancing;
use hyper::header::{HeaderName, HeaderValue};

use super::attempt::{Attempt, Refused};
use super::call::Call;
use super::chunk::Chunk;
use super::plain::PlainAnswer;
use super::progress::Progress;
use crate::Gateway;
use crate::error::Refusal;
use crate::fleet::{Model, Running, Version};
use crate::policy::affinity;
use crate::settings::Settings;
use crate::telemetry::{Place, Tally};

/// What there is to tell the client next.
pub(crate) enum Next {
    /// A chunk that is news.
    Chunk(Chunk),
    /// What was told so far is void: the answer begins anew. Only for an answer that is told as a whole, of which its
    /// client has nothing yet.
    Anew,
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
    pub(crate) headers: [(HeaderName, HeaderValue); 2],
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
    headers: [(HeaderName, HeaderValue); 2],
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
    /// When the last try began, how long it may take to bring news, and when news last came.
    began: Instant,
    begin_by: Option<Instant>,
    news: Option<Instant>,
    moved: bool,
    /// So often has it gone on elsewhere.
    moves: u32,
    /// It begins anew, and whoever collects it must know.
    anew: bool,
    /// A version on trial refused it; the one that is asked now says whether it was right.
    doubted: Option<Place>,
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
        let near = settings.replicas.balancing == Balancing::Affinity;
        let beginnings = if near && model.versions[version].replicas.len() > 1 {
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
            begin_by: None,
            news: None,
            moved: false,
            moves: 0,
            anew: false,
            doubted: None,
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
        let _ = self.tally.place.set(self.place());
    }

    fn place(&self) -> Place {
        Place { model: self.model.clone(), index: self.version }
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

    /// When its time is up.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What the request comes to.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }
}

//! What the server needs of an engine, and the replica it serves.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use consort_inference::{Engine, Request, Stats, Submission, SubmitError};
use consort_model::{ChatTemplate, Tokenizer};

/// Something that generates tokens: the engine, or a script in tests.
pub trait Generate: Send + Sync + 'static {
    /// Takes a request or says why not; never waits for a place.
    ///
    /// # Errors
    /// [`SubmitError`]
    fn submit(&self, request: Request) -> Result<Submission, SubmitError>;

    /// Why any request would be turned away now, if so: asked before a prompt is read, so that a flood costs little.
    fn refusal(&self) -> Option<SubmitError> {
        None
    }

    /// Names the numerics class.
    fn fingerprint(&self) -> &str;

    /// The longest sequence, in tokens.
    fn max_context(&self) -> usize;

    /// Current numbers.
    fn stats(&self) -> Stats;

    /// Stops admitting, finishes or hands over what runs within `budget`; returns when nothing runs. Blocks.
    fn drain(&self, budget: Duration);
}

impl Generate for Engine {
    fn submit(&self, request: Request) -> Result<Submission, SubmitError> {
        Engine::submit(self, request)
    }

    fn refusal(&self) -> Option<SubmitError> {
        Engine::refusal(self)
    }

    fn fingerprint(&self) -> &str {
        Engine::fingerprint(self)
    }

    fn max_context(&self) -> usize {
        Engine::max_context(self)
    }

    fn stats(&self) -> Stats {
        Engine::stats(self)
    }

    fn drain(&self, budget: Duration) {
        Engine::drain(self, budget);
    }
}

impl<G: Generate + ?Sized> Generate for Arc<G> {
    fn submit(&self, request: Request) -> Result<Submission, SubmitError> {
        (**self).submit(request)
    }

    fn refusal(&self) -> Option<SubmitError> {
        (**self).refusal()
    }

    fn fingerprint(&self) -> &str {
        (**self).fingerprint()
    }

    fn max_context(&self) -> usize {
        (**self).max_context()
    }

    fn stats(&self) -> Stats {
        (**self).stats()
    }

    fn drain(&self, budget: Duration) {
        (**self).drain(budget);
    }
}

/// A loaded model, ready to answer.
#[derive(Clone)]
pub struct Replica {
    /// Generates.
    pub engine: Arc<dyn Generate>,
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's, where it has one; without, `/v1/chat/completions` is refused.
    pub template: Option<Arc<ChatTemplate>>,
    /// The name in answers and in `/v1/models`.
    pub model: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
}

/// Where a replica appears once its model is loaded. Until then `/health` says live, `/ready` says no, and requests
/// are turned away with 503 and `Retry-After`. Clones share the place.
#[derive(Clone, Default)]
pub struct Slot {
    replica: Arc<OnceLock<Replica>>,
}

impl Slot {
    /// A place to fill later.
    pub fn empty() -> Slot {
        Slot::default()
    }

    /// Puts the replica in. A second one is dropped: a slot serves one model for its life.
    pub fn fill(&self, replica: Replica) {
        if self.replica.set(replica).is_err() {
            tracing::warn!("a second replica for one server was dropped");
        }
    }

    /// The replica, once it is there.
    pub fn get(&self) -> Option<&Replica> {
        self.replica.get()
    }
}

impl From<Replica> for Slot {
    fn from(replica: Replica) -> Slot {
        let slot = Slot::empty();
        slot.fill(replica);
        slot
    }
}

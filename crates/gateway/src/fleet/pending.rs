//! Requests for one model that wait for a replica.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::policy::fair::{FairQueue, Full, Waiting};

/// The queue of one model, and what is known of its traffic. It outlives replacements of the fleet.
pub(crate) struct Pending {
    queue: Mutex<FairQueue<Arc<Waiter>>>,
    pub(crate) running: AtomicU64,
    last: Mutex<Option<Instant>>,
}

struct Waiter {
    since: Instant,
    /// Another key's request took its place in a full queue.
    evicted: AtomicBool,
}

/// A request's place; leaving it takes the request out.
pub(crate) struct Place {
    pending: Arc<Pending>,
    waiting: Option<Waiting>,
    waiter: Arc<Waiter>,
}

/// A request that runs, until dropped.
pub(crate) struct Running(Arc<Pending>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pending {
    pub(crate) fn new() -> Pending {
        Pending { queue: Mutex::default(), running: AtomicU64::new(0), last: Mutex::new(None) }
    }

    fn queue(&self) -> MutexGuard<'_, FairQueue<Arc<Waiter>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request for the model arrived.
    pub(crate) fn arrived(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// When the last one did.
    pub(crate) fn last(&self) -> Option<Instant> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request goes to a replica.
    pub(crate) fn run(self: &Arc<Pending>) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        Running(Arc::clone(self))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue().len() == 0
    }

    /// How many wait, for how many tokens, and since when the one that goes next has.
    pub(crate) fn waiting(&self) -> (usize, u64, Option<Instant>) {
        let queue = self.queue();
        (queue.len(), queue.tokens(), queue.head().map(|(_, waiter)| waiter.since))
    }

    /// Waits behind the others; none where the queue is full.
    pub(crate) fn enter(
        self: &Arc<Pending>,
        key: &str,
        weight: u32,
        cost: u64,
        bound: usize,
    ) -> Option<Place> {
        let waiter = Arc::new(Waiter { since: Instant::now(), evicted: AtomicBool::new(false) });
        let (waiting, full) = self.queue().push(key, weight, cost, waiter.clone(), bound);
        if let Some(Full::Instead(_, evicted)) = full {
            evicted.evicted.store(true, Ordering::Relaxed);
        }
        waiting.map(|waiting| Place { pending: Arc::clone(self), waiting: Some(waiting), waiter })
    }
}

impl Place {
    /// It is this one's turn.
    pub(crate) fn is_head(&self) -> bool {
        self.pending.queue().head().is_some_and(|(waiting, _)| Some(waiting) == self.waiting)
    }

    /// Another one has its place.
    pub(crate) fn evicted(&self) -> bool {
        self.waiter.evicted.load(Ordering::Relaxed)
    }

    /// It goes on.
    pub(crate) fn serve(mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.pending.queue().serve(waiting);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take()
            && !self.evicted()
        {
            self.pending.queue().remove(waiting);
        }
    }
}

//! The engine's numbers, written by its thread and read by anyone without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use crate::engine::Stats;

/// What the handles and the thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    start: Instant,
    /// Requests taken and not yet over.
    pub(crate) open: AtomicUsize,
    /// Of them, those that never ran.
    pub(crate) queued: AtomicUsize,
    /// Tokens of requests that the thread has not looked at yet.
    pub(crate) inbox_tokens: AtomicUsize,
    pub(crate) draining: AtomicBool,
    pub(crate) running: AtomicUsize,
    pub(crate) outstanding: AtomicUsize,
    pub(crate) kv_blocks: AtomicUsize,
    pub(crate) kv_blocks_used: AtomicUsize,
    pub(crate) lookup_tokens: AtomicU64,
    pub(crate) hit_tokens: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    pub(crate) steps: AtomicU64,
    pub(crate) step_rows: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    /// Recent rows a second, rounded.
    pub(crate) rows_per_second: AtomicU64,
    /// Milliseconds from the start to the end of the last step, or to when the engine last had nothing to do.
    last_step_ms: AtomicU64,
}

impl Shared {
    pub(crate) fn new(kv_blocks: usize) -> Shared {
        Shared {
            start: Instant::now(),
            open: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            inbox_tokens: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
            kv_blocks: AtomicUsize::new(kv_blocks),
            kv_blocks_used: AtomicUsize::new(0),
            lookup_tokens: AtomicU64::new(0),
            hit_tokens: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            step_rows: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            rows_per_second: AtomicU64::new(0),
            last_step_ms: AtomicU64::new(0),
        }
    }

    /// The thread got on (or has nothing to do).
    pub(crate) fn mark_alive(&self) {
        self.last_step_ms.store(self.start.elapsed().as_millis() as u64, Relaxed);
    }

    pub(crate) fn read(&self) -> Stats {
        let open = self.open.load(Relaxed);
        let since = (self.start.elapsed().as_millis() as u64).saturating_sub(self.last_step_ms.load(Relaxed));
        Stats {
            queued: self.queued.load(Relaxed),
            running: self.running.load(Relaxed),
            outstanding_tokens: self.outstanding.load(Relaxed) + self.inbox_tokens.load(Relaxed),
            kv_blocks: self.kv_blocks.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            prefix_lookup_tokens: self.lookup_tokens.load(Relaxed),
            prefix_hit_tokens: self.hit_tokens.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            steps: self.steps.load(Relaxed),
            step_rows: self.step_rows.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
            stalled_ms: if open > 0 { since } else { 0 },
        }
    }
}

//! The engine's numbers, written by its thread and read by anyone without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use crate::engine::Stats;

/// Upper bounds of the buckets that steps are counted in, by rows: decode alone on the left, prompts on the right.
pub const STEP_ROW_BOUNDS: [usize; 13] = [1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024];

/// Steps by how many rows they computed, ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepRows {
    /// Steps of at most [`STEP_ROW_BOUNDS`]`[i]` rows and more than the bound before; last, those past every bound.
    pub counts: [u64; STEP_ROW_BOUNDS.len() + 1],
    /// Rows of all steps.
    pub sum: u64,
}

impl StepRows {
    /// Steps, ever.
    pub fn steps(&self) -> u64 {
        self.counts.iter().sum()
    }
}

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
    /// The thread failed; nothing runs any more.
    pub(crate) stopped: AtomicBool,
    pub(crate) running: AtomicUsize,
    pub(crate) outstanding: AtomicUsize,
    pub(crate) kv_blocks: AtomicUsize,
    pub(crate) kv_blocks_used: AtomicUsize,
    pub(crate) lookup_tokens: AtomicU64,
    pub(crate) hit_tokens: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    /// Steps by their rows, one count for each bound and one past the last.
    step_rows: [AtomicU64; STEP_ROW_BOUNDS.len() + 1],
    step_rows_sum: AtomicU64,
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
            stopped: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
            kv_blocks: AtomicUsize::new(kv_blocks),
            kv_blocks_used: AtomicUsize::new(0),
            lookup_tokens: AtomicU64::new(0),
            hit_tokens: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            step_rows: std::array::from_fn(|_| AtomicU64::new(0)),
            step_rows_sum: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            rows_per_second: AtomicU64::new(0),
            last_step_ms: AtomicU64::new(0),
        }
    }

    /// The thread got on (or has nothing to do).
    pub(crate) fn mark_alive(&self) {
        self.last_step_ms.store(self.start.elapsed().as_millis() as u64, Relaxed);
    }

    /// A step of so many rows was computed.
    pub(crate) fn count_step(&self, rows: usize) {
        let bucket = STEP_ROW_BOUNDS.partition_point(|bound| *bound < rows);
        self.step_rows[bucket].fetch_add(1, Relaxed);
        self.step_rows_sum.fetch_add(rows as u64, Relaxed);
    }

    /// Rows of all steps, ever.
    pub(crate) fn rows(&self) -> u64 {
        self.step_rows_sum.load(Relaxed)
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
            step_rows: StepRows {
                counts: std::array::from_fn(|i| self.step_rows[i].load(Relaxed)),
                sum: self.step_rows_sum.load(Relaxed),
            },
            preemptions: self.preemptions.load(Relaxed),
            stalled_ms: if open > 0 { since } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_counted_where_its_rows_fit() {
        let shared = Shared::new(1);
        for rows in [1, 1, 2, 3, 4, 5, 1024, 1025] {
            shared.count_step(rows);
        }
        let counted = shared.read().step_rows;
        assert_eq!(counted.counts[..4], [2, 1, 2, 1]);
        assert_eq!(counted.counts[12..], [1, 1]);
        assert_eq!((counted.steps(), counted.sum), (8, 2065));
    }
}

//! Which rows run in the next step: iteration-level continuous batching (Yu et al., "Orca", OSDI 2022) over a paged
//! cache, as a pure state machine. No clock, socket, lock or random number inside: the time is an argument.
//!
//! Each step has a budget of rows. In order:
//!
//! 1. *End* what is past its deadline, and what its reader has not taken for too long.
//! 2. *Admit* waiting sequences, strictly oldest first, while a place is free and the cache can hold everything
//!    that is known of all running sequences. What can't ever fit was refused before it came here, so the oldest
//!    is always admitted in the end.
//! 3. *Adopt* cached blocks: a sequence that stands at a block's border takes the block from the prefix cache if
//!    somebody computed it, also if that happened a step ago. The last known token is always computed.
//! 4. *Share out rows.* One for each sequence that is decoding. Of the rest, half to the oldest prompt, the other
//!    half to the shortest remaining prompts: a long prompt can't hold up short ones, and short ones can't starve
//!    it. Where decoding alone fills the budget (tiny budgets only), everybody takes turns.
//!    A prompt whose next block an older sequence computes in this very step waits one step and adopts it.
//! 5. *Find blocks*, oldest first. When none is left, a paused sequence or the youngest one is preempted: it gives
//!    its blocks back and waits to recompute them (its full blocks stay findable until their memory is needed).
//!    Only younger ones are, so the oldest always gets on; one that may preempt nobody stands still for a step.
//!
//! Every choice affects only *when* a row is computed; its bits are the same in any company.

mod planning;
mod rows;
mod sequence;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use consort_tensor::kv::{BLOCK_TOKENS, BlockId};

use crate::blocks::BlockPool;
use sequence::Sequence;

/// A sequence's arrival number: the lower, the older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The scheduler's bounds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that run at once; at least 1.
    pub max_running: usize,
    /// Rows a step; at least 1.
    pub step_tokens: usize,
    /// Prompt rows a step whose logits are wanted (they cost `vocab` floats each); at least 1.
    pub score_rows: usize,
    /// Share full blocks between sequences with the same start.
    pub prefix_cache: bool,
    /// A sequence that stays paused for longer is ended.
    pub patience: Duration,
}

/// A sequence to run.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The prompt, then what is known of the answer.
    pub tokens: Vec<u32>,
    /// Tokens of `tokens` that are the prompt.
    pub prompt: usize,
    /// The sequence never grows past this many tokens; at most the cache's capacity.
    pub limit: usize,
    /// The prompt rows' logits are wanted (all but the last one's, which predicts the answer).
    pub score_prompt: bool,
    /// Past this it ends.
    pub deadline: Option<Instant>,
}

/// One sequence's rows in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub id: SequenceId,
    /// The first row's position.
    pub first_position: usize,
    /// Rows: consecutive positions.
    pub rows: usize,
    /// Rows from the chunk's start whose logits score the prompt (`[first, last)`; mostly empty).
    pub scored: (usize, usize),
    /// The last row's logits are wanted for the next token.
    pub samples: bool,
}

/// Why the scheduler ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its deadline passed.
    Deadline,
    /// Nobody took its tokens for too long.
    Abandoned,
}

/// What to compute next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Sequences that were ended; they are gone already.
    pub ended: Vec<(SequenceId, Ended)>,
    /// Sequences admitted for the first time.
    pub admitted: Vec<SequenceId>,
    /// Sequences that lost their blocks.
    pub preempted: Vec<SequenceId>,
    /// The step's rows, oldest sequence first. Empty: nothing can run.
    pub chunks: Vec<Chunk>,
}

/// The pure core. Drive it with [`Scheduler::plan`], then [`Scheduler::commit`] and [`Scheduler::push_token`].
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockPool,
    sequences: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeSet<SequenceId>,
    running: BTreeSet<SequenceId>,
    arrivals: u64,
    steps: u64,
    /// Prompt tokens looked up in, and found in, the prefix cache.
    lookups: (u64, u64),
    preemptions: u64,
}

impl Scheduler {
    /// An idle scheduler over `blocks` cache blocks.
    pub fn new(limits: Limits, blocks: usize) -> Scheduler {
        let limits = Limits {
            max_running: limits.max_running.max(1),
            step_tokens: limits.step_tokens.max(1),
            score_rows: limits.score_rows.max(1),
            ..limits
        };
        Scheduler {
            limits,
            blocks: BlockPool::new(blocks),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            arrivals: 0,
            steps: 0,
            lookups: (0, 0),
            preemptions: 0,
        }
    }

    /// Queues a sequence.
    ///
    /// # Panics
    /// If it can't run here: an empty prompt, a limit past the cache's capacity or below its own tokens, or nothing
    /// to compute (no token to generate and no prompt row to score).
    pub fn submit(&mut self, arrival: Arrival) -> SequenceId {
        assert!(arrival.prompt > 0 && arrival.prompt <= arrival.tokens.len(), "the prompt is empty");
        assert!(arrival.limit <= self.blocks.len() * BLOCK_TOKENS, "the sequence can outgrow the cache");
        assert!(arrival.tokens.len() <= arrival.limit, "the sequence is over its limit");
        let computes = arrival.tokens.len() < arrival.limit || (arrival.score_prompt && arrival.prompt > 1);
        assert!(computes, "the sequence has nothing to compute");
        self.arrivals += 1;
        let id = SequenceId(self.arrivals);
        self.sequences.insert(id, Sequence::new(arrival));
        self.waiting.insert(id);
        id
    }

    /// Ends a sequence and frees what it holds; unknown ids are ignored.
    pub fn finish(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            release(&mut self.blocks, &mut sequence.blocks);
            self.waiting.remove(&id);
            self.running.remove(&id);
        }
    }

    /// Leaves a sequence out of the steps until [`Scheduler::resume`] (its reader is slow). It keeps its place and
    /// its blocks only as long as nobody else needs them.
    pub fn pause(&mut self, id: SequenceId, now: Instant) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.paused_since.get_or_insert(now);
        }
    }

    /// Takes a paused sequence up again.
    pub fn resume(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.paused_since = None;
        }
    }

    /// Notes that a chunk's keys and values are stored, and publishes the blocks it filled.
    pub fn commit(&mut self, chunk: &Chunk) {
        let Some(sequence) = self.sequences.get_mut(&chunk.id) else { return };
        assert_eq!(sequence.computed, chunk.first_position, "a chunk is committed out of order");
        let before = sequence.computed / BLOCK_TOKENS;
        sequence.computed += chunk.rows;
        if chunk.scored.0 < chunk.scored.1 {
            sequence.scored = chunk.first_position + chunk.scored.1;
        }
        if self.limits.prefix_cache {
            for index in before..sequence.computed / BLOCK_TOKENS {
                let name = sequence.name(index);
                sequence.blocks[index] = self.blocks.publish(sequence.blocks[index], name);
            }
        }
    }

    /// Appends a generated token; the sequence goes on unless it is finished.
    ///
    /// # Panics
    /// If the sequence is at its limit.
    pub fn push_token(&mut self, id: SequenceId, token: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        assert!(sequence.samples(), "the sequence is at its limit");
        sequence.arrival.tokens.push(token);
    }

    /// A sequence's tokens, prompt first.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.arrival.tokens)
    }

    /// A sequence's cache blocks.
    pub fn blocks(&self, id: SequenceId) -> &[BlockId] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.blocks)
    }

    /// Prompt tokens of a sequence that came out of the prefix cache when it first ran.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.cached)
    }

    /// Whether everything that is wanted of a sequence so far is computed.
    pub fn is_complete(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.remaining() == 0)
    }

    /// Whether a sequence has had its first step's turn.
    pub fn was_admitted(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.admitted)
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// All sequences, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.sequences.keys().copied()
    }

    /// Sequences running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that never ran.
    pub fn queued(&self) -> usize {
        self.waiting.iter().filter(|id| !self.sequences[id].admitted).count()
    }

    /// Rows and tokens still to come, if every answer runs to its limit.
    pub fn outstanding_tokens(&self) -> usize {
        let left =
            |sequence: &Sequence| sequence.arrival.limit - sequence.computed.min(sequence.arrival.limit);
        self.sequences.values().map(left).sum()
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.sequences.values().filter_map(|sequence| sequence.arrival.deadline).min()
    }

    /// The cache's bookkeeping.
    pub fn pool(&self) -> &BlockPool {
        &self.blocks
    }

    /// Prompt tokens looked up in the prefix cache, and found there, ever.
    pub fn lookups(&self) -> (u64, u64) {
        self.lookups
    }

    /// Preemptions, ever.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// How far the sequence is that nothing may hold up: the oldest that runs and isn't paused. (One that was
    /// paused and lost its place waits for another, ahead of all newcomers.)
    #[cfg(test)]
    pub(crate) fn oldest_progress(&self) -> Option<(SequenceId, usize, usize)> {
        let awake = |id: &&SequenceId| self.sequences[id].paused_since.is_none();
        let id = self.running.iter().find(awake).or_else(|| self.waiting.iter().find(awake))?;
        let sequence = &self.sequences[id];
        Some((*id, sequence.computed, sequence.arrival.tokens.len()))
    }

    /// Checks every invariant.
    ///
    /// # Panics
    /// With the first one that doesn't hold.
    #[doc(hidden)]
    pub fn check(&self) {
        self.blocks.check(self.sequences.values().map(|sequence| sequence.blocks.as_slice()));
        assert!(self.running.len() <= self.limits.max_running, "too many run");
        assert!(self.running.is_disjoint(&self.waiting));
        assert_eq!(self.running.len() + self.waiting.len(), self.sequences.len(), "a sequence is nowhere");
        for id in &self.waiting {
            assert!(self.sequences[id].blocks.is_empty(), "{id:?} waits with blocks");
        }
        for sequence in self.sequences.values() {
            assert!(sequence.computed <= sequence.blocks.len() * BLOCK_TOKENS, "rows without blocks");
            assert!(sequence.computed <= sequence.target(), "rows past the target");
        }
    }
}

/// Gives blocks back, the last first: a sequence's start is worth most to others and is forgotten last.
fn release(pool: &mut BlockPool, blocks: &mut Vec<BlockId>) {
    while let Some(block) = blocks.pop() {
        pool.release(block);
    }
}

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

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use consort_tensor::kv::{BLOCK_TOKENS, BlockId};

use crate::blocks::{BlockHash, BlockPool};

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

#[derive(Debug)]
struct Sequence {
    arrival: Arrival,
    /// Rows whose keys and values are stored.
    computed: usize,
    /// Prompt rows scored so far; a recomputation doesn't score them again.
    scored: usize,
    blocks: Vec<BlockId>,
    /// Names of the full blocks of `arrival.tokens`, as far as they were needed.
    names: Vec<BlockHash>,
    paused_since: Option<Instant>,
    admitted: bool,
    /// Prompt tokens found in the cache at the first time through.
    cached: usize,
    preemptions: u32,
    /// The step it last had rows in.
    served: u64,
}

impl Sequence {
    /// Rows to compute before something is wanted of this sequence.
    fn target(&self) -> usize {
        if self.samples() { self.arrival.tokens.len() } else { self.arrival.prompt - 1 }
    }

    fn samples(&self) -> bool {
        self.arrival.tokens.len() < self.arrival.limit
    }

    fn remaining(&self) -> usize {
        self.target().saturating_sub(self.computed)
    }

    fn decodes(&self) -> bool {
        self.remaining() == 1 && self.arrival.tokens.len() > self.arrival.prompt
    }

    fn scores_until(&self) -> usize {
        if self.arrival.score_prompt { self.arrival.prompt - 1 } else { 0 }
    }

    /// Positions below this may come out of the cache.
    fn adoptable(&self) -> usize {
        let last = self.target().saturating_sub(usize::from(self.samples()));
        if self.scored < self.scores_until() { last.min(self.scored) } else { last }
    }

    fn name(&mut self, index: usize) -> BlockHash {
        while self.names.len() <= index {
            let at = self.names.len();
            let parent = at.checked_sub(1).map_or(BlockHash::ROOT, |before| self.names[before]);
            self.names.push(parent.child(&self.arrival.tokens[at * BLOCK_TOKENS..(at + 1) * BLOCK_TOKENS]));
        }
        self.names[index]
    }

    /// Blocks for everything known of it and the next token.
    fn blocks_wanted(&self) -> usize {
        (self.arrival.tokens.len() + 1).min(self.arrival.limit).div_ceil(BLOCK_TOKENS)
    }
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
        let sequence = Sequence {
            arrival,
            computed: 0,
            scored: 0,
            blocks: Vec::new(),
            names: Vec::new(),
            paused_since: None,
            admitted: false,
            cached: 0,
            preemptions: 0,
            served: 0,
        };
        self.sequences.insert(id, sequence);
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

    /// Chooses the next step's rows. The caller computes them and calls [`Scheduler::commit`], or drops the plan
    /// (sequences may be finished in between).
    pub fn plan(&mut self, now: Instant) -> StepPlan {
        self.steps += 1;
        let mut plan = StepPlan::default();
        self.expire(now, &mut plan);
        self.admit(&mut plan);
        self.adopt();
        let shares = self.share_rows();
        self.find_blocks(&shares, &mut plan);
        plan
    }

    fn expire(&mut self, now: Instant, plan: &mut StepPlan) {
        let patience = self.limits.patience;
        for (&id, sequence) in &self.sequences {
            if sequence.arrival.deadline.is_some_and(|deadline| deadline <= now) {
                plan.ended.push((id, Ended::Deadline));
            } else if sequence.paused_since.is_some_and(|since| now.saturating_duration_since(since) >= patience) {
                plan.ended.push((id, Ended::Abandoned));
            }
        }
        for &(id, _) in &plan.ended {
            self.finish(id);
        }
    }

    fn admit(&mut self, plan: &mut StepPlan) {
        while let Some(head) = self.oldest_waiting() {
            while !(self.running.len() < self.limits.max_running && self.fits(head)) {
                let Some(paused) = self.youngest_running(|_, sequence| sequence.paused_since.is_some()) else {
                    return;
                };
                self.preempt(paused, plan);
            }
            self.waiting.remove(&head);
            self.running.insert(head);
            let Some(sequence) = self.sequences.get_mut(&head) else { return };
            if !sequence.admitted {
                sequence.admitted = true;
                self.lookups.0 += sequence.arrival.prompt as u64;
                plan.admitted.push(head);
            }
        }
    }

    fn oldest_waiting(&self) -> Option<SequenceId> {
        self.waiting.iter().copied().find(|id| self.sequences[id].paused_since.is_none())
    }

    /// Whether the cache can hold all that is known of the running sequences and of this one.
    fn fits(&mut self, id: SequenceId) -> bool {
        if self.running.is_empty() {
            return true;
        }
        let promised: usize = (self.running.iter())
            .map(|id| &self.sequences[id])
            .map(|running| running.blocks_wanted().saturating_sub(running.blocks.len()))
            .sum();
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let mut fresh = sequence.blocks_wanted();
        let mut woken = 0;
        if self.limits.prefix_cache {
            for index in 0..sequence.adoptable() / BLOCK_TOKENS {
                let Some((_, idle)) = self.blocks.find(sequence.name(index)) else { break };
                fresh -= 1;
                woken += usize::from(idle);
            }
        }
        promised + fresh + woken <= self.blocks.available()
    }

    fn adopt(&mut self) {
        if !self.limits.prefix_cache {
            return;
        }
        for id in &self.running {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if sequence.paused_since.is_some() {
                continue;
            }
            while sequence.computed + BLOCK_TOKENS <= sequence.adoptable()
                && sequence.computed == sequence.blocks.len() * BLOCK_TOKENS
            {
                let name = sequence.name(sequence.blocks.len());
                let Some(block) = self.blocks.adopt(name) else { break };
                sequence.blocks.push(block);
                sequence.computed += BLOCK_TOKENS;
                if sequence.preemptions == 0 {
                    let found = sequence.computed.min(sequence.arrival.prompt) - (sequence.computed - BLOCK_TOKENS);
                    sequence.cached += found;
                    self.lookups.1 += found as u64;
                }
            }
        }
    }

    /// Rows for each running sequence, at most the budget in all.
    fn share_rows(&mut self) -> BTreeMap<SequenceId, usize> {
        let ready: Vec<SequenceId> = (self.running.iter().copied())
            .filter(|id| self.sequences[id].paused_since.is_none() && self.sequences[id].remaining() > 0)
            .collect();
        let mut shares = BTreeMap::new();
        let mut budget = self.limits.step_tokens;
        let (decoding, prompts): (Vec<_>, Vec<_>) = ready.iter().partition(|id| self.sequences[id].decodes());

        if decoding.len() + usize::from(!prompts.is_empty()) > budget {
            let mut turns = ready;
            turns.sort_by_key(|id| (self.sequences[id].served, *id));
            for id in turns {
                let rows = self.sequences[&id].remaining().min(budget).min(self.score_cap(id));
                if rows > 0 {
                    shares.insert(id, rows);
                    budget -= rows;
                }
            }
            return shares;
        }

        for &id in &decoding {
            shares.insert(id, 1);
        }
        budget -= decoding.len();
        let mut scored = self.limits.score_rows;
        let mut computing: HashMap<BlockHash, SequenceId> = HashMap::new();
        let mut give = |this: &mut Scheduler, id: SequenceId, most: usize| {
            let given = shares.get(&id).copied().unwrap_or(0);
            let cap = this.score_cap(id);
            let scores = cap < usize::MAX;
            let most = if scores { most.min(cap.saturating_sub(given)).min(scored) } else { most };
            let rows = most.min(this.sequences[&id].remaining() - given);
            if rows > 0 {
                shares.insert(id, given + rows);
                scored -= if scores { rows } else { 0 };
            }
            rows
        };

        // The oldest first: its half, so that nobody can starve it.
        let oldest = prompts.first().copied();
        if let Some(id) = oldest {
            let rows = give(self, id, budget.div_ceil(2));
            budget -= rows;
            self.claim(id, rows, &mut computing);
        }
        // Then the shortest, the oldest's own remainder among them.
        let mut by_length = prompts;
        by_length.sort_by_key(|id| (self.sequences[id].remaining(), *id));
        for id in by_length {
            if budget == 0 {
                break;
            }
            if Some(id) != oldest && self.is_claimed(id, &computing) {
                continue;
            }
            let rows = give(self, id, budget);
            budget -= rows;
            self.claim(id, rows, &mut computing);
        }
        shares
    }

    /// Most rows that a chunk of this sequence may have because their logits are wanted.
    fn score_cap(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        if sequence.scored < sequence.scores_until() { self.limits.score_rows } else { usize::MAX }
    }

    /// Remembers the blocks that a sequence's next `rows` rows touch.
    fn claim(&mut self, id: SequenceId, rows: usize, computing: &mut HashMap<BlockHash, SequenceId>) {
        if !self.limits.prefix_cache || rows == 0 {
            return;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let full = sequence.arrival.tokens.len() / BLOCK_TOKENS;
        let end = (sequence.computed + rows).div_ceil(BLOCK_TOKENS).min(full);
        for index in sequence.computed / BLOCK_TOKENS..end {
            let first = computing.entry(sequence.name(index)).or_insert(id);
            *first = id.min(*first);
        }
    }

    /// Whether an older sequence is at work on the next block of this one. (Waiting for a younger one could last:
    /// it may itself have to wait for blocks that this one holds.)
    fn is_claimed(&mut self, id: SequenceId, computing: &HashMap<BlockHash, SequenceId>) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let index = sequence.computed / BLOCK_TOKENS;
        self.limits.prefix_cache
            && sequence.computed == index * BLOCK_TOKENS
            && sequence.computed + BLOCK_TOKENS <= sequence.adoptable()
            && computing.get(&sequence.name(index)).is_some_and(|&other| other < id)
    }

    fn find_blocks(&mut self, shares: &BTreeMap<SequenceId, usize>, plan: &mut StepPlan) {
        for (&id, &rows) in shares {
            if !self.running.contains(&id) {
                continue;
            }
            let wanted = self.sequences[&id].computed + rows;
            while self.sequences[&id].blocks.len() * BLOCK_TOKENS < wanted {
                if let Some(block) = self.blocks.allocate() {
                    if let Some(sequence) = self.sequences.get_mut(&id) {
                        sequence.blocks.push(block);
                    }
                } else if let Some(victim) = self
                    .youngest_running(|_, sequence| sequence.paused_since.is_some())
                    .or_else(|| self.youngest_running(|other, _| other > id))
                {
                    self.preempt(victim, plan);
                } else {
                    break;
                }
            }
            let steps = self.steps;
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let end = wanted.min(sequence.blocks.len() * BLOCK_TOKENS);
            if end <= sequence.computed {
                continue;
            }
            sequence.served = steps;
            let first = sequence.computed;
            let scored_from = sequence.scored.max(first);
            let scored_to = sequence.scores_until().min(end).max(scored_from);
            plan.chunks.push(Chunk {
                id,
                first_position: first,
                rows: end - first,
                scored: (scored_from - first, scored_to - first),
                samples: sequence.samples() && end == sequence.arrival.tokens.len(),
            });
        }
    }

    fn youngest_running(&self, which: impl Fn(SequenceId, &Sequence) -> bool) -> Option<SequenceId> {
        self.running.iter().rev().copied().find(|&id| which(id, &self.sequences[&id]))
    }

    fn preempt(&mut self, id: SequenceId, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        release(&mut self.blocks, &mut sequence.blocks);
        sequence.computed = 0;
        sequence.preemptions += 1;
        self.preemptions += 1;
        self.running.remove(&id);
        self.waiting.insert(id);
        plan.preempted.push(id);
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
        let left = |sequence: &Sequence| sequence.arrival.limit - sequence.computed.min(sequence.arrival.limit);
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

    /// How far the oldest sequence that isn't paused is.
    #[cfg(test)]
    pub(crate) fn oldest_progress(&self) -> Option<(SequenceId, usize, usize)> {
        let (id, sequence) = self.sequences.iter().find(|(_, sequence)| sequence.paused_since.is_none())?;
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

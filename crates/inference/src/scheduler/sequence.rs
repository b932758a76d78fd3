//! One sequence as the scheduler sees it: what is known, what is computed, what may come out of the cache.

use std::time::Instant;

use consort_tensor::kv::{BLOCK_TOKENS, BlockId};

use super::Arrival;
use crate::blocks::BlockHash;

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) arrival: Arrival,
    /// Rows whose keys and values are stored.
    pub(super) computed: usize,
    /// Prompt rows scored so far; a recomputation doesn't score them again.
    pub(super) scored: usize,
    pub(super) blocks: Vec<BlockId>,
    /// Names of the full blocks of `arrival.tokens`, as far as they were needed.
    pub(super) names: Vec<BlockHash>,
    pub(super) paused_since: Option<Instant>,
    pub(super) admitted: bool,
    /// Prompt tokens found in the cache at the first time through.
    pub(super) cached: usize,
    pub(super) preemptions: u32,
    /// The step it last had rows in.
    pub(super) served: u64,
}

impl Sequence {
    /// As it arrives.
    pub(super) fn new(arrival: Arrival) -> Sequence {
        Sequence {
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
        }
    }

    /// Rows to compute before something is wanted of this sequence.
    pub(super) fn target(&self) -> usize {
        if self.samples() { self.arrival.tokens.len() } else { self.arrival.prompt - 1 }
    }

    pub(super) fn samples(&self) -> bool {
        self.arrival.tokens.len() < self.arrival.limit
    }

    pub(super) fn remaining(&self) -> usize {
        self.target().saturating_sub(self.computed)
    }

    pub(super) fn decodes(&self) -> bool {
        self.remaining() == 1 && self.arrival.tokens.len() > self.arrival.prompt
    }

    pub(super) fn scores_until(&self) -> usize {
        if self.arrival.score_prompt { self.arrival.prompt - 1 } else { 0 }
    }

    /// Positions below this may come out of the cache.
    pub(super) fn adoptable(&self) -> usize {
        let last = self.target().saturating_sub(usize::from(self.samples()));
        if self.scored < self.scores_until() { last.min(self.scored) } else { last }
    }

    pub(super) fn name(&mut self, index: usize) -> BlockHash {
        while self.names.len() <= index {
            let at = self.names.len();
            let parent = at.checked_sub(1).map_or(BlockHash::ROOT, |before| self.names[before]);
            self.names.push(parent.child(&self.arrival.tokens[at * BLOCK_TOKENS..(at + 1) * BLOCK_TOKENS]));
        }
        self.names[index]
    }

    /// Blocks for everything known of it and the next token.
    pub(super) fn blocks_wanted(&self) -> usize {
        (self.arrival.tokens.len() + 1).min(self.arrival.limit).div_ceil(BLOCK_TOKENS)
    }
}

//! How a step's rows are shared out.

use std::collections::{BTreeMap, HashMap};

use consort_tensor::kv::BLOCK_TOKENS;

use super::{Scheduler, SequenceId};
use crate::blocks::BlockHash;

impl Scheduler {
    /// Rows for each running sequence, at most the budget in all.
    pub(super) fn share_rows(&mut self) -> BTreeMap<SequenceId, usize> {
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
}

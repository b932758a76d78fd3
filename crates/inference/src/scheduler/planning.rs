//! A step's plan: who ends, who is let in, what comes out of the cache, and who gets the blocks.

use std::collections::BTreeMap;
use std::time::Instant;

use consort_tensor::kv::BLOCK_TOKENS;

use super::sequence::Sequence;
use super::{Chunk, Ended, Scheduler, SequenceId, StepPlan, release};

impl Scheduler {
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
            } else if sequence
                .paused_since
                .is_some_and(|since| now.saturating_duration_since(since) >= patience)
            {
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
                let Some(paused) = self.youngest_running(|_, sequence| sequence.paused_since.is_some())
                else {
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
                    let start = sequence.computed - BLOCK_TOKENS;
                    let found = sequence.computed.min(sequence.arrival.prompt).saturating_sub(start);
                    sequence.cached += found;
                    self.lookups.1 += found as u64;
                }
            }
        }
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
            // A turn without blocks is a turn too: else whoever finds none would keep it for ever.
            sequence.served = steps;
            let end = wanted.min(sequence.blocks.len() * BLOCK_TOKENS);
            if end <= sequence.computed {
                continue;
            }
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
}

//! Sends a prompt to the replica that has its beginning in the prefix cache, unless that one has too much to do.
//!
//! A prompt is cut into blocks; each block's hash covers all before it. A bounded table remembers which replica last
//! got a prompt with that beginning: the longest one known wins. Where none is known, the first block is hashed
//! to a replica (rendezvous hashing, the same at every gateway). Either way the bound of consistent hashing with
//! bounded loads holds (Mirrokni, Thorup and Zadimoghaddam 2018): a replica with more than its share of the outstanding
//! tokens is passed over, so that a popular beginning spreads over as many replicas as it needs.

use std::collections::{HashMap, VecDeque};

use super::balance::Candidate;
use super::canary::mix;

/// Bytes of a prompt's JSON in a block: some sixty tokens.
const BLOCK: usize = 256;
/// Blocks that are looked at.
const MAX_BLOCKS: usize = 64;
/// Beginnings remembered.
const REMEMBERED: usize = 64 << 10;
/// A replica may have this much more than the mean.
const BOUND: f64 = 1.25;
/// And so many tokens for each block of the prompt that it has had: what they would take to be computed elsewhere, since
/// reading a token costs about a quarter of saying one.
const WORTH: f64 = 16.0;

/// Hashes of a prompt's beginnings, the shortest first.
pub(crate) fn beginnings(prompt: &[u8]) -> Vec<u64> {
    let mut hash = 0x9e37_79b9_7f4a_7c15;
    let blocks = prompt.chunks_exact(BLOCK).take(MAX_BLOCKS);
    blocks
        .map(|block| {
            for word in block.chunks_exact(8) {
                let word = word.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
                hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
                hash ^= hash >> 32;
            }
            hash
        })
        .collect()
}

/// What is remembered of one version's prompts.
#[derive(Debug, Default)]
pub(crate) struct Affinity {
    /// Beginning to replica.
    seen: HashMap<u64, u64>,
    /// In the order they came.
    order: VecDeque<u64>,
}

impl Affinity {
    /// The index of the replica that should get a prompt with these beginnings; none where nothing speaks for one.
    pub(crate) fn choose(&self, homes: &[Candidate], beginnings: &[u64], cost: u64) -> Option<usize> {
        let first = *beginnings.first()?;
        let load = |home: &Candidate| home.load_with(cost);
        let mean = homes.iter().map(|home| home.tokens as f64).sum::<f64>() / homes.len().max(1) as f64;
        let most = (mean + cost as f64) * BOUND;
        let seen = |(at, beginning): (usize, &u64)| self.seen.get(beginning).map(|id| (at + 1, *id));
        let known = beginnings.iter().enumerate().rev().find_map(seen);
        if let Some((blocks, id)) = known
            && let Some(index) = homes.iter().position(|home| home.id == id)
            && load(&homes[index]) <= most + WORTH * blocks as f64
        {
            return Some(index);
        }
        let ranked = homes.iter().enumerate().filter(|(_, home)| load(home) <= most);
        ranked.max_by_key(|(_, home)| mix(first, &home.id.to_string())).map(|(index, _)| index)
    }

    /// Remembers where a prompt went.
    pub(crate) fn note(&mut self, beginnings: &[u64], home: u64) {
        for beginning in beginnings {
            if self.seen.insert(*beginning, home).is_none() {
                self.order.push_back(*beginning);
            }
        }
        while self.order.len() > REMEMBERED {
            if let Some(oldest) = self.order.pop_front() {
                self.seen.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_api::deployment::Balancing;
    use consort_base::Philox;

    use super::*;
    use crate::policy::balance::Balance;

    fn home(id: u64, tokens: u64) -> Candidate {
        Candidate { id, requests: 0, tokens, share: 1.0 }
    }

    #[test]
    fn a_conversation_stays_and_a_loaded_replica_is_passed_over() {
        let mut affinity = Affinity::default();
        let first = "x".repeat(600);
        let second = format!("{first}{}", "y".repeat(600));
        let homes = [home(1, 0), home(2, 0), home(3, 0)];
        let short = beginnings(&first.as_bytes()[..100]);
        assert_eq!(affinity.choose(&homes, &short, 10), None, "too short to be worth it");
        affinity.note(&beginnings(first.as_bytes()), 2);
        let longer = beginnings(second.as_bytes());
        assert_eq!(affinity.choose(&homes, &longer, 10), Some(1));
        let loaded = [home(1, 0), home(2, 50_000), home(3, 0)];
        assert_ne!(affinity.choose(&loaded, &longer, 10), Some(1));
    }

    #[test]
    fn a_replica_that_goes_moves_its_own_prompts_only() {
        let affinity = Affinity::default();
        let mut rng = Philox::new(3, 0);
        let all = [home(1, 0), home(2, 0), home(3, 0), home(4, 0)];
        let left = [all[0], all[1], all[3]];
        for _ in 0..500 {
            let prompt = [rng.next_u64()];
            let before = all[affinity.choose(&all, &prompt, 1).unwrap()].id;
            let after = left[affinity.choose(&left, &prompt, 1).unwrap()].id;
            assert!(before == after || before == 3);
        }
    }

    /// Conversations on four replicas whose caches hold a few prefixes each: affinity finds most turns' prefixes,
    /// without it few are found, and the loads stay in bounds.
    #[test]
    fn prefixes_are_found_where_they_were_left() {
        let found = |with: bool| {
            let mut rng = Philox::new(9, 0);
            let mut balance = Balance::default();
            let (mut loads, mut caches) = ([0u64; 4], vec![VecDeque::<usize>::new(); 4]);
            let (mut hits, mut turns, mut spread) = (0, 0, 0);
            for _ in 0..4000 {
                let conversation = rng.next_u64() as usize % 60;
                let prompt: Vec<u64> = (0..4).map(|block| (conversation * 10 + block) as u64).collect();
                let cost = 50 + rng.next_u64() % 400;
                let homes: Vec<Candidate> = (0..4).map(|i| home(i as u64, loads[i])).collect();
                let way = if with { Balancing::Affinity } else { Balancing::TwoChoices };
                let index = balance.choose(way, &homes, &prompt, cost, rng.next_u64()).unwrap();
                balance.note(&prompt, index as u64);
                turns += 1;
                let cache = &mut caches[index];
                hits += usize::from(cache.contains(&conversation));
                cache.retain(|other| *other != conversation);
                cache.push_back(conversation);
                if cache.len() > 20 {
                    cache.pop_front();
                }
                loads[index] += cost;
                // Together they compute a fifth more than what comes, on average.
                loads = loads.map(|load| load.saturating_sub(75));
                spread = spread.max(loads.iter().max().unwrap() - loads.iter().min().unwrap());
            }
            (hits * 100 / turns, spread)
        };
        let ((with, spread), (without, _)) = (found(true), found(false));
        assert!(with > 75 && without < 45, "{with} % with, {without} % without");
        assert!(spread < 6000, "{spread}");
    }
}

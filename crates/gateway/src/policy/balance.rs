//! Who gets the next request: by default whoever has had the prompt's beginning ([`Affinity`]), else the less loaded of
//! two drawn at random (power of two choices; Mitzenmacher 2001).
//!
//! Load is outstanding work in tokens, not requests: a request for 2,000 tokens weighs what forty short ones do. Two
//! draws instead of the minimum of all: every gateway that stands before the same replicas would send to the same
//! minimum at the same time. A replica that starts slowly counts its load over its share, so that it fills slowly.
//!
//! The other ways are what people know from other proxies; `simulation` beside this file compares all of them.

use consort_api::deployment::Balancing;

use super::affinity::Affinity;
use super::canary::mix;

/// A replica that may get the request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    /// Its id's hash.
    pub(crate) id: u64,
    /// Requests that it has.
    pub(crate) requests: u64,
    /// Tokens it has yet to compute.
    pub(crate) tokens: u64,
    /// Above 0, to 1.
    pub(crate) share: f64,
}

/// What a way to choose remembers of one version's requests.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    affinity: Affinity,
    /// Requests that were given by turns.
    turns: u64,
}

impl Candidate {
    /// A replica's id as a number.
    pub(crate) fn hash(id: &str) -> u64 {
        mix(0, id)
    }

    /// Its load with a request of `cost` tokens more.
    pub(crate) fn load_with(&self, cost: u64) -> f64 {
        (self.tokens + cost) as f64 / self.share.max(f64::MIN_POSITIVE)
    }
}

impl Balance {
    /// The index of the one that gets a request of `cost` tokens whose prompt has these beginnings; none where there is
    /// none. `random` is uniform over all 64-bit numbers.
    pub(crate) fn choose(
        &mut self,
        way: Balancing,
        candidates: &[Candidate],
        beginnings: &[u64],
        cost: u64,
        random: u64,
    ) -> Option<usize> {
        match (candidates.len(), way) {
            (0, _) => None,
            (1, _) => Some(0),
            (_, Balancing::Affinity) => {
                let near = self.affinity.choose(candidates, beginnings, cost);
                near.or_else(|| lighter(candidates, cost, random))
            }
            (_, Balancing::TwoChoices) => lighter(candidates, cost, random),
            (_, Balancing::LeastRequests) => fewest(candidates, random),
            (_, Balancing::RoundRobin) => self.turn(candidates, random),
        }
    }

    /// Remembers where a prompt went.
    pub(crate) fn note(&mut self, beginnings: &[u64], id: u64) {
        self.affinity.note(beginnings, id);
    }

    /// Each in its turn; one that starts slowly takes only its share of its turns.
    fn turn(&mut self, candidates: &[Candidate], random: u64) -> Option<usize> {
        let count = candidates.len();
        let uniform = (random >> 11) as f64 / (1u64 << 53) as f64;
        for _ in 0..count {
            let index = (self.turns % count as u64) as usize;
            self.turns = self.turns.wrapping_add(1);
            if uniform < candidates[index].share {
                return Some(index);
            }
        }
        (0..count).max_by(|a, b| candidates[*a].share.total_cmp(&candidates[*b].share))
    }
}

/// The less loaded of two different ones, each pair as likely as any other; none where there is none.
pub(crate) fn lighter(candidates: &[Candidate], cost: u64, random: u64) -> Option<usize> {
    let count = candidates.len() as u64;
    if count < 2 {
        return (count == 1).then_some(0);
    }
    let first = (random & 0xffff_ffff) % count;
    let second = (first + 1 + (random >> 32) % (count - 1)) % count;
    let (first, second) = (first as usize, second as usize);
    let lighter = candidates[first].load_with(cost) <= candidates[second].load_with(cost);
    Some(if lighter { first } else { second })
}

/// The one with the fewest requests, over its share; any of them where several have.
fn fewest(candidates: &[Candidate], random: u64) -> Option<usize> {
    let count = candidates.len();
    let start = (random % count.max(1) as u64) as usize;
    let load = |i: &usize| {
        let one = &candidates[*i];
        (one.requests + 1) as f64 / one.share.max(f64::MIN_POSITIVE)
    };
    (0..count).map(|i| (start + i) % count).min_by(|a, b| load(a).total_cmp(&load(b)))
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    fn load(tokens: u64, share: f64) -> Candidate {
        Candidate { id: tokens, requests: 0, tokens, share }
    }

    fn pick(way: Balancing, candidates: &[Candidate], random: u64) -> Option<usize> {
        Balance::default().choose(way, candidates, &[], 1, random)
    }

    #[test]
    fn the_lighter_of_two_gets_it_and_everyone_is_drawn() {
        for way in Balancing::ALL {
            assert_eq!(pick(way, &[], 7), None);
            assert_eq!(pick(way, &[load(9, 1.0)], 7), Some(0));
        }
        let mut rng = Philox::new(1, 0);
        for way in [Balancing::TwoChoices, Balancing::Affinity] {
            for _ in 0..100 {
                assert_eq!(pick(way, &[load(10, 1.0), load(9, 1.0)], rng.next_u64()), Some(1));
                assert_eq!(pick(way, &[load(10, 1.0), load(9, 0.5)], rng.next_u64()), Some(0));
            }
        }
        for way in [Balancing::TwoChoices, Balancing::LeastRequests] {
            let mut counts = [0; 4];
            for _ in 0..4000 {
                counts[pick(way, &[load(0, 1.0); 4], rng.next_u64()).unwrap()] += 1;
            }
            assert!(counts.iter().all(|count| (800..1200).contains(count)), "{way:?}: {counts:?}");
        }
    }

    #[test]
    fn the_fewest_requests_and_turns_are_what_they_say_and_know_slow_starts() {
        let with = |requests, share| Candidate { requests, ..load(0, share) };
        let few = [with(3, 1.0), with(1, 1.0), with(0, 0.25)];
        let mut rng = Philox::new(4, 0);
        for _ in 0..50 {
            assert_eq!(pick(Balancing::LeastRequests, &few, rng.next_u64()), Some(1));
        }
        let (mut balance, mut counts) = (Balance::default(), [0u64; 3]);
        let slow = [with(9, 1.0), with(0, 1.0), with(0, 0.25)];
        for _ in 0..4000 {
            let index = balance.choose(Balancing::RoundRobin, &slow, &[], 1, rng.next_u64()).unwrap();
            counts[index] += 1;
        }
        assert!((350..550).contains(&counts[2]), "a ninth: {counts:?}");
        assert!(counts[0].abs_diff(counts[1]) < 500, "{counts:?}");
        let starting = [with(0, 0.01), with(0, 0.02)];
        assert!(pick(Balancing::RoundRobin, &starting, u64::MAX).is_some(), "somebody has to take it");
    }

    /// Work of very different lengths: the largest load stays closer to the mean than by turns.
    #[test]
    fn uneven_work_is_spread_better_than_by_turns() {
        let mut rng = Philox::new(2, 0);
        let costs: Vec<u64> =
            (0..4000).map(|_| if rng.next_u64().is_multiple_of(20) { 2000 } else { 20 }).collect();
        let (mut picked, mut turns) = ([0u64; 8], [0u64; 8]);
        for (i, cost) in costs.iter().enumerate() {
            let candidates = picked.map(|tokens| load(tokens, 1.0));
            picked[lighter(&candidates, *cost, rng.next_u64()).unwrap()] += cost;
            turns[i % 8] += cost;
        }
        let spread = |loads: &[u64; 8]| loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread(&picked) * 2 < spread(&turns), "{picked:?} {turns:?}");
    }
}

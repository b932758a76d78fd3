//! Who gets the next request: the less loaded of two drawn at random (power of two choices; Mitzenmacher 2001).
//!
//! Load is outstanding work in tokens, not requests: a request for 2,000 tokens weighs what forty short ones do. Two
//! draws instead of the minimum of all: every gateway that stands before the same replicas would send to the same
//! minimum at the same time. A replica that starts slowly counts its load over its share, so that it fills slowly.

/// A replica that may get the request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    /// Tokens it has yet to compute.
    pub(crate) tokens: u64,
    /// Above 0, to 1.
    pub(crate) share: f64,
}

impl Candidate {
    /// Its load with a request of `cost` tokens more.
    pub(crate) fn load_with(&self, cost: u64) -> f64 {
        (self.tokens + cost) as f64 / self.share.max(f64::MIN_POSITIVE)
    }
}

/// The index of the one that gets a request of `cost` tokens; none where there is none. `random` is uniform over all
/// 64-bit numbers.
pub(crate) fn pick(candidates: &[Candidate], cost: u64, random: u64) -> Option<usize> {
    let count = candidates.len() as u64;
    match count {
        0 => None,
        1 => Some(0),
        _ => {
            // Two different ones, each pair as likely as any other.
            let first = (random & 0xffff_ffff) % count;
            let second = (first + 1 + (random >> 32) % (count - 1)) % count;
            let (first, second) = (first as usize, second as usize);
            let lighter = candidates[first].load_with(cost) <= candidates[second].load_with(cost);
            Some(if lighter { first } else { second })
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    #[test]
    fn the_lighter_of_two_gets_it_and_everyone_is_drawn() {
        let load = |tokens, share| Candidate { tokens, share };
        assert_eq!(pick(&[], 1, 7), None);
        assert_eq!(pick(&[load(9, 1.0)], 1, 7), Some(0));
        let mut rng = Philox::new(1, 0);
        for _ in 0..100 {
            assert_eq!(pick(&[load(10, 1.0), load(9, 1.0)], 1, rng.next_u64()), Some(1));
            assert_eq!(pick(&[load(10, 1.0), load(9, 0.5)], 1, rng.next_u64()), Some(0));
        }
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[pick(&[load(0, 1.0); 4], 1, rng.next_u64()).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    /// Work of very different lengths: the largest load stays closer to the mean than by turns.
    #[test]
    fn uneven_work_is_spread_better_than_by_turns() {
        let mut rng = Philox::new(2, 0);
        let costs: Vec<u64> =
            (0..4000).map(|_| if rng.next_u64().is_multiple_of(20) { 2000 } else { 20 }).collect();
        let (mut picked, mut turns) = ([0u64; 8], [0u64; 8]);
        for (i, cost) in costs.iter().enumerate() {
            let candidates = picked.map(|tokens| Candidate { tokens, share: 1.0 });
            picked[pick(&candidates, *cost, rng.next_u64()).unwrap()] += cost;
            turns[i % 8] += cost;
        }
        let spread = |loads: &[u64; 8]| loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread(&picked) * 2 < spread(&turns), "{picked:?} {turns:?}");
    }
}

//! In which order samples are seen: every one once an epoch, each epoch in an order of its own.
//!
//! The order is a function and not a list: a keyed permutation of `0..n`, so that the millionth sample is found without
//! the ones before it, on any worker, after any restart. It is a Feistel network of four rounds over the next even
//! number of bits, walked until it lands below `n` (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
//! 2002), with Philox for its round function. A step lands below `n` with probability 1/4 or more.

use consort_base::philox4x32;

const ROUNDS: u32 = 4;

/// The order of one data set's samples under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    samples: u64,
    seed: u64,
    /// Bits of one half of a number.
    half: u32,
}

impl Order {
    /// Of `samples` samples, which must not be 0.
    pub(crate) fn new(samples: u64, seed: u64) -> Order {
        let bits = u64::BITS - samples.saturating_sub(1).leading_zeros();
        Order { samples, seed, half: bits.div_ceil(2).max(1) }
    }

    /// Samples in an epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The sample at `cursor`, counted over all epochs from 0.
    pub fn at(&self, cursor: u64) -> u64 {
        let (epoch, mut place) = (cursor / self.samples, cursor % self.samples);
        loop {
            place = self.permuted(place, epoch);
            if place < self.samples {
                return place;
            }
        }
    }

    fn permuted(&self, place: u64, epoch: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (place >> self.half, place & mask);
        for round in 0..ROUNDS {
            // At most 32 bits of a half fill the first word; the epoch takes two and the round the last.
            let counter = [right as u32, epoch as u32, (epoch >> 32) as u32, round];
            let key = [self.seed as u32, (self.seed >> 32) as u32];
            let [word, ..] = philox4x32(counter, key);
            (left, right) = (right, left ^ (u64::from(word) & mask));
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_sample_comes_once_an_epoch() {
        for samples in [1, 2, 3, 5, 64, 65, 1000, 4097] {
            let order = Order::new(samples, 7);
            for epoch in 0..3 {
                let seen: BTreeSet<u64> = (0..samples).map(|i| order.at(epoch * samples + i)).collect();
                assert_eq!(seen, (0..samples).collect(), "{samples} samples, epoch {epoch}");
            }
        }
    }

    #[test]
    fn seeds_and_epochs_have_orders_of_their_own() {
        let list = |seed, epoch: u64| -> Vec<u64> {
            let order = Order::new(500, seed);
            (0..500).map(|i| order.at(epoch * 500 + i)).collect()
        };
        let orders = [list(1, 0), list(1, 1), list(2, 0), (0..500).collect()];
        for (i, a) in orders.iter().enumerate() {
            for b in &orders[..i] {
                let same = a.iter().zip(b).filter(|(a, b)| a == b).count();
                assert!(same < 10, "{same} samples stand at the same place");
            }
        }
        assert_eq!(list(1, 1), list(1, 1));
    }

    #[test]
    fn places_are_spread_evenly() {
        // Where sample 0 of ten stands in 4,000 epochs: 400 a place, with a standard deviation of 19.
        let order = Order::new(10, 3);
        let mut counts = [0u32; 10];
        (0..4000).for_each(|epoch| counts[order.at(epoch * 10) as usize] += 1);
        assert!(counts.iter().all(|count| (300..500).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_largest_set_has_an_order() {
        let order = Order::new(u64::MAX, 1);
        assert!(order.at(5) != order.at(6));
    }
}

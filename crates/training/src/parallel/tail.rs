//! The last reduction of a step: what every worker must know before it moves its weights.
//!
//! One vector of integers, added over all workers. Each number has a place of its own that one worker alone fills, so
//! the sum is everybody's knowledge, and no order of additions touches a loss. A few hundred bytes: one short call.

use consort_model::train::Loss;

/// Words of a micro-batch: how often it was computed, loss, weight, rows, samples, which.
const OF_MICRO_BATCH: usize = 6;
/// Words of a worker beside one a bucket: flags, newcomers, computing time, the last step's gradient norm.
const OF_WORKER: usize = 4;

/// This worker asks for a stop.
pub(super) const STOP: i64 = 1;
/// This worker's store is gone.
pub(super) const STORE_LOST: i64 = 2;

/// This worker is still writing the last checkpoint.
pub(super) const SAVING: i64 = 4;

/// The words, and where each lies.
#[derive(Clone, Debug)]
pub(super) struct Tail {
    pub(super) words: Vec<i64>,
    micro_batches: usize,
    buckets: usize,
    workers: usize,
}

/// What a micro-batch came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Done {
    pub(super) loss: Loss,
    pub(super) samples: u64,
    pub(super) seen: u64,
}

/// What a worker says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) flags: i64,
    pub(super) newcomers: i64,
    pub(super) computed_us: i64,
    /// The bits of the gradient's length in the step before: equal on all, or somebody's weights are not the others'.
    pub(super) check: i64,
}

impl Tail {
    pub(super) fn new(micro_batches: usize, buckets: usize, workers: usize) -> Tail {
        let len = micro_batches * OF_MICRO_BATCH + workers * (OF_WORKER + buckets);
        Tail { words: vec![0; len], micro_batches, buckets, workers }
    }

    fn worker(&self, rank: usize) -> usize {
        self.micro_batches * OF_MICRO_BATCH + rank * (OF_WORKER + self.buckets)
    }

    /// Where a worker's flags and newcomers are, for the thread that knows of newcomers.
    pub(super) fn place(&self, rank: usize) -> usize {
        self.worker(rank)
    }

    pub(super) fn put_micro_batch(&mut self, m: usize, done: Done) {
        let Done { loss, samples, seen } = done;
        let words = [
            1,
            loss.sum.to_bits() as i64,
            loss.weight.to_bits() as i64,
            loss.rows as i64,
            samples as i64,
            seen as i64,
        ];
        self.words[m * OF_MICRO_BATCH..][..OF_MICRO_BATCH].copy_from_slice(&words);
    }

    pub(super) fn put_worker(&mut self, rank: usize, word: Word, largest: &[f32]) {
        let at = self.worker(rank);
        let Word { flags, newcomers, computed_us, check } = word;
        self.words[at..at + OF_WORKER].copy_from_slice(&[flags, newcomers, computed_us, check]);
        for (word, largest) in self.words[at + OF_WORKER..][..self.buckets].iter_mut().zip(largest) {
            *word = i64::from(largest.to_bits());
        }
    }

    /// How often a micro-batch was computed, and what it came to.
    pub(super) fn micro_batch(&self, m: usize) -> (i64, Done) {
        let words = &self.words[m * OF_MICRO_BATCH..][..OF_MICRO_BATCH];
        let [sum, weight] = [words[1], words[2]].map(|bits| f64::from_bits(bits as u64));
        let loss = Loss { sum, weight, rows: words[3] as usize };
        (words[0], Done { loss, samples: words[4] as u64, seen: words[5] as u64 })
    }

    pub(super) fn word(&self, rank: usize) -> Word {
        let words = &self.words[self.worker(rank)..][..OF_WORKER];
        Word { flags: words[0], newcomers: words[1], computed_us: words[2], check: words[3] }
    }

    pub(super) fn workers(&self) -> impl Iterator<Item = Word> + '_ {
        (0..self.workers).map(|rank| self.word(rank))
    }

    /// The largest magnitude in a bucket, over all workers; infinite or NaN where one is.
    pub(super) fn largest(&self, bucket: usize) -> f32 {
        let words = (0..self.workers).map(|rank| self.words[self.worker(rank) + OF_WORKER + bucket]);
        // Magnitudes order as their bits do, and NaN comes last.
        f32::from_bits(words.max().unwrap_or(0) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_puts_in_everyone_reads() {
        let (micro_batches, buckets, workers) = (5, 3, 2);
        let done = |m: usize| Done {
            loss: Loss { sum: 0.1 * m as f64 - 0.3, weight: 7.5, rows: m },
            samples: 2,
            seen: u64::MAX - m as u64,
        };
        let mut sum = Tail::new(micro_batches, buckets, workers);
        for rank in 0..workers {
            let mut own = Tail::new(micro_batches, buckets, workers);
            (rank..micro_batches).step_by(workers).for_each(|m| own.put_micro_batch(m, done(m)));
            let word = Word { flags: STOP, newcomers: 3, computed_us: 9, check: i64::MIN };
            let largest = [rank as f32, 1.0 - rank as f32, if rank == 1 { f32::NAN } else { f32::INFINITY }];
            own.put_worker(rank, word, &largest);
            sum.words.iter_mut().zip(&own.words).for_each(|(a, b)| *a = a.wrapping_add(*b));
            assert_eq!(own.word(rank), word);
        }
        for m in 0..micro_batches {
            assert_eq!(sum.micro_batch(m), (1, done(m)));
        }
        assert_eq!((sum.largest(0), sum.largest(1)), (1.0, 1.0));
        assert!(sum.largest(2).is_nan());
        assert!(sum.workers().all(|word| word.flags == STOP && word.check == i64::MIN));
        assert_eq!(sum.words[sum.place(1)], STOP);
    }
}

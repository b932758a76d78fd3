//! How durations are distributed, in constant memory and mergeable: counts in buckets that each are a fifth wider than
//! the one before.
//!
//! Counts since the beginning rather than of a sliding window, so that whoever keeps an earlier copy has the
//! distribution of any span by subtraction ([`Histogram::since`]). Quantiles are right to a fifth, which is what
//! deciding between two versions of a model needs; an exact quantile would keep every sample.
//!
//! Cost: one logarithm a sample, 8 bytes a bucket up to the highest used (102 at most). Source: the scheme is
//! HdrHistogram's without its sub-buckets.

use std::time::Duration;

/// Buckets there are: from 0.1 ms to about three hours.
pub const BUCKETS: usize = 102;
const GROWTH: f64 = 1.2;
const LEAST_MS: f64 = 0.1;

/// Counts of durations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    counts: Vec<u64>,
    sum_seconds: f64,
}

/// The bucket that a duration falls into, below [`BUCKETS`].
pub fn bucket(duration: Duration) -> usize {
    let ms = duration.as_secs_f64() * 1e3;
    (((ms / LEAST_MS).max(1.0).ln() / GROWTH.ln()) as usize).min(BUCKETS - 1)
}

/// A bucket's upper bound in milliseconds.
pub fn upper_ms(bucket: usize) -> f64 {
    LEAST_MS * GROWTH.powf(bucket as f64 + 1.0)
}

/// The `share`-quantile of these counts in milliseconds, as a bucket's geometric middle; `None` where all are 0.
pub fn quantile_ms(counts: impl Iterator<Item = u64> + Clone, share: f64) -> Option<f64> {
    let count: u64 = counts.clone().sum();
    let wanted = ((count as f64 * share).ceil() as u64).max(1);
    let mut seen = 0;
    let bucket = counts.into_iter().position(|c| {
        seen += c;
        seen >= wanted
    })?;
    Some(LEAST_MS * GROWTH.powf(bucket as f64 + 0.5))
}

impl Histogram {
    /// Counts a duration.
    pub fn add(&mut self, duration: Duration) {
        let bucket = bucket(duration);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.sum_seconds += duration.as_secs_f64();
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them added up, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_seconds
    }

    /// The `share`-quantile in milliseconds; `None` where nothing was counted.
    pub fn quantile_ms(&self, share: f64) -> Option<f64> {
        quantile_ms(self.counts.iter().copied(), share)
    }

    /// What was counted after `earlier`, a copy of this one, was taken.
    #[must_use]
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        Histogram {
            counts: self.counts.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect(),
            sum_seconds: (self.sum_seconds - earlier.sum_seconds).max(0.0),
        }
    }

    /// Counts by upper bound in seconds, `every` buckets as one, up to the highest used.
    pub fn coarse(&self, every: usize) -> Vec<(f64, u64)> {
        let every = every.max(1);
        let sums = self.counts.chunks(every).map(|counts| counts.iter().sum());
        sums.enumerate().map(|(i, count)| (upper_ms(i * every + every - 1) / 1e3, count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_and_spans_are_differences() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|ms| histogram.add(Duration::from_millis(ms)));
        let near = |got: Option<f64>, wanted: f64| (got.unwrap() / wanted - 1.0).abs() < 0.2;
        assert!(near(histogram.quantile_ms(0.5), 500.0) && near(histogram.quantile_ms(0.95), 950.0));
        assert!((histogram.sum_seconds() - 500.5).abs() < 1e-6);
        let earlier = histogram.clone();
        (0..10).for_each(|_| histogram.add(Duration::from_secs(9)));
        let span = histogram.since(&earlier);
        assert_eq!(span.count(), 10);
        assert!(near(span.quantile_ms(0.5), 9000.0));
        assert_eq!(Histogram::default().quantile_ms(0.5), None);
        assert_eq!(span.since(&span).quantile_ms(0.5), None);
    }

    #[test]
    fn extremes_have_a_bucket_and_coarse_buckets_lose_nothing() {
        let mut histogram = Histogram::default();
        for duration in [Duration::ZERO, Duration::from_nanos(1), Duration::from_secs(1 << 40)] {
            histogram.add(duration);
        }
        assert_eq!((bucket(Duration::ZERO), bucket(Duration::from_secs(1 << 40))), (0, BUCKETS - 1));
        let coarse = histogram.coarse(4);
        assert_eq!(coarse.iter().map(|(_, count)| count).sum::<u64>(), 3);
        assert!(coarse.is_sorted_by(|a, b| a.0 < b.0));
    }
}

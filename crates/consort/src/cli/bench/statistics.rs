//! Percentiles of measured times.

use std::time::Duration;

use serde::Serialize;

/// Two percentiles and the mean of a set of times, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Times {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) mean: f64,
}

impl Times {
    /// Of at least one time.
    pub(super) fn of(mut times: Vec<Duration>) -> Option<Times> {
        times.sort_unstable();
        let ms = |d: &Duration| d.as_secs_f64() * 1e3;
        // Nearest rank over 0..=n-1, as the usual load generators take it.
        let at = |p: f64| times.get((p * (times.len().checked_sub(1)?) as f64).round() as usize).map(ms);
        Some(Times {
            p50: at(0.5)?,
            p99: at(0.99)?,
            mean: times.iter().map(ms).sum::<f64>() / times.len() as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let times = Times::of((1..=101).rev().map(Duration::from_millis).collect()).unwrap();
        assert_eq!((times.p50, times.p99, times.mean), (51.0, 100.0, 51.0));
        assert_eq!(Times::of(Vec::new()), None);
        assert_eq!(Times::of(vec![Duration::from_millis(3)]).unwrap().p99, 3.0);
    }
}

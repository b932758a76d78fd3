//! Dropout: every value is kept with probability `1 − rate` and scaled by `1 / (1 − rate)`, or becomes 0.
//!
//! Which, is a function of seed, site and the value's index (Philox, a counter-based generator), so backward finds the
//! same values without a mask in memory, on any number of threads: backward is the same call on the gradient.

use consort_base::philox4x32;

use crate::Pool;
use crate::pool::Disjoint;

use super::rows::each_block;

/// Values that one fork hands out at a time.
const CHUNK: usize = 1024;

/// Where dropout happens: different sites of one step draw different numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// The job's seed.
    pub seed: u64,
    /// The micro-batch, counted over the whole job.
    pub step: u64,
    /// The place in the model.
    pub place: u32,
}

/// Drops values of `x` in place. A `rate` of 0 or less keeps all; 1 or more drops all.
pub fn dropout(pool: &Pool, site: Site, rate: f32, x: &mut [f32]) {
    if rate.is_nan() || rate <= 0.0 {
        return;
    }
    if rate >= 1.0 {
        x.fill(0.0);
        return;
    }
    let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
    let scale = 1.0 / (1.0 - rate);
    let key = [site.seed as u32, (site.seed >> 32) as u32];
    let len = x.len();
    let parts = Disjoint::new(x);
    each_block(pool, len.div_ceil(CHUNK), CHUNK, |_, chunks| {
        let (from, to) = (chunks.start * CHUNK, (chunks.end * CHUNK).min(len));
        // SAFETY: blocks don't overlap.
        let x = unsafe { parts.part(from..to) };
        for (group, x) in x.chunks_mut(4).enumerate() {
            // 2³² groups of four are more values than a micro-batch has.
            let index = (from / 4 + group) as u32;
            let words = philox4x32([index, site.place, site.step as u32, (site.step >> 32) as u32], key);
            for (x, word) in x.iter_mut().zip(words) {
                *x = if word < threshold { 0.0 } else { *x * scale };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools};

    #[test]
    fn drops_the_asked_share_the_same_way_on_any_number_of_threads() {
        let site = Site { seed: 7, step: 3, place: 5 };
        let mut first: Option<Vec<u32>> = None;
        for pool in pools() {
            let mut x = vec![1.0; 200_001];
            dropout(&pool, site, 0.25, &mut x);
            let dropped = x.iter().filter(|&&x| x == 0.0).count() as f64 / x.len() as f64;
            assert!((dropped - 0.25).abs() < 0.005, "{dropped}");
            assert!(x.iter().all(|&x| x == 0.0 || x == 1.0 / 0.75));
            assert!(*first.get_or_insert_with(|| bits(&x)) == bits(&x));
            for other in [Site { step: 4, ..site }, Site { place: 6, ..site }, Site { seed: 8, ..site }] {
                let mut y = vec![1.0; x.len()];
                dropout(&pool, other, 0.25, &mut y);
                assert_ne!(x, y);
            }
            let mut kept = vec![3.0; 10];
            dropout(&pool, site, 0.0, &mut kept);
            assert_eq!(kept, [3.0; 10]);
        }
    }
}

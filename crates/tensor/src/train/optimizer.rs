//! Optimizers' updates and the norm of a gradient, each one pass over memory.
//!
//! An update touches every value alone, so how values are shared among threads changes nothing. AdamW reads and
//! writes 28 bytes a parameter, which is what it costs: at 36 GB/s, 0.8 ms a million parameters.

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;

/// Values of a block of [`square_sum`].
const SUM_BLOCK: usize = 4096;
/// Values that one fork hands out at a time.
const GRAIN: usize = 4096;

/// AdamW (Loshchilov and Hutter 2019) for one step, as PyTorch has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The step's learning rate.
    pub learning_rate: f32,
    /// How slowly the mean of gradients moves.
    pub beta1: f32,
    /// How slowly the mean of their squares moves.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Every value loses this share of itself times the learning rate, apart from its gradient.
    pub weight_decay: f32,
    /// The step's number, from 1: the means are corrected for having begun at 0.
    pub step: u64,
    /// Multiplies the gradient first: one over the tokens it is the sum of, and what clipping takes away.
    pub gradient_scale: f32,
}

impl AdamW {
    /// Updates `values` and the two means from `gradient`, all of one length.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn update(
        &self,
        pool: &Pool,
        values: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        mean_square: &mut [f32],
    ) {
        let len = values.len();
        assert!(gradient.len() == len && mean.len() == len && mean_square.len() == len, "one length");
        let step = self.step.max(1) as f64;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step);
        let rates = Rates {
            keep: (1.0 - f64::from(self.learning_rate) * f64::from(self.weight_decay)) as f32,
            rate: -(f64::from(self.learning_rate) / correction(self.beta1)) as f32,
            root: (1.0 / correction(self.beta2).sqrt()) as f32,
            adam: *self,
        };
        let (values, mean, mean_square) =
            (Disjoint::new(values), Disjoint::new(mean), Disjoint::new(mean_square));
        each_range(pool, len, |range| {
            // SAFETY: ranges of different workers don't overlap.
            let (values, mean, mean_square) = unsafe {
                (values.part(range.clone()), mean.part(range.clone()), mean_square.part(range.clone()))
            };
            let gradient = &gradient[range];
            lanes::dispatch(pool.cpu(), Update { rates, values, gradient, mean, mean_square });
        });
    }
}

#[derive(Clone, Copy)]
struct Rates {
    keep: f32,
    rate: f32,
    root: f32,
    adam: AdamW,
}

struct Update<'a> {
    rates: Rates,
    values: &'a mut [f32],
    gradient: &'a [f32],
    mean: &'a mut [f32],
    mean_square: &'a mut [f32],
}

impl Kernel for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Rates { keep, rate, root, adam } = self.rates;
        let s = |x| l.splat(x);
        let means = self.mean.chunks_mut(LANES).zip(self.mean_square.chunks_mut(LANES));
        let rows = self.values.chunks_mut(LANES).zip(self.gradient.chunks(LANES)).zip(means);
        for ((values, gradient), (mean, mean_square)) in rows {
            let n = values.len();
            let g = l.mul(l.load_first(gradient, n), s(adam.gradient_scale));
            let m = l.load_first(mean, n);
            let m = l.fma(l.sub(g, m), s(1.0 - adam.beta1), m);
            let v = l.mul(l.load_first(mean_square, n), s(adam.beta2));
            let v = l.fma(l.mul(g, s(1.0 - adam.beta2)), g, v);
            let root = l.fma(l.sqrt(v), s(root), s(adam.epsilon));
            let kept = l.mul(l.load_first(values, n), s(keep));
            l.store_first(l.fma(l.div(m, root), s(rate), kept), values, n);
            l.store_first(m, mean, n);
            l.store_first(v, mean_square, n);
        }
    }
}

/// Stochastic gradient descent with momentum for one step, as PyTorch has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// The step's learning rate.
    pub learning_rate: f32,
    /// The share of the last velocity that is kept.
    pub momentum: f32,
    /// Looks one step ahead (Nesterov).
    pub nesterov: bool,
    /// Every value loses this share of itself times the learning rate, apart from its gradient.
    pub weight_decay: f32,
    /// Multiplies the gradient first.
    pub gradient_scale: f32,
}

impl Sgd {
    /// Updates `values` and `velocity` from `gradient`, all of one length: `velocity = momentum · velocity + gradient`,
    /// `values −= learning_rate · velocity` (with Nesterov, of `gradient + momentum · velocity`).
    ///
    /// # Panics
    /// If lengths differ.
    pub fn update(&self, pool: &Pool, values: &mut [f32], gradient: &[f32], velocity: &mut [f32]) {
        let len = values.len();
        assert!(gradient.len() == len && velocity.len() == len, "one length");
        let keep = 1.0 - self.learning_rate * self.weight_decay;
        let (values, velocity) = (Disjoint::new(values), Disjoint::new(velocity));
        each_range(pool, len, |range| {
            // SAFETY: ranges of different workers don't overlap.
            let (values, velocity) = unsafe { (values.part(range.clone()), velocity.part(range.clone())) };
            for ((value, velocity), gradient) in values.iter_mut().zip(velocity).zip(&gradient[range]) {
                let gradient = gradient * self.gradient_scale;
                *velocity = self.momentum * *velocity + gradient;
                let step = if self.nesterov { gradient + self.momentum * *velocity } else { *velocity };
                *value = keep * *value - self.learning_rate * step;
            }
        });
    }
}

/// `Σ x²` in `f64`: blocks of a fixed length in `f32` lanes, added in order.
pub fn square_sum(pool: &Pool, x: &[f32]) -> f64 {
    let mut sums = vec![0.0f64; x.len().div_ceil(SUM_BLOCK)];
    let count = sums.len();
    let parts = Disjoint::new(&mut sums);
    pool.run(|worker| {
        let blocks = worker.split(count, 1);
        // SAFETY: ranges of different workers don't overlap.
        let sums = unsafe { parts.part(blocks.clone()) };
        for (block, sum) in blocks.zip(sums) {
            let x = &x[block * SUM_BLOCK..x.len().min((block + 1) * SUM_BLOCK)];
            *sum = f64::from(lanes::dispatch(pool.cpu(), SquareSum(x)));
        }
    });
    sums.iter().sum()
}

struct SquareSum<'a>(&'a [f32]);

impl Kernel for SquareSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) -> f32 {
        let mut sum = l.splat(0.0);
        for x in self.0.chunks(LANES) {
            let x = l.load_first(x, x.len());
            sum = l.fma(x, x, sum);
        }
        l.sum(sum)
    }
}

fn each_range(pool: &Pool, len: usize, work: impl Fn(std::ops::Range<usize>) + Sync) {
    if len <= GRAIN {
        return work(0..len);
    }
    pool.run(|worker| work(worker.split(len, GRAIN)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    #[test]
    fn adamw_is_its_definition_and_the_same_bits_everywhere() {
        let len = 10_007;
        let mut first: Option<Vec<u32>> = None;
        for pool in pools() {
            let mut values = uniform(1, len);
            let (mut mean, mut square) = (vec![0.0; len], vec![0.0; len]);
            let mut want: Vec<[f64; 3]> = values.iter().map(|&x| [f64::from(x), 0.0, 0.0]).collect();
            for step in 1..=5 {
                let gradient = uniform(1 + step, len);
                let adam = AdamW {
                    learning_rate: 0.01,
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    step,
                    gradient_scale: 0.5,
                };
                adam.update(&pool, &mut values, &gradient, &mut mean, &mut square);
                for ([x, m, v], g) in want.iter_mut().zip(&gradient) {
                    let g = 0.5 * f64::from(*g);
                    *x *= 1.0 - 0.01 * 0.1;
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.95 * *v + 0.05 * g * g;
                    let (bias1, bias2) = (1.0 - 0.9f64.powf(step as f64), 1.0 - 0.95f64.powf(step as f64));
                    *x -= 0.01 / bias1 * *m / ((*v / bias2).sqrt() + 1e-8);
                }
            }
            for (got, [want, ..]) in values.iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
            }
            assert!(*first.get_or_insert_with(|| bits(&values)) == bits(&values));
        }
    }

    #[test]
    fn sgd_is_its_definition() {
        let pool = Pool::new(2, crate::Cpu::detect());
        for nesterov in [false, true] {
            let sgd =
                Sgd { learning_rate: 0.1, momentum: 0.5, nesterov, weight_decay: 0.2, gradient_scale: 2.0 };
            let (mut values, mut velocity) = (vec![1.0; 9000], vec![2.0; 9000]);
            sgd.update(&pool, &mut values, &vec![0.25; 9000], &mut velocity);
            let step = if nesterov { 0.5 + 0.5 * 1.5 } else { 1.5 };
            assert!(velocity.iter().all(|&v| v == 1.5));
            assert!(values.iter().all(|&x| (x - (0.98 - 0.1 * step)).abs() < 1e-6));
        }
    }

    #[test]
    fn a_square_sum_has_one_order() {
        let x = uniform(1, 50_001);
        let want: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let mut first = None;
        for pool in pools() {
            let got = square_sum(&pool, &x);
            assert!((got / want - 1.0).abs() < 1e-6);
            assert_eq!(*first.get_or_insert(got.to_bits()), got.to_bits());
        }
    }
}

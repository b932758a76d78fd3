//! Sums that don't depend on their order: floats on a grid of integers.
//!
//! A gradient is added up over micro-batches, by whichever workers computed them and along whichever way they tell each
//! other. Floating-point sums differ with the order; integer sums don't. So each micro-batch's values are rounded to
//! multiples of 2^-k, once, and added as 64-bit integers: the same total for any number of workers, any topology, any
//! time of arrival.
//!
//! A [`Grid`] is chosen for a bucket from the largest value seen in it, which lands near 2^46: what is 2^-46 of
//! the largest is still counted, where an `f32` sum forgets below 2^-24. A value may be [`GROWTH`] times larger than
//! expected; past that it doesn't fit, and the step is done again on the grid that its own largest value asks for. The
//! largest value is itself a maximum over all workers, so all of them choose alike. [`MAX_TERMS`] terms can't overflow.
//!
//! Reproducible summation by pre-rounding: Demmel and Nguyen, "Fast reproducible floating-point summation" (ARITH 2013);
//! here with one level and integers. Cost: [`Grid::add`] reads 12 bytes a value and writes 8.

use crate::Pool;
use crate::lanes::{self, Kernel, Lanes};
use crate::pool::Disjoint;

/// The power of two that the largest expected value is brought near.
const TARGET: i32 = 46;
/// Values below 2^51 are rounded to integers by adding [`MAGIC`].
const LIMIT: f64 = (1u64 << 51) as f64;
/// A double of this size has its last bit at 1.
const MAGIC: f64 = (3u64 << 51) as f64;
/// How much larger than expected a value may be.
pub const GROWTH: f64 = (1u32 << (51 - TARGET - 1)) as f64;
/// Where the largest value is below this on the grid, the grid was made for values far larger: less than 30 bits of it
/// are kept, and the step is done again on a finer one.
const COARSE: f64 = (1u64 << 30) as f64;
/// Terms of a sum that can't overflow.
pub const MAX_TERMS: usize = 1 << 12;
/// Values that one fork hands out at a time.
const GRAIN: usize = 4096;

/// Multiples of 2^-k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    k: i32,
}

impl Grid {
    /// The grid for values up to `largest` in magnitude. Anything that is no positive number gives the grid for 1.
    pub fn for_largest(largest: f32) -> Grid {
        let largest = if largest.is_finite() && largest > 0.0 { f64::from(largest) } else { 1.0 };
        // Of a double, the exponent is there to be read; an f32's smallest is well inside its range.
        let exponent = ((largest.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        Grid { k: TARGET - 1 - exponent }
    }

    /// The exponent, to keep in a checkpoint.
    pub fn exponent(self) -> i32 {
        self.k
    }

    /// The grid of a checkpoint.
    pub fn from_exponent(k: i32) -> Grid {
        // Beyond these no f32 asks for it, and 2^k stays a normal double.
        Grid { k: k.clamp(-128, 256) }
    }

    /// Whether values up to `largest` fit. NaN and infinities don't.
    pub fn fits(self, largest: f32) -> bool {
        f64::from(largest) * self.scale() < LIMIT
    }

    /// Whether values up to `largest` fit and the grid is fine enough for them; nothing is too small for a grid if there is
    /// nothing.
    pub fn suits(self, largest: f32) -> bool {
        self.fits(largest) && (largest == 0.0 || f64::from(largest) * self.scale() >= COARSE)
    }

    fn scale(self) -> f64 {
        power_of_two(self.k)
    }

    /// As [`Grid::add`] to sums of 0, whatever they are now: the first term costs no pass of its own.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn set(self, pool: &Pool, values: &[f32], sums: &mut [i64]) -> f32 {
        self.accumulate::<true>(pool, values, sums)
    }

    /// Adds `values` to `sums` and returns the largest magnitude among them; infinite or NaN where one is. Where the
    /// largest doesn't fit ([`Grid::fits`]) the sums are of no use.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn add(self, pool: &Pool, values: &[f32], sums: &mut [i64]) -> f32 {
        self.accumulate::<false>(pool, values, sums)
    }

    fn accumulate<const FIRST: bool>(self, pool: &Pool, values: &[f32], sums: &mut [i64]) -> f32 {
        assert_eq!(values.len(), sums.len(), "a sum a value");
        let scale = self.scale();
        let len = values.len();
        let sums = Disjoint::new(sums);
        let largest = std::sync::atomic::AtomicU32::new(0);
        let work = |range: std::ops::Range<usize>| {
            // SAFETY: ranges of different workers don't overlap.
            let sums = unsafe { sums.part(range.clone()) };
            let own = lanes::dispatch(pool.cpu(), Add::<FIRST> { scale, values: &values[range], sums });
            largest.fetch_max(own, std::sync::atomic::Ordering::Relaxed);
        };
        if len <= GRAIN {
            work(0..len);
        } else {
            pool.run(|worker| work(worker.split(len, GRAIN)));
        }
        f32::from_bits(largest.into_inner())
    }

    /// The sums as floats, each rounded once (to a double where it has more than 53 bits, then to nearest even).
    ///
    /// # Panics
    /// If lengths differ.
    pub fn read(self, pool: &Pool, sums: &[i64], values: &mut [f32]) {
        assert_eq!(values.len(), sums.len(), "a value a sum");
        let scale = power_of_two(-self.k);
        let len = values.len();
        let values = Disjoint::new(values);
        let work = |range: std::ops::Range<usize>| {
            // SAFETY: ranges of different workers don't overlap.
            let values = unsafe { values.part(range.clone()) };
            lanes::dispatch(pool.cpu(), Read { scale, sums: &sums[range], values });
        };
        if len <= GRAIN {
            work(0..len);
        } else {
            pool.run(|worker| work(worker.split(len, GRAIN)));
        }
    }
}

/// Adds `from` to `into`, both sums on one grid.
///
/// # Panics
/// If lengths differ.
pub fn add_sums(pool: &Pool, from: &[i64], into: &mut [i64]) {
    assert_eq!(from.len(), into.len(), "sums of one length");
    each(pool, into, |start, part| {
        let from = &from[start..start + part.len()];
        part.iter_mut().zip(from).for_each(|(into, from)| *into = into.wrapping_add(*from));
    });
}

/// Makes sums 0.
pub fn clear_sums(pool: &Pool, sums: &mut [i64]) {
    each(pool, sums, |_, part| part.fill(0));
}

/// Hands parts of `sums`, with where they begin, to the pool's threads.
fn each(pool: &Pool, sums: &mut [i64], work: impl Fn(usize, &mut [i64]) + Sync) {
    let len = sums.len();
    if len <= GRAIN {
        return work(0, sums);
    }
    let sums = Disjoint::new(sums);
    pool.run(|worker| {
        let range = worker.split(len, GRAIN);
        // SAFETY: ranges of different workers don't overlap.
        work(range.start, unsafe { sums.part(range) });
    });
}

/// 2^k for a k of a normal double.
fn power_of_two(k: i32) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

struct Add<'a, const FIRST: bool> {
    scale: f64,
    values: &'a [f32],
    sums: &'a mut [i64],
}

impl<const FIRST: bool> Kernel for Add<'_, FIRST> {
    type Output = u32;

    /// Plain arithmetic, which the compiler turns into each family's vectors; the bits are the same by definition.
    #[inline(always)]
    fn call<L: Lanes>(self, _: L) -> u32 {
        let mut largest = 0;
        for (value, sum) in self.values.iter().zip(self.sums) {
            // Magnitudes as integers order as floats do, and NaN comes last.
            largest = largest.max(value.to_bits() & (u32::MAX >> 1));
            // The product is exact; adding the constant rounds it to an integer, ties to even, in the last bits.
            let rounded = f64::from(*value) * self.scale + MAGIC;
            let term = rounded.to_bits().wrapping_sub(MAGIC.to_bits()) as i64;
            *sum = if FIRST { term } else { sum.wrapping_add(term) };
        }
        largest
    }
}

struct Read<'a> {
    scale: f64,
    sums: &'a [i64],
    values: &'a mut [f32],
}

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, _: L) {
        for (value, sum) in self.values.iter_mut().zip(self.sums) {
            *value = (*sum as f64 * self.scale) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    /// Gradients of very different sizes.
    fn terms(count: u64, len: usize) -> Vec<Vec<f32>> {
        (0..count)
            .map(|i| {
                let x = uniform(i + 1, len);
                x.iter().enumerate().map(|(j, x)| x * 10f32.powi((j % 9) as i32 - 6)).collect()
            })
            .collect()
    }

    fn largest(terms: &[Vec<f32>]) -> f32 {
        terms.iter().flatten().fold(0.0, |a: f32, x| a.max(x.abs()))
    }

    #[test]
    fn any_order_and_any_cut_gives_the_same_sum() {
        let terms = terms(13, 10_007);
        let grid = Grid::for_largest(largest(&terms));
        let mut first: Option<Vec<i64>> = None;
        for pool in pools() {
            for workers in [1, 2, 3, 7, 13] {
                // Each worker adds its own, from the last to the first; then the workers' sums are added.
                let mut total = vec![0i64; 10_007];
                for worker in (0..workers).rev() {
                    let mut own = vec![0i64; 10_007];
                    let mut most = 0f32;
                    for (i, term) in terms.iter().skip(worker).step_by(workers).rev().enumerate() {
                        // Half of the runs begin with a term instead of zeros.
                        let first = i == 0 && workers % 2 == 0;
                        most = most.max(if first {
                            own.fill(77);
                            grid.set(&pool, term, &mut own)
                        } else {
                            grid.add(&pool, term, &mut own)
                        });
                    }
                    assert!(grid.fits(most));
                    total.iter_mut().zip(&own).for_each(|(a, b)| *a += b);
                }
                assert!(*first.get_or_insert_with(|| total.clone()) == total, "{workers} workers");
            }
            let total = first.as_ref().unwrap();
            let mut sums = vec![0.0; 10_007];
            grid.read(&pool, total, &mut sums);
            for (i, sum) in sums.iter().enumerate() {
                let want: f64 = terms.iter().map(|term| f64::from(term[i])).sum();
                let error = (f64::from(*sum) - want).abs();
                // Half a unit of the grid a term, and the result's own rounding.
                let unit = power_of_two(-grid.exponent());
                assert!(error <= 13.0 * unit + want.abs() * 1e-7, "{i}: {sum} for {want}");
            }
        }
    }

    #[test]
    fn the_grid_is_fine_enough_and_has_room() {
        for largest in [1e-38f32, 1e-20, 3e-7, 0.5, 1.0, 1.5, 1e4, 3e38] {
            let grid = Grid::for_largest(largest);
            let scaled = f64::from(largest) * grid.scale();
            assert!((power_of_two(TARGET - 1)..power_of_two(TARGET)).contains(&scaled), "{largest}");
            assert!(grid.fits(largest));
            let more = f64::from(largest) * GROWTH;
            assert!(more > f64::from(f32::MAX) || grid.fits(more as f32));
            assert!(more * 4.0 > f64::from(f32::MAX) || !grid.fits((more * 4.0) as f32));
            assert_eq!(Grid::from_exponent(grid.exponent()), grid);
        }
        let grid = Grid::for_largest(1.0);
        assert!(grid.suits(0.0) && grid.suits(1e-4) && grid.suits(10.0));
        assert!(!grid.suits(1e-5) && !grid.suits(100.0) && !grid.suits(f32::NAN));
        assert!(!grid.fits(f32::NAN) && !grid.fits(f32::INFINITY));
        for odd in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(Grid::for_largest(odd), Grid::for_largest(1.0));
        }
        assert!(GROWTH * power_of_two(TARGET) <= LIMIT && LIMIT * MAX_TERMS as f64 <= power_of_two(63));
    }

    #[test]
    fn what_is_no_number_is_seen() {
        for pool in pools() {
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
                let mut values = uniform(1, 9001);
                values[8999] = odd;
                let most = Grid::for_largest(1.0).add(&pool, &values, &mut vec![0; 9001]);
                assert!(!most.is_finite(), "{odd} gives {most}");
            }
        }
    }

    #[test]
    fn sums_add_up_and_clear_on_any_threads() {
        for pool in pools() {
            let from: Vec<i64> = (0..9001).collect();
            let mut into: Vec<i64> = (0..9001).map(|i| i * i).collect();
            add_sums(&pool, &from, &mut into);
            assert!(into.iter().enumerate().all(|(i, &sum)| sum == (i * i + i) as i64));
            clear_sums(&pool, &mut into);
            assert!(into.iter().all(|&sum| sum == 0));
        }
    }

    #[test]
    fn values_on_the_grid_come_back_as_they_were() {
        let pool = Pool::new(2, crate::Cpu::detect());
        let values: Vec<f32> = uniform(3, 5000).iter().map(|x| (x * 1000.0).round() / 8.0).collect();
        let grid = Grid::for_largest(125.0);
        let mut sums = vec![0; 5000];
        grid.add(&pool, &values, &mut sums);
        let mut back = vec![0.0; 5000];
        grid.read(&pool, &sums, &mut back);
        // Zeros have no sign on the grid.
        let plain: Vec<f32> = values.iter().map(|x| x + 0.0).collect();
        assert!(bits(&back) == bits(&plain));
    }
}

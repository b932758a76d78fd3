//! What this machine can do at most, measured: what a benchmark's shares are shares of.
//!
//! A peak is how fast the multiply-add that a family's products are made of runs from registers alone; memory, packing
//! and the edges of tiles come on top, so no product passes it. It is measured and not read from a table because clocks
//! move with the instructions, the heat and the neighbours. Both figures are those of the best of many short rounds:
//! what a neighbour takes isn't the machine's limit. Each takes an eighth of a second.

use std::hint::black_box;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::train::Precision;
use crate::train::matmul::{Bf16, F32, Multiply};
use crate::{Error, Pool};

/// Time for all rounds of a measurement.
const TIME: Duration = Duration::from_millis(125);
/// A round is at least so long: far longer than a fork and join.
const ROUND: Duration = Duration::from_micros(500);
/// Words that [`read_bandwidth`] reads: 256 MiB, more than any cache.
const WORDS: usize = 32 << 20;

/// Floating-point operations a second that all threads of `pool` together finish from registers, with inputs as
/// `precision` rounds them; a multiply-add is two.
pub fn peak(pool: &Pool, precision: Precision) -> f64 {
    match precision {
        Precision::F32 => peak_of::<F32>(pool),
        Precision::Bf16 => peak_of::<Bf16>(pool),
    }
}

fn peak_of<M: Multiply>(pool: &Pool) -> f64 {
    let run = |rounds: usize| {
        let begun = Instant::now();
        pool.run(|_| lanes::dispatch(pool.cpu(), Registers::<M>(rounds, PhantomData)));
        begun.elapsed()
    };
    let mut rounds = 64;
    // Wherever a multiply-add is a call of a library, it is a thousand times slower than where it is an instruction.
    while run(rounds) < ROUND && rounds < 1 << 30 {
        rounds *= 2;
    }
    let best = best(|| run(rounds));
    let operations = 2 * M::VALUES * LANES * CHAINS * rounds * pool.threads();
    operations as f64 / best.as_secs_f64()
}

/// Bytes a second that all threads of `pool` together read from memory.
///
/// # Errors
/// [`Error::OutOfMemory`] where 256 MiB are refused.
pub fn read_bandwidth(pool: &Pool) -> Result<f64, Error> {
    let mut memory: Buffer<u64> = Buffer::zeroed(WORDS)?;
    // Pages that nobody has written are all the same page.
    memory.fill(1);
    let best = best(|| {
        let begun = Instant::now();
        pool.run(|worker| {
            let share = &memory[worker.split(memory.len(), 64)];
            // Several streams a thread, as adding up from one alone leaves bandwidth unused.
            let quarter = share.len() / 4 / 8 * 8;
            let mut sums = [0u64; 32];
            for at in (0..quarter).step_by(8) {
                for stream in 0..4 {
                    let words = &share[stream * quarter + at..][..8];
                    for (sum, x) in sums[stream * 8..][..8].iter_mut().zip(words) {
                        *sum = sum.wrapping_add(*x);
                    }
                }
            }
            black_box(sums);
        });
        begun.elapsed()
    });
    Ok((memory.len() * size_of::<u64>()) as f64 / best.as_secs_f64())
}

/// The shortest of at least five rounds.
fn best(mut round: impl FnMut() -> Duration) -> Duration {
    let (begun, mut best, mut rounds) = (Instant::now(), Duration::MAX, 0);
    while rounds < 5 || begun.elapsed() < TIME {
        best = best.min(round());
        rounds += 1;
    }
    best.max(Duration::from_nanos(1))
}

/// Sums that don't wait for each other: as many in every family, so that the count of operations is one.
const CHAINS: usize = 12;

/// `self.0` times a multiply-add on each of [`CHAINS`] sums.
struct Registers<M>(usize, PhantomData<M>);

impl<M: Multiply> Kernel for Registers<M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        // Where a vector is two registers of sixteen, twelve sums don't fit at a time; six are enough to hide an
        // instruction's latency.
        if L::WIDE {
            chains::<L, M, CHAINS>(l, self.0);
        } else {
            chains::<L, M, { CHAINS / 2 }>(l, 2 * self.0);
        }
    }
}

#[inline(always)]
fn chains<L: Lanes, M: Multiply, const N: usize>(l: L, rounds: usize) {
    // Small numbers, as one f32 and as a pair of bf16: sums stay far from infinity and from what takes longer.
    let word = black_box(0x3A80_3A80);
    let (a, b) = (M::splat(l, word), M::splat(l, word));
    let mut sums = [l.splat(0.0); N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = M::multiply_add(l, a, b, *sum);
        }
    }
    for sum in sums {
        black_box(l.array(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    #[test]
    fn limits_are_those_of_a_machine() {
        for family in Cpu::available() {
            let pool = Pool::new(1, Cpu::force(family).unwrap());
            for precision in [Precision::F32, Precision::Bf16] {
                let peak = peak(&pool, precision);
                // From a library's call a lane to more than any core has.
                assert!(peak > 1e6 && peak < 1e13, "{family:?} {precision:?}: {peak}");
            }
        }
        let bandwidth = read_bandwidth(&Pool::new(2, Cpu::detect())).unwrap();
        assert!(bandwidth > 1e7 && bandwidth < 1e13, "{bandwidth}");
    }
}

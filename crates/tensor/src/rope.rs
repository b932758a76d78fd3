//! Rotary position embedding (Su et al. 2021), in the half-split ("NeoX") layout.
//!
//! Weights whose file interleaves the pairs (GGUF's `llama` and `mistral`) are permuted when they are loaded,
//! so that one layout runs.
//!
//! Cosines and sines come from a table made in `f64`, because an `f32` angle of position 8,000 is off by 5·10⁻⁴.
//! The table doubles when a position passes its end (10 ms for 8,192 positions of 32 pairs).

use std::sync::{Arc, PoisonError, RwLock};

use crate::Pool;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::norm::each_row;

/// Positions up to here are kept in the table; later ones are computed where they are used, so that no position,
/// however large, sizes an allocation.
const TABLE_POSITIONS: usize = 1 << 17;

/// Cosines and sines for positions `0..len`, computed in `f64` once, grown on demand.
pub struct Rope {
    inverse_frequencies: Vec<f64>,
    magnitude: f64,
    /// A row a position: first the cosines of every pair, then the sines.
    table: RwLock<Arc<[f32]>>,
}

impl Rope {
    /// `inverse_frequencies` has one value a pair (`rotary_dim / 2`); `magnitude` scales both tables (YaRN, else 1).
    pub fn new(inverse_frequencies: Vec<f64>, magnitude: f64) -> Rope {
        Rope { inverse_frequencies, magnitude, table: RwLock::new(Arc::from([])) }
    }

    /// Rotates every head of every row of `x` (`positions.len()` rows of `heads * head_dim` values) in place: of
    /// each head the first `rotary_dim` values, paired half with half; the others stay.
    ///
    /// # Panics
    /// If `x` has another length or a head is shorter than `rotary_dim`.
    pub fn apply(&self, pool: &Pool, x: &mut [f32], heads: usize, head_dim: usize, positions: &[u32]) {
        self.turn(pool, x, (heads * head_dim, heads, head_dim), positions, false);
    }

    /// As [`Rope::apply`], for rows that begin every `stride` values with the heads to rotate.
    ///
    /// # Panics
    /// If `x` is not one row a position, or the heads are longer than a row.
    pub fn apply_rows(
        &self,
        pool: &Pool,
        x: &mut [f32],
        (stride, heads, head_dim): (usize, usize, usize),
        positions: &[u32],
    ) {
        self.turn(pool, x, (stride, heads, head_dim), positions, false);
    }

    /// The gradient of what went into [`Rope::apply_rows`] from that of what came out, in place: the rotation back.
    ///
    /// # Panics
    /// As [`Rope::apply_rows`].
    pub fn apply_rows_backward(
        &self,
        pool: &Pool,
        x: &mut [f32],
        (stride, heads, head_dim): (usize, usize, usize),
        positions: &[u32],
    ) {
        self.turn(pool, x, (stride, heads, head_dim), positions, true);
    }

    fn turn(
        &self,
        pool: &Pool,
        x: &mut [f32],
        (stride, heads, head_dim): (usize, usize, usize),
        positions: &[u32],
        back: bool,
    ) {
        let pairs = self.inverse_frequencies.len();
        assert_eq!(x.len(), positions.len() * stride, "one position a row");
        assert!(heads * head_dim <= stride, "{heads} heads of {head_dim} don't fit a row of {stride}");
        assert!(2 * pairs <= head_dim, "{pairs} pairs don't fit a head of {head_dim}");
        if pairs == 0 || x.is_empty() {
            return;
        }
        let table = self.table_for(positions);
        each_row(pool, x, stride, |rows, x| {
            let mut computed = Vec::new();
            for (row, &position) in x.chunks_exact_mut(stride).zip(&positions[rows]) {
                let row = &mut row[..heads * head_dim];
                let start = position as usize * 2 * pairs;
                let angles = table.get(start..start + 2 * pairs).unwrap_or_else(|| {
                    computed.resize(2 * pairs, 0.0);
                    self.angles(position as usize, &mut computed);
                    &computed
                });
                lanes::dispatch(pool.cpu(), Rotate { row, head_dim, angles, back });
            }
        });
    }

    fn table_for(&self, positions: &[u32]) -> Arc<[f32]> {
        let row = 2 * self.inverse_frequencies.len();
        let needed = positions.iter().copied().max().map_or(0, |p| p as usize + 1).min(TABLE_POSITIONS);
        let table = Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner));
        if needed * row <= table.len() {
            return table;
        }
        let mut shared = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let have = shared.len() / row;
        if needed > have {
            let mut grown = vec![0.0; needed.next_power_of_two().max(256) * row];
            grown[..shared.len()].copy_from_slice(&shared);
            for (position, out) in grown.chunks_exact_mut(row).enumerate().skip(have) {
                self.angles(position, out);
            }
            *shared = Arc::from(grown);
        }
        Arc::clone(&shared)
    }

    fn angles(&self, position: usize, out: &mut [f32]) {
        let (cosines, sines) = out.split_at_mut(self.inverse_frequencies.len());
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.inverse_frequencies) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (*cosine, *sine) = ((cos * self.magnitude) as f32, (sin * self.magnitude) as f32);
        }
    }
}

/// All heads of one row.
struct Rotate<'a> {
    row: &'a mut [f32],
    head_dim: usize,
    angles: &'a [f32],
    /// By the negative angle.
    back: bool,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let pairs = self.angles.len() / 2;
        let (cosines, sines) = self.angles.split_at(pairs);
        for head in self.row.chunks_exact_mut(self.head_dim) {
            let (first, second) = head[..2 * pairs].split_at_mut(pairs);
            let angles = cosines.chunks(LANES).zip(sines.chunks(LANES));
            for ((a, b), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(angles) {
                let n = a.len();
                let (x, y) = (l.load_first(a, n), l.load_first(b, n));
                let (cos, sin) = (l.load_first(cos, n), l.load_first(sin, n));
                let sin = if self.back { l.sub(l.splat(0.0), sin) } else { sin };
                l.store_first(l.sub(l.mul(x, cos), l.mul(y, sin)), a, n);
                l.store_first(l.fma(y, cos, l.mul(x, sin)), b, n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{bits, pools, uniform};

    fn frequencies(pairs: usize) -> Vec<f64> {
        (0..pairs).map(|i| 10_000f64.powf(-(i as f64) / pairs as f64)).collect()
    }

    #[test]
    fn rotates_pairs_by_the_angle_of_their_position() {
        for (head_dim, pairs) in [(64, 32), (80, 16), (6, 3), (32, 0)] {
            let rope = Rope::new(frequencies(pairs), 1.5);
            let positions = [0u32, 1, 4000, 200_000];
            let x = uniform(1, positions.len() * 2 * head_dim);
            let mut out = x.clone();
            let pool = Pool::new(1, crate::Cpu::detect());
            rope.apply(&pool, &mut out, 2, head_dim, &positions);
            for (i, (x, out)) in x.chunks(head_dim).zip(out.chunks(head_dim)).enumerate() {
                for p in 0..pairs {
                    let (sin, cos) = (f64::from(positions[i / 2]) * frequencies(pairs)[p]).sin_cos();
                    let (a, b) = (f64::from(x[p]), f64::from(x[p + pairs]));
                    assert!((f64::from(out[p]) - 1.5 * (a * cos - b * sin)).abs() < 1e-6);
                    assert!((f64::from(out[p + pairs]) - 1.5 * (b * cos + a * sin)).abs() < 1e-6);
                }
                assert_eq!(x[2 * pairs..], out[2 * pairs..]);
            }
        }
    }

    #[test]
    fn the_same_bits_from_every_family_thread_count_and_history() {
        let positions: Vec<u32> = (0..300).map(|i| i * 7 % 900).collect();
        let x = uniform(1, positions.len() * 3 * 64);
        let mut expected: Option<Vec<u32>> = None;
        for pool in pools() {
            let rope = Rope::new(frequencies(32), 1.0);
            let mut out = x.clone();
            rope.apply(&pool, &mut out, 3, 64, &positions);
            let mut alone = x[..3 * 64].to_vec();
            let fresh = Rope::new(frequencies(32), 1.0);
            fresh.apply(&pool, &mut alone, 3, 64, &positions[..1]);
            assert_eq!(bits(&alone), bits(&out[..3 * 64]));
            assert!(*expected.get_or_insert_with(|| bits(&out)) == bits(&out));
        }
    }
}

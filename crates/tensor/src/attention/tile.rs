//! The inner loops of attention: a few query rows against a few blocks of keys, in registers.
//!
//! Both products have the same form: R rows times V vectors of sixteen lanes, accumulated over a third index
//! (dimensions for scores, keys for the output), with one broadcast value a row and one vector a column. With
//! R = 6 and V = 4 that is 24 multiply-adds for 10 loads, which keeps AVX-512's multiplier busy. The tile's shape
//! decides only which elements are computed together, never an element's own chain, so it is free to choose.

// Rows and vectors are indices of several arrays at once. And closures, as in `array::from_fn`, would not have the
// family's instructions: only what is inlined into the family's entry has.
#![allow(clippy::needless_range_loop)]

use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::kv::BLOCK_TOKENS;
use crate::lanes::{LANES, Lanes};

use super::SOFTMAX_KEYS;

/// Pages of the cache in one softmax block.
pub(super) const PAGES: usize = SOFTMAX_KEYS / BLOCK_TOKENS;

/// A number that keys and values are read as.
pub(super) trait Stored: Copy {
    /// Sixteen values.
    ///
    /// # Safety
    /// [`LANES`] values can be read at `x`.
    unsafe fn vector<L: Lanes>(l: L, x: *const Self) -> L::V;

    fn wide<L: Lanes>(l: L, x: &[Self]) -> L::V;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn vector<L: Lanes>(l: L, x: *const f32) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { l.load_at(x) }
    }

    #[inline(always)]
    fn wide<L: Lanes>(l: L, x: &[f32]) -> L::V {
        l.load_first(x, x.len())
    }
}

impl Stored for u16 {
    #[inline(always)]
    unsafe fn vector<L: Lanes>(l: L, x: *const u16) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { l.load_half_at(x) }
    }

    #[inline(always)]
    fn wide<L: Lanes>(l: L, x: &[u16]) -> L::V {
        let mut full = [0; LANES];
        full[..x.len()].copy_from_slice(x);
        l.load_half(&full)
    }
}

/// Half precision to `f32`, exactly. `halves` is a multiple of [`LANES`] long, as pages are.
#[inline(always)]
pub(super) fn expand<L: Lanes>(l: L, halves: &[u16], out: &mut [f32]) {
    for (out, halves) in out.chunks_exact_mut(LANES).zip(halves.chunks_exact(LANES)) {
        l.store(l.load_half(halves), out);
    }
}

/// Query rows that walk the same keys, and what they have summed so far.
pub(super) struct Group<'a> {
    count: usize,
    head_dim: usize,
    /// `q` times what turns a score into a power of two, `head_dim` a row.
    q: &'a mut [f32],
    /// `Σ p · value` under the current maximum, `head_dim` rounded up to whole vectors a row.
    sums: &'a mut [f32],
    /// `Σ p` by lane.
    totals: &'a mut [f32],
    /// The largest score so far.
    largest: &'a mut [f32],
}

impl<'a> Group<'a> {
    /// Values of scratch memory that `count` rows need.
    pub(super) fn scratch(count: usize, head_dim: usize) -> usize {
        count * (head_dim + head_dim.next_multiple_of(LANES) + LANES + 1)
    }

    pub(super) fn new(scratch: &'a mut [f32], count: usize, head_dim: usize) -> Group<'a> {
        let (q, rest) = scratch.split_at_mut(count * head_dim);
        let (sums, rest) = rest.split_at_mut(count * head_dim.next_multiple_of(LANES));
        let (totals, largest) = rest.split_at_mut(count * LANES);
        sums.fill(0.0);
        totals.fill(0.0);
        largest.fill(f32::MIN);
        Group { count, head_dim, q, sums, totals, largest }
    }

    /// Row `i`'s query. With a cap, which comes between, the scores turn into powers of two only after it.
    pub(super) fn start(&mut self, i: usize, q: &[f32], scale: f32, softcap: Option<f32>) {
        let scale = if softcap.is_some() { scale } else { scale * LOG2_E };
        for (to, q) in self.q[i * self.head_dim..(i + 1) * self.head_dim].iter_mut().zip(q) {
            *to = q * scale;
        }
    }

    /// Takes in up to N blocks: `pages` are keys and values of their pages; row `i` sees the keys `sees(i)` of them,
    /// and no row fewer than the row before it in `end`.
    #[inline(always)]
    pub(super) fn blocks<L: Lanes, S: Stored, const N: usize>(
        &mut self,
        l: L,
        pages: &[(&[S], &[S])],
        softcap: Option<f32>,
        sees: impl Fn(usize) -> (usize, usize),
    ) {
        assert!(pages.len() <= N * PAGES);
        for (keys, values) in pages {
            assert!(keys.len() == self.head_dim * BLOCK_TOKENS && values.len() == keys.len());
        }
        let mut i = 0;
        while i < self.count {
            let left = self.count - i;
            if L::WIDE && left >= 6 {
                self.tile::<L, S, 6, N>(l, i, pages, softcap, &sees);
                i += 6;
            } else if L::WIDE && left >= 3 {
                self.tile::<L, S, 3, N>(l, i, pages, softcap, &sees);
                i += 3;
            } else if left >= 2 {
                self.tile::<L, S, 2, N>(l, i, pages, softcap, &sees);
                i += 2;
            } else {
                self.tile::<L, S, 1, N>(l, i, pages, softcap, &sees);
                i += 1;
            }
        }
    }

    /// Rows `first..first + R`: all scores, then the softmax block by block, then all values, so that the three do
    /// not wait for each other in every block.
    #[inline(always)]
    fn tile<L: Lanes, S: Stored, const R: usize, const N: usize>(
        &mut self,
        l: L,
        first: usize,
        pages: &[(&[S], &[S])],
        softcap: Option<f32>,
        sees: &impl Fn(usize) -> (usize, usize),
    ) {
        let seen: [(usize, usize); R] = std::array::from_fn(|r| sees(first + r));
        let end = seen[R - 1].1;
        let begin = seen.iter().map(|s| s.0).min().unwrap_or(0);
        if begin >= end {
            return;
        }
        // A key that gets no score is out of sight of all R rows.
        let mut scores = [[[f32::NEG_INFINITY; SOFTMAX_KEYS]; N]; R];
        let q = &self.q[first * self.head_dim..(first + R) * self.head_dim];
        let (mut page, last_page) = (begin / BLOCK_TOKENS, end.div_ceil(BLOCK_TOKENS));
        while page < last_page {
            let left = last_page - page;
            if L::WIDE && left >= 4 {
                score::<L, S, R, 4, N>(l, q, pages, page, &mut scores);
                page += 4;
            } else if left >= 2 {
                score::<L, S, R, 2, N>(l, q, pages, page, &mut scores);
                page += 2;
            } else {
                score::<L, S, R, 1, N>(l, q, pages, page, &mut scores);
                page += 1;
            }
        }
        let mut shrink = [[1.0; LANES]; N];
        for block in begin / SOFTMAX_KEYS..end.div_ceil(SOFTMAX_KEYS) {
            let start = block * SOFTMAX_KEYS;
            let within = |at: usize| at.saturating_sub(start).min(SOFTMAX_KEYS);
            let seen = seen.map(|(first, end)| (within(first), within(end)));
            let totals = &mut self.totals[first * LANES..(first + R) * LANES];
            let largest = &mut self.largest[first..first + R];
            shrink[block] = softmax(l, &mut scores, block, &seen, softcap, largest, totals);
        }
        let padded = self.head_dim.next_multiple_of(LANES);
        let sums = &mut self.sums[first * padded..(first + R) * padded];
        let weights = Weights { p: &scores, shrink: &shrink, keys: begin..end, head_dim: self.head_dim };
        let mut vector = 0;
        let whole = self.head_dim / LANES;
        while vector < whole {
            let left = whole - vector;
            if L::WIDE && left >= 4 {
                weights.weigh::<L, S, 4>(l, pages, vector, sums);
                vector += 4;
            } else if left >= 2 {
                weights.weigh::<L, S, 2>(l, pages, vector, sums);
                vector += 2;
            } else {
                weights.weigh::<L, S, 1>(l, pages, vector, sums);
                vector += 1;
            }
        }
        if whole * LANES < self.head_dim {
            weights.weigh_last(l, pages, sums);
        }
    }

    /// Row `i`'s result: the weighted mean of the values.
    #[inline(always)]
    pub(super) fn finish<L: Lanes>(&self, l: L, i: usize, out: &mut [f32]) {
        let padded = self.head_dim.next_multiple_of(LANES);
        let total = l.sum(l.load(&self.totals[i * LANES..]));
        let inverse = l.splat(1.0 / total);
        let sums = &self.sums[i * padded..(i + 1) * padded];
        for (out, sum) in out.chunks_mut(LANES).zip(sums.chunks_exact(LANES)) {
            // Adding zero turns −0 into 0: a sum that underflowed to −0 keeps or loses its sign by how many
            // masked keys (p = 0) came after, and that may not show.
            let mean = l.fma(l.load(sum), inverse, l.splat(0.0));
            l.store_first(mean, out, out.len());
        }
    }
}

/// The scores, then the probabilities, of R rows for the keys of N blocks.
type Scores<const R: usize, const N: usize> = [[[f32; SOFTMAX_KEYS]; N]; R];

/// Scores of R rows against the keys of V pages from `page` on.
#[inline(always)]
fn score<L: Lanes, S: Stored, const R: usize, const V: usize, const N: usize>(
    l: L,
    q: &[f32],
    pages: &[(&[S], &[S])],
    page: usize,
    scores: &mut Scores<R, N>,
) {
    let head_dim = q.len() / R;
    let keys: [&[S]; V] = std::array::from_fn(|v| pages[page + v].0);
    assert!(q.len() == R * head_dim && keys.iter().all(|k| k.len() == head_dim * LANES));
    let mut sums = [[l.splat(0.0); V]; R];
    for d in 0..head_dim {
        // SAFETY: `d < head_dim`, each page has `head_dim` vectors and `q` R rows of `head_dim`, both just checked.
        unsafe {
            let mut k = [l.splat(0.0); V];
            for v in 0..V {
                k[v] = S::vector(l, keys[v].as_ptr().add(d * LANES));
            }
            for r in 0..R {
                let q = l.splat(*q.as_ptr().add(r * head_dim + d));
                for v in 0..V {
                    sums[r][v] = l.fma(q, k[v], sums[r][v]);
                }
            }
        }
    }
    for r in 0..R {
        let scores = scores[r].as_flattened_mut();
        for v in 0..V {
            l.store(sums[r][v], &mut scores[(page + v) * LANES..]);
        }
    }
}

/// Turns R rows' scores (in powers of two) of one block into probabilities under the new maxima and adds them to
/// `totals`. Returns the factors for what was summed before.
#[inline(always)]
fn softmax<L: Lanes, const R: usize, const N: usize>(
    l: L,
    scores: &mut Scores<R, N>,
    block: usize,
    seen: &[(usize, usize); R],
    softcap: Option<f32>,
    largest: &mut [f32],
    totals: &mut [f32],
) -> [f32; LANES] {
    let older = l.load_first(largest, R);
    for r in 0..R {
        let scores = &mut scores[r][block];
        if seen[r] != (0, SOFTMAX_KEYS) || softcap.is_some() {
            limit(l, scores, seen[r], softcap);
        }
        let low = l.max(l.load(&scores[0..]), l.load(&scores[LANES..]));
        let high = l.max(l.load(&scores[2 * LANES..]), l.load(&scores[3 * LANES..]));
        let most = l.largest(l.max(low, high));
        largest[r] = if most > largest[r] { most } else { largest[r] };
    }
    let shrink = l.array(l.exp2_below_one(l.sub(older, l.load_first(largest, R))));
    for r in 0..R {
        let m = l.splat(largest[r]);
        let mut p = [m; PAGES];
        for v in 0..PAGES {
            let part = &mut scores[r][block][v * LANES..];
            p[v] = l.exp2_below_one(l.sub(l.load(part), m));
            l.store(p[v], part);
        }
        let totals = &mut totals[r * LANES..];
        let added = l.add(l.add(p[0], p[1]), l.add(p[2], p[3]));
        l.store(l.fma(l.load(totals), l.splat(shrink[r]), added), totals);
    }
    shrink
}

/// Caps a row's scores and hides those out of sight.
#[inline(always)]
fn limit<L: Lanes>(l: L, scores: &mut [f32; SOFTMAX_KEYS], seen: (usize, usize), softcap: Option<f32>) {
    let (first, end) = (l.splat(seen.0 as f32), l.splat(seen.1 as f32));
    let hidden = l.splat(f32::NEG_INFINITY);
    for v in 0..PAGES {
        let part = &mut scores[v * LANES..];
        let mut s = l.load(part);
        if let Some(cap) = softcap {
            s = l.mul(l.splat(cap * LOG2_E), l.tanh(l.div(s, l.splat(cap))));
        }
        let index = l.load(&INDEX[v * LANES..]);
        l.store(l.where_less(index, end, l.where_less(index, first, hidden, s), hidden), part);
    }
}

/// 0, 1, 2, …
const INDEX: [f32; SOFTMAX_KEYS] = {
    let mut index = [0.0; SOFTMAX_KEYS];
    let mut i = 0;
    while i < SOFTMAX_KEYS {
        index[i] = i as f32;
        i += 1;
    }
    index
};

/// What the values of N blocks are multiplied by.
struct Weights<'a, const R: usize, const N: usize> {
    p: &'a Scores<R, N>,
    /// For each block a row's factor for what was summed before it.
    shrink: &'a [[f32; LANES]; N],
    /// All other keys have p = 0 in every row.
    keys: Range<usize>,
    head_dim: usize,
}

impl<const R: usize, const N: usize> Weights<'_, R, N> {
    /// `sums = sums · shrink + Σ p · value`, block by block, for V vectors of dimensions from `vector` on.
    #[inline(always)]
    fn weigh<L: Lanes, S: Stored, const V: usize>(
        &self,
        l: L,
        pages: &[(&[S], &[S])],
        vector: usize,
        sums: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        let padded = head_dim.next_multiple_of(LANES);
        let at = |r: usize, v: usize| r * padded + (vector + v) * LANES;
        assert!(self.keys.end <= N * SOFTMAX_KEYS && (vector + V) * LANES <= head_dim);
        let mut acc = [[l.splat(0.0); V]; R];
        for r in 0..R {
            for v in 0..V {
                acc[r][v] = l.load(&sums[at(r, v)..]);
            }
        }
        let mut key = self.keys.start;
        while key < self.keys.end {
            if key == self.keys.start || key.is_multiple_of(SOFTMAX_KEYS) {
                let shrink = &self.shrink[key / SOFTMAX_KEYS];
                for r in 0..R {
                    for v in 0..V {
                        acc[r][v] = l.mul(acc[r][v], l.splat(shrink[r]));
                    }
                }
            }
            let page = key / BLOCK_TOKENS;
            let end = self.keys.end.min((page + 1) * BLOCK_TOKENS);
            let values = pages[page].1;
            assert!(values.len() == BLOCK_TOKENS * head_dim);
            for key in key..end {
                // SAFETY: `key < N * SOFTMAX_KEYS`, and its row of `values` has `head_dim` values, among them V
                // vectors from `vector` on, all just checked.
                unsafe {
                    let row = values.as_ptr().add(key % BLOCK_TOKENS * head_dim + vector * LANES);
                    let mut x = [l.splat(0.0); V];
                    for v in 0..V {
                        x[v] = S::vector(l, row.add(v * LANES));
                    }
                    for r in 0..R {
                        let p = l.splat(*self.p[r].as_ptr().cast::<f32>().add(key));
                        for v in 0..V {
                            acc[r][v] = l.fma(p, x[v], acc[r][v]);
                        }
                    }
                }
            }
            key = end;
        }
        for r in 0..R {
            for v in 0..V {
                l.store(acc[r][v], &mut sums[at(r, v)..]);
            }
        }
    }

    /// As [`Weights::weigh`] for the dimensions past the last whole vector.
    #[inline(always)]
    fn weigh_last<L: Lanes, S: Stored>(&self, l: L, pages: &[(&[S], &[S])], sums: &mut [f32]) {
        let padded = self.head_dim.next_multiple_of(LANES);
        let whole = self.head_dim / LANES * LANES;
        for r in 0..R {
            let sums = &mut sums[r * padded + whole..(r + 1) * padded];
            let mut acc = l.load(sums);
            for key in self.keys.clone() {
                let block = key / SOFTMAX_KEYS;
                if key == self.keys.start || key.is_multiple_of(SOFTMAX_KEYS) {
                    acc = l.mul(acc, l.splat(self.shrink[block][r]));
                }
                let row = key % BLOCK_TOKENS * self.head_dim;
                let x = S::wide(l, &pages[key / BLOCK_TOKENS].1[row + whole..row + self.head_dim]);
                acc = l.fma(l.splat(self.p[r][block][key % SOFTMAX_KEYS]), x, acc);
            }
            l.store(acc, sums);
        }
    }
}

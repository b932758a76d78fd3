//! The inner loops of attention: a few query rows against one block of keys, in registers.
//!
//! Both products have the same form: R rows times V vectors of sixteen lanes, accumulated over a third index
//! (dimensions for scores, keys for the output), with one broadcast value a row and one vector a column. With
//! R = 6 and V = 4 that is 24 multiply-adds for 10 loads, which keeps AVX-512's multiplier busy. The tile's shape
//! decides only which elements are computed together, never an element's own chain, so it is free to choose.

// Rows and vectors are indices of several arrays at once. And closures, as in `array::from_fn`, would not have the
// family's instructions: only what is inlined into the family's entry has.
#![allow(clippy::needless_range_loop)]

use std::f32::consts::LOG2_E;

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

    /// Takes in one block: `pages` are keys and values of its pages; row `i` sees its keys `sees(i)`, and no row
    /// fewer than the row before it in `end`.
    #[inline(always)]
    pub(super) fn block<L: Lanes, S: Stored>(
        &mut self,
        l: L,
        pages: [(&[S], &[S]); PAGES],
        softcap: Option<f32>,
        sees: impl Fn(usize) -> (usize, usize),
    ) {
        for (keys, values) in pages {
            assert!(keys.len() == self.head_dim * BLOCK_TOKENS && values.len() == keys.len());
        }
        let mut i = 0;
        while i < self.count {
            let left = self.count - i;
            if L::WIDE && left >= 6 {
                self.tile::<L, S, 6>(l, i, &pages, softcap, &sees);
                i += 6;
            } else if L::WIDE && left >= 3 {
                self.tile::<L, S, 3>(l, i, &pages, softcap, &sees);
                i += 3;
            } else if left >= 2 {
                self.tile::<L, S, 2>(l, i, &pages, softcap, &sees);
                i += 2;
            } else {
                self.tile::<L, S, 1>(l, i, &pages, softcap, &sees);
                i += 1;
            }
        }
    }

    /// Rows `first..first + R`.
    #[inline(always)]
    fn tile<L: Lanes, S: Stored, const R: usize>(
        &mut self,
        l: L,
        first: usize,
        pages: &[(&[S], &[S]); PAGES],
        softcap: Option<f32>,
        sees: &impl Fn(usize) -> (usize, usize),
    ) {
        let seen: [(usize, usize); R] = std::array::from_fn(|r| sees(first + r));
        let end = seen[R - 1].1;
        let begin = seen.iter().map(|s| s.0).min().unwrap_or(0);
        if begin >= end {
            return;
        }
        let (first_page, last_page) = (begin / BLOCK_TOKENS, end.div_ceil(BLOCK_TOKENS));
        let mut scores = [[f32::NEG_INFINITY; SOFTMAX_KEYS]; R];
        let q = &self.q[first * self.head_dim..(first + R) * self.head_dim];
        let mut page = first_page;
        while page < last_page {
            let left = last_page - page;
            if L::WIDE && left >= 4 {
                score::<L, S, R, 4>(l, q, pages, page, &mut scores);
                page += 4;
            } else if left >= 2 {
                score::<L, S, R, 2>(l, q, pages, page, &mut scores);
                page += 2;
            } else {
                score::<L, S, R, 1>(l, q, pages, page, &mut scores);
                page += 1;
            }
        }
        let totals = &mut self.totals[first * LANES..(first + R) * LANES];
        let shrink = softmax(l, &mut scores, &seen, softcap, &mut self.largest[first..first + R], totals);
        let padded = self.head_dim.next_multiple_of(LANES);
        let sums = &mut self.sums[first * padded..(first + R) * padded];
        // Keys before `begin` and past `end` have p = 0 in every row.
        let keys = begin..end;
        let mut vector = 0;
        let whole = self.head_dim / LANES;
        while vector < whole {
            let left = whole - vector;
            if L::WIDE && left >= 4 {
                weigh::<L, S, R, 4>(l, &scores, &shrink, pages, keys.clone(), self.head_dim, vector, sums);
                vector += 4;
            } else if left >= 2 {
                weigh::<L, S, R, 2>(l, &scores, &shrink, pages, keys.clone(), self.head_dim, vector, sums);
                vector += 2;
            } else {
                weigh::<L, S, R, 1>(l, &scores, &shrink, pages, keys.clone(), self.head_dim, vector, sums);
                vector += 1;
            }
        }
        if whole * LANES < self.head_dim {
            weigh_last(l, &scores, &shrink, pages, keys, self.head_dim, sums);
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

/// Scores of R rows against the keys of V pages from `page` on.
#[inline(always)]
fn score<L: Lanes, S: Stored, const R: usize, const V: usize>(
    l: L,
    q: &[f32],
    pages: &[(&[S], &[S]); PAGES],
    page: usize,
    scores: &mut [[f32; SOFTMAX_KEYS]; R],
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
        for v in 0..V {
            l.store(sums[r][v], &mut scores[r][(page + v) * LANES..]);
        }
    }
}

/// Turns R rows' scores (in powers of two) into probabilities under the new maxima and adds them to `totals`.
/// Returns the factors for what was summed before.
#[inline(always)]
fn softmax<L: Lanes, const R: usize>(
    l: L,
    scores: &mut [[f32; SOFTMAX_KEYS]; R],
    seen: &[(usize, usize); R],
    softcap: Option<f32>,
    largest: &mut [f32],
    totals: &mut [f32],
) -> [f32; LANES] {
    let older = l.load_first(largest, R);
    for r in 0..R {
        let scores = &mut scores[r];
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
            let part = &mut scores[r][v * LANES..];
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

/// `sums = sums · shrink + Σ p · value` for R rows and V vectors of dimensions from `vector` on.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn weigh<L: Lanes, S: Stored, const R: usize, const V: usize>(
    l: L,
    p: &[[f32; SOFTMAX_KEYS]; R],
    shrink: &[f32; LANES],
    pages: &[(&[S], &[S]); PAGES],
    keys: std::ops::Range<usize>,
    head_dim: usize,
    vector: usize,
    sums: &mut [f32],
) {
    let padded = head_dim.next_multiple_of(LANES);
    let at = |r: usize, v: usize| r * padded + (vector + v) * LANES;
    let mut acc = [[l.splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            acc[r][v] = l.mul(l.load(&sums[at(r, v)..]), l.splat(shrink[r]));
        }
    }
    assert!(keys.end <= SOFTMAX_KEYS && (vector + V) * LANES <= head_dim);
    let mut key = keys.start;
    while key < keys.end {
        let page = key / BLOCK_TOKENS;
        let end = keys.end.min((page + 1) * BLOCK_TOKENS);
        let values = pages[page].1;
        assert!(values.len() == BLOCK_TOKENS * head_dim);
        for key in key..end {
            // SAFETY: `key < SOFTMAX_KEYS`, and its row of `values` has `head_dim` values, among them V vectors
            // from `vector` on, all just checked.
            unsafe {
                let row = values.as_ptr().add(key % BLOCK_TOKENS * head_dim + vector * LANES);
                let mut x = [l.splat(0.0); V];
                for v in 0..V {
                    x[v] = S::vector(l, row.add(v * LANES));
                }
                for r in 0..R {
                    let p = l.splat(*p[r].as_ptr().add(key));
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

/// As [`weigh`] for the dimensions past the last whole vector.
#[inline(always)]
fn weigh_last<L: Lanes, S: Stored, const R: usize>(
    l: L,
    p: &[[f32; SOFTMAX_KEYS]; R],
    shrink: &[f32; LANES],
    pages: &[(&[S], &[S]); PAGES],
    keys: std::ops::Range<usize>,
    head_dim: usize,
    sums: &mut [f32],
) {
    let padded = head_dim.next_multiple_of(LANES);
    let whole = head_dim / LANES * LANES;
    for r in 0..R {
        let sums = &mut sums[r * padded + whole..(r + 1) * padded];
        let mut acc = l.mul(l.load(sums), l.splat(shrink[r]));
        for key in keys.clone() {
            let row = key % BLOCK_TOKENS * head_dim;
            let x = S::wide(l, &pages[key / BLOCK_TOKENS].1[row + whole..row + head_dim]);
            acc = l.fma(l.splat(p[r][key]), x, acc);
        }
        l.store(acc, sums);
    }
}

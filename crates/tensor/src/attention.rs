//! Grouped-query attention over the paged cache, with an online softmax (Dao et al. 2022).
//!
//! One query walks its keys in one fixed order of blocks by absolute position, so prefill, decode, chunks and
//! cached prefixes give the same bits. The order, for one query of one head, over each block of 64 keys
//! that starts at a multiple of 64:
//!
//! 1. every score is one chain of fused multiply-adds over the dimensions of `q · scale · log₂ e` and a key (with a
//!    cap, log₂ e comes after it); a key out of sight scores −∞;
//! 2. the maximum so far `m` grows to include the block; `p = 2^(score − m)`, and what was summed under the older
//!    maximum is multiplied by `2^(older − m)`;
//! 3. the sum of `p` is kept in sixteen lanes, each output dimension as one chain over the keys in order.
//!
//! A block that is wholly out of sight changes no bit (`m` starts finite, so both factors are 1 and every `p` is
//! 0), which is why queries that see different blocks can share a tile.
//!
//! Cost: 2 · `head_dim` multiply-adds a visible key, query and head. For many rows that is what bounds it, so
//! keys are turned into `f32` once and a tile of 6 rows by 64 keys stays in registers. For a single
//! row it is the cache's bytes, 4 · `head_dim` a position and key-value head, read once for the whole group.

mod tile;

use std::cell::RefCell;

use crate::Pool;
use crate::kv::{BLOCK_TOKENS, BlockId, KvCache};
use crate::lanes::{self, Kernel, Lanes};
use crate::pool::Disjoint;

use tile::{Group, PAGES, expand as expand_page};

/// Keys whose scores are turned into probabilities together.
pub(crate) const SOFTMAX_KEYS: usize = 64;

/// Query rows (tokens times heads of a group) that walk the keys together, at most.
const TASK_ROWS: usize = 96;

/// From this many query rows on, keys and values are turned into `f32` before use, not in each tile anew.
const EXPAND_ROWS: usize = 13;

/// Softmax blocks that a few rows take in at a time.
const STEP_BLOCKS: usize = 4;

/// One sequence's rows in a packed batch.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Its first row in the batch.
    pub first_row: usize,
    /// Its rows in the batch: consecutive tokens.
    pub rows: usize,
    /// The first row's position in the sequence; row *r* stands at `first_position + r`.
    pub first_position: usize,
    /// Its cache blocks from position 0 on; covers every position up to the last row's.
    pub blocks: &'a [BlockId],
}

impl Span<'_> {
    /// # Panics
    /// If a row's position has no block, or a block is not one of the cache's.
    pub(crate) fn check(&self, cache_blocks: usize) {
        let needed = (self.first_position + self.rows).div_ceil(BLOCK_TOKENS);
        assert!(needed <= self.blocks.len(), "{} blocks where {needed} are needed", self.blocks.len());
        assert!(
            self.blocks[..needed].iter().all(|&b| (b as usize) < cache_blocks),
            "a block outside the cache"
        );
    }
}

/// What an [`attention`] call needs beside queries and cache.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Query heads.
    pub heads: usize,
    /// Multiplies the scores (`1 / sqrt(head_dim)` in most models).
    pub scale: f32,
    /// A row sees at most this many positions, its own included (sliding window); `None` sees all.
    pub window: Option<usize>,
    /// `cap · tanh(score / cap)` where set (Gemma 2).
    pub softcap: Option<f32>,
}

/// Causal attention of every row of `q` (`heads * head_dim` values) over its sequence's keys, into `out` (same shape).
/// The rows' own keys and values are already stored.
///
/// # Panics
/// If shapes don't fit, a span leaves its blocks or the cache, or two spans share a row.
pub fn attention(
    pool: &Pool,
    params: AttentionParams,
    layer: usize,
    cache: &KvCache,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let shape = cache.shape();
    let width = params.heads * shape.head_dim;
    assert_eq!(q.len(), out.len(), "queries and output have one shape");
    assert!(layer < shape.layers && shape.kv_heads > 0 && params.heads.is_multiple_of(shape.kv_heads));
    assert!(params.window != Some(0), "a window of no positions");
    let mut rows_before = 0;
    for span in spans {
        assert!(span.first_row >= rows_before, "spans come in the order of their rows, and share none");
        rows_before = span.first_row + span.rows;
        span.check(cache.blocks());
    }
    assert!(rows_before * width <= q.len(), "a span leaves the batch");
    let call = Call {
        params,
        layer,
        cache,
        spans,
        q,
        out: Disjoint::new(out),
        group: params.heads / shape.kv_heads,
    };
    let rows: usize = spans.iter().map(|span| span.rows).sum();
    if rows * shape.kv_heads < 2 * pool.threads() {
        // A few decoding rows: equal shares of the query heads, each share in as few groups as possible.
        call.run_heads(pool);
    } else {
        call.run_tasks(pool);
    }
}

struct Call<'a> {
    params: AttentionParams,
    layer: usize,
    cache: &'a KvCache,
    spans: &'a [Span<'a>],
    q: &'a [f32],
    out: Disjoint<'a, f32>,
    /// Query heads that share a key-value head.
    group: usize,
}

/// Consecutive rows of one span, with the query heads `heads` of one group.
#[derive(Clone)]
struct Task {
    span: usize,
    rows: std::ops::Range<usize>,
    heads: std::ops::Range<usize>,
}

impl Call<'_> {
    fn run_heads(&self, pool: &Pool) {
        let heads = self.params.heads;
        let rows = || self.spans.iter().enumerate().flat_map(|(s, span)| (0..span.rows).map(move |r| (s, r)));
        pool.run(|worker| {
            let mut share = worker.split(rows().count() * heads, 1);
            while !share.is_empty() {
                let (row, head) = (share.start / heads, share.start % heads);
                let end = (head / self.group + 1) * self.group;
                let count = share.len().min(end - head);
                if let Some((span, r)) = rows().nth(row) {
                    self.run(pool, Task { span, rows: r..r + 1, heads: head..head + count });
                }
                share.start += count;
            }
        });
    }

    fn run_tasks(&self, pool: &Pool) {
        let step = (TASK_ROWS / self.group).max(1);
        let mut tasks = Vec::new();
        for (s, span) in self.spans.iter().enumerate() {
            for first in (0..span.rows).step_by(step) {
                for head in (0..self.params.heads).step_by(self.group) {
                    let rows = first..(first + step).min(span.rows);
                    tasks.push(Task { span: s, rows, heads: head..head + self.group });
                }
            }
        }
        // The longest first, so that the last to finish is short.
        tasks.sort_by_key(|t| {
            std::cmp::Reverse(t.rows.len() * (self.spans[t.span].first_position + t.rows.end))
        });
        pool.run(|worker| {
            while let Some(index) = worker.claim(tasks.len()) {
                self.run(pool, tasks[index].clone());
            }
        });
    }

    fn run(&self, pool: &Pool, task: Task) {
        lanes::dispatch(pool.cpu(), Attend { call: self, task });
    }
}

thread_local! {
    /// Grows to the largest task this thread has seen.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Attend<'a> {
    call: &'a Call<'a>,
    task: Task,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        // Taken and given back rather than borrowed in a closure, which would not have the family's instructions.
        let mut scratch = SCRATCH.take();
        attend(l, self.call, &self.task, &mut scratch);
        SCRATCH.set(scratch);
    }
}

#[inline(always)]
fn attend<L: Lanes>(l: L, call: &Call<'_>, task: &Task, scratch: &mut Vec<f32>) {
    let shape = call.cache.shape();
    let (heads, head_dim) = (call.params.heads, shape.head_dim);
    let span = &call.spans[task.span];
    let kv_head = task.heads.start / call.group;
    let count = task.rows.len() * task.heads.len();
    let page = head_dim * BLOCK_TOKENS;
    let expand = count >= EXPAND_ROWS;

    let expanded_len = if expand { PAGES * 2 * page } else { 0 };
    let needed = Group::scratch(count, head_dim) + expanded_len;
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let (expanded, state) = scratch[..needed].split_at_mut(expanded_len);
    let mut group = Group::new(state, count, head_dim);

    let row_of = |i: usize| span.first_row + task.rows.start + i / task.heads.len();
    let head_of = |i: usize| task.heads.start + i % task.heads.len();
    for i in 0..count {
        let from = (row_of(i) * heads + head_of(i)) * head_dim;
        group.start(i, &call.q[from..from + head_dim], call.params.scale, call.params.softcap);
    }
    let position = |i: usize| span.first_position + task.rows.start + i / task.heads.len();
    let first_seen = |i: usize| call.params.window.map_or(0, |w| (position(i) + 1).saturating_sub(w));

    // A step of several blocks where little is kept; one block where its expanded pages stay in the first cache.
    let step = SOFTMAX_KEYS * if expand { 1 } else { STEP_BLOCKS };
    let mut start = first_seen(0) / SOFTMAX_KEYS * SOFTMAX_KEYS;
    while start <= position(count - 1) {
        let first_block = start / BLOCK_TOKENS;
        let pages = (step / BLOCK_TOKENS).min(position(count - 1) / BLOCK_TOKENS + 1 - first_block);
        let blocks = &span.blocks[first_block..first_block + pages];
        // Of these keys a row sees `first..end`.
        let sees = |i: usize| {
            let end = (position(i) + 1).saturating_sub(start).min(step);
            (first_seen(i).saturating_sub(start).min(end), end)
        };
        let page_of = |block: &BlockId| call.cache.page(call.layer, *block, kv_head);
        if expand {
            for (out, block) in expanded.chunks_exact_mut(2 * page).zip(blocks) {
                let (keys, values) = page_of(block);
                let (out_keys, out_values) = out.split_at_mut(page);
                expand_page(l, keys, out_keys);
                expand_page(l, values, out_values);
            }
            let mut stored: [(&[f32], &[f32]); PAGES] = [(&[], &[]); PAGES];
            for (stored, pages) in stored.iter_mut().zip(expanded.chunks_exact(2 * page)) {
                *stored = pages.split_at(page);
            }
            group.blocks::<L, f32, 1>(l, &stored[..pages], call.params.softcap, sees);
        } else {
            let mut stored: [(&[u16], &[u16]); STEP_BLOCKS * PAGES] = [(&[], &[]); STEP_BLOCKS * PAGES];
            for (stored, block) in stored.iter_mut().zip(blocks) {
                *stored = page_of(block);
            }
            group.blocks::<L, u16, STEP_BLOCKS>(l, &stored[..pages], call.params.softcap, sees);
        }
        start += step;
    }
    for i in 0..count {
        let to = (row_of(i) * heads + head_of(i)) * head_dim;
        // SAFETY: rows of different spans and tasks differ, and so do the heads of tasks with one row.
        group.finish(l, i, unsafe { call.out.part(to..to + head_dim) });
    }
}

#[cfg(test)]
mod tests;

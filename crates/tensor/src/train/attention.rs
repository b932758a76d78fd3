//! Causal grouped-query attention over packed sequences of different lengths, forward and backward, without ever
//! storing a square of scores (FlashAttention 2, Dao 2023).
//!
//! Rows of several sequences lie one after the other; `starts` says where each begins. A row holds its queries, keys
//! and values (`heads + 2 · kv_heads` vectors of `head_dim`), as one product with all three weights writes them.
//! Forward keeps one number a row and head beside the output, the logarithm of the softmax's denominator; backward
//! computes the probabilities again from it.
//!
//! # The order of sums
//!
//! A row walks its sequence's keys in blocks of 256 by position, with an online softmax between blocks: scores are
//! chains over the dimensions; a block's denominator is kept in sixteen lanes; outputs are chains over the keys. In
//! backward, `dQ` is a chain over the keys; `dK` and `dV` are chains over the rows of a block of 96, continued over
//! the blocks in order and over the heads of a group in order. All of it depends on positions in the row's own
//! sequence alone.
//!
//! # Cost
//!
//! 4 multiply-adds a dimension, visible key, row and head in forward over 2 products, 10 in backward over 5. All seven
//! run in the kernel of [`matmul`](super::matmul), on `f32` where it lies and on packed blocks that stay in the caches.
//! Along the diagonal each panel of twelve rows stops at the keys that its last row sees.
//!
//! Threads share pairs of a sequence and a key-value head (forward: and 256 rows of it), the last and largest first.

mod backward;
mod forward;

use crate::Pool;
use crate::lanes::Lanes;
use crate::train::matmul::{Left, Multiply, PackedA, PackedB, Right, Steps, TILE_ROWS, View};

pub use backward::{Saved, attention_backward};
pub use forward::attention;

/// Keys of a block of the online softmax.
const KEYS: usize = 256;
/// Rows of a tile of scores.
const ROWS: usize = 96;
/// Values from one row of scores to the next: as rows of the left side of a product lie, so that in `f32` scores are
/// multiplied where they are.
const STRIDE: usize = PackedA::ROW;
/// Widest head: its dimensions are packed as one block.
const MAX_HEAD_DIM: usize = 256;

/// The shape of attention, the same in every row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
}

impl Heads {
    /// Values of a row's queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Values of a row's output.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Where a row's keys of a key-value head begin.
    fn key(&self, kv_head: usize) -> usize {
        (self.heads + kv_head) * self.head_dim
    }

    /// Where a row's values of a key-value head begin.
    fn value(&self, kv_head: usize) -> usize {
        (self.heads + self.kv_heads + kv_head) * self.head_dim
    }

    /// Rows of all sequences.
    ///
    /// # Panics
    /// If the heads or the sequences make no sense.
    fn check(&self, starts: &[usize], qkv: usize) -> usize {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "{self:?}");
        assert!((1..=MAX_HEAD_DIM).contains(&self.head_dim), "heads of {} values", self.head_dim);
        assert!(qkv.is_multiple_of(self.qkv_width()), "{qkv} values are not rows of {}", self.qkv_width());
        let rows = qkv / self.qkv_width();
        assert!(starts.first().is_none_or(|&first| first == 0), "the first sequence begins at row 0");
        assert!(
            starts.is_sorted() && starts.last().is_none_or(|&last| last <= rows),
            "{starts:?} of {rows} rows"
        );
        assert!(rows == 0 || !starts.is_empty(), "rows without a sequence");
        rows
    }
}

/// First row and number of rows of sequence `index`.
fn sequence(starts: &[usize], rows: usize, index: usize) -> (usize, usize) {
    let end = starts.get(index + 1).copied().unwrap_or(rows);
    (starts[index], end - starts[index])
}

/// Runs every task, the most work first, so that no thread is left with a long one at the end.
fn run_longest_first<T: Sync>(
    pool: &Pool,
    mut tasks: Vec<T>,
    work: impl Fn(&T) -> usize,
    run: impl Fn(&T) + Sync,
) {
    tasks.sort_by_key(|task| std::cmp::Reverse(work(task)));
    pool.run(|worker| {
        while let Some(task) = worker.claim(tasks.len()) {
            run(&tasks[task]);
        }
    });
}

/// The first `rows` rows of `view` as the left side of a product: where they are, or in `packed`.
#[inline(always)]
fn rows_of<'a, L: Lanes, M: Multiply>(
    l: L,
    view: View<'a>,
    rows: usize,
    dims: Steps,
    packed: &'a mut PackedA,
) -> Left<'a> {
    match Left::in_place::<M>(view, (0, rows), dims, None) {
        Some(left) if rows.is_multiple_of(TILE_ROWS) => left,
        _ => {
            packed.pack::<L, M>(l, view, (0, rows), dims);
            packed.left()
        }
    }
}

/// `dim` columns of the first `rows` rows of `view` as the right side of a product: where they are, or in `packed`.
#[inline(always)]
fn columns_of<'a, L: Lanes, M: Multiply>(
    l: L,
    view: View<'a>,
    rows: usize,
    dim: usize,
    packed: &'a mut PackedB,
) -> Right<'a> {
    let steps = Steps { from: 0, len: rows };
    if Right::lies_well::<M>(view, dim) {
        return Right::in_place(view, steps, (0, dim));
    }
    packed.pack::<L, M>(l, view, steps, (0, dim));
    packed.right()
}

/// `rows` rows of `cols` values of a tile as the left side of a product, as they lie or turned: where they are, or rounded
/// into `packed`.
#[inline(always)]
fn left<'a, L: Lanes, M: Multiply>(
    l: L,
    tile: &'a [f32],
    (rows, cols): (usize, usize),
    turned: bool,
    packed: &'a mut PackedA,
) -> Left<'a> {
    if M::VALUES == 1 {
        return if turned { Left::turned(tile, cols, rows) } else { Left::rows(tile, rows, cols) };
    }
    let view = View::new(tile, STRIDE);
    let (view, rows, cols) = if turned { (view.turned(), cols, rows) } else { (view, rows, cols) };
    packed.pack::<L, M>(l, view, (0, rows), Steps { from: 0, len: cols });
    packed.left()
}

#[cfg(test)]
mod tests;

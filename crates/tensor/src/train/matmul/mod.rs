//! Products of float matrices, the nine tenths of a training step: `C = A·B` or `C += A·B`, each side as it lies or
//! turned.
//!
//! # The order of sums
//!
//! An element of `C` is one chain of fused multiply-adds over the inner dimension from its first index to its last,
//! begun at 0 or at what `C` held. Blocks of the inner dimension end in memory as `f32` and go on from there, which
//! changes nothing. So an element depends on its row of `A` and its column of `B` alone: not on the tile it falls
//! into, the number of threads, or how the inner dimension was cut; and accumulating a gradient over two calls is
//! the same as one call over both.
//!
//! [`Precision::F32`] gives the same bits in every kernel family. [`Precision::Bf16`] rounds both sides to bf16
//! (nearest even, subnormals to 0) and adds pairs of products, the odd one first; AVX-512's own instruction rounds a
//! pair's sum in its own way, so there the bits are those of the family, closer to the exact sum than 2⁻²² of its
//! terms' magnitudes a pair.
//!
//! # How it is fast
//!
//! As GotoBLAS and BLIS do it (Goto and van de Geijn 2008): both sides are copied into panels in the order in which
//! the kernel reads them, twelve rows of `A` and thirty-two columns of `B`, and a tile of 12 × 32 sums stays in
//! registers. A panel of `A` (18 KiB) stays in the first-level cache, a block of `B` (up to 576 KiB) in the second, and
//! each tile asks for the memory of the next one's results before it begins. Rounding to bf16 and turning happen in
//! the copy. Tiles at the edges are computed whole and stored in part.

mod kernel;
mod pack;

use std::cell::RefCell;

use crate::Pool;
use crate::lanes::{self, Lanes};
use crate::pool::Disjoint;

pub(crate) use kernel::{Bf16, F32, Multiply, Reach, multiply};
pub(crate) use pack::{PackedA, PackedB, Steps};

/// Rows of a register tile.
pub(crate) const TILE_ROWS: usize = 12;
/// Columns of a register tile.
pub(crate) const TILE_COLS: usize = 32;
/// Words of the inner dimension that are packed at a time, at most: a word is one `f32` or a pair of bf16.
pub(crate) const BLOCK_STEPS: usize = 384;
/// Words of a packed block of `B`, at most: 576 KiB, of a second-level cache of 1 MiB.
const BLOCK_WORDS: usize = 384 * 384;
/// Rows of `A` packed at a time.
const BLOCK_ROWS: usize = 8 * TILE_ROWS;
/// Rows of a task, at most: they pay for packing the block of `B`.
const TASK_ROWS: usize = 85 * TILE_ROWS;
/// Multiply-adds below which a fork and join costs more than it gives.
const FORK_WORK: usize = 1 << 17;

/// What products round their inputs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Nothing is rounded.
    F32,
    /// Inputs to bf16, sums in `f32`: twice as fast where the machine multiplies bf16.
    Bf16,
}

/// A matrix of `f32` in memory: rows at a stride, taken as they lie or turned.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    values: &'a [f32],
    stride: usize,
    turned: bool,
}

impl<'a> View<'a> {
    /// Rows that begin every `stride` values.
    pub fn new(values: &'a [f32], stride: usize) -> View<'a> {
        View { values, stride, turned: false }
    }

    /// The same memory with rows and columns exchanged.
    pub fn turned(self) -> View<'a> {
        View { turned: !self.turned, ..self }
    }

    /// # Panics
    /// If `rows` by `cols` of this view leave its memory.
    fn check(&self, rows: usize, cols: usize) {
        let (rows, cols) = if self.turned { (cols, rows) } else { (rows, cols) };
        check_extent(self.values.len(), self.stride, rows, cols);
    }
}

/// # Panics
/// If a matrix of that extent leaves `len` values.
fn check_extent(len: usize, stride: usize, rows: usize, cols: usize) {
    assert!(cols <= stride || rows <= 1, "rows of {cols} values overlap at a stride of {stride}");
    let end = rows.saturating_sub(1).checked_mul(stride).and_then(|start| start.checked_add(cols));
    let fits = rows == 0 || cols == 0 || end.is_some_and(|end| end <= len);
    assert!(fits, "{rows} rows of {cols} values at a stride of {stride} leave {len} values");
}

/// What becomes of the values that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// They are replaced.
    Replace,
    /// The product is added to them.
    Add,
}

/// The extent of a product: `[rows × inner] · [inner × cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Rows of the left side and of the result.
    pub rows: usize,
    /// Columns of the right side and of the result.
    pub cols: usize,
    /// Columns of the left side and rows of the right one.
    pub inner: usize,
}

/// `out = a · b` or `out += a · b`, with `out` of `extent.rows` rows at `out_stride`.
///
/// # Panics
/// If a matrix of this extent leaves its memory.
pub fn matmul(
    pool: &Pool,
    precision: Precision,
    extent: Extent,
    a: View<'_>,
    b: View<'_>,
    (out, out_stride): (&mut [f32], usize),
    store: Store,
) {
    let Extent { rows, cols, inner } = extent;
    a.check(rows, inner);
    b.check(inner, cols);
    check_extent(out.len(), out_stride, rows, cols);
    if rows == 0 || cols == 0 {
        return;
    }
    let work = rows.saturating_mul(cols).saturating_mul(inner);
    let threads = if work < FORK_WORK { 1 } else { pool.threads() };
    let values = if precision == Precision::F32 { F32::VALUES } else { Bf16::VALUES };
    let block = block_len(inner, values);
    let most_cols = BLOCK_WORDS / block.div_ceil(values).max(1) / TILE_COLS * TILE_COLS;
    let (task_rows, task_cols) = tasks(rows, (cols, most_cols.min(1024)), threads);
    let (down, across) = (rows.div_ceil(task_rows), cols.div_ceil(task_cols));
    let out = Disjoint::new(out);
    let run = |task: usize| {
        let (row, col) = (task / across * task_rows, task % across * task_cols);
        let part = Part {
            rows: (row, task_rows.min(rows - row)),
            cols: (col, task_cols.min(cols - col)),
            inner,
            block,
            a,
            b,
            out: (out.at(0).cast_mut(), out_stride),
            add: store == Store::Add,
        };
        PACKS.with_borrow_mut(|packs| match precision {
            Precision::F32 => lanes::dispatch(pool.cpu(), Call::<F32>(part, packs, std::marker::PhantomData)),
            Precision::Bf16 => {
                lanes::dispatch(pool.cpu(), Call::<Bf16>(part, packs, std::marker::PhantomData))
            }
        });
    };
    if threads == 1 {
        (0..down * across).for_each(run);
    } else {
        pool.run(|worker| {
            while let Some(task) = worker.claim(down * across) {
                run(task);
            }
        });
    }
}

/// Values of the inner dimension that are packed at a time: blocks of equal length, whole words.
fn block_len(inner: usize, values: usize) -> usize {
    let blocks = inner.div_ceil(BLOCK_STEPS * values).max(1);
    inner.div_ceil(blocks).next_multiple_of(8 * values)
}

/// Rows and columns of a task: large, but enough tasks that no thread waits long for another's last.
fn tasks(rows: usize, (cols, most_cols): (usize, usize), threads: usize) -> (usize, usize) {
    let even = |len: usize, parts: usize, grain: usize| len.div_ceil(parts).next_multiple_of(grain);
    let across = cols.div_ceil(most_cols);
    let down = rows.div_ceil(TASK_ROWS);
    if threads == 1 {
        return (even(rows, down, TILE_ROWS), even(cols, across, TILE_COLS));
    }
    let wanted = 2 * threads;
    let most_down = rows.div_ceil(BLOCK_ROWS);
    let mut down = down.max(wanted.div_ceil(across)).min(most_down).max(1);
    let across = across.max(wanted.div_ceil(down)).min(cols.div_ceil(4 * TILE_COLS)).max(across);
    // As many for each thread: of nine tasks on two threads, one thread would wait for the ninth.
    if let Some(even) = (down..=most_down.min(2 * down)).find(|down| (down * across).is_multiple_of(threads))
    {
        down = even;
    }
    (even(rows, down, TILE_ROWS), even(cols, across, TILE_COLS))
}

/// One thread's packed blocks.
#[derive(Default)]
struct Packs {
    a: PackedA,
    b: PackedB,
}

thread_local! {
    /// Grow to the largest block that this thread has packed.
    static PACKS: RefCell<Packs> = RefCell::default();
}

/// One task of a product.
struct Part<'a> {
    /// First row and number of rows.
    rows: (usize, usize),
    /// First column and number of columns.
    cols: (usize, usize),
    inner: usize,
    /// Values of it that are packed at a time.
    block: usize,
    a: View<'a>,
    b: View<'a>,
    /// The whole result and its stride; this task alone touches its rows and columns.
    out: (*mut f32, usize),
    add: bool,
}

struct Call<'a, M>(Part<'a>, &'a mut Packs, std::marker::PhantomData<M>);

impl<M: Multiply> lanes::Kernel for Call<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Call(part, packs, _) = self;
        let (row, rows) = part.rows;
        let (col, cols) = part.cols;
        let block = part.block;
        let mut from = 0;
        // An empty inner dimension still replaces what is there.
        loop {
            let steps = Steps { from, len: block.min(part.inner - from) };
            packs.b.pack::<L, M>(l, part.b, steps, (col, cols));
            for first in (0..rows).step_by(BLOCK_ROWS) {
                let count = BLOCK_ROWS.min(rows - first);
                packs.a.pack::<L, M>(l, part.a, (row + first, count), steps);
                // SAFETY: the caller checked that the task's rows and columns are inside `out`, and no other
                // task has them.
                unsafe {
                    let out = part.out.0.add((row + first) * part.out.1 + col);
                    let add = part.add || from > 0;
                    kernel::multiply::<L, M>(
                        l,
                        &packs.a,
                        &packs.b,
                        |_| Reach::all(&packs.a, cols),
                        (out, part.out.1),
                        add,
                    );
                }
            }
            from += block;
            if from >= part.inner {
                return;
            }
        }
    }
}

// SAFETY: the pointer stands for this task's part of a `Disjoint`.
unsafe impl Send for Part<'_> {}
// SAFETY: as above.
unsafe impl Sync for Part<'_> {}

#[cfg(test)]
mod tests;

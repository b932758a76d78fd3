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
//! As GotoBLAS and BLIS do it (Goto and van de Geijn 2008): a tile of 12 × 32 sums stays in registers while the kernel
//! goes through the inner dimension, and blocks are as large as the caches hold. Each thread takes 48 rows of `A` at a time
//! through all columns: many small tasks, so that a thread that was held up leaves its rest to the others. Each tile asks
//! for the memory of the next one's results before it begins, and of the rows that come next.
//!
//! `f32` that lies well is read where it is: twelve rows of `A`, as they lie or turned, and rows of `B`. Copied into panels
//! in the order in which the kernel reads them is what must be turned (`B`) or rounded (bf16), and rows whose distance
//! lets them crowd a few sets of a cache ([`pitch`](super::pitch) avoids such). `B` is packed once by all threads
//! together, in pieces that a second-level cache holds (up to 384 KiB). Tiles at the edges are computed whole, or their
//! left half, and stored in part.

mod kernel;
mod pack;
mod sides;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::lanes::{self, Lanes};
use crate::pool::Disjoint;
use crate::{Cpu, Pool};

pub(crate) use kernel::{Begin, Bf16, F32, Multiply, Reach, multiply};
pub(crate) use pack::{PackedA, PackedB};
pub(crate) use sides::{Left, Right, Steps};

/// Rows of a register tile.
pub(crate) const TILE_ROWS: usize = 12;
/// Columns of a register tile.
pub(crate) const TILE_COLS: usize = 32;
/// Words of the inner dimension that are packed at a time, at most: a word is one `f32` or a pair of bf16.
pub(crate) const BLOCK_STEPS: usize = 384;
/// Words of `B` that are packed at a time, at most: 12 MiB, which a shared cache holds.
const SHARED_WORDS: usize = 3 << 20;
/// Columns of a piece of packed `B`, at most: 384 KiB, of a second-level cache of 1 MiB.
const PIECE_PANELS: usize = 8;
/// Panels of a task, at most.
const TASK_PANELS: usize = 4;
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Store<'a> {
    /// They are replaced.
    Replace,
    /// The product is added to them.
    Add,
    /// They are replaced by the product added to these, which lie as they do.
    AddTo(&'a [f32]),
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

/// `out = a · b`, `out += a · b` or `out = x + a · b`, with `out` of `extent.rows` rows at `out_stride`.
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
    store: Store<'_>,
) {
    let Extent { rows, cols, inner } = extent;
    a.check(rows, inner);
    b.check(inner, cols);
    check_extent(out.len(), out_stride, rows, cols);
    if let Store::AddTo(x) = store {
        check_extent(x.len(), out_stride, rows, cols);
    }
    if rows == 0 || cols == 0 {
        return;
    }
    let work = rows.saturating_mul(cols).saturating_mul(inner);
    let threads = if work < FORK_WORK { 1 } else { pool.threads() };
    let values = if precision == Precision::F32 { F32::VALUES } else { Bf16::VALUES };
    let out = Disjoint::new(out);
    let product = Product {
        extent,
        block: block_len(inner, values),
        pieces: piece_cols(extent, threads),
        a,
        b,
        out: (out.at(0).cast_mut(), out_stride),
        begin: match store {
            Store::Replace => Begin::Zero,
            Store::Add => Begin::There,
            Store::AddTo(x) => Begin::From(x.as_ptr()),
        },
    };
    let run = |tasks: usize, task: &(dyn Fn(usize) + Sync)| {
        if threads == 1 {
            (0..tasks).for_each(task);
        } else {
            pool.run(|worker| {
                while let Some(index) = worker.claim(tasks) {
                    task(index);
                }
            });
        }
    };
    RIGHT.with_borrow_mut(|right| match precision {
        Precision::F32 => product.run::<F32>(pool.cpu(), threads, right, run),
        Precision::Bf16 => product.run::<Bf16>(pool.cpu(), threads, right, run),
    });
}

/// Values of the inner dimension that are packed at a time: blocks of equal length, whole words.
fn block_len(inner: usize, values: usize) -> usize {
    let blocks = inner.div_ceil(BLOCK_STEPS * values).max(1);
    inner.div_ceil(blocks).max(1).next_multiple_of(8 * values)
}

/// Columns of a piece of packed `B`: whole panels, and enough pieces that all threads have some to pack.
fn piece_cols(Extent { cols, inner, .. }: Extent, threads: usize) -> usize {
    let panels = cols.div_ceil(TILE_COLS);
    let wanted = (2 * threads).div_ceil(inner.div_ceil(BLOCK_STEPS).max(1));
    (panels / wanted).clamp(2, PIECE_PANELS) * TILE_COLS
}

/// Into how many parts rows and columns are cut: `panels` of twelve rows, `pieces` of columns. Many small tasks cost
/// nothing, because the packed `B` is everybody's; as many for each thread, because of nine tasks on two threads
/// one thread would wait for the ninth. Columns are cut where there are too few rows: each part packs its rows again.
fn tasks(panels: usize, pieces: usize, threads: usize) -> (usize, usize) {
    if threads == 1 {
        return (panels.div_ceil(TASK_PANELS), 1);
    }
    let wanted = panels.div_ceil(TASK_PANELS).max(4 * threads).next_multiple_of(threads);
    let down = wanted.min(panels.div_ceil(2));
    let across = if down == wanted { 1 } else { wanted.div_ceil(down).next_multiple_of(threads) };
    (down, across.min(pieces))
}

/// Part `index` of `parts` of `len` things.
fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    len * index / parts..len * (index + 1) / parts
}

thread_local! {
    /// Of the thread that asks for a product; grows to the most that it has packed.
    static RIGHT: RefCell<Vec<PackedB>> = RefCell::default();
    /// Of each thread that works on one.
    static LEFT: RefCell<PackedA> = RefCell::default();
}

/// A product, and how it is cut.
struct Product<'a> {
    extent: Extent,
    /// Values of the inner dimension that are packed at a time.
    block: usize,
    /// Columns of a piece of packed `B`.
    pieces: usize,
    a: View<'a>,
    b: View<'a>,
    /// The whole result and its stride; a task alone touches its rows and columns.
    out: (*mut f32, usize),
    begin: Begin,
}

impl Product<'_> {
    /// `run` does a number of tasks on some threads and returns when all are done.
    fn run<M: Multiply>(
        &self,
        cpu: Cpu,
        threads: usize,
        right: &mut Vec<PackedB>,
        run: impl Fn(usize, &(dyn Fn(usize) + Sync)),
    ) {
        let Extent { rows, cols, inner } = self.extent;
        let (across, panels) = (cols.div_ceil(self.pieces), rows.div_ceil(TILE_ROWS));
        // An empty inner dimension still replaces what is there.
        let blocks = inner.div_ceil(self.block).max(1);
        let (down, sideways) = tasks(panels, across, threads);
        let multiply = |blocks: Range<usize>, right: Option<&[PackedB]>| {
            run(down * sideways, &|task| {
                let next = part(panels, down, (task + threads) / sideways).start * TILE_ROWS;
                let part = Part {
                    blocks: blocks.clone(),
                    next,
                    right,
                    across,
                    panels: part(panels, down, task / sideways),
                    pieces: part(across, sideways, task % sideways),
                };
                LEFT.with_borrow_mut(|left| {
                    lanes::dispatch(cpu, Call::<M>(self, part, left, PhantomData));
                });
            });
        };
        if inner > 0 && Right::lies_well::<M>(self.b, cols) {
            return multiply(0..blocks, None);
        }
        let words = cols.next_multiple_of(TILE_COLS) * self.block.div_ceil(M::VALUES);
        let at_once = blocks.div_ceil(blocks.div_ceil((SHARED_WORDS / words).max(1)));
        if right.len() < at_once * across {
            right.resize_with(at_once * across, PackedB::default);
        }
        for first in (0..blocks).step_by(at_once) {
            let blocks = first..blocks.min(first + at_once);
            let right = &mut right[..blocks.len() * across];
            let pieces = Disjoint::new(&mut *right);
            run(blocks.len() * across, &|index| {
                // SAFETY: every piece is packed by one task.
                let piece = unsafe { &mut pieces.part(index..index + 1)[0] };
                let (block, at) = (first + index / across, index % across);
                lanes::dispatch(cpu, Pack::<M>(self, block, at, piece, PhantomData));
            });
            multiply(blocks, Some(&*right));
        }
    }

    /// Block `index` of the inner dimension.
    fn steps(&self, index: usize) -> Steps {
        let from = index * self.block;
        Steps { from, len: self.block.min(self.extent.inner - from) }
    }

    /// First and number of columns of piece `index`.
    fn cols(&self, index: usize) -> (usize, usize) {
        let from = index * self.pieces;
        (from, self.pieces.min(self.extent.cols - from))
    }
}

// SAFETY: the one pointer stands for parts of a `Disjoint`, the other is read alone.
unsafe impl Sync for Product<'_> {}

/// Packs one piece of one block of `B`.
struct Pack<'a, M>(&'a Product<'a>, usize, usize, &'a mut PackedB, PhantomData<M>);

impl<M: Multiply> lanes::Kernel for Pack<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Pack(product, block, piece, packed, _) = self;
        packed.pack::<L, M>(l, product.b, product.steps(block), product.cols(piece));
    }
}

/// Some rows and columns of a product, over some blocks of the inner dimension.
struct Part<'a> {
    blocks: Range<usize>,
    /// What is packed of the right side: all pieces of these blocks, `across` a block.
    right: Option<&'a [PackedB]>,
    across: usize,
    panels: Range<usize>,
    /// The first row of the task that this thread is likely to get next.
    next: usize,
    pieces: Range<usize>,
}

struct Call<'a, M>(&'a Product<'a>, Part<'a>, &'a mut PackedA, PhantomData<M>);

impl<M: Multiply> lanes::Kernel for Call<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Call(product, part, left, _) = self;
        let rows = part.panels.start * TILE_ROWS..(part.panels.end * TILE_ROWS).min(product.extent.rows);
        for block in part.blocks.clone() {
            let steps = product.steps(block);
            let after = if block + 1 < part.blocks.end {
                (rows.start, steps.from + steps.len)
            } else {
                (part.next, product.steps(part.blocks.start).from)
            };
            let in_place = Left::in_place::<M>(product.a, (rows.start, rows.len()), steps, Some(after));
            let whole = in_place.map_or(0, |left| left.rows);
            let (first, count) = (rows.start + whole, rows.len() - whole);
            if count > 0 {
                left.pack::<L, M>(l, product.a, (first, count), steps);
            }
            let packed = (count > 0).then(|| left.left());
            for (left, row) in [(in_place, rows.start), (packed, first)] {
                let Some(left) = left else { continue };
                for piece in part.pieces.clone() {
                    let (col, cols) = product.cols(piece);
                    let right = match part.right {
                        Some(right) => right[(block - part.blocks.start) * part.across + piece].right(),
                        None => Right::in_place(product.b, steps, (col, cols)),
                    };
                    // SAFETY: rows and columns are inside `out` and what it begins with, whose extents were checked, and no other
                    // task has them.
                    unsafe {
                        let at = row * product.out.1 + col;
                        let begin = if block == 0 { product.begin.at(at) } else { Begin::There };
                        let out = (product.out.0.add(at), product.out.1);
                        multiply::<L, M>(l, left, right, |_| Reach::all(left, cols), out, begin);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

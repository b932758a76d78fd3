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
//! registers. `B` is packed once by all threads together, in pieces, and stays in the cache that they share; then each
//! takes 96 rows of `A` at a time through it. A panel of `A` (18 KiB) stays in the first-level cache, a piece of `B` (up
//! to 384 KiB) in the second, and each tile asks for the memory of the next one's results before it begins. Rounding to
//! bf16 and turning happen in the copy. Tiles at the edges are computed whole and stored in part.

mod kernel;
mod pack;

use std::cell::RefCell;
use std::marker::PhantomData;

use crate::lanes::{self, Lanes};
use crate::pool::Disjoint;
use crate::{Cpu, Pool};

pub(crate) use kernel::{Bf16, F32, Multiply, Reach, multiply};
pub(crate) use pack::{Left, PackedA, PackedB, Steps};

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
/// Rows of a task, at most: as many of `A` are packed at a time.
const TASK_PANELS: usize = 8;
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
    let out = Disjoint::new(out);
    let product = Product {
        extent,
        block: block_len(inner, values),
        pieces: piece_cols(extent, threads),
        a,
        b,
        out: (out.at(0).cast_mut(), out_stride),
        add: store == Store::Add,
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
fn part(len: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
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
    add: bool,
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
        let words = cols.next_multiple_of(TILE_COLS) * self.block.div_ceil(M::VALUES);
        let at_once = blocks.div_ceil(blocks.div_ceil((SHARED_WORDS / words).max(1)));
        if right.len() < at_once * across {
            right.resize_with(at_once * across, PackedB::default);
        }
        let (down, sideways) = tasks(panels, across, threads);
        for first in (0..blocks).step_by(at_once) {
            let count = at_once.min(blocks - first);
            let right = &mut right[..count * across];
            let pieces = Disjoint::new(&mut *right);
            run(count * across, &|index| {
                // SAFETY: every piece is packed by one task.
                let piece = unsafe { &mut pieces.part(index..index + 1)[0] };
                lanes::dispatch(
                    cpu,
                    Pack::<M>(self, first + index / across, index % across, piece, PhantomData),
                );
            });
            run(down * sideways, &|task| {
                let part = Part {
                    first,
                    right: &*right,
                    across,
                    panels: part(panels, down, task / sideways),
                    pieces: part(across, sideways, task % sideways),
                };
                LEFT.with_borrow_mut(|left| {
                    lanes::dispatch(cpu, Call::<M>(self, part, left, PhantomData));
                });
            });
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

// SAFETY: the pointer stands for parts of a `Disjoint`.
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

/// Some rows and columns of a product, over the blocks of the inner dimension that are packed.
struct Part<'a> {
    /// The first of these blocks.
    first: usize,
    /// Their pieces, `across` a block.
    right: &'a [PackedB],
    across: usize,
    panels: std::ops::Range<usize>,
    pieces: std::ops::Range<usize>,
}

struct Call<'a, M>(&'a Product<'a>, Part<'a>, &'a mut PackedA, PhantomData<M>);

impl<M: Multiply> lanes::Kernel for Call<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Call(product, part, left, _) = self;
        let rows = part.panels.start * TILE_ROWS..(part.panels.end * TILE_ROWS).min(product.extent.rows);
        for (index, right) in part.right.chunks_exact(part.across).enumerate() {
            let block = part.first + index;
            left.pack::<L, M>(l, product.a, (rows.start, rows.len()), product.steps(block));
            for piece in part.pieces.clone() {
                let (col, cols) = product.cols(piece);
                // SAFETY: rows and columns are inside `out`, whose extent was checked, and no other task has them.
                unsafe {
                    let out = product.out.0.add(rows.start * product.out.1 + col);
                    let (left, add) = (left.left(), product.add || block > 0);
                    let reach = |_| Reach::all(left, cols);
                    multiply::<L, M>(l, left, &right[piece], reach, (out, product.out.1), add);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

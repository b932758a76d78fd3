//! The tile of sums that stays in registers, once for `f32` and once for pairs of bf16.
//!
//! A step of the inner dimension loads two vectors of `B` and twelve words of `A`, and does twenty-four
//! multiply-adds. With 32 registers all 24 sums stay in them; families with fewer registers take the tile in quarters of
//! six rows by one vector, in the same order.

use std::ops::Range;

use super::pack::{Layout, Left, PackedA, PackedB};
use super::{TILE_COLS, TILE_ROWS};
use crate::lanes::{LANES, Lanes, prefetch_write};

/// How packed words are multiplied.
pub(crate) trait Multiply: Copy {
    /// Values of the inner dimension in a word.
    const VALUES: usize;
    /// Sixteen words.
    type B<L: Lanes>: Copy;

    /// # Safety
    /// [`LANES`] words can be read at `x`.
    unsafe fn load<L: Lanes>(l: L, x: *const u32) -> Self::B<L>;
    fn splat<L: Lanes>(l: L, x: u32) -> Self::B<L>;
    fn multiply_add<L: Lanes>(l: L, a: Self::B<L>, b: Self::B<L>, sum: L::V) -> L::V;
}

/// A word is an `f32`.
#[derive(Clone, Copy)]
pub(crate) struct F32;

impl Multiply for F32 {
    const VALUES: usize = 1;
    type B<L: Lanes> = L::V;

    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, x: *const u32) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { l.load_at(x.cast()) }
    }

    #[inline(always)]
    fn splat<L: Lanes>(l: L, x: u32) -> L::V {
        l.splat(f32::from_bits(x))
    }

    #[inline(always)]
    fn multiply_add<L: Lanes>(l: L, a: L::V, b: L::V, sum: L::V) -> L::V {
        l.fma(a, b, sum)
    }
}

/// A word is a pair of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Multiply for Bf16 {
    const VALUES: usize = 2;
    type B<L: Lanes> = L::Pairs;

    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, x: *const u32) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { l.load_pairs_at(x) }
    }

    #[inline(always)]
    fn splat<L: Lanes>(l: L, x: u32) -> L::Pairs {
        l.splat_pair(x)
    }

    #[inline(always)]
    fn multiply_add<L: Lanes>(l: L, a: L::Pairs, b: L::Pairs, sum: L::V) -> L::V {
        l.dot_pairs(a, b, sum)
    }
}

/// What of a product a panel of rows needs.
#[derive(Clone, Debug)]
pub(crate) struct Reach {
    /// Columns of the right side, from the first on.
    pub(crate) cols: usize,
    /// Words of the inner dimension.
    pub(crate) steps: Range<usize>,
}

impl Reach {
    /// `cols` columns over all that is packed of the left side.
    #[inline(always)]
    pub(crate) fn all(a: Left<'_>, cols: usize) -> Reach {
        Reach { cols, steps: 0..a.steps }
    }
}

/// Adds the product of the packed blocks to `out` (or to 0), whose rows lie at a stride. `reach` says for each panel,
/// by its first row, which columns and steps it needs: what lies outside is left alone, or known to be 0.
///
/// # Safety
/// The rows of `a` of as many values as `reach` gives columns can be read and written at `out`.
#[inline(always)]
pub(crate) unsafe fn multiply<L: Lanes, M: Multiply>(
    l: L,
    a: Left<'_>,
    b: &PackedB,
    reach: impl Fn(usize) -> Reach,
    (out, stride): (*mut f32, usize),
    add: bool,
) {
    for row in (0..a.rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(a.rows - row);
        let Reach { cols, steps } = reach(row);
        assert!(
            steps.end <= a.steps.min(b.steps) && steps.start <= steps.end && cols <= b.cols,
            "a panel reaches past what is packed"
        );
        let left = a.panel(row / TILE_ROWS, &steps);
        for col in (0..cols).step_by(TILE_COLS) {
            let cols = TILE_COLS.min(cols - col);
            let right = b.panel(col / TILE_COLS).wrapping_add(steps.start * TILE_COLS);
            let out = out.wrapping_add(row * stride + col);
            // The next tile's results come from memory while this one is computed.
            for r in 0..TILE_ROWS {
                let next = out.wrapping_add(r * stride + TILE_COLS);
                prefetch_write(next);
                prefetch_write(next.wrapping_add(LANES));
            }
            let call = Call { layout: a.layout, steps: steps.len(), left, right };
            // SAFETY: panels hold these steps; the tile's rows and columns are inside `out` by the caller's promise.
            unsafe {
                if rows == TILE_ROWS && cols == TILE_COLS {
                    whole::<L, M>(l, call, (out, stride), add);
                } else {
                    let mut tile = [0.0f32; TILE_ROWS * TILE_COLS];
                    if add {
                        for r in 0..rows {
                            let from = out.add(r * stride);
                            std::ptr::copy_nonoverlapping(from, tile[r * TILE_COLS..].as_mut_ptr(), cols);
                        }
                    }
                    whole::<L, M>(l, call, (tile.as_mut_ptr(), TILE_COLS), add);
                    for r in 0..rows {
                        let to = out.add(r * stride);
                        std::ptr::copy_nonoverlapping(tile[r * TILE_COLS..].as_ptr(), to, cols);
                    }
                }
            }
        }
    }
}

/// Where a tile's words are.
#[derive(Clone, Copy)]
struct Call {
    layout: Layout,
    steps: usize,
    left: *const u32,
    right: *const u32,
}

/// A whole tile, in as many pieces as the family's registers ask for.
///
/// # Safety
/// Panels of `call.steps` steps; a whole tile at `out`.
#[inline(always)]
unsafe fn whole<L: Lanes, M: Multiply>(l: L, call: Call, (out, stride): (*mut f32, usize), add: bool) {
    const HALF: usize = TILE_ROWS / 2;
    const ROW: usize = PackedA::ROW;
    let Call { layout, steps, left, right } = call;
    // SAFETY: the caller's promise; pieces are inside the tile, and rows of a panel lie as its layout says.
    unsafe {
        if L::WIDE {
            return match layout {
                Layout::Rows => tile::<L, M, TILE_ROWS, 2, ROW, 1>(l, steps, left, right, out, stride, add),
                Layout::Steps => {
                    tile::<L, M, TILE_ROWS, 2, 1, TILE_ROWS>(l, steps, left, right, out, stride, add)
                }
                Layout::Turned => tile::<L, M, TILE_ROWS, 2, 1, ROW>(l, steps, left, right, out, stride, add),
            };
        }
        for piece in 0..4 {
            let (row, col) = (piece / 2 * HALF, piece % 2 * LANES);
            let (right, out) = (right.add(col), out.add(row * stride + col));
            match layout {
                Layout::Rows => {
                    tile::<L, M, HALF, 1, ROW, 1>(l, steps, left.add(row * ROW), right, out, stride, add);
                }
                Layout::Steps => {
                    tile::<L, M, HALF, 1, 1, TILE_ROWS>(l, steps, left.add(row), right, out, stride, add);
                }
                Layout::Turned => {
                    tile::<L, M, HALF, 1, 1, ROW>(l, steps, left.add(row), right, out, stride, add);
                }
            }
        }
    }
}

/// `ROWS` by `VECTORS · LANES` sums. A word of `A` is at `row · ROW + step · STEP`.
///
/// # Safety
/// As [`whole`], for this piece.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::needless_range_loop, reason = "registers, addressed by number")]
unsafe fn tile<
    L: Lanes,
    M: Multiply,
    const ROWS: usize,
    const VECTORS: usize,
    const ROW: usize,
    const STEP: usize,
>(
    l: L,
    steps: usize,
    left: *const u32,
    right: *const u32,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    // SAFETY: every address is inside a panel or the tile by the caller's promise.
    unsafe {
        let mut sums = [[l.splat(0.0); VECTORS]; ROWS];
        if add {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    sums[row][v] = l.load_at(out.add(row * stride + v * LANES));
                }
            }
        }
        for step in 0..steps {
            let mut b = [M::splat(l, 0); VECTORS];
            for v in 0..VECTORS {
                b[v] = M::load(l, right.add(step * TILE_COLS + v * LANES));
            }
            for row in 0..ROWS {
                let a = M::splat(l, *left.add(row * ROW + step * STEP));
                for v in 0..VECTORS {
                    sums[row][v] = M::multiply_add(l, a, b[v], sums[row][v]);
                }
            }
        }
        for row in 0..ROWS {
            for v in 0..VECTORS {
                let to = std::slice::from_raw_parts_mut(out.add(row * stride + v * LANES), LANES);
                l.store(sums[row][v], to);
            }
        }
    }
}

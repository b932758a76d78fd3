//! The tile of sums that stays in registers, once for `f32` and once for pairs of bf16.
//!
//! A step of the inner dimension loads two vectors of `B` and twelve words of `A`, and does twenty-four
//! multiply-adds. With 32 registers all 24 sums stay in them; families with fewer registers take the tile in quarters of
//! six rows by one vector, in the same order.

use std::ops::Range;

use super::sides::{Left, Right};
use super::{TILE_COLS, TILE_ROWS};
use crate::lanes::{LANES, Lanes, prefetch_read, prefetch_second, prefetch_write};

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

/// Where the values of a tile's sums come from.
#[derive(Clone, Copy)]
pub(crate) enum Begin {
    /// They begin at 0.
    Zero,
    /// They go on from what is there.
    There,
    /// They begin with these, which lie as the results do.
    From(*const f32),
}

impl Begin {
    /// The same, `count` values further on.
    #[inline(always)]
    pub(super) fn at(self, count: usize) -> Begin {
        match self {
            Begin::From(from) => Begin::From(from.wrapping_add(count)),
            other => other,
        }
    }

    /// Where they are, for results at `out`.
    #[inline(always)]
    fn values(self, out: *const f32) -> Option<*const f32> {
        match self {
            Begin::Zero => None,
            Begin::There => Some(out),
            Begin::From(from) => Some(from),
        }
    }
}

/// Writes the product of the packed blocks, added to what `begin` says, to `out`, whose rows lie at a stride. `reach` says
/// for each panel, by its first row, which columns and steps it needs: what lies outside is left alone, or known to be 0.
///
/// # Safety
/// The rows of `a` of as many values as `reach` gives columns can be read and written at `out`, and read where they begin.
#[inline(always)]
pub(crate) unsafe fn multiply<L: Lanes, M: Multiply>(
    l: L,
    a: Left<'_>,
    b: Right<'_>,
    reach: impl Fn(usize) -> Reach,
    (out, stride): (*mut f32, usize),
    begin: Begin,
) {
    for row in (0..a.rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(a.rows - row);
        let Reach { cols, steps } = reach(row);
        assert!(
            steps.end <= a.steps.min(b.steps) && steps.start <= steps.end && cols <= b.cols,
            "a panel reaches past what is packed"
        );
        let left = a.panel(row / TILE_ROWS, &steps);
        let padded = cols.div_ceil(TILE_COLS) * TILE_COLS;
        let next_panel = if row + TILE_ROWS < a.rows { a.beyond(row / TILE_ROWS) } else { a.after };
        for col in (0..cols).step_by(TILE_COLS) {
            let cols = TILE_COLS.min(cols - col);
            let right = b.panel(col / TILE_COLS, &steps);
            let at = row * stride + col;
            // What the next tile begins with, or the next panel's first, comes from memory while this one is computed.
            let next = if col + TILE_COLS < padded { at + TILE_COLS } else { at - col + TILE_ROWS * stride };
            for r in 0..TILE_ROWS {
                let at = next + r * stride;
                prefetch_write(out.wrapping_add(at));
                prefetch_write(out.wrapping_add(at + LANES));
                if let Begin::From(from) = begin {
                    prefetch_read(from.wrapping_add(at));
                    prefetch_read(from.wrapping_add(at + LANES));
                }
            }
            // So do some of the next panel's rows.
            if let Some(next) = next_panel {
                let rows = |col: usize| col * TILE_ROWS / padded;
                for r in rows(col)..rows(col + TILE_COLS) {
                    let row = next.wrapping_add(r * a.row);
                    for line in (0..steps.len() + LANES).step_by(LANES) {
                        prefetch_second(row.wrapping_add(line));
                    }
                }
            }
            let (out, begin) = (out.wrapping_add(at), begin.at(at));
            let words =
                Words { steps: steps.len(), left, row: a.row, left_step: a.step, right, right_step: b.step };
            // At the right edge half a tile may be enough.
            let vectors = cols.div_ceil(LANES);
            // SAFETY: panels hold these steps; the tile's rows and columns are inside `out` by the caller's promise.
            unsafe {
                if rows == TILE_ROWS && cols == vectors * LANES {
                    whole::<L, M>(l, words, vectors, (out, stride), begin);
                } else {
                    let mut tile = [0.0f32; TILE_ROWS * TILE_COLS];
                    if let Some(from) = begin.values(out) {
                        for r in 0..rows {
                            let from = from.add(r * stride);
                            std::ptr::copy_nonoverlapping(from, tile[r * TILE_COLS..].as_mut_ptr(), cols);
                        }
                    }
                    whole::<L, M>(l, words, vectors, (tile.as_mut_ptr(), TILE_COLS), Begin::There);
                    for r in 0..rows {
                        let to = out.add(r * stride);
                        std::ptr::copy_nonoverlapping(tile[r * TILE_COLS..].as_ptr(), to, cols);
                    }
                }
            }
        }
    }
}

/// Where a tile's words are: `left` with rows and steps so many words apart, `right` with steps so many words apart.
#[derive(Clone, Copy)]
struct Words {
    steps: usize,
    left: *const u32,
    row: usize,
    left_step: usize,
    right: *const u32,
    right_step: usize,
}

/// All rows of a tile and `vectors` (1 or 2) of its columns, in as many pieces as the family's registers ask for.
///
/// # Safety
/// The words of a whole tile; as many columns of it at `out`, and where it begins.
#[inline(always)]
unsafe fn whole<L: Lanes, M: Multiply>(
    l: L,
    words: Words,
    vectors: usize,
    (out, stride): (*mut f32, usize),
    begin: Begin,
) {
    const HALF: usize = TILE_ROWS / 2;
    // SAFETY: the caller's promise; pieces are inside the tile.
    unsafe {
        if L::WIDE {
            return match vectors {
                1 => tile::<L, M, TILE_ROWS, 1>(l, words, (out, stride), begin),
                _ => tile::<L, M, TILE_ROWS, 2>(l, words, (out, stride), begin),
            };
        }
        for piece in 0..2 * vectors {
            let (row, col) = (piece / vectors * HALF, piece % vectors * LANES);
            let at = row * stride + col;
            let words = Words { left: words.left.add(row * words.row), right: words.right.add(col), ..words };
            tile::<L, M, HALF, 1>(l, words, (out.add(at), stride), begin.at(at));
        }
    }
}

/// Steps after which words are needed that are asked for now.
const AHEAD: usize = 12;

/// `ROWS` (a multiple of three) by `VECTORS · LANES` sums.
///
/// # Safety
/// As [`whole`], for this piece.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "registers, addressed by number")]
unsafe fn tile<L: Lanes, M: Multiply, const ROWS: usize, const VECTORS: usize>(
    l: L,
    words: Words,
    (out, stride): (*mut f32, usize),
    begin: Begin,
) {
    // SAFETY: every address that is read or written is inside a panel or the tile by the caller's promise.
    unsafe {
        let mut sums = [[l.splat(0.0); VECTORS]; ROWS];
        if let Some(from) = begin.values(out) {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    sums[row][v] = l.load_at(from.add(row * stride + v * LANES));
                }
            }
        }
        // Three rows from one pointer: their distances are what an address can add.
        let Words { steps, row, left_step, mut right, right_step, .. } = words;
        let mut left = [words.left; 4];
        for third in 0..ROWS / 3 {
            left[third] = words.left.add(3 * third * row);
        }
        for _ in 0..steps {
            prefetch_read(right.wrapping_add(AHEAD * right_step));
            prefetch_read(right.wrapping_add(AHEAD * right_step + LANES));
            prefetch_read(left[0].wrapping_add(AHEAD * left_step));
            prefetch_read(left[0].wrapping_add(AHEAD * left_step + LANES));
            let mut b = [M::splat(l, 0); VECTORS];
            for v in 0..VECTORS {
                b[v] = M::load(l, right.add(v * LANES));
            }
            for r in 0..ROWS {
                let a = M::splat(l, *left[r / 3].add(r % 3 * row));
                for v in 0..VECTORS {
                    sums[r][v] = M::multiply_add(l, a, b[v], sums[r][v]);
                }
            }
            right = right.wrapping_add(right_step);
            for third in 0..ROWS / 3 {
                left[third] = left[third].wrapping_add(left_step);
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

//! The two sides of a product as the kernel reads them: how far apart the words of a panel are, wherever it lies.
//!
//! A panel of `A` has twelve rows, one of `B` 32 columns. `f32` that lies well is a panel where it is; what doesn't is
//! copied into one ([`pack`](super::pack)).

use std::ops::Range;

use super::kernel::Multiply;
use super::pack::PackedA;
use super::{TILE_COLS, TILE_ROWS, View};
use crate::lanes::LANES;

/// A piece of the inner dimension, in values.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) from: usize,
    pub(crate) len: usize,
}

/// Rows of the left side as the kernel reads them: packed, or where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(super) words: &'a [u32],
    pub(super) rows: usize,
    /// Words of the inner dimension.
    pub(super) steps: usize,
    /// Words from one row to the next.
    pub(super) row: usize,
    /// Words from one step to the next.
    pub(super) step: usize,
    /// Words from one panel of twelve rows to the next.
    pub(super) panel: usize,
    /// Where rows lie in memory one after the other: those that follow the last panel.
    pub(super) after: Option<*const u32>,
}

impl<'a> Left<'a> {
    /// `rows` rows of a tile of `f32` whose rows lie [`PackedA::ROW`] apart: what packing would copy.
    pub(crate) fn rows(tile: &'a [f32], rows: usize, steps: usize) -> Left<'a> {
        let row = PackedA::ROW;
        Left { words: words(tile), rows, steps, row, step: 1, panel: TILE_ROWS * row, after: None }
    }

    /// The same tile turned: its columns are rows, its rows are steps.
    pub(crate) fn turned(tile: &'a [f32], rows: usize, steps: usize) -> Left<'a> {
        Left { words: words(tile), rows, steps, row: 1, step: PackedA::ROW, panel: TILE_ROWS, after: None }
    }

    /// Whole panels of rows of `a` (first and count) where they are, if nothing is to be gained by copying them. The
    /// thread will likely go on with the row and step `after`.
    pub(crate) fn in_place<M: Multiply>(
        a: View<'a>,
        (first, count): (usize, usize),
        steps: Steps,
        after: Option<(usize, usize)>,
    ) -> Option<Left<'a>> {
        if M::VALUES > 1 || steps.len == 0 || crowded(a) {
            return None;
        }
        let (rows, steps, stride) = (count / TILE_ROWS * TILE_ROWS, (steps.from, steps.len), a.stride);
        Some(if a.turned {
            let words = words(&a.values[steps.0 * stride + first..]);
            Left { words, rows, steps: steps.1, row: 1, step: stride, panel: TILE_ROWS, after: None }
        } else {
            let words = words(&a.values[first * stride + steps.0..]);
            let word = |(row, step)| a.values.as_ptr().cast::<u32>().wrapping_add(row * stride + step);
            Left {
                words,
                rows,
                steps: steps.1,
                row: stride,
                step: 1,
                panel: TILE_ROWS * stride,
                after: after.map(word),
            }
        })
    }

    /// The first word of the panel behind panel `index`, where `after` says that there's something to ask for.
    #[inline(always)]
    pub(super) fn beyond(&self, index: usize) -> Option<*const u32> {
        self.after.map(|_| self.words.as_ptr().wrapping_add((index + 1) * self.panel))
    }

    /// The words of panel `index` from the first of `steps` on.
    ///
    /// # Panics
    /// If the panel's words of these steps are not there.
    pub(super) fn panel(&self, index: usize, steps: &Range<usize>) -> *const u32 {
        let last = steps.end.saturating_sub(1) * self.step + (TILE_ROWS - 1) * self.row;
        let panel = &self.words[index * self.panel..];
        assert!(last < panel.len(), "a panel reaches past its words");
        panel.as_ptr().wrapping_add(steps.start * self.step)
    }
}

/// Columns of the right side as the kernel reads them: packed, or where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(super) words: &'a [u32],
    pub(super) cols: usize,
    /// Words of the inner dimension.
    pub(super) steps: usize,
    /// Words from one step to the next.
    pub(super) step: usize,
    /// Words from one panel of 32 columns to the next.
    pub(super) panel: usize,
}

impl<'a> Right<'a> {
    /// Whether whole panels of `cols` columns of `b` can be read where they are, and nothing is to be gained by copying
    /// them.
    pub(crate) fn lies_well<M: Multiply>(b: View<'_>, cols: usize) -> bool {
        let aligned = b.stride.is_multiple_of(LANES) && b.values.as_ptr().addr().is_multiple_of(64);
        M::VALUES == 1 && !b.turned && cols.is_multiple_of(TILE_COLS) && aligned && !crowded(b)
    }

    /// Columns of `b` (first and count) that [lie well](Right::lies_well).
    pub(crate) fn in_place(b: View<'a>, steps: Steps, (first, cols): (usize, usize)) -> Right<'a> {
        let words = words(&b.values[steps.from * b.stride + first..]);
        Right { words, cols, steps: steps.len, step: b.stride, panel: TILE_COLS }
    }

    /// The words of panel `index` from the first of `steps` on.
    ///
    /// # Panics
    /// If the panel's words of these steps are not there.
    pub(super) fn panel(&self, index: usize, steps: &Range<usize>) -> *const u32 {
        let panel = &self.words[index * self.panel..];
        assert!(
            steps.is_empty() || (steps.end - 1) * self.step + TILE_COLS <= panel.len(),
            "a panel reaches past its words"
        );
        panel.as_ptr().wrapping_add(steps.start * self.step)
    }
}

/// Whether the same column of many rows falls into the same few sets of a first-level cache, so that a copy is better.
fn crowded(view: View<'_>) -> bool {
    (view.stride * size_of::<f32>()).div_ceil(64).is_multiple_of(32)
}

pub(super) fn words(values: &[f32]) -> &[u32] {
    // SAFETY: any bits of an f32 are a u32 of the same size and alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

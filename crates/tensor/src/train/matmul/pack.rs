//! The two sides of a product in the order in which the kernel reads them: where they lie, or copied, and rounded if
//! asked.
//!
//! A panel of `B` has, step by step, the words of 32 columns; a panel of `A` has twelve rows. [`Left`] and [`Right`] say
//! how far apart a panel's words are, so memory that lies well is a panel already. In a copy, `B` lies step by step;
//! `A` one row after the other where the rows lie in memory as they are (a plain copy), or step by step where the matrix
//! comes turned (again pieces of memory rows). So only a turned `B` has to be turned in the copy, in squares of sixteen.
//!
//! Rows and columns past the matrix are 0 in a copied panel; steps past it are 0 in the last pair.

use std::ops::Range;

use super::kernel::Multiply;
use super::{BLOCK_STEPS, TILE_COLS, TILE_ROWS, View};
use crate::buffer::Buffer;
use crate::lanes::{LANES, Lanes, bf16_pair, prefetch_read};

/// Steps of a turned `A` that are on their way from memory while one is packed.
const AHEAD: usize = 8;

/// A piece of the inner dimension, in values.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) from: usize,
    pub(crate) len: usize,
}

/// Packed rows of the left side.
#[derive(Default)]
pub(crate) struct PackedA {
    words: Buffer<u32>,
    rows: usize,
    /// Words of the inner dimension.
    steps: usize,
    by_rows: bool,
}

/// Rows of the left side as the kernel reads them: packed, or where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    words: &'a [u32],
    pub(super) rows: usize,
    /// Words of the inner dimension.
    pub(super) steps: usize,
    /// Words from one row to the next.
    pub(super) row: usize,
    /// Words from one step to the next.
    pub(super) step: usize,
    /// Words from one panel of twelve rows to the next.
    panel: usize,
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
    words: &'a [u32],
    pub(super) cols: usize,
    /// Words of the inner dimension.
    pub(super) steps: usize,
    /// Words from one step to the next.
    pub(super) step: usize,
    /// Words from one panel of 32 columns to the next.
    panel: usize,
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

fn words(values: &[f32]) -> &[u32] {
    // SAFETY: any bits of an f32 are a u32 of the same size and alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// Packed columns of the right side.
#[derive(Default)]
pub(crate) struct PackedB {
    words: Buffer<u32>,
    pub(super) cols: usize,
    pub(super) steps: usize,
}

/// At least `len` words.
///
/// # Panics
/// If the system has no memory for a few hundred kilobytes.
fn grown(words: &mut Buffer<u32>, len: usize) {
    if words.len() < len {
        #[allow(clippy::expect_used, reason = "as any allocation of this length")]
        let larger = Buffer::zeroed(len).expect("memory for a packed block");
        *words = larger;
    }
}

/// The word of two neighbouring steps, or of one; steps past `end` are 0.
#[inline(always)]
fn word<M: Multiply>(at: impl Fn(usize) -> f32, step: usize, end: usize) -> u32 {
    let value = |step: usize| if step < end { at(step) } else { 0.0 };
    if M::VALUES == 1 { value(step).to_bits() } else { bf16_pair(value(step), value(step + 1)) }
}

impl PackedA {
    /// Words from one row of a panel to the next, where they lie one after the other. Not a power of two, so that the
    /// rows don't all fall into the same set of the cache.
    pub(crate) const ROW: usize = BLOCK_STEPS + LANES;

    /// What was packed last.
    pub(crate) fn left(&self) -> Left<'_> {
        let (row, step) = if self.by_rows { (PackedA::ROW, 1) } else { (1, TILE_ROWS) };
        let panel = TILE_ROWS * PackedA::ROW;
        Left { words: &self.words, rows: self.rows, steps: self.steps, row, step, panel, after: None }
    }

    /// Packs `rows` (first and count) of `a`, whose extent the caller has checked.
    #[inline(always)]
    pub(crate) fn pack<L: Lanes, M: Multiply>(
        &mut self,
        l: L,
        a: View<'_>,
        (first, count): (usize, usize),
        steps: Steps,
    ) {
        assert!(steps.len <= BLOCK_STEPS * M::VALUES);
        self.rows = count;
        self.steps = steps.len.div_ceil(M::VALUES);
        self.by_rows = !a.turned;
        let panels = count.div_ceil(TILE_ROWS);
        grown(&mut self.words, panels * TILE_ROWS * PackedA::ROW);
        if self.by_rows {
            for row in 0..panels * TILE_ROWS {
                let out = &mut self.words[row * PackedA::ROW..][..self.steps];
                if row >= count {
                    out.fill(0);
                    continue;
                }
                let from = (first + row) * a.stride + steps.from;
                let next = a.values.as_ptr().wrapping_add(from + 2 * a.stride);
                for line in (0..steps.len).step_by(LANES) {
                    prefetch_read(next.wrapping_add(line));
                }
                pack_row::<L, M>(l, &a.values[from..from + steps.len], out);
            }
            return;
        }
        self.pack_turned::<L, M>(l, a, (first, count), steps);
    }

    /// Memory rows are steps: each is read once, from panel to panel.
    #[inline(always)]
    fn pack_turned<L: Lanes, M: Multiply>(
        &mut self,
        l: L,
        a: View<'_>,
        (first, count): (usize, usize),
        steps: Steps,
    ) {
        let panels = count.div_ceil(TILE_ROWS);
        for index in 0..self.steps {
            let from = (steps.from + index * M::VALUES) * a.stride + first;
            let even = &a.values[from..];
            let odd = (M::VALUES == 2 && index * 2 + 1 < steps.len).then(|| &a.values[from + a.stride..]);
            // The processor doesn't foresee short pieces that lie far apart.
            for ahead in 0..M::VALUES {
                let next = a.values.as_ptr().wrapping_add(from + (AHEAD * M::VALUES + ahead) * a.stride);
                for line in (0..count + LANES).step_by(LANES) {
                    prefetch_read(next.wrapping_add(line));
                }
            }
            for panel in 0..panels {
                let row = panel * TILE_ROWS;
                let rows = TILE_ROWS.min(count - row);
                let out = &mut self.words[panel * TILE_ROWS * PackedA::ROW + index * TILE_ROWS..][..LANES];
                // Sixteen words are written where twelve belong: the next step overwrites the other four, and a panel
                // has room for more steps than it gets. So long as there are sixteen values to read.
                let enough = |x: &[f32]| rows == TILE_ROWS && x.len() >= row + LANES;
                match odd {
                    None if M::VALUES == 1 && enough(even) => {
                        out.copy_from_slice(words(&even[row..row + LANES]));
                    }
                    Some(odd) if enough(odd) => {
                        let (even, odd) = (&even[row..row + LANES], &odd[row..row + LANES]);
                        // SAFETY: sixteen values and words each.
                        unsafe { l.round_rows_at(even.as_ptr(), odd.as_ptr(), out.as_mut_ptr()) };
                    }
                    _ => {
                        let at = |x: &[f32], lane: usize| if lane < rows { x[row + lane] } else { 0.0 };
                        for (lane, out) in out[..TILE_ROWS].iter_mut().enumerate() {
                            let even = at(even, lane);
                            *out = if M::VALUES == 1 {
                                even.to_bits()
                            } else {
                                bf16_pair(even, odd.map_or(0.0, |odd| at(odd, lane)))
                            };
                        }
                    }
                }
            }
        }
    }
}

/// One row of neighbouring steps.
#[inline(always)]
fn pack_row<L: Lanes, M: Multiply>(l: L, row: &[f32], out: &mut [u32]) {
    if M::VALUES == 1 {
        out.copy_from_slice(words(row));
        return;
    }
    let whole = row.len() / (2 * LANES);
    for index in 0..whole {
        let (x, out) = (&row[index * 2 * LANES..][..2 * LANES], &mut out[index * LANES..][..LANES]);
        // SAFETY: both are as long as it takes.
        unsafe { l.round_neighbours_at(x.as_ptr(), out.as_mut_ptr()) };
    }
    for (index, out) in out.iter_mut().enumerate().skip(whole * LANES) {
        *out = word::<M>(|step| row[step], index * 2, row.len());
    }
}

impl PackedB {
    /// Words from one panel to the next. Not a multiple of a page: a step's words go to every panel, and would all fall
    /// into the same set of the cache.
    fn pitch(&self) -> usize {
        self.steps * TILE_COLS + TILE_COLS
    }

    /// What was packed last.
    pub(crate) fn right(&self) -> Right<'_> {
        let (words, panel) = (&*self.words, self.pitch());
        Right { words, cols: self.cols, steps: self.steps, step: TILE_COLS, panel }
    }

    /// Packs `cols` (first and count) of `b`, whose extent the caller has checked.
    #[inline(always)]
    pub(crate) fn pack<L: Lanes, M: Multiply>(
        &mut self,
        l: L,
        b: View<'_>,
        steps: Steps,
        (first, count): (usize, usize),
    ) {
        assert!(steps.len <= BLOCK_STEPS * M::VALUES);
        self.cols = count;
        self.steps = steps.len.div_ceil(M::VALUES);
        let panels = count.div_ceil(TILE_COLS);
        let len = panels * self.pitch();
        grown(&mut self.words, len);
        if b.turned {
            self.pack_turned::<L, M>(l, b, steps, first);
        } else {
            self.pack_plain::<L, M>(l, b, steps, first);
        }
    }

    /// Memory rows are steps.
    #[inline(always)]
    fn pack_plain<L: Lanes, M: Multiply>(&mut self, l: L, b: View<'_>, steps: Steps, first: usize) {
        let pitch = self.pitch();
        for index in 0..self.steps {
            let step = steps.from + index * M::VALUES;
            let even = &b.values[step * b.stride + first..][..self.cols];
            let odd = (M::VALUES == 2 && index * 2 + 1 < steps.len)
                .then(|| &b.values[(step + 1) * b.stride + first..][..self.cols]);
            for ahead in 0..M::VALUES {
                let next =
                    b.values.as_ptr().wrapping_add((step + AHEAD * M::VALUES + ahead) * b.stride + first);
                for line in (0..self.cols).step_by(LANES) {
                    prefetch_read(next.wrapping_add(line));
                }
            }
            for col in (0..self.cols).step_by(LANES) {
                let at = col / TILE_COLS * pitch + index * TILE_COLS + col % TILE_COLS;
                let out = &mut self.words[at..at + LANES];
                let n = LANES.min(self.cols - col);
                if n < LANES || (M::VALUES == 2 && odd.is_none()) {
                    for (lane, out) in out.iter_mut().enumerate() {
                        let x = |row: &[f32]| if lane < n { row[col + lane] } else { 0.0 };
                        *out = if M::VALUES == 1 {
                            x(even).to_bits()
                        } else {
                            bf16_pair(x(even), odd.map_or(0.0, x))
                        };
                    }
                } else if let Some(odd) = odd {
                    let (even, odd) = (&even[col..col + LANES], &odd[col..col + LANES]);
                    // SAFETY: sixteen values and words each.
                    unsafe { l.round_rows_at(even.as_ptr(), odd.as_ptr(), out.as_mut_ptr()) };
                } else {
                    out.copy_from_slice(words(&even[col..col + LANES]));
                }
            }
            // The last panel's second vector, where no column falls into it.
            if (self.cols - 1) % TILE_COLS < LANES {
                let at = (self.cols - 1) / TILE_COLS * pitch + index * TILE_COLS + LANES;
                self.words[at..at + LANES].fill(0);
            }
        }
    }

    /// Memory rows are columns: squares of sixteen words are turned.
    #[inline(always)]
    fn pack_turned<L: Lanes, M: Multiply>(&mut self, l: L, b: View<'_>, steps: Steps, first: usize) {
        let (panel_words, pitch) = (self.steps * TILE_COLS, self.pitch());
        if panel_words == 0 {
            return;
        }
        let mut pairs = [0u32; LANES * LANES];
        for col in (0..self.cols.next_multiple_of(TILE_COLS)).step_by(LANES) {
            let cols = LANES.min(self.cols.saturating_sub(col));
            let panel = &mut self.words[col / TILE_COLS * pitch..][..panel_words];
            let out = &mut panel[col % TILE_COLS..];
            let row = |lane: usize| &b.values[(first + col + lane) * b.stride + steps.from..][..steps.len];
            let whole = if cols == LANES { steps.len / (LANES * M::VALUES) * LANES } else { 0 };
            for index in (0..whole).step_by(LANES) {
                let to = &mut out[index * TILE_COLS..];
                assert!(to.len() >= (LANES - 1) * TILE_COLS + LANES);
                if M::VALUES == 1 {
                    let last = &b.values[(first + col) * b.stride + steps.from + index..];
                    assert!(last.len() >= (LANES - 1) * b.stride + LANES);
                    // SAFETY: both squares are inside their slices by the assertions.
                    unsafe { l.transpose_at(last.as_ptr().cast(), b.stride, to.as_mut_ptr(), TILE_COLS) };
                } else {
                    for lane in 0..LANES {
                        let x = &row(lane)[index * 2..][..2 * LANES];
                        // SAFETY: 32 values, and sixteen words of the square.
                        unsafe { l.round_neighbours_at(x.as_ptr(), pairs[lane * LANES..].as_mut_ptr()) };
                    }
                    // SAFETY: `pairs` is a square, and the assertion above.
                    unsafe { l.transpose_at(pairs.as_ptr(), LANES, to.as_mut_ptr(), TILE_COLS) };
                }
            }
            for index in whole..self.steps {
                for lane in 0..LANES {
                    let x = |step: usize| row(lane)[step];
                    out[index * TILE_COLS + lane] =
                        if lane < cols { word::<M>(x, index * M::VALUES, steps.len) } else { 0 };
                }
            }
        }
    }
}

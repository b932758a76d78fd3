//! Copies of blocks of a matrix in the order in which the kernel reads them, rounded if asked: where they can't be read
//! where they lie ([`sides`](super::sides)).
//!
//! A panel of `B` has, step by step, the words of its 32 columns. A panel of `A` has twelve rows: one after the other
//! where the rows lie in memory as they are (a plain copy), or step by step where the matrix comes turned (again
//! pieces of memory rows). So only a turned `B` has to be turned in the copy, in squares of sixteen.
//!
//! Rows and columns past the matrix are 0 in the panel; steps past it are 0 in the last pair.

use super::kernel::Multiply;
use super::sides::{Left, Right, Steps, words};
use super::{BLOCK_STEPS, TILE_COLS, TILE_ROWS, View};
use crate::buffer::Buffer;
use crate::lanes::{LANES, Lanes, bf16_pair, prefetch_read};

/// Steps of a turned `A` that are on their way from memory while one is packed.
const AHEAD: usize = 8;

/// Packed rows of the left side.
#[derive(Default)]
pub(crate) struct PackedA {
    words: Buffer<u32>,
    rows: usize,
    /// Words of the inner dimension.
    steps: usize,
    by_rows: bool,
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

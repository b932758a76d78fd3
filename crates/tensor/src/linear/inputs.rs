//! Input rows turned into what the weights want, once, however many matrices read them.

use super::quantize::Quantize;
use super::tile::{BLOCK_WORDS, HALF_WORDS, Tiles};
use crate::lanes;
use crate::matrix::InputKind;
use crate::matrix::panel::BLOCK;
use crate::norm::rms_norm;
use crate::pool::Disjoint;
use crate::{Cpu, Pool};

/// Below this many values one thread prepares faster than two meet.
const ALONE: usize = 4096;

/// Input rows in the form the weights want: made once, used by every matrix that reads them.
#[derive(Default)]
pub struct Inputs {
    rows: usize,
    cols: usize,
    kind: Option<InputKind>,
    /// By tile; see [`super::tile::Tile::words`].
    words: Vec<u32>,
    halves: Vec<u32>,
    normed: Vec<f32>,
}

impl Inputs {
    /// Empty; grows to its first use and keeps its memory.
    pub fn new() -> Inputs {
        Inputs::default()
    }

    /// Rows prepared.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in each.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What they were prepared as; `None` before the first time.
    pub fn kind(&self) -> Option<InputKind> {
        self.kind
    }

    /// Turns `x` (`n` rows of `cols` values) into `kind`.
    ///
    /// # Panics
    /// If `x` is not whole rows, or `kind` is [`InputKind::Int8`] and `cols` no multiple of 32 (no matrix that
    /// wants int8 has such rows).
    pub fn prepare(&mut self, pool: &Pool, x: &[f32], cols: usize, kind: InputKind) {
        let rows = x.len().checked_div(cols).unwrap_or(0);
        assert_eq!(rows * cols, x.len(), "inputs are not whole rows of {cols} values");
        let (row_words, row_halves) = row_words(kind, cols);
        (self.rows, self.cols, self.kind) = (rows, cols, Some(kind));
        self.words.resize(rows * row_words, 0);
        self.halves.resize(rows * row_halves, 0);
        let tiles = Tiles::new(rows);
        let (words, halves) = (Disjoint::new(&mut self.words), Disjoint::new(&mut self.halves));
        let one = |index: usize| {
            let (first, count) = tiles.tile(index);
            let part = |per_row: usize| first * per_row..(first + count) * per_row;
            // SAFETY: tiles are disjoint ranges of rows, and each is prepared once.
            let (words, halves) = unsafe { (words.part(part(row_words)), halves.part(part(row_halves))) };
            prepare_tile(pool.cpu(), &x[part(cols)], cols, kind, words, halves);
        };
        if x.len() <= ALONE {
            (0..tiles.count).for_each(one);
        } else {
            pool.run(|worker| worker.split(tiles.count, 1).for_each(one));
        }
    }

    /// RMS norm and preparation in one pass: as [`crate::norm::rms_norm`] into a temporary, then [`Inputs::prepare`].
    pub fn prepare_normed(&mut self, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, kind: InputKind) {
        let mut normed = std::mem::take(&mut self.normed);
        normed.resize(x.len(), 0.0);
        rms_norm(pool, x, weight, eps, &mut normed);
        self.prepare(pool, &normed, weight.len(), kind);
        self.normed = normed;
    }

    pub(crate) fn tiles(&self) -> Tiles {
        Tiles::new(self.rows)
    }

    /// The words and halves of one tile, and its rows.
    pub(crate) fn tile(&self, index: usize) -> (usize, usize, &[u32], &[u32]) {
        let (first, count) = self.tiles().tile(index);
        let (words, halves) = self.kind.map_or((0, 0), |kind| row_words(kind, self.cols));
        let part = |per_row: usize| first * per_row..(first + count) * per_row;
        (first, count, &self.words[part(words)], &self.halves[part(halves)])
    }
}

/// Words that a prepared row takes, and words of its halves.
fn row_words(kind: InputKind, cols: usize) -> (usize, usize) {
    match kind {
        InputKind::F32 => (cols, 0),
        InputKind::Bf16 => (cols.div_ceil(2), 0),
        InputKind::Int8 => {
            assert!(cols.is_multiple_of(BLOCK), "{cols} columns are not blocks of {BLOCK}");
            (cols / BLOCK * BLOCK_WORDS, cols / BLOCK * HALF_WORDS)
        }
    }
}

fn prepare_tile(cpu: Cpu, x: &[f32], cols: usize, kind: InputKind, words: &mut [u32], halves: &mut [u32]) {
    match kind {
        InputKind::Int8 => lanes::dispatch(cpu, Quantize { x, cols, words, halves }),
        InputKind::Bf16 => lanes::dispatch(cpu, Pairs { x, cols, words }),
        InputKind::F32 => {
            let rows = x.len() / cols;
            for (row, x) in x.chunks_exact(cols).enumerate() {
                for (x, to) in x.iter().zip(words[row..].iter_mut().step_by(rows)) {
                    *to = x.to_bits();
                }
            }
        }
    }
}

/// The rows of one tile as pairs of bf16: integer arithmetic, which the compiler puts into vectors for each family.
struct Pairs<'a> {
    x: &'a [f32],
    cols: usize,
    words: &'a mut [u32],
}

impl lanes::Kernel for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: lanes::Lanes>(self, _: L) {
        let rows = self.x.len() / self.cols;
        for (row, x) in self.x.chunks_exact(self.cols).enumerate() {
            let mut words = self.words[row..].iter_mut().step_by(rows);
            let (blocks, rest) = x.as_chunks::<BLOCK>();
            for x in blocks {
                let pairs: [u32; BLOCK / 2] = std::array::from_fn(|i| bf16_pair(x[2 * i], x[2 * i + 1]));
                for pair in pairs {
                    if let Some(word) = words.next() {
                        *word = pair;
                    }
                }
            }
            for (pair, word) in rest.chunks(2).zip(words) {
                *word = bf16_pair(pair[0], pair.get(1).copied().unwrap_or(0.0));
            }
        }
    }
}

/// Two values rounded to nearest even, the first in the low half. NaN stays NaN.
#[inline(always)]
fn bf16_pair(low: f32, high: f32) -> u32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        if x.is_nan() { bits | 0x0040_0000 } else { nearest }
    };
    round(low) >> 16 | round(high) & 0xffff_0000
}

//! Input rows turned into what the weights want, once, however many matrices read them.

use std::ops::Range;

use super::quantize::Quantize;
use super::tile::{BLOCK_WORDS, HALF_WORDS, Tiles};
#[cfg(target_arch = "x86_64")]
use crate::Family;
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
        let words = grown(&mut self.words, rows * row_words);
        let halves = grown(&mut self.halves, rows * row_halves);
        let tiles = Tiles::new(rows);
        let (words, halves) = (Disjoint::new(words), Disjoint::new(halves));
        // Work is shared out in blocks of columns of a tile, since a batch of a few rows is a single tile.
        let blocks = cols.div_ceil(BLOCK);
        let some = |mut share: Range<usize>| {
            while !share.is_empty() {
                let (tile, block) = (share.start / blocks, share.start % blocks);
                let end = blocks.min(block + share.len());
                share.start += end - block;
                let (first, count) = tiles.tile(tile);
                let columns = block * BLOCK..(end * BLOCK).min(cols);
                let part = |words: fn(InputKind, usize) -> usize, per_row: usize| {
                    first * per_row + count * words(kind, columns.start)
                        ..first * per_row + count * words(kind, columns.end)
                };
                // SAFETY: blocks of tiles are disjoint ranges of words, and each is prepared once.
                let (words, halves) = unsafe {
                    (words.part(part(words_before, row_words)), halves.part(part(halves_before, row_halves)))
                };
                let x = &x[first * cols..(first + count) * cols];
                prepare_columns(pool.cpu(), kind, Columns { x, cols, columns, words, halves });
            }
        };
        if x.len() <= ALONE {
            some(0..tiles.count * blocks);
        } else {
            pool.run(|worker| some(worker.split(tiles.count * blocks, 1)));
        }
    }

    /// RMS norm and preparation in one pass: as [`crate::norm::rms_norm`] into a temporary, then [`Inputs::prepare`].
    pub fn prepare_normed(&mut self, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, kind: InputKind) {
        let mut memory = std::mem::take(&mut self.normed);
        let normed = grown(&mut memory, x.len());
        rms_norm(pool, x, weight, eps, normed);
        self.prepare(pool, normed, weight.len(), kind);
        self.normed = memory;
    }

    pub(crate) fn tiles(&self) -> Tiles {
        Tiles::new(self.rows)
    }

    /// The tiles, each with its first row and its rows.
    pub(crate) fn each_tile(&self) -> Vec<TileInputs<'_>> {
        let (words, halves) = self.kind.map_or((0, 0), |kind| row_words(kind, self.cols));
        let tiles = self.tiles();
        let tile = |index| {
            let (first, rows) = tiles.tile(index);
            let part = |per_row: usize| first * per_row..(first + rows) * per_row;
            TileInputs { first, rows, words: &self.words[part(words)], halves: &self.halves[part(halves)] }
        };
        (0..tiles.count).map(tile).collect()
    }
}

/// What a kernel reads of one tile; see [`super::tile::Tile`].
#[derive(Clone, Copy)]
pub(crate) struct TileInputs<'a> {
    /// The first row.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) words: &'a [u32],
    pub(crate) halves: &'a [u32],
}

/// The first `len` values of a memory that only grows, so that batches that come and go clear nothing. Every value is
/// written before it is read.
fn grown<T: Default + Clone>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    &mut memory[..len]
}

/// Words that a prepared row takes, and words of its halves.
fn row_words(kind: InputKind, cols: usize) -> (usize, usize) {
    let whole = kind != InputKind::Int8 || cols.is_multiple_of(BLOCK);
    assert!(whole, "{cols} columns are not blocks of {BLOCK}");
    (words_before(kind, cols), halves_before(kind, cols))
}

/// Words of a row before `column`, the first of a block or the row's end.
fn words_before(kind: InputKind, column: usize) -> usize {
    match kind {
        InputKind::F32 => column,
        InputKind::Bf16 => column.div_ceil(2),
        InputKind::Int8 => column / BLOCK * BLOCK_WORDS,
    }
}

/// Words of a row's halves before `column`.
fn halves_before(kind: InputKind, column: usize) -> usize {
    if kind == InputKind::Int8 { column / BLOCK * HALF_WORDS } else { 0 }
}

/// Some columns of all rows of a tile, and where they go.
pub(super) struct Columns<'a> {
    /// The tile's rows, `cols` values each.
    pub(super) x: &'a [f32],
    pub(super) cols: usize,
    /// Whole blocks, the row's last aside.
    pub(super) columns: Range<usize>,
    /// The tile's words (see [`super::tile::Tile::words`]) and halves of these columns.
    pub(super) words: &'a mut [u32],
    pub(super) halves: &'a mut [u32],
}

fn prepare_columns(cpu: Cpu, kind: InputKind, columns: Columns<'_>) {
    match kind {
        #[cfg(target_arch = "x86_64")]
        InputKind::Int8 if cpu.family() == Family::Avx512 && columns.x.len() > columns.cols => {
            // SAFETY: a `Cpu` of this family exists only where its instructions do.
            unsafe { super::quantize::avx512::quantize(columns) }
        }
        InputKind::Int8 => lanes::dispatch(cpu, Quantize(columns)),
        InputKind::Bf16 => lanes::dispatch(cpu, Pairs(columns)),
        InputKind::F32 => {
            let Columns { x, cols, columns, words, .. } = columns;
            let rows = x.len() / cols;
            for (row, x) in x.chunks_exact(cols).enumerate() {
                for (x, to) in x[columns.clone()].iter().zip(words[row..].iter_mut().step_by(rows)) {
                    *to = x.to_bits();
                }
            }
        }
    }
}

/// Pairs of bf16: integer arithmetic, which the compiler puts into vectors for each family.
struct Pairs<'a>(Columns<'a>);

impl lanes::Kernel for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: lanes::Lanes>(self, _: L) {
        let Columns { x, cols, columns, words, .. } = self.0;
        let rows = x.len() / cols;
        for (row, x) in x.chunks_exact(cols).enumerate() {
            let mut words = words[row..].iter_mut().step_by(rows);
            let (blocks, rest) = x[columns.clone()].as_chunks::<BLOCK>();
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

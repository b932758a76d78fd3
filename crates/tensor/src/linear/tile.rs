//! What a kernel gets and gives: one panel of weights against a few rows of activations.
//!
//! Rows of a batch are grouped into tiles of at most [`TILE`] (as even as possible), and prepared inputs are laid
//! out tile by tile in the order in which a kernel reads them: one pointer walks them, and every distance is a
//! constant. With twelve rows an AVX-512 kernel keeps twelve integer and twelve float sums in registers and loads
//! one register of weights for twelve dot products.

use crate::matrix::panel::{LANES, Layout};

/// Most rows in a tile.
pub(crate) const TILE: usize = 12;

/// 32-bit words of a prepared int8 block of one row: 8 of codes, scale, scale × sum, −sum.
pub(crate) const BLOCK_WORDS: usize = 11;

/// Words of the same block's halves: −sum and −sum, scale × sum and scale × sum.
pub(crate) const HALF_WORDS: usize = 4;

/// The sums of one tile: a row of sixteen lanes for each input row.
#[repr(align(64))]
pub(crate) struct Sums(pub(crate) [[f32; LANES]; TILE]);

/// One kernel call.
pub(crate) struct Tile<'a> {
    pub(crate) layout: &'a Layout,
    /// The weights, `layout.bytes` long.
    pub(crate) panel: &'a [u8],
    /// Input rows, `1..=TILE`.
    pub(crate) rows: usize,
    /// Prepared inputs, by [`crate::matrix::InputKind`]:
    ///
    /// - `Int8`: for each block of 32 columns, `rows` words of codes (four columns each) for each of eight groups,
    ///   then `rows` times the scale, `rows` times scale × sum of codes, `rows` times −sum of codes;
    /// - `F32`: for each column, `rows` values;
    /// - `Bf16`: for each pair of columns, `rows` words (the first column in the low half).
    pub(crate) words: &'a [u32],
    /// `Int8` only; for each block −sum of the first half for each row, of the second, then scale × sum likewise.
    pub(crate) halves: &'a [u32],
    /// Where the kernel prefetches while it reads the panel: as many bytes as the panel has. Null for nowhere.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only AVX-512 kernels prefetch"))]
    pub(crate) ahead: *const u8,
}

/// Computes the sums of `tile.rows` rows.
///
/// # Safety
/// The machine has the instructions of the family that this kernel belongs to.
pub(crate) type Kernel = unsafe fn(tile: &Tile<'_>, sums: &mut Sums);

/// How `rows` rows are cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    rows: usize,
    pub(crate) count: usize,
}

impl Tiles {
    pub(crate) fn new(rows: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(TILE) }
    }

    /// The first row of tile `index` and its rows; `index == count` gives the end.
    pub(crate) fn tile(self, index: usize) -> (usize, usize) {
        let (each, more) = (self.rows / self.count.max(1), self.rows % self.count.max(1));
        (index * each + index.min(more), each + usize::from(index < more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_rows_evenly() {
        for rows in 0..200 {
            let tiles = Tiles::new(rows);
            let mut next = 0;
            for index in 0..tiles.count {
                let (first, count) = tiles.tile(index);
                assert_eq!(first, next);
                assert!((1..=TILE).contains(&count) && count + 1 >= rows / tiles.count);
                next = first + count;
            }
            assert_eq!(next, rows);
        }
    }
}

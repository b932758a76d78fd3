//! The paged key and value cache: blocks of [`BLOCK_TOKENS`] tokens in half precision.
//!
//! Within a block, keys are stored with one lane a token and values with one lane a dimension, so that neither
//! product needs a sum across lanes (see [`crate::attention`]).
//!
//! Memory order is block, layer, head, then keys `[head_dim][16 tokens]` and values `[16 tokens][head_dim]`. A
//! block is one stretch of memory over all layers, so a cache takes only as much memory as the blocks in use;
//! one head's keys and values of a block lie side by side, for 64 dimensions exactly one 4 KiB page.
//!
//! What is stored is always finite, so that a masked key times a probability of 0 stays 0.

use crate::attention::Span;
use crate::buffer::Buffer;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::norm::FORK_VALUES;
use crate::pool::Disjoint;
use crate::{Error, Pool};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// A block's number, `0..blocks`.
pub type BlockId = u32;

/// The largest finite half-precision value.
const HALF_MAX: f32 = 65504.0;

/// The shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Key-value heads a layer.
    pub kv_heads: usize,
    /// Values a head; a multiple of 16 is fast, any number works.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(self) -> usize {
        self.layers * self.kv_heads * self.head_dim * BLOCK_TOKENS * 2 * 2
    }

    /// Values of one head in one block of one layer: its keys, and as many again for its values.
    fn page(self) -> usize {
        self.head_dim * BLOCK_TOKENS
    }
}

/// Keys and values of every layer. Memory is zeroed by the system and touched only as blocks are used.
pub struct KvCache {
    shape: KvShape,
    blocks: usize,
    halves: Buffer<u16>,
}

impl KvCache {
    /// Room for `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(shape: KvShape, blocks: usize) -> Result<KvCache, Error> {
        let factors = [shape.layers, shape.kv_heads, shape.head_dim, 2 * BLOCK_TOKENS, blocks];
        let len = factors.into_iter().try_fold(1usize, |product, factor| product.checked_mul(factor));
        let halves = Buffer::zeroed(len.ok_or(Error::OutOfMemory { bytes: usize::MAX })?)?;
        Ok(KvCache { shape, blocks, halves })
    }

    /// The cache's shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Blocks it has.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Stores the keys and values of a batch in one layer: row *i* of `k` and `v` (`kv_heads * head_dim` values)
    /// goes to the slot that `spans` give it. Values beyond half precision's range are clamped to it, NaN becomes 0.
    ///
    /// # Panics
    /// If a span leaves the rows, its blocks or the cache.
    pub fn store(&mut self, pool: &Pool, layer: usize, spans: &[Span<'_>], k: &[f32], v: &[f32]) {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert_eq!(k.len(), v.len(), "as many values as keys");
        for span in spans {
            let rows = k.len() / (kv_heads * head_dim).max(1);
            assert!(span.first_row <= rows && span.rows <= rows - span.first_row, "a span leaves the batch");
            span.check(self.blocks);
        }
        // Dimensions belong to one worker each, so no two write the same element whatever the spans.
        let tiles = kv_heads * head_dim.div_ceil(LANES);
        let shape = self.shape;
        let halves = Disjoint::new(&mut self.halves);
        let store = |tiles: std::ops::Range<usize>| {
            lanes::dispatch(pool.cpu(), Store { shape, halves: &halves, layer, tiles, spans, k, v });
        };
        if k.len() < FORK_VALUES {
            store(0..tiles);
        } else {
            pool.run(|worker| store(worker.split(tiles, 1)));
        }
    }

    /// One head's keys, `[head_dim][16 tokens]`, and values, `[16 tokens][head_dim]`, of one block of one layer.
    #[inline(always)]
    pub(crate) fn page(&self, layer: usize, block: BlockId, head: usize) -> (&[u16], &[u16]) {
        let page = self.shape.page();
        let start = page_start(self.shape, layer, block as usize, head);
        self.halves[start..start + 2 * page].split_at(page)
    }
}

/// Where one head's keys of a block begin.
#[inline(always)]
fn page_start(shape: KvShape, layer: usize, block: usize, head: usize) -> usize {
    ((block * shape.layers + layer) * shape.kv_heads + head) * 2 * shape.page()
}

/// Some tiles of all rows; a tile is up to sixteen dimensions of one head.
struct Store<'a> {
    shape: KvShape,
    halves: &'a Disjoint<'a, u16>,
    layer: usize,
    tiles: std::ops::Range<usize>,
    spans: &'a [Span<'a>],
    k: &'a [f32],
    v: &'a [f32],
}

impl Kernel for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        for span in self.spans {
            let end = span.first_position + span.rows;
            let mut position = span.first_position;
            while position < end {
                let (block, token) = (span.blocks[position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
                let rows = (BLOCK_TOKENS - token).min(end - position);
                let row = span.first_row + position - span.first_position;
                let tiles = head_dim.div_ceil(LANES);
                for tile in self.tiles.clone() {
                    let (head, dim) = (tile / tiles, tile % tiles * LANES);
                    let from = (row * kv_heads + head) * head_dim + dim;
                    let page = page_start(self.shape, self.layer, block, head);
                    self.store_tile(l, from, rows, page, dim, token);
                }
                position += rows;
            }
        }
    }
}

impl Store<'_> {
    /// `rows` tokens of one page, from `token` on; their first value of the tile is `k[from]` and `v[from]`.
    #[inline(always)]
    fn store_tile<L: Lanes>(&self, l: L, from: usize, rows: usize, page: usize, dim: usize, token: usize) {
        let head_dim = self.shape.head_dim;
        let dims = LANES.min(head_dim - dim);
        let stride = self.shape.kv_heads * head_dim;
        let mut halves = [[0; LANES]; BLOCK_TOKENS];
        for (r, row) in halves.iter_mut().enumerate().take(rows) {
            *row = halve(l, &self.v[from + r * stride..][..dims]);
            let to = page + self.shape.page() + (token + r) * head_dim + dim;
            // SAFETY: in this head's tile of dimensions, which one worker has; no other part lives.
            unsafe { self.halves.part(to..to + dims) }.copy_from_slice(&row[..dims]);
        }
        for (r, row) in halves.iter_mut().enumerate().take(rows) {
            *row = halve(l, &self.k[from + r * stride..][..dims]);
        }
        let to = page + dim * BLOCK_TOKENS;
        // SAFETY: as above.
        let keys = unsafe { self.halves.part(to..to + dims * BLOCK_TOKENS) };
        for (d, lane) in keys.chunks_exact_mut(BLOCK_TOKENS).enumerate() {
            if rows == BLOCK_TOKENS {
                for t in 0..BLOCK_TOKENS {
                    lane[t] = halves[t][d];
                }
            } else {
                for r in 0..rows {
                    lane[token + r] = halves[r][d];
                }
            }
        }
    }
}

/// In half precision, finite, with zeros after the last.
#[inline(always)]
fn halve<L: Lanes>(l: L, row: &[f32]) -> [u16; LANES] {
    let x = l.nan_to_zero(l.load_first(row, row.len()));
    let mut halves = [0; LANES];
    l.store_half(l.min(l.max(x, l.splat(-HALF_MAX)), l.splat(HALF_MAX)), &mut halves);
    halves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{pools, uniform};
    use half::f16;

    #[test]
    fn rows_land_in_their_slots_for_any_shape_and_pool() {
        for (kv_heads, head_dim) in [(3, 64), (1, 80), (2, 20), (1, 5)] {
            let shape = KvShape { layers: 2, kv_heads, head_dim };
            let row = kv_heads * head_dim;
            let rows = 150;
            let (k, v) = (uniform(1, rows * row), uniform(2, rows * row));
            let (first, second) = ([4, 9, 2], [1, 0, 7, 3, 5, 6, 8]);
            let spans = [
                Span { first_row: 100, rows: 33, first_position: 10, blocks: &first },
                Span { first_row: 0, rows: 100, first_position: 3, blocks: &second },
            ];
            for pool in pools() {
                let mut cache = KvCache::new(shape, 10).unwrap();
                cache.store(&pool, 1, &spans, &k, &v);
                for span in &spans {
                    for r in 0..span.rows {
                        let at = span.first_position + r;
                        for head in 0..kv_heads {
                            let (keys, values) = cache.page(1, span.blocks[at / 16], head);
                            for d in 0..head_dim {
                                let from = (span.first_row + r) * row + head * head_dim + d;
                                let half = |x: f32| f16::from_f32(x).to_bits();
                                assert_eq!(keys[d * 16 + at % 16], half(k[from]));
                                assert_eq!(values[at % 16 * head_dim + d], half(v[from]));
                            }
                        }
                    }
                }
                assert!(
                    (0..10).all(|b| (0..kv_heads).all(|h| cache.page(0, b, h).0.iter().all(|&x| x == 0)))
                );
            }
        }
    }

    #[test]
    fn the_cache_is_always_finite() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16 };
        let mut row = [1.0; 16];
        row[..4].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 70000.0]);
        for pool in pools() {
            let mut cache = KvCache::new(shape, 1).unwrap();
            cache.store(
                &pool,
                0,
                &[Span { first_row: 0, rows: 1, first_position: 0, blocks: &[0] }],
                &row,
                &row,
            );
            let stored: Vec<f32> =
                cache.page(0, 0, 0).1[..5].iter().map(|&x| f16::from_bits(x).to_f32()).collect();
            assert_eq!(stored, [65504.0, -65504.0, 0.0, 65504.0, 1.0]);
        }
    }

    #[test]
    fn an_impossible_cache_is_an_error() {
        let shape = KvShape { layers: usize::MAX / 2, kv_heads: 3, head_dim: 64 };
        assert!(matches!(KvCache::new(shape, 9), Err(Error::OutOfMemory { .. })));
    }
}

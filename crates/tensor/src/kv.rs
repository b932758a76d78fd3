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

use std::ops::Range;

use crate::attention::Span;
use crate::buffer::Buffer;
use crate::lanes::{self, Kernel, LANES, Lanes};
use crate::pool::Disjoint;
use crate::{Error, Pool};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// A block's number, `0..blocks`.
pub type BlockId = u32;

/// Fewer keys than this are stored before another thread has heard of it.
const WORTH_SHARING: usize = 1024;

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

    /// Has the system put memory behind `blocks` now rather than when they are first stored to, which takes a
    /// millisecond for a few MiB on bare metal and more in a virtual machine. Changes nothing that is stored.
    ///
    /// # Panics
    /// If a block leaves the cache.
    pub fn populate(&self, blocks: Range<usize>) {
        let block = self.halves.len() / self.blocks.max(1);
        self.halves.populate(blocks.start * block..blocks.end * block);
    }

    /// Stores the keys and values of a batch in one layer: row *i* of `k` and `v` (`kv_heads * head_dim` values)
    /// goes to the slot that `spans` give it. Values beyond half precision's range are clamped to it, NaN becomes 0.
    ///
    /// # Panics
    /// If a span leaves the rows, its blocks or the cache, or two spans store into one block.
    pub fn store(&mut self, pool: &Pool, layer: usize, spans: &[Span<'_>], k: &[f32], v: &[f32]) {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert_eq!(k.len(), v.len(), "as many values as keys");
        let rows = k.len() / (kv_heads * head_dim).max(1);
        let mut runs = Vec::with_capacity(rows / BLOCK_TOKENS + 2 * spans.len());
        for span in spans {
            assert!(span.first_row <= rows && span.rows <= rows - span.first_row, "a span leaves the batch");
            span.check(self.blocks);
            runs.extend(Run::of(span));
        }
        runs.sort_unstable_by_key(|run| run.block);
        assert!(runs.windows(2).all(|pair| pair[0].block != pair[1].block), "two spans store into one block");
        let shape = self.shape;
        let halves = Disjoint::new(&mut self.halves);
        let store = |rows: Range<usize>| {
            let own = runs.iter().filter(|run| rows.contains(&run.row));
            lanes::dispatch(pool.cpu(), Store { shape, halves: &halves, layer, runs: own, k, v });
        };
        if k.len() < WORTH_SHARING {
            store(0..rows);
        } else {
            // By rows: those of one worker are likely those that it computed.
            pool.run(|worker| store(worker.split(rows, 1)));
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

/// Rows of one span that go to one block.
struct Run {
    block: usize,
    /// The first row's place in the block.
    token: usize,
    /// The first row in the batch, and how many there are.
    row: usize,
    rows: usize,
}

impl Run {
    fn of(span: &Span<'_>) -> impl Iterator<Item = Run> {
        let Span { first_row, rows, first_position, blocks } = *span;
        let end = first_position + rows;
        let mut position = first_position;
        std::iter::from_fn(move || {
            let token = position % BLOCK_TOKENS;
            let rows = (BLOCK_TOKENS - token).min(end - position);
            let block = *blocks.get(position / BLOCK_TOKENS).filter(|_| rows > 0)? as usize;
            let run = Run { block, token, row: first_row + position - first_position, rows };
            position += rows;
            Some(run)
        })
    }
}

/// Some of the runs, which no other worker has, all heads of them.
struct Store<'a, R> {
    shape: KvShape,
    halves: &'a Disjoint<'a, u16>,
    layer: usize,
    runs: R,
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a, R: Iterator<Item = &'a Run>> Kernel for Store<'_, R> {
    type Output = ();

    #[inline(always)]
    fn call<L: Lanes>(self, l: L) {
        let Store { shape, halves, layer, runs, k, v } = self;
        let KvShape { kv_heads, head_dim, .. } = shape;
        for run in runs {
            for head in 0..kv_heads {
                let start = page_start(shape, layer, run.block, head);
                // SAFETY: blocks of runs differ, and each run has one worker.
                let page = unsafe { halves.part(start..start + 2 * shape.page()) };
                let (keys, values) = page.split_at_mut(shape.page());
                for dim in (0..head_dim).step_by(LANES) {
                    let dims = LANES.min(head_dim - dim);
                    let from = |row: usize| ((run.row + row) * kv_heads + head) * head_dim + dim;
                    let mut tile = [[0; LANES]; BLOCK_TOKENS];
                    for (r, row) in tile.iter_mut().enumerate().take(run.rows) {
                        let halves = halve(l, &v[from(r)..][..dims]);
                        values[(run.token + r) * head_dim + dim..][..dims].copy_from_slice(&halves[..dims]);
                        *row = halve(l, &k[from(r)..][..dims]);
                    }
                    for (d, lane) in
                        keys[dim * BLOCK_TOKENS..].chunks_exact_mut(BLOCK_TOKENS).take(dims).enumerate()
                    {
                        if run.rows == BLOCK_TOKENS {
                            for t in 0..BLOCK_TOKENS {
                                lane[t] = tile[t][d];
                            }
                        } else {
                            for r in 0..run.rows {
                                lane[run.token + r] = tile[r][d];
                            }
                        }
                    }
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
    #[should_panic(expected = "two spans store into one block")]
    fn a_block_belongs_to_one_span() {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16 };
        let span = |first_row| Span { first_row, rows: 1, first_position: first_row, blocks: &[0] };
        let row = [1.0; 32];
        KvCache::new(shape, 1).unwrap().store(
            &Pool::new(1, crate::Cpu::detect()),
            0,
            &[span(0), span(1)],
            &row,
            &row,
        );
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

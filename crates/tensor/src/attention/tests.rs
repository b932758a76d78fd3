use super::*;
use crate::kv::KvShape;
use crate::test_support::{bits, pools, uniform};

/// One sequence's tokens in a cache, with blocks in a scattered order.
struct Sequence {
    cache: KvCache,
    blocks: Vec<BlockId>,
    params: AttentionParams,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    tokens: usize,
}

fn sequence(pool: &Pool, head_dim: usize, kv_heads: usize, group: usize, tokens: usize) -> Sequence {
    let params = AttentionParams {
        heads: kv_heads * group,
        scale: 4.0 / (head_dim as f32).sqrt(),
        window: None,
        softcap: None,
    };
    let shape = KvShape { layers: 2, kv_heads, head_dim };
    let count = tokens.div_ceil(BLOCK_TOKENS);
    let mut cache = KvCache::new(shape, count + 3).unwrap();
    let blocks: Vec<BlockId> = (0..count).map(|i| ((i * 7 + 2) % (count + 3)) as BlockId).collect();
    assert!(!(count + 3).is_multiple_of(7), "the blocks would repeat");
    let scaled = |seed, len| uniform(seed, len).iter().map(|x| x * 4.0).collect::<Vec<f32>>();
    let k = scaled(1, tokens * kv_heads * head_dim);
    let v = scaled(2, k.len());
    let q = scaled(3, k.len() * group);
    let span = Span { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks };
    cache.store(pool, 1, &[span], &k, &v);
    Sequence { cache, blocks, params, k, v, q, tokens }
}

impl Sequence {
    /// All rows, in chunks of the given lengths over and over.
    fn attend(&self, pool: &Pool, chunks: &[usize]) -> Vec<f32> {
        let width = self.q.len() / self.tokens;
        let mut out = vec![f32::NAN; self.q.len()];
        let (mut at, mut turn) = (0, 0);
        while at < self.tokens {
            let rows = chunks[turn % chunks.len()].min(self.tokens - at);
            let span = Span { first_row: 0, rows, first_position: at, blocks: &self.blocks };
            let range = at * width..(at + rows) * width;
            attention(pool, self.params, 1, &self.cache, &[span], &self.q[range.clone()], &mut out[range]);
            at += rows;
            turn += 1;
        }
        out
    }

    /// The textbook formula in `f64`.
    fn exact(&self) -> Vec<f64> {
        let KvShape { kv_heads, head_dim, .. } = self.cache.shape();
        let heads = self.params.heads;
        let half = |x: f32| half::f16::from_f32(x).to_f64();
        let mut out = Vec::new();
        for (index, q) in self.q.chunks(head_dim).enumerate() {
            let (position, kv_head) = (index / heads, index % heads / (heads / kv_heads));
            let first = self.params.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let at = |t: usize| (t * kv_heads + kv_head) * head_dim;
            let scores: Vec<f64> = (first..=position)
                .map(|t| {
                    let dot: f64 = (0..head_dim).map(|d| f64::from(q[d]) * half(self.k[at(t) + d])).sum();
                    let score = dot * f64::from(self.params.scale);
                    self.params.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            for d in 0..head_dim {
                let values = scores.iter().zip(first..);
                let sum: f64 = values.map(|(s, t)| (s - largest).exp() * half(self.v[at(t) + d])).sum();
                out.push(sum / total);
            }
        }
        out
    }
}

#[test]
fn agrees_with_the_formula_in_f64() {
    let pool = Pool::new(2, crate::Cpu::detect());
    for (head_dim, kv_heads, group) in
        [(64, 3, 3), (80, 1, 2), (96, 2, 1), (128, 1, 7), (256, 1, 4), (20, 2, 2), (5, 1, 1)]
    {
        let mut sequence = sequence(&pool, head_dim, kv_heads, group, 150);
        for (window, softcap) in
            [(None, None), (Some(1), None), (Some(70), None), (None, Some(3.0)), (Some(33), Some(2.0))]
        {
            (sequence.params.window, sequence.params.softcap) = (window, softcap);
            for (got, want) in sequence.attend(&pool, &[150]).iter().zip(sequence.exact()) {
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5,
                    "{head_dim} {window:?} {softcap:?}: {got} not {want}"
                );
            }
        }
    }
}

#[test]
fn a_row_is_the_same_alone_or_in_any_chunk_on_any_family_and_thread_count() {
    for (head_dim, kv_heads, group) in [(64, 3, 3), (80, 1, 5), (20, 2, 1)] {
        for (window, softcap) in [(None, None), (Some(40), None), (Some(130), Some(5.0))] {
            let mut expected: Option<Vec<u32>> = None;
            for pool in pools() {
                let mut sequence = sequence(&pool, head_dim, kv_heads, group, 210);
                (sequence.params.window, sequence.params.softcap) = (window, softcap);
                for chunks in [&[1][..], &[210], &[64], &[7], &[1, 50, 3, 2, 31, 16]] {
                    let got = bits(&sequence.attend(&pool, chunks));
                    let same = *expected.get_or_insert_with(|| got.clone()) == got;
                    assert!(same, "{head_dim} {window:?} {chunks:?} {:?} {}", pool.cpu(), pool.threads());
                }
            }
        }
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other() {
    let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 32 };
    let params = AttentionParams { heads: 4, scale: 0.2, window: None, softcap: None };
    let width = params.heads * shape.head_dim;
    for pool in pools() {
        let mut cache = KvCache::new(shape, 40).unwrap();
        let blocks: [Vec<BlockId>; 3] = [(0..10).collect(), (10..12).collect(), (20..40).rev().collect()];
        // Every sequence has its past stored before; then one batch with rows between them that belong to nobody.
        for (i, blocks) in blocks.iter().enumerate() {
            let past = Span { first_row: 0, rows: blocks.len() * 16, first_position: 0, blocks };
            let len = past.rows * shape.kv_heads * shape.head_dim;
            cache.store(&pool, 0, &[past], &uniform(i as u64, len), &uniform(9 + i as u64, len));
        }
        let spans = [
            Span { first_row: 1, rows: 1, first_position: 140, blocks: &blocks[0] },
            Span { first_row: 2, rows: 20, first_position: 5, blocks: &blocks[1] },
            Span { first_row: 25, rows: 2, first_position: 318, blocks: &blocks[2] },
        ];
        let q = uniform(5, 28 * width);
        let mut together = vec![7.0; q.len()];
        attention(&pool, params, 0, &cache, &spans, &q, &mut together);
        let mut alone = vec![7.0; q.len()];
        for span in spans {
            attention(&pool, params, 0, &cache, &[span], &q, &mut alone);
        }
        assert_eq!(bits(&together), bits(&alone));
        assert!(
            [0, 22, 24, 27].iter().all(|r| together[r * width..(r + 1) * width].iter().all(|&x| x == 7.0))
        );
    }
}

#[test]
#[should_panic(expected = "blocks where")]
fn a_span_past_its_blocks_is_refused() {
    let pool = Pool::new(1, crate::Cpu::detect());
    let sequence = sequence(&pool, 16, 1, 1, 20);
    let span = Span { first_row: 0, rows: 1, first_position: 32, blocks: &sequence.blocks };
    let mut out = [0.0; 16];
    attention(&pool, sequence.params, 1, &sequence.cache, &[span], &sequence.q[..16], &mut out);
}

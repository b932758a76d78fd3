//! The forward pass, as named steps over packed rows.
//!
//! A row is one token. Its hidden state (`hidden` values) starts as the token's embedding; every layer adds what
//! attention sees and what the feed-forward block makes of it; the head turns the last state into logits. Rows
//! meet in attention only, and there through the cache, so a prompt may be computed in any chunks and beside any
//! other sequences and gives the same bits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use consort_tensor::Pool;
use consort_tensor::attention::{AttentionParams, Span, attention};
use consort_tensor::kv::KvCache;
use consort_tensor::linear::{Product, linear};
use consort_tensor::rope::Rope;

use super::Model;
use super::batch::Batch;
use super::config::ModelConfig;
use super::parts::{Part, PartTimes};
use super::rows::{Local, Rows, grown};
use crate::Error;

/// Embedding fewer rows than this costs less than waking a thread for them.
const ROWS_WORTH_SHARING: usize = 32;

/// From this many rows a thread on, each thread takes rows of its own through all steps between two attentions,
/// instead of meeting the others at every step: what it wrote is then still in its own cache. Fewer rows are bound by
/// reading the weights, which all threads had better read together.
const ROWS_OF_ITS_OWN: usize = 8;

/// Most rows that a thread takes through the steps at a time, so that all they need stays in its second-level cache.
const CHUNK_ROWS: usize = 72;

/// Buffers that a forward pass reuses. All are rows of the batch, in its order.
#[derive(Default)]
pub struct Scratch {
    /// The residual stream, `hidden` values a row.
    x: Vec<f32>,
    /// `heads * head_dim` values a row.
    q: Vec<f32>,
    /// `kv_heads * head_dim` values a row.
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention read, `heads * head_dim` values a row.
    attended: Vec<f32>,
    /// Every row's position in its sequence.
    positions: Vec<u32>,
    /// Blocks that the batch stores into.
    writes: Vec<(u32, u32)>,
    /// One for each thread of the pool.
    locals: Vec<Mutex<Local>>,
}

impl Model {
    /// Runs the rows through the decoder, storing keys and values in `cache`; `logits` becomes
    /// `batch.logit_rows.len()` rows of `vocab` values.
    ///
    /// # Errors
    /// [`Error::Batch`] where a token, position or block is out of range, or where two spans store into one block;
    /// nothing was stored then.
    pub fn forward(
        &self,
        pool: &Pool,
        batch: Batch<'_>,
        cache: &mut KvCache,
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.check(&batch, cache, &mut scratch.writes)?;
        scratch.place(batch.spans, &self.config);
        scratch.locals.resize_with(pool.threads().max(scratch.locals.len()), Mutex::default);
        scratch.begin();
        self.embed(pool, batch.tokens, &mut scratch.x);
        scratch.end(Part::Embed);
        self.advance(pool, 0, scratch);
        for index in 0..self.layers.len() {
            let keys = batch.tokens.len() * self.config.kv_heads * self.config.head_dim;
            cache.store(pool, index, batch.spans, &scratch.k[..keys], &scratch.v[..keys]);
            scratch.end(Part::RotateStore);
            // Nobody reads the last layer's rows but those whose logits are wanted.
            let last = index + 1 == self.layers.len() && batch.logit_rows.len() < batch.tokens.len();
            let wanted = last.then(|| scratch.keep(batch, &self.config));
            self.attention(pool, index, wanted.as_deref().unwrap_or(batch.spans), cache, scratch);
            self.advance(pool, index + 1, scratch);
        }
        self.project_to_vocabulary(pool, scratch, logits);
        Ok(())
    }

    /// Every row's way from the attention of the layer before `index` to that of layer `index`.
    fn advance(&self, pool: &Pool, index: usize, scratch: &mut Scratch) {
        let config = &self.config;
        let Scratch { x, q, k, v, attended, positions, locals, .. } = scratch;
        let rows = positions.len();
        if rows == 0 {
            return;
        }
        let steps = |rows: &mut Rows<'_>, local: &mut Local| {
            if let Some(before) = index.checked_sub(1) {
                self.finish_attention(pool, &self.layers[before].attention, rows, local);
                self.feed_forward(pool, &self.layers[before].feed_forward, rows, local);
            }
            if let Some(layer) = self.layers.get(index) {
                self.begin_attention(pool, self.rope_of(index), &layer.attention, rows, local);
            }
        };
        let count = match rows >= pool.threads() * ROWS_OF_ITS_OWN {
            // As many for each thread, so that none waits for another's last.
            true => rows.div_ceil(CHUNK_ROWS * pool.threads()) * pool.threads(),
            false => 1,
        };
        let (queries, keys) =
            (rows * config.heads * config.head_dim, rows * config.kv_heads * config.head_dim);
        let mut all = Rows {
            positions,
            x: &mut x[..rows * config.hidden],
            q: &mut q[..queries],
            k: &mut k[..keys],
            v: &mut v[..keys],
            attended: &attended[..queries],
        };
        if count == 1 {
            return steps(&mut all, &mut lock(&locals[0]));
        }
        let mut chunks = Vec::with_capacity(count);
        for index in 0..count {
            let (chunk, rest) = all.split(rows * (index + 1) / count - rows * index / count, config);
            all = rest;
            chunks.push(Mutex::new(Some(chunk)));
        }
        let locals = &*locals;
        pool.run(|worker| {
            let local = &mut lock(&locals[worker.rank]);
            // First its own, which are the same rows every time; then what the others have not come to yet.
            let own = worker.split(count, 1);
            for index in own.clone().chain((0..count).rev().filter(|index| !own.contains(index))) {
                let chunk = lock(&chunks[index]).take();
                if let Some(mut chunk) = chunk {
                    steps(&mut chunk, local);
                }
            }
        });
    }

    /// Each row's queries read the keys and values of its sequence up to its own.
    fn attention(
        &self,
        pool: &Pool,
        index: usize,
        spans: &[Span<'_>],
        cache: &KvCache,
        scratch: &mut Scratch,
    ) {
        let config = &self.config;
        let params = AttentionParams {
            heads: config.heads,
            scale: config.attention_scale,
            window: config.window(index),
            softcap: config.attention_softcap,
        };
        let Scratch { q, attended, positions, .. } = scratch;
        let queries = positions.len() * config.heads * config.head_dim;
        attention(pool, params, index, cache, spans, &q[..queries], &mut attended[..queries]);
        scratch.end(Part::Attention);
    }

    /// Tokens to rows of the embedding.
    fn embed(&self, pool: &Pool, tokens: &[u32], x: &mut Vec<f32>) {
        let hidden = self.config.hidden;
        let x = grown(x, tokens.len() * hidden);
        let embed = |token: u32, out: &mut [f32]| {
            self.embedding.row(token as usize, out);
            if let Some(scale) = self.config.embedding_scale {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        };
        let rows = tokens.iter().zip(x.chunks_exact_mut(hidden));
        if tokens.len() < ROWS_WORTH_SHARING {
            rows.for_each(|(&token, out)| embed(token, out));
            return;
        }
        let rows = Mutex::new(rows);
        pool.run(|_| {
            while let Some((&token, out)) = { lock(&rows).next() } {
                embed(token, out);
            }
        });
    }

    /// The rows' last states to logits.
    fn project_to_vocabulary(&self, pool: &Pool, scratch: &mut Scratch, logits: &mut Vec<f32>) {
        let config = &self.config;
        let Scratch { x, positions, locals, .. } = scratch;
        logits.resize(positions.len() * config.vocab, 0.0);
        if positions.is_empty() {
            return;
        }
        let head = self.head();
        let Local { inputs, times, .. } = &mut *lock(&locals[0]);
        let x = &x[..positions.len() * config.hidden];
        inputs.prepare_normed(pool, x, &self.final_norm, config.norm_eps, head.input_kind());
        linear(pool, inputs, &mut [Product { weights: head, bias: None, out: logits, accumulate: false }]);
        if let Some(cap) = config.logit_softcap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        PartTimes::end(times, Part::Head);
    }

    fn rope_of(&self, layer: usize) -> &Rope {
        match &self.sliding_rope {
            Some(rope) if self.config.window(layer).is_some() => rope,
            _ => &self.rope,
        }
    }
}

impl Scratch {
    /// Empty; grows to its first use and keeps its memory.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// Starts to note where forward passes with this scratch spend their time, as the calling thread sees it.
    pub fn time_parts(&mut self) {
        self.locals.resize_with(self.locals.len().max(1), Mutex::default);
        self.first().times = Some(PartTimes::default());
    }

    /// What [`Scratch::time_parts`] started, up to now.
    pub fn part_times(&mut self) -> Option<&PartTimes> {
        self.locals
            .first_mut()
            .and_then(|local| local.get_mut().unwrap_or_else(PoisonError::into_inner).times.as_ref())
    }

    fn begin(&mut self) {
        PartTimes::begin(&mut self.first().times);
    }

    fn end(&mut self, part: Part) {
        PartTimes::end(&mut self.first().times, part);
    }

    /// The calling thread's.
    fn first(&mut self) -> &mut Local {
        self.locals[0].get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for the batch, and every row's position from the spans.
    fn place(&mut self, spans: &[Span<'_>], config: &ModelConfig) {
        self.positions.clear();
        for span in spans {
            // Checked to be below the model's context, which fits 32 bits.
            self.positions.extend((span.first_position..span.first_position + span.rows).map(|p| p as u32));
        }
        let rows = self.positions.len();
        grown(&mut self.q, rows * config.heads * config.head_dim);
        grown(&mut self.attended, rows * config.heads * config.head_dim);
        grown(&mut self.k, rows * config.kv_heads * config.head_dim);
        grown(&mut self.v, rows * config.kv_heads * config.head_dim);
    }

    /// Moves the rows whose logits are wanted to the front and forgets the others. Returns their spans.
    fn keep<'a>(&mut self, batch: Batch<'a>, config: &ModelConfig) -> Vec<Span<'a>> {
        let mut kept: Vec<Span<'a>> = Vec::with_capacity(batch.logit_rows.len());
        let mut spans = batch.spans.iter();
        let mut span = spans.next();
        for (to, &from) in batch.logit_rows.iter().enumerate() {
            while let Some(passed) = span.filter(|span| span.first_row + span.rows <= from) {
                debug_assert!(passed.first_row <= from);
                span = spans.next();
            }
            // Rows that follow one another stay one span, so that they read their keys together.
            let follows = to > 0 && batch.logit_rows[to - 1] + 1 == from;
            match (span, kept.last_mut()) {
                (Some(span), Some(last)) if follows && span.first_row < from => last.rows += 1,
                (Some(span), _) => kept.push(Span {
                    first_row: to,
                    rows: 1,
                    first_position: span.first_position + from - span.first_row,
                    blocks: span.blocks,
                }),
                // Checked: every row is in a span.
                (None, _) => {}
            }
            self.positions[to] = self.positions[from];
            let shift = |buffer: &mut Vec<f32>, width: usize| {
                buffer.copy_within(from * width..(from + 1) * width, to * width);
            };
            shift(&mut self.x, config.hidden);
            shift(&mut self.q, config.heads * config.head_dim);
        }
        self.positions.truncate(batch.logit_rows.len());
        kept
    }
}

/// A local's owner is the only one to lock it; one that panicked left nothing that the next pass would read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

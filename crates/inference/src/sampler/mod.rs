//! Picks a token from a row of logits: a function of the row, the request's [`Sampling`], the tokens so far and
//! the position. Nothing else: not of the batch, the time or a generator's state.
//!
//! # The order of operations
//!
//! 1. *Repetition penalty*: the logit of each token in prompt or answer is divided by it (positive logits) or
//!    multiplied with it.
//! 2. *Presence and frequency*: `presence + frequency · count` is subtracted for each token in the answer.
//! 3. *Bias*: added per token.
//! 4. *Grammar*: tokens it doesn't allow are banned (−∞).
//! 5. *Temperature* T: `x = (logit − largest logit) / T` in `f32`, computed as a product with `1 / T`. Below
//!    [`GREEDY_BELOW`] the token with the largest logit is picked and the rest doesn't apply.
//! 6. *Top-k*: the k tokens with the largest x stay.
//! 7. *Top-p*: of these, the smallest set of the likeliest whose probability among them reaches p stays.
//!    Probabilities are whole multiples of 2⁻²⁸ of the likeliest's ([`weight`]), so their sum has no order.
//! 8. *Min-p*: tokens with `x >= ln(min_p)` stay.
//! 9. *Noise*: the token with the largest x + Gumbel(seed, position, token) is picked ([`noise`]): a draw from
//!    the distribution that is left.
//!
//! Every tie goes to the lowest id. A NaN is banned; under a temperature +∞ counts as the largest finite number. The
//! prompt's and the answer's tokens count the same when they were emitted by another replica, and the position is the index in the
//! answer, so a resumed answer goes on exactly.
//!
//! Beside the kernels' log-sum-exp (top-p's total) only additions, multiplications, comparisons and software
//! logarithms (`libm`) are used, so the same logits give the same token wherever the fingerprint is the same.
//!
//! # Cost
//!
//! Passes over the vocabulary, no sort of it: one for the chunks' maxima ([`peaks`]), after which most chunks are
//! skipped; one for top-p's total; one for the noise where nothing was filtered. Greedy without penalties is one
//! `argmax`. Each stage has a plain counterpart in `reference.rs` and a test that compares them.
//!
//! [`weight`]: weight::weight

pub mod logprob;
pub mod noise;
pub mod peaks;
pub mod weight;

#[cfg(test)]
mod reference;

use std::collections::HashMap;

use consort_tensor::Cpu;
use consort_tensor::reduce;

use crate::request::Sampling;
use peaks::{Candidate, Peaks, Row};

/// Temperatures below this are greedy.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Up to here candidates are looked at one by one.
const FEW: usize = 256;

/// One answer's sampler: its parameters and the tokens that penalties count.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// How often each token is in the answer.
    counts: HashMap<u32, u32>,
    /// Distinct tokens of the prompt, where the repetition penalty wants them.
    prompt: Vec<u32>,
}

/// Buffers that picks reuse.
#[derive(Debug, Default)]
pub struct Scratch {
    row: Vec<f32>,
    tempered: Vec<f32>,
    peaks: Peaks,
    candidates: Vec<Candidate>,
}

/// Tokens that may come next: bit `id % 32` of word `id / 32`; ids past the end are not allowed.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a>(pub &'a [u32]);

impl Sampler {
    /// For an answer to `prompt` of which `emitted` is known.
    pub fn new(sampling: Sampling, prompt: &[u32], emitted: &[u32]) -> Sampler {
        let mut distinct = Vec::new();
        if sampling.repetition_penalty != 1.0 {
            distinct.extend_from_slice(prompt);
            distinct.sort_unstable();
            distinct.dedup();
        }
        let mut sampler = Sampler { sampling, counts: HashMap::new(), prompt: distinct };
        for &token in emitted {
            sampler.accept(token);
        }
        sampler
    }

    /// Counts a token as the answer's.
    pub fn accept(&mut self, token: u32) {
        *self.counts.entry(token).or_insert(0) += 1;
    }

    /// The answer's token at index `position`, or `None` where every token is banned (a grammar without a way on,
    /// or a model that put out no number).
    pub fn pick(
        &self,
        cpu: Cpu,
        scratch: &mut Scratch,
        logits: &[f32],
        position: usize,
        allowed: Option<Allowed<'_>>,
    ) -> Option<u32> {
        let Scratch { row, tempered, peaks, candidates } = scratch;
        let logits = if self.changes_logits() || allowed.is_some() {
            row.clear();
            row.extend_from_slice(logits);
            self.penalize(row);
            if let Some(allowed) = allowed {
                ban(row, allowed);
            }
            &row[..]
        } else {
            logits
        };

        let temperature = self.sampling.temperature;
        if temperature < GREEDY_BELOW {
            let best = reduce::argmax(cpu, logits);
            return (logits.get(best)? > &f32::NEG_INFINITY).then_some(best as u32);
        }

        peaks.find(logits);
        let row = Row::new(logits, peaks.largest()?, temperature);
        let noise = noise::Noise::new(self.sampling.seed, position);
        let min_p =
            if self.sampling.min_p > 0.0 { libm::logf(self.sampling.min_p) } else { f32::NEG_INFINITY };
        let top_k = self.sampling.top_k as usize;
        let limits_k = top_k > 0 && top_k < logits.len();
        let limits_p = self.sampling.top_p < 1.0;

        if limits_k {
            peaks.top_k(row, top_k, candidates);
        }
        if limits_p {
            let top_p = f64::from(self.sampling.top_p);
            if limits_k {
                let total = candidates.iter().map(|candidate| u64::from(weight::weight(candidate.x))).sum();
                let kept = weight::nucleus(candidates, weight::target(total, top_p));
                candidates.truncate(kept);
            } else {
                weight::nucleus_of_row(cpu, row, peaks, top_p, tempered, candidates);
            }
        }
        // What is left is a start of the order: a few candidates, or all tokens up to a last one.
        let mut last = Candidate { x: min_p, id: u32::MAX };
        if limits_k || limits_p {
            candidates.retain(|candidate| candidate.x >= min_p);
            if candidates.len() <= FEW {
                return noise.pick(candidates);
            }
            last = candidates.iter().copied().max_by(Candidate::order).unwrap_or(last);
        }
        noise.pick_of_row(row, peaks, last)
    }

    fn changes_logits(&self) -> bool {
        let Sampling { presence_penalty, frequency_penalty, repetition_penalty, logit_bias, .. } =
            &self.sampling;
        *presence_penalty != 0.0
            || *frequency_penalty != 0.0
            || *repetition_penalty != 1.0
            || !logit_bias.is_empty()
    }

    fn penalize(&self, row: &mut [f32]) {
        let Sampling { presence_penalty, frequency_penalty, repetition_penalty, logit_bias, .. } =
            &self.sampling;
        if *repetition_penalty != 1.0 {
            let answer = self.counts.keys().filter(|token| self.prompt.binary_search(token).is_err());
            for &token in self.prompt.iter().chain(answer) {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit =
                        if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
                }
            }
        }
        if *presence_penalty != 0.0 || *frequency_penalty != 0.0 {
            for (&token, &count) in &self.counts {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit -= presence_penalty + frequency_penalty * count as f32;
                }
            }
        }
        for &(token, bias) in logit_bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }
}

fn ban(row: &mut [f32], allowed: Allowed<'_>) {
    for (index, logits) in row.chunks_mut(32).enumerate() {
        let mut bits = allowed.0.get(index).copied().unwrap_or(0);
        if bits == u32::MAX {
            continue;
        }
        for logit in logits {
            if bits & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
            bits >>= 1;
        }
    }
}

#[cfg(test)]
mod tests;

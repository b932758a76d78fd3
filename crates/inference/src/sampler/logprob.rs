//! Log-probabilities: ln p of the model's own logits, before penalties, grammar and temperature.

use consort_tensor::Cpu;
use consort_tensor::reduce;

use super::Scratch;
use super::peaks::{Candidate, Row};
use crate::request::TokenEvent;

/// The chosen token's log-probability and those of the `top` likeliest tokens (ties to the lower id).
pub fn token_event(cpu: Cpu, scratch: &mut Scratch, logits: &[f32], id: u32, top: usize) -> TokenEvent {
    let normalizer = reduce::log_sum_exp(cpu, logits);
    let logprob = logits.get(id as usize).map(|logit| logit - normalizer);
    let Scratch { peaks, candidates, .. } = scratch;
    candidates.clear();
    if top > 0 {
        peaks.find(logits);
        peaks.top_k(Row::plain(logits), top, candidates);
        candidates.sort_unstable_by(Candidate::order);
    }
    TokenEvent {
        id,
        logprob,
        top: candidates.iter().map(|c| (c.id, logits[c.id as usize] - normalizer)).collect(),
    }
}

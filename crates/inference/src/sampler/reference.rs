//! The sampler said plainly: whole rows, full sorts, no skipping. The fast one must agree with it on every token.

use std::cmp::Ordering;
use std::collections::HashMap;

use consort_tensor::Cpu;

use super::noise::Noise;
use super::peaks::Row;
use super::weight::{target, total, weight};
use super::{Allowed, GREEDY_BELOW};
use crate::request::Sampling;

fn number(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// Steps 1 to 9 of the order of operations, one loop each.
pub(super) fn pick(
    sampling: &Sampling,
    prompt: &[u32],
    answer: &[u32],
    logits: &[f32],
    position: usize,
    allowed: Option<Allowed<'_>>,
) -> Option<u32> {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for &token in answer {
        *counts.entry(token).or_default() += 1;
    }
    let mut row = logits.to_vec();
    for (id, logit) in row.iter_mut().enumerate() {
        let id = id as u32;
        let seen = prompt.contains(&id) || counts.contains_key(&id);
        if seen && sampling.repetition_penalty != 1.0 {
            let penalty = sampling.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if let Some(&count) = counts.get(&id) {
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        }
        for (_, bias) in sampling.logit_bias.iter().filter(|(token, _)| *token == id) {
            *logit += bias;
        }
        if let Some(Allowed(words)) = allowed {
            let bit = words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
            if !bit {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    let raw = row.clone();
    row.iter_mut().for_each(|logit| *logit = number(*logit));

    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return None;
    }
    if sampling.temperature < GREEDY_BELOW {
        return row.iter().position(|logit| *logit == largest).map(|id| id as u32);
    }

    let inverse = 1.0 / sampling.temperature;
    let largest = largest.min(f32::MAX);
    let mut kept: Vec<(f32, u32)> = (row.iter().zip(0..))
        .filter(|(logit, _)| **logit > f32::NEG_INFINITY)
        .map(|(logit, id)| ((logit.min(f32::MAX) - largest) * inverse, id))
        .collect();
    kept.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        let all = sampling.top_k == 0 || sampling.top_k as usize >= logits.len();
        let total = if all {
            // Shared with the fast one; a test of its own compares it with the sum.
            total(Cpu::detect(), Row::new(&raw, largest, sampling.temperature), &mut Vec::new())
        } else {
            kept.iter().map(|(x, _)| u64::from(weight(*x))).sum()
        };
        let target = target(total, f64::from(sampling.top_p));
        let mut mass = 0;
        let reached = kept.iter().position(|(x, _)| {
            mass += u64::from(weight(*x));
            mass >= target
        });
        kept.truncate(reached.map_or(kept.len(), |index| index + 1));
    }
    if sampling.min_p > 0.0 {
        let floor = libm::logf(sampling.min_p);
        kept.retain(|(x, _)| *x >= floor);
    }
    let noise = Noise::new(sampling.seed, position);
    let order = |a: &(f64, u32), b: &(f64, u32)| match a.0.total_cmp(&b.0) {
        Ordering::Equal => b.1.cmp(&a.1),
        other => other,
    };
    let scored = kept.iter().map(|(x, id)| (f64::from(*x) + noise.of(*id), *id));
    scored.filter(|(score, _)| *score > f64::NEG_INFINITY).max_by(order).map(|(_, id)| id)
}

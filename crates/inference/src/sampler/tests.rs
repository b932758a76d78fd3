use consort_base::Philox;
use consort_tensor::{Cpu, reduce};

use super::logprob::token_event;
use super::noise::Noise;
use super::peaks::{Candidate, Peaks, Row};
use super::*;

/// Comes after every token.
const ANY: Candidate = Candidate { x: f32::NEG_INFINITY, id: u32::MAX };

fn seeds(count: u64) -> impl Iterator<Item = (u64, Philox)> {
    (0..count).map(|seed| (seed, Philox::new(seed, 0x5A)))
}

/// A row of one of the shapes that models and mistakes make: peaked, flat, full of ties, with NaN and infinities.
fn row(rng: &mut Philox) -> Vec<f32> {
    let vocab = 1 + rng.below(700) as usize;
    let spread = [0.01, 1.0, 6.0, 40.0][rng.below(4) as usize];
    let steps = [3, 50, 1 << 24][rng.below(3) as usize];
    let strange = rng.chance(0.2);
    (0..vocab)
        .map(|_| {
            if strange && rng.chance(0.1) {
                return [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0][rng.below(5) as usize];
            }
            // The sum of three is round like a model's logits.
            let sum: f32 = (0..3).map(|_| rng.below(steps) as f32 / steps as f32 - 0.5).sum();
            sum * spread
        })
        .collect()
}

fn one_of<T: Copy>(rng: &mut Philox, values: &[T]) -> T {
    values[rng.below(values.len() as u64) as usize]
}

fn sampling(rng: &mut Philox, vocab: usize) -> Sampling {
    let bias = (0..one_of(rng, &[0, 0, 3]))
        .map(|_| (rng.below(vocab as u64) as u32, one_of(rng, &[-100.0, -1.0, 2.0, 100.0])));
    let logit_bias = bias.collect();
    Sampling {
        temperature: one_of(rng, &[0.0, 1e-4, 0.3, 0.7, 1.0, 2.0, 50.0]),
        top_k: one_of(rng, &[0, 0, 1, 2, 40, 600]),
        top_p: one_of(rng, &[1.0, 1.0, 0.95, 0.5, 0.0, 1e-6, 0.9999]),
        min_p: one_of(rng, &[0.0, 0.0, 0.05, 0.5, 1.0]),
        presence_penalty: one_of(rng, &[0.0, 0.0, 0.5, -2.0]),
        frequency_penalty: one_of(rng, &[0.0, 0.0, 0.3, 2.0]),
        repetition_penalty: one_of(rng, &[1.0, 1.0, 1.3, 0.8]),
        logit_bias,
        seed: rng.next_u64(),
    }
}

#[test]
fn the_fast_sampler_agrees_with_the_plain_one() {
    let mut scratch = Scratch::default();
    for (seed, mut rng) in seeds(3000) {
        let row = row(&mut rng);
        let vocab = row.len();
        let sampling = sampling(&mut rng, vocab);
        let prompt: Vec<u32> = (0..rng.below(20)).map(|_| rng.below(vocab as u64) as u32).collect();
        let answer: Vec<u32> = (0..rng.below(20)).map(|_| rng.below(vocab as u64) as u32).collect();
        let words = (vocab / 32 + one_of(&mut rng, &[0, 1])) as u64;
        let mask: Vec<u32> = (0..words).map(|_| one_of(&mut rng, &[0, u32::MAX, 0xF0F0_1111])).collect();
        let allowed = rng.chance(0.3).then_some(Allowed(&mask));
        let position = rng.below(5000) as usize;

        let (first, rest) = answer.split_at(answer.len() / 2);
        let mut sampler = Sampler::new(sampling.clone(), &prompt, first);
        for &token in rest {
            sampler.accept(token);
        }
        let fast = sampler.pick(Cpu::detect(), &mut scratch, &row, position, allowed);
        let plain = reference::pick(&sampling, &prompt, &answer, &row, position, allowed);
        assert_eq!(fast, plain, "seed {seed}: {sampling:?} over {vocab} logits");
    }
}

#[test]
fn a_top_p_of_zero_leaves_the_likeliest_alone() {
    let mut scratch = Scratch::default();
    for (seed, mut rng) in seeds(200) {
        let row: Vec<f32> = (0..300).map(|_| (rng.unit() as f32 - 0.5) * 4.0).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 0.0, seed, ..Sampling::default() };
        let greedy = Sampling { temperature: 0.0, ..sampling.clone() };
        let mut pick = |s| Sampler::new(s, &[], &[]).pick(Cpu::detect(), &mut scratch, &row, 7, None);
        assert_eq!(pick(sampling), pick(greedy), "seed {seed}");
    }
}

/// The pruned scan must not lose a winner: large rows, no filter, many positions.
#[test]
fn the_whole_rows_noise_is_the_candidates_noise() {
    for (seed, mut rng) in seeds(60) {
        let spread = [2.0, 20.0, 60.0][seed as usize % 3];
        let row: Vec<f32> = (0..5000).map(|_| (rng.unit() as f32 - 0.5) * spread).collect();
        let mut peaks = Peaks::default();
        peaks.find(&row);
        let view = Row::new(&row, peaks.largest().expect("finite"), 1.0);
        let all: Vec<Candidate> =
            (row.iter().zip(0..)).map(|(v, id)| Candidate { x: view.x(*v), id }).collect();
        for position in 0..10 {
            let noise = Noise::new(seed, position);
            let best = all.iter().max_by(|a, b| {
                (f64::from(a.x) + noise.of(a.id)).total_cmp(&(f64::from(b.x) + noise.of(b.id)))
            });
            let expected = best.map(|candidate| candidate.id);
            assert_eq!(noise.pick_of_row(view, &peaks, ANY), expected, "seed {seed} position {position}");
            assert_eq!(noise.pick(&all), expected, "seed {seed} position {position}");
        }
    }
}

#[test]
fn top_k_and_nucleus_are_prefixes_of_the_full_order() {
    for (seed, mut rng) in seeds(500) {
        let row: Vec<f32> = row(&mut rng);
        let mut peaks = Peaks::default();
        peaks.find(&row);
        let Some(largest) = peaks.largest() else { continue };
        let view = Row::new(&row, largest, one_of(&mut rng, &[0.5, 1.0, 30.0]));
        let mut sorted: Vec<Candidate> = (row.iter().zip(0..))
            .filter(|(logit, _)| **logit > f32::NEG_INFINITY)
            .map(|(logit, id)| Candidate { x: view.x(*logit), id })
            .collect();
        sorted.sort_by(Candidate::order);

        let k = 1 + rng.below(row.len() as u64) as usize;
        let mut got = Vec::new();
        peaks.top_k(view, k, &mut got);
        got.sort_by(Candidate::order);
        assert_eq!(got, sorted[..k.min(sorted.len())], "seed {seed}: top {k}");

        let top_p = rng.unit();
        let mut tempered = Vec::new();
        let total = weight::total(Cpu::detect(), view, &mut tempered);
        let sum: u64 = sorted.iter().map(|candidate| u64::from(weight::weight(candidate.x))).sum();
        assert!(
            total.abs_diff(sum) as f64 <= sum as f64 * 1e-5 + 800.0,
            "seed {seed}: {total} instead of {sum}"
        );
        let mut mass = 0;
        let reached = sorted.iter().position(|candidate| {
            mass += u64::from(weight::weight(candidate.x));
            mass >= weight::target(total, top_p)
        });
        weight::nucleus_of_row(Cpu::detect(), view, &peaks, top_p, &mut tempered, &mut got);
        got.sort_by(Candidate::order);
        assert_eq!(got, sorted[..reached.map_or(sorted.len(), |i| i + 1)], "seed {seed}: top-p {top_p}");
    }
}

/// Pearson's test over 20,000 positions: the sampler follows the distribution that the filters leave.
#[test]
fn draws_follow_the_distribution() {
    let logits: Vec<f32> = (0..12).map(|i| ((i * 7) % 12) as f32 * 0.4 - 1.0).collect();
    let cases = [
        (Sampling { temperature: 1.0, ..Sampling::default() }, 12),
        (Sampling { temperature: 0.7, ..Sampling::default() }, 12),
        (Sampling { temperature: 1.5, top_k: 5, ..Sampling::default() }, 5),
        (Sampling { temperature: 1.0, top_p: 0.8, ..Sampling::default() }, 0),
        (Sampling { temperature: 1.0, min_p: 0.1, ..Sampling::default() }, 0),
    ];
    let mut scratch = Scratch::default();
    for (case, (sampling, expected_kept)) in cases.into_iter().enumerate() {
        let sampling = Sampling { seed: 1234 + case as u64, ..sampling };
        let p = distribution(&logits, &sampling);
        let kept = p.iter().filter(|p| **p > 0.0).count();
        assert!(expected_kept == 0 || kept == expected_kept);
        let sampler = Sampler::new(sampling.clone(), &[], &[]);
        const DRAWS: usize = 20_000;
        let mut counts = vec![0f64; logits.len()];
        for position in 0..DRAWS {
            let id = sampler.pick(Cpu::detect(), &mut scratch, &logits, position, None).expect("finite");
            counts[id as usize] += 1.0;
        }
        let mut chi_square = 0.0;
        for (count, p) in counts.iter().zip(&p) {
            if *p == 0.0 {
                assert_eq!(*count, 0.0, "a filtered token was drawn under {sampling:?}");
            } else {
                let expected = p * DRAWS as f64;
                chi_square += (count - expected).powi(2) / expected;
            }
        }
        // 11 degrees of freedom reach 31.3 once in a thousand; fewer degrees less.
        assert!(chi_square < 31.3, "chi-square {chi_square} under {sampling:?}: {counts:?}");
    }
}

fn distribution(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let scaled: Vec<f64> =
        logits.iter().map(|x| (f64::from(*x) / f64::from(sampling.temperature)).exp()).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| scaled[b].total_cmp(&scaled[a]));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k as usize);
    }
    let total: f64 = order.iter().map(|&i| scaled[i]).sum();
    let mut mass = 0.0;
    let reached = order.iter().position(|&i| {
        mass += scaled[i] / total;
        mass >= f64::from(sampling.top_p)
    });
    order.truncate(reached.map_or(order.len(), |i| i + 1));
    let likeliest = scaled[order[0]];
    order.retain(|&i| scaled[i] >= likeliest * f64::from(sampling.min_p));
    let total: f64 = order.iter().map(|&i| scaled[i]).sum();
    let mut p = vec![0.0; logits.len()];
    order.into_iter().for_each(|i| p[i] = scaled[i] / total);
    p
}

/// Two tokens drawn at one position, and one token at two, are independent: no word of noise is used twice.
#[test]
fn noise_differs_between_tokens_positions_and_seeds() {
    let mut seen = std::collections::HashSet::new();
    for seed in [0, 1, 1 << 32] {
        for position in [0, 1, 1 << 32] {
            for id in 0..200 {
                assert!(seen.insert(Noise::new(seed, position).of(id).to_bits()), "{seed} {position} {id}");
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let mut scratch = Scratch::default();
    let row = vec![1.0; 300];
    let greedy = Sampler::new(Sampling::default(), &[], &[]);
    assert_eq!(greedy.pick(Cpu::detect(), &mut scratch, &row, 0, None), Some(0));
    let one = Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() };
    assert_eq!(Sampler::new(one, &[], &[]).pick(Cpu::detect(), &mut scratch, &row, 0, None), Some(0));
}

#[test]
fn no_number_is_no_token() {
    let mut scratch = Scratch::default();
    for temperature in [0.0, 1.0] {
        let sampler = Sampler::new(Sampling { temperature, ..Sampling::default() }, &[], &[]);
        for value in [f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(sampler.pick(Cpu::detect(), &mut scratch, &[value; 100], 0, None), None);
        }
        assert_eq!(sampler.pick(Cpu::detect(), &mut scratch, &[], 0, None), None);
        assert_eq!(sampler.pick(Cpu::detect(), &mut scratch, &[1.0; 40], 0, Some(Allowed(&[0, 0]))), None);
        assert_eq!(
            sampler.pick(Cpu::detect(), &mut scratch, &[1.0; 40], 0, Some(Allowed(&[0, 2]))),
            Some(33)
        );
        let mixed = [f32::NAN, f32::INFINITY, f32::NAN, 1.0];
        assert_eq!(sampler.pick(Cpu::detect(), &mut scratch, &mixed, 0, None), Some(1));
    }
}

#[test]
fn logprobs_are_the_rows_own() {
    let mut scratch = Scratch::default();
    let row: Vec<f32> = (0..500).map(|i| ((i * 37) % 101) as f32 * 0.1).collect();
    let normalizer = reduce::log_sum_exp(Cpu::detect(), &row);
    let event = token_event(Cpu::detect(), &mut scratch, &row, 3, 5);
    assert_eq!(event.logprob, Some(row[3] - normalizer));
    let mut order: Vec<usize> = (0..500).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    let expected: Vec<_> = order[..5].iter().map(|&i| (i as u32, row[i] - normalizer)).collect();
    assert_eq!(event.top, expected);
}

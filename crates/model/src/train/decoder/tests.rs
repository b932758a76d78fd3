use consort_tensor::Cpu;
use consort_tensor::activation::Activation;

use super::super::Normal;
use super::*;
use crate::arch::RopeConfig;

/// A model of a few thousand weights whose every number is another.
pub(in crate::train) fn tiny(family: &str) -> ModelConfig {
    ModelConfig {
        family: family.into(),
        name: None,
        vocab: 29,
        max_context: 64,
        layers: 2,
        hidden: 20,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 33,
        activation: Activation::Silu,
        norm_eps: 1e-5,
        embedding_scale: None,
        attention_scale: 6f32.powf(-0.5),
        attention_softcap: None,
        logit_softcap: None,
        query_key_norm: family == "qwen3",
        post_norms: false,
        tied_head: family != "qwen2",
        rope: RopeConfig::plain(10_000.0),
        sliding: None,
    }
}

fn batch() -> MicroBatch {
    let mut batch = MicroBatch::new();
    batch.push(&(0..40).map(|i| i * i % 29).collect::<Vec<u32>>());
    batch.push_weighted(&(0..17).map(|i| i * 5 % 29).collect::<Vec<u32>>(), |i| (i % 3) as f32);
    batch.push(&[3, 4]);
    batch
}

fn weights(decoder: &Decoder, pool: &Pool) -> Vec<f32> {
    let mut weights = vec![0.0; decoder.layout().len()];
    decoder.layout().initialize(pool, Normal { seed: 7, deviation: 0.25 }, &mut weights);
    // Norms and biases away from where they begin.
    for parameter in decoder.layout().parameters().iter().filter(|p| p.shape.len() == 1) {
        for (i, x) in weights[parameter.range.clone()].iter_mut().enumerate() {
            *x += 0.1 * (i as f32).sin();
        }
    }
    weights
}

fn run(decoder: &Decoder, pool: &Pool, weights: &[f32], batch: &MicroBatch) -> (Loss, Gradients) {
    let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
    let mut order = Vec::new();
    let mut completed = |index: usize, _: &mut Buffer<f32>| order.push(index);
    let mut arena = Arena::new();
    let loss = decoder
        .forward_backward(pool, weights, batch, 3, &mut gradients, &mut arena, &mut completed)
        .unwrap();
    assert!(order.into_iter().eq(0..decoder.layout().buckets().len()), "buckets complete in order, once");
    (loss, gradients)
}

fn bits(gradients: &Gradients) -> Vec<u32> {
    gradients.buckets.iter().flat_map(|bucket| bucket.iter().map(|x| x.to_bits())).collect()
}

#[test]
fn every_tensors_gradient_is_the_slope_of_the_loss() {
    let pool = Pool::new(2, Cpu::detect());
    for family in ["llama", "qwen2", "qwen3"] {
        let decoder = Decoder::new(&tiny(family), Options::default()).unwrap();
        let (weights, batch) = (weights(&decoder, &pool), batch());
        let (loss, gradients) = run(&decoder, &pool, &weights, &batch);
        let mut arena = Arena::new();
        assert_eq!(decoder.loss(&pool, &weights, &batch, &mut arena).unwrap(), loss);
        // Along the gradient itself the slope is its length: one number that every value has a part in.
        for parameter in decoder.layout().parameters() {
            let gradient = gradients.of(decoder.layout(), parameter);
            let length = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-3, "{family} {}: {length}", parameter.name);
            let step = 2e-3;
            let mut at = |sign: f64| {
                let mut moved = weights.clone();
                for (x, &g) in moved[parameter.range.clone()].iter_mut().zip(gradient) {
                    *x += (sign * step * f64::from(g) / length) as f32;
                }
                decoder.loss(&pool, &moved, &batch, &mut arena).unwrap().sum
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
            let name = &parameter.name;
            assert!((slope / length - 1.0).abs() < 0.01, "{family} {name}: {slope}, not {length}");
        }
    }
}

#[test]
fn threads_recomputation_and_company_change_no_bit() {
    let one = Pool::new(1, Cpu::detect());
    for (family, precision) in
        [("llama", Precision::F32), ("qwen3", Precision::Bf16), ("qwen2", Precision::F32)]
    {
        for dropout in [0.0, 0.2] {
            let options = Options { precision, dropout, ..Options::default() };
            let decoder = Decoder::new(&tiny(family), options).unwrap();
            let (weights, batch) = (weights(&decoder, &one), batch());
            let (loss, gradients) = run(&decoder, &one, &weights, &batch);
            for (threads, recompute) in [(2, false), (3, true), (1, true)] {
                let options = Options { recompute, ..options };
                let decoder = Decoder::new(&tiny(family), options).unwrap();
                let pool = Pool::new(threads, Cpu::detect());
                let again = run(&decoder, &pool, &weights, &batch);
                assert_eq!(again.0, loss);
                assert!(bits(&again.1) == bits(&gradients), "{family} {threads} {recompute}");
            }
        }
    }
}

#[test]
fn two_micro_batches_add_to_what_one_with_both_gives() {
    let pool = Pool::new(2, Cpu::detect());
    let decoder = Decoder::new(&tiny("llama"), Options::default()).unwrap();
    let weights = weights(&decoder, &pool);
    let sequences: [Vec<u32>; 2] = [(0..30).collect::<Vec<u32>>(), (3..25).rev().collect()];
    let sequences = sequences.map(|s| s.into_iter().map(|t| t % 29).collect::<Vec<u32>>());
    let mut both = MicroBatch::new();
    let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
    let mut sum = Loss::default();
    for sequence in &sequences {
        both.push(sequence);
        let mut alone = MicroBatch::new();
        alone.push(sequence);
        sum += decoder
            .forward_backward(&pool, &weights, &alone, 0, &mut gradients, &mut Arena::new(), &mut |_, _| ())
            .unwrap();
    }
    let (loss, want) = run(&decoder, &pool, &weights, &both);
    assert!((loss.sum - sum.sum).abs() < 1e-4 && loss.rows == sum.rows);
    for (bucket, want) in gradients.buckets.iter().zip(&want.buckets) {
        assert!(bucket.iter().zip(want.iter()).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}

#[test]
fn forgotten_gradients_leave_nothing_behind() {
    let pool = Pool::new(2, Cpu::detect());
    for family in ["llama", "qwen2", "qwen3"] {
        let decoder = Decoder::new(&tiny(family), Options::default()).unwrap();
        let weights = weights(&decoder, &pool);
        let mut nothing = MicroBatch::new();
        nothing.push_weighted(&[1, 2, 3], |_| 0.0);
        for batch in [batch(), nothing] {
            let (loss, want) = run(&decoder, &pool, &weights, &batch);
            let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
            let fill = |gradients: &mut Gradients| {
                for (bucket, range) in gradients.buckets.iter_mut().zip(decoder.layout().buckets()) {
                    for parameter in decoder.layout().parameters() {
                        if range.contains(&parameter.range.start) {
                            let at = parameter.range.start - range.start..parameter.range.end - range.start;
                            bucket[at].fill(7.0);
                        }
                    }
                }
            };
            fill(&mut gradients);
            gradients.forget();
            let arena = &mut Arena::new();
            let got = decoder
                .forward_backward(&pool, &weights, &batch, 3, &mut gradients, arena, &mut |_, _| ())
                .unwrap();
            assert_eq!(got, loss);
            assert!(bits(&gradients) == bits(&want), "{family}");
            // What is there now counts again.
            gradients.settle(&pool);
            assert!(bits(&gradients) == bits(&want), "{family}");
            fill(&mut gradients);
            gradients.forget();
            gradients.settle(&pool);
            assert!(gradients.buckets.iter().all(|bucket| bucket.iter().all(|&x| x == 0.0)));
        }
    }
}

#[test]
fn dropout_follows_the_step_and_is_off_in_evaluation() {
    let pool = Pool::new(2, Cpu::detect());
    let options = Options { dropout: 0.3, ..Options::default() };
    let decoder = Decoder::new(&tiny("llama"), options).unwrap();
    let plain = Decoder::new(&tiny("llama"), Options::default()).unwrap();
    let (weights, batch) = (weights(&decoder, &pool), batch());
    let loss_of = |decoder: &Decoder, step: u64| {
        let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
        let arena = &mut Arena::new();
        decoder
            .forward_backward(&pool, &weights, &batch, step, &mut gradients, arena, &mut |_, _| ())
            .unwrap()
            .sum
    };
    assert_eq!(loss_of(&decoder, 1), loss_of(&decoder, 1));
    assert_ne!(loss_of(&decoder, 1), loss_of(&decoder, 2));
    assert_eq!(loss_of(&plain, 1), loss_of(&plain, 2));
    let arena = &mut Arena::new();
    assert_eq!(
        decoder.loss(&pool, &weights, &batch, arena).unwrap(),
        plain.loss(&pool, &weights, &batch, arena).unwrap()
    );
    assert!(Decoder::new(&tiny("llama"), Options { dropout: 1.0, ..options }).is_err());
}

#[test]
fn a_gradient_bucket_can_be_carried_away() {
    let pool = Pool::new(2, Cpu::detect());
    let decoder = Decoder::new(&tiny("llama"), Options::default()).unwrap();
    let (weights, batch) = (weights(&decoder, &pool), batch());
    let (_, want) = run(&decoder, &pool, &weights, &batch);
    let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
    let carried: Vec<Buffer<f32>> = std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel::<Buffer<f32>>();
        let other = scope.spawn(move || receiver.into_iter().collect::<Vec<_>>());
        let mut completed = |_: usize, bucket: &mut Buffer<f32>| sender.send(std::mem::take(bucket)).unwrap();
        let arena = &mut Arena::new();
        decoder.forward_backward(&pool, &weights, &batch, 0, &mut gradients, arena, &mut completed).unwrap();
        drop(sender);
        other.join().unwrap()
    });
    assert!(bits(&Gradients { buckets: carried, forgotten: false }) == bits(&want));
}

//! Loss, logits, every gradient and ten AdamW steps held against what PyTorch computed, as
//! `tests/golden/train/record.py` recorded it. After llm.c's `test_gpt2.c`.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use consort_model::train::Arena;
use consort_tensor::{Cpu, Pool};
use consort_training::{
    Decay, Decoder, Gradients, MicroBatch, OptimizerConfig, Options, Precision, Schedule, Trainer,
    TrainerConfig,
};
use safetensors::SafeTensors;

/// Largest difference of a logit. Both sides sum in `f32`, in different orders.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// Largest difference of a gradient's value, relative to the tensor's largest.
const GRADIENT_TOLERANCE: f32 = 2e-5;
/// Largest relative difference of a step's loss and of its gradient's norm. Adam divides by roots of squares, so that
/// differences of rounding grow from step to step.
const STEP_TOLERANCE: f64 = 5e-4;
/// The same where products round their inputs to bf16, 2⁻⁹ of a value at most: the path through the weights is another
/// after a few steps, down the same slope. The norm differs more than the loss, and says less.
const BF16_STEP_TOLERANCE: f64 = 0.03;
const BF16_NORM_TOLERANCE: f64 = 0.2;
/// Length of the difference between a tensor's gradient and PyTorch's in f32, relative to the latter, in bf16.
const BF16_GRADIENT_TOLERANCE: f32 = 0.05;

struct Golden {
    folder: PathBuf,
    plan: serde_json::Value,
    expected: Vec<u8>,
}

impl Golden {
    fn open(family: &str) -> Golden {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train").join(family);
        let plan = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let expected = std::fs::read(folder.join("expected.safetensors")).unwrap();
        Golden { folder, plan, expected }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.expected).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
        tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    }

    fn number(&self, name: &str) -> f32 {
        self.plan[name].as_f64().unwrap() as f32
    }

    fn sequences(&self) -> Vec<(Vec<u32>, Vec<f32>)> {
        let lists = |name: &str| self.plan[name].as_array().unwrap().clone();
        let sequences = lists("sequences").into_iter().zip(lists("weights"));
        sequences
            .map(|(s, w)| (serde_json::from_value(s).unwrap(), serde_json::from_value(w).unwrap()))
            .collect()
    }

    fn batch(&self) -> MicroBatch {
        let mut batch = MicroBatch::new();
        for (tokens, weights) in self.sequences() {
            batch.push_weighted(&tokens, |i| weights[i - 1]);
        }
        batch
    }

    fn decoder(&self, precision: Precision) -> (Decoder, Vec<f32>) {
        let opened = consort_model::open(&self.folder).unwrap();
        let options = Options { precision, ..Options::default() };
        let decoder = Decoder::new(opened.config(), options).unwrap();
        let mut weights = vec![0.0; decoder.layout().len()];
        opened.read_weights(decoder.layout(), &mut weights).unwrap();
        (decoder, weights)
    }

    fn trainer(&self, precision: Precision, threads: usize) -> Trainer {
        let opened = consort_model::open(&self.folder).unwrap();
        let config = TrainerConfig {
            options: Options { precision, ..Options::default() },
            optimizer: OptimizerConfig::AdamW {
                beta1: self.number("beta1"),
                beta2: self.number("beta2"),
                epsilon: self.number("epsilon"),
                weight_decay: self.number("weight_decay"),
            },
            schedule: Schedule {
                learning_rate: f64::from(self.number("learning_rate")),
                warmup_steps: 0,
                steps: 10,
                decay: Decay::Constant,
                final_share: 1.0,
            },
            clip_norm: Some(f64::from(self.number("clip_norm"))),
        };
        let mut trainer = Trainer::new(Pool::new(threads, Cpu::detect()), opened.config(), config).unwrap();
        let layout = trainer.decoder().layout().clone();
        opened.read_weights(&layout, trainer.weights_mut()).unwrap();
        trainer
    }
}

const FAMILIES: [&str; 3] = ["llama", "qwen2", "qwen3"];

#[test]
fn logits_are_pytorchs() {
    let pool = Pool::new(2, Cpu::detect());
    for family in FAMILIES {
        let golden = Golden::open(family);
        let (decoder, weights) = golden.decoder(Precision::F32);
        let logits = decoder.logits(&pool, &weights, &golden.batch(), &mut Arena::new()).unwrap();
        let want = [golden.tensor("logits.0"), golden.tensor("logits.1")].concat();
        assert_eq!(logits.len(), want.len());
        for (index, (got, want)) in logits.iter().zip(&want).enumerate() {
            assert!((got - want).abs() < LOGIT_TOLERANCE, "{family} {index}: {got}, not {want}");
        }
    }
}

#[test]
fn every_gradient_is_pytorchs() {
    let pool = Pool::new(2, Cpu::detect());
    for family in FAMILIES {
        let golden = Golden::open(family);
        for precision in [Precision::F32, Precision::Bf16] {
            let (decoder, weights) = golden.decoder(precision);
            let mut gradients = Gradients::zeroed(decoder.layout()).unwrap();
            let arena = &mut Arena::new();
            decoder
                .forward_backward(&pool, &weights, &golden.batch(), 0, &mut gradients, arena, &mut |_, _| ())
                .unwrap();
            for parameter in decoder.layout().parameters() {
                let want = golden.tensor(&format!("gradient.{}", parameter.name));
                let got = gradients.of(decoder.layout(), parameter);
                assert_eq!(got.len(), want.len(), "{family} {}", parameter.name);
                let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let difference = length(&mut got.iter().zip(&want).map(|(a, b)| a - b));
                let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let (error, tolerance) = match precision {
                    Precision::F32 => {
                        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
                        (worst.fold(0.0, f32::max) / largest, GRADIENT_TOLERANCE)
                    }
                    Precision::Bf16 => {
                        (difference / length(&mut want.iter().copied()), BF16_GRADIENT_TOLERANCE)
                    }
                };
                assert!(error < tolerance, "{family} {precision:?} {}: {error}", parameter.name);
            }
        }
    }
}

#[test]
fn ten_steps_lose_what_pytorchs_lose() {
    for family in FAMILIES {
        let golden = Golden::open(family);
        for (precision, tolerance, norm_tolerance) in [
            (Precision::F32, STEP_TOLERANCE, STEP_TOLERANCE),
            (Precision::Bf16, BF16_STEP_TOLERANCE, BF16_NORM_TOLERANCE),
        ] {
            let mut trainer = golden.trainer(precision, 2);
            for (loss, norm) in golden.tensor("losses").iter().zip(golden.tensor("norms")) {
                let report = trainer.step(&[golden.batch()]).unwrap();
                let off = |got: f64, want: f32| (got / f64::from(want) - 1.0).abs();
                assert!(off(report.loss.mean(), *loss) < tolerance, "{family} {report:?}, not {loss}");
                assert!(off(report.gradient_norm, norm) < norm_tolerance, "{family} {report:?}, not {norm}");
            }
        }
    }
}

#[test]
fn threads_and_recomputation_leave_the_weights_bits_alone_and_micro_batches_nearly() {
    let golden = Golden::open("qwen3");
    let weights = |trainer: &Trainer| trainer.weights().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let run = |threads: usize| {
        let mut trainer = golden.trainer(Precision::F32, threads);
        for _ in 0..5 {
            trainer.step(&[golden.batch()]).unwrap();
        }
        trainer
    };
    let one = run(1);
    assert!(weights(&one) == weights(&run(2)) && weights(&one) == weights(&run(3)));

    let mut cut = golden.trainer(Precision::F32, 2);
    let parts: Vec<MicroBatch> = golden
        .sequences()
        .iter()
        .map(|(tokens, weights)| {
            let mut batch = MicroBatch::new();
            batch.push_weighted(tokens, |i| weights[i - 1]);
            batch
        })
        .collect();
    for _ in 0..5 {
        cut.step(&parts).unwrap();
    }
    for (a, b) in one.weights().iter().zip(cut.weights()) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}

//! A small model from scratch learns a rule, and what a step refuses leaves everything as it was.
#![allow(clippy::unwrap_used)]

use consort_model::ModelConfig;
use consort_tensor::{Cpu, Pool};
use consort_training::{
    Decay, Error, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

fn model() -> ModelConfig {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train/llama");
    consort_model::open(&folder).unwrap().config().clone()
}

fn config(optimizer: OptimizerConfig, learning_rate: f64) -> TrainerConfig {
    let schedule =
        Schedule { learning_rate, warmup_steps: 5, steps: 150, decay: Decay::Cosine, final_share: 0.1 };
    TrainerConfig { options: Options::default(), optimizer, schedule, clip_norm: Some(1.0) }
}

fn trainer(config: TrainerConfig) -> Trainer {
    let mut trainer = Trainer::new(Pool::new(2, Cpu::detect()), &model(), config).unwrap();
    let layout = trainer.decoder().layout().clone();
    let pool = Pool::new(1, Cpu::detect());
    layout.initialize(&pool, Normal::new(1), trainer.weights_mut());
    trainer
}

/// Sequences that repeat a pattern of four tokens: to predict them, attention has to look back.
fn repetitions(step: u32) -> MicroBatch {
    let mut batch = MicroBatch::new();
    for row in 0..16 {
        let seed = step * 16 + row;
        let pattern: Vec<u32> = (0..4).map(|i| (seed * 7919 + i * i * 104_729 + i * seed) % 48).collect();
        batch.push_weighted(&pattern.repeat(6), |i| if i < 4 { 0.0 } else { 1.0 });
    }
    batch
}

#[test]
fn it_learns_to_repeat() {
    let sgd = OptimizerConfig::Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.0 };
    for (optimizer, learning_rate, enough) in [(OptimizerConfig::default(), 0.02, 0.5), (sgd, 0.3, 3.0)] {
        let mut trainer = trainer(config(optimizer, learning_rate));
        let before = trainer.evaluate(&repetitions(10_000)).unwrap().mean();
        assert!((before - 48f64.ln()).abs() < 0.2, "an untrained model guesses: {before}");
        for step in 0..150 {
            trainer.step(&[repetitions(step)]).unwrap();
        }
        let after = trainer.evaluate(&repetitions(10_000)).unwrap().mean();
        assert!(after < enough, "{optimizer:?}: {before} to {after}");
        assert_eq!(trainer.steps(), 150);
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut trainer = trainer(config(OptimizerConfig::default(), 0.01));
    trainer.step(&[repetitions(0)]).unwrap();
    let weights = trainer.weights().to_vec();

    let mut bad = repetitions(1);
    bad.tokens[3] = 48;
    assert!(matches!(trainer.step(&[repetitions(1), bad]), Err(Error::Model(_))));
    let mut silent = MicroBatch::new();
    silent.push_weighted(&[1, 2, 3], |_| 0.0);
    assert!(matches!(trainer.step(&[silent]), Err(Error::NothingToLearn { step: 1 })));
    assert!(matches!(trainer.step(&[]), Err(Error::NothingToLearn { step: 1 })));
    assert_eq!(trainer.weights(), weights);
    assert_eq!(trainer.steps(), 1);

    // Nothing of the refused micro-batches is left in the next step's gradients.
    let mut fresh = self::trainer(config(OptimizerConfig::default(), 0.01));
    fresh.step(&[repetitions(0)]).unwrap();
    assert_eq!(
        trainer.step(&[repetitions(2)]).unwrap().gradient_norm,
        fresh.step(&[repetitions(2)]).unwrap().gradient_norm
    );

    trainer.weights_mut()[40] = f32::NAN;
    assert!(matches!(trainer.step(&[repetitions(3)]), Err(Error::Diverged { step: 2, .. })));
    assert_eq!(trainer.steps(), 2);
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    let good = config(OptimizerConfig::default(), 0.01);
    let adam =
        |beta1, epsilon, weight_decay| OptimizerConfig::AdamW { beta1, beta2: 0.9, epsilon, weight_decay };
    for (config, name) in [
        (TrainerConfig { clip_norm: Some(0.0), ..good }, "clip_norm"),
        (TrainerConfig { optimizer: adam(1.0, 1e-8, 0.0), ..good }, "beta1"),
        (TrainerConfig { optimizer: adam(0.9, 0.0, 0.0), ..good }, "epsilon"),
        (TrainerConfig { optimizer: adam(0.9, 1e-8, -1.0), ..good }, "weight_decay"),
        (TrainerConfig { schedule: Schedule { steps: 0, ..good.schedule }, ..good }, "steps"),
    ] {
        let error = Trainer::new(Pool::new(1, Cpu::detect()), &model(), config).err().unwrap();
        assert!(error.to_string().starts_with(name), "{error}");
    }
}

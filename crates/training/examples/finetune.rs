//! Trains a model on a text and writes it as a Hugging Face folder.
//!
//! ```text
//! cargo run --release -p consort-training --example finetune -- MODEL TEXT OUT [STEPS]
//! ```
//!
//! MODEL is a GGUF file or a Hugging Face folder, TEXT any text file; OUT is what `consort run` and `transformers`
//! then load. Each step takes four pieces of up to 128 tokens, in turn, in bf16.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;

use consort_model::tokenizer::Specials;
use consort_model::train::{SavedType, save};
use consort_tensor::{Cpu, Pool};
use consort_training::{
    Decay, MicroBatch, OptimizerConfig, Options, Precision, Schedule, Trainer, TrainerConfig,
};

const PIECE: usize = 128;
const PIECES: usize = 4;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, out, rest @ ..] = &arguments[..] else {
        panic!("give a model, a text file and the folder to write");
    };
    let steps: u64 = rest.first().map_or(20, |steps| steps.parse().unwrap());
    let opened = consort_model::open(Path::new(model)).unwrap();
    let tokens =
        opened.tokenizer().unwrap().encode(&std::fs::read_to_string(text).unwrap(), Specials::AsText);
    let pieces: Vec<&[u32]> = tokens.chunks(PIECE).filter(|piece| piece.len() > 1).collect();
    assert!(!pieces.is_empty(), "the text has fewer than two tokens");

    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let config = TrainerConfig {
        options: Options { precision: Precision::Bf16, ..Options::default() },
        optimizer: OptimizerConfig::default(),
        schedule: Schedule {
            learning_rate: 1e-4,
            warmup_steps: steps / 10,
            steps,
            decay: Decay::Cosine,
            final_share: 0.1,
        },
        clip_norm: Some(1.0),
    };
    let mut trainer = Trainer::new(Pool::new(threads, Cpu::detect()), opened.config(), config).unwrap();
    let layout = trainer.decoder().layout().clone();
    opened.read_weights(&layout, trainer.weights_mut()).unwrap();
    for step in 0..steps as usize {
        let mut batch = MicroBatch::new();
        for piece in 0..PIECES {
            batch.push(pieces[(step * PIECES + piece) % pieces.len()]);
        }
        let report = trainer.step(&[batch]).unwrap();
        println!(
            "step {step}: loss {:.4}, gradient {:.3}, learning rate {:.2e}",
            report.loss.mean(),
            report.gradient_norm,
            report.learning_rate
        );
    }
    let weights = trainer.weights();
    save(Path::new(out), opened.config(), &layout, weights, SavedType::Bf16, Some(&opened)).unwrap();
    println!("written to {out}");
}

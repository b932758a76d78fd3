//! A tiny model and data without files, for tests of training on many workers.

#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, missing_docs, unreachable_pub)]

pub mod process;
pub mod relay;

use consort_base::philox4x32;
use consort_collectives::{JoinOptions, Store, StoreOptions, TransportKind};
use consort_model::ModelConfig;
use consort_model::arch::RopeConfig;
use consort_tensor::activation::Activation;
use consort_tensor::{Cpu, Pool};
use consort_training::parallel::{HOST_SETTLE, HOST_SILENCE, Plan, Samples};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

pub const TOKEN: &[u8] = b"a token for tests, long enough";

pub fn model() -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        name: None,
        vocab: 64,
        max_context: 64,
        layers: 2,
        hidden: 32,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        ffn: 64,
        activation: Activation::Silu,
        norm_eps: 1e-5,
        embedding_scale: None,
        attention_scale: 8f32.powf(-0.5),
        attention_softcap: None,
        logit_softcap: None,
        query_key_norm: false,
        post_norms: false,
        tied_head: true,
        rope: RopeConfig::plain(1e4),
        sliding: None,
    }
}

pub fn trainer(model: &ModelConfig, dropout: f32, threads: usize) -> Trainer {
    let schedule =
        Schedule { learning_rate: 0.01, warmup_steps: 3, steps: 40, decay: Decay::Cosine, final_share: 0.1 };
    let config = TrainerConfig {
        options: Options { dropout, seed: 5, ..Options::default() },
        optimizer: OptimizerConfig::default(),
        schedule,
        clip_norm: Some(1.0),
    };
    let pool = Pool::new(threads, Cpu::detect());
    let mut trainer = Trainer::new(pool, model, config).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    trainer
}

/// Sequences of different lengths that repeat a pattern.
pub struct Patterns {
    pub count: u64,
    pub vocab: u32,
    pub rows: u32,
}

pub const PATTERNS: Patterns = Patterns { count: 37, vocab: 64, rows: 8 };

impl Samples for Patterns {
    fn count(&self) -> u64 {
        self.count
    }

    fn id(&self) -> String {
        format!("patterns {} {} {}", self.count, self.vocab, self.rows)
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        let word = |i: u32| philox4x32([index as u32, i, 0, 0], [3, 7])[0];
        let tokens: Vec<u32> =
            (0..self.rows + 1 + word(9) % self.rows).map(|i| word(i % 4) % self.vocab).collect();
        batch.push(&tokens);
    }
}

pub fn plan() -> Plan {
    Plan::new(11, 12, 8, 2)
}

pub fn store(workers: usize) -> Store {
    let options = StoreOptions { settle: HOST_SETTLE, ..StoreOptions::new(workers) };
    Store::listen("127.0.0.1:0", TOKEN, options).unwrap()
}

pub fn options(address: &str, kind: TransportKind) -> JoinOptions {
    JoinOptions { transport: Some(kind), silence: HOST_SILENCE, ..JoinOptions::new(address, TOKEN) }
}

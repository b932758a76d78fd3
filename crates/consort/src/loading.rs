//! From a model's path to a running engine, as fast as the disk and the cores allow.
//!
//! Tokenizer and template are built on a thread of their own while the weights are read and packed.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use consort_hub::{Fetched, Hub, ModelRef};
use consort_inference::{Engine, EngineOptions};
use consort_model::{ChatTemplate, Tokenizer};
use consort_tensor::Pool;

use crate::cli::UsageError;
use crate::progress::Progress;

/// A model that is ready to answer.
pub(crate) struct Loaded {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<Arc<ChatTemplate>>,
    pub(crate) threads: usize,
    pub(crate) kernels: &'static str,
    pub(crate) weight_bytes: usize,
    pub(crate) load_time: Duration,
}

/// Reads a reference; what is wrong with it is the caller's to mend, so exit code 2.
pub(crate) fn reference(hub: &Hub, text: &str) -> Result<ModelRef> {
    hub.parse(text).map_err(|e| UsageError(e.to_string()).into())
}

/// Makes the model's files available, with progress on standard error.
pub(crate) fn fetch(hub: &Hub, model: &ModelRef, force: bool, quiet: bool) -> Result<Fetched> {
    let mut progress = Progress::new(quiet);
    let fetched = hub.fetch(model, force, &mut |event| progress.on(event));
    progress.clear();
    Ok(fetched?)
}

/// Loads the model at `path` and starts its engine.
pub(crate) fn load(path: &Path, pool: Pool, options: EngineOptions) -> Result<Loaded> {
    let start = Instant::now();
    let opened = consort_model::open(path)?;
    let (threads, kernels) = (pool.threads(), pool.cpu().family().name());
    let (model, text) = std::thread::scope(|scope| {
        let text = std::thread::Builder::new()
            .name("tokenizer".into())
            .spawn_scoped(scope, || -> Result<_> { Ok((opened.tokenizer()?, opened.chat_template()?)) });
        let model = opened.load(&pool);
        let text = text
            .context("can't start a thread for the tokenizer")
            .and_then(|thread| thread.join().map_err(|_| anyhow!("the tokenizer's thread panicked"))?);
        (model, text)
    });
    let (model, (tokenizer, template)) = (model?, text?);
    let weight_bytes = model.weight_bytes();
    let tokenizer = Arc::new(tokenizer);
    let engine = Engine::start(Arc::new(model), tokenizer.clone(), pool, options)?;
    Ok(Loaded {
        engine,
        tokenizer,
        template: template.map(Arc::new),
        threads,
        kernels,
        weight_bytes,
        load_time: start.elapsed(),
    })
}

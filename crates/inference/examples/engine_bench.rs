//! Prefill and decode of one sequence through the whole engine (scheduler, cache, sampler), as one line of JSON.
//!
//! Measures what `llama-bench -p 512 -n 128` measures: a prompt of random tokens to its first token, and tokens
//! generated one after another from an almost empty context. Each part runs once to warm up, then `--repeat` times.
//!
//! ```text
//! cargo run --release -p consort-inference --example engine_bench -- MODEL.gguf [--threads 2] [--repeat 1]
//!     [--prompt 512] [--generate 128]
//! ```

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use consort_inference::{Engine, EngineOptions, Event, Request, Sampling};
use consort_tensor::{Cpu, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("give a model file")?;
    let mut options: HashMap<String, usize> = HashMap::new();
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a number"))?;
        options.insert(name, value.parse()?);
    }
    let option = |name: &str, default: usize| options.get(name).copied().unwrap_or(default);
    let machine = std::thread::available_parallelism().map_or(1, usize::from);
    let (threads, repeat) = (option("--threads", machine), option("--repeat", 1).max(1));
    let (prompt, generate) = (option("--prompt", 512).max(1), option("--generate", 128).max(1));

    let pool = Pool::new(threads, Cpu::detect());
    let opened = consort_model::open(Path::new(&path))?;
    let tokenizer = Arc::new(opened.tokenizer()?);
    let model = Arc::new(opened.load(&pool)?);
    let vocab = model.config().vocab as u32;
    let options =
        EngineOptions { prefix_cache: false, step_tokens: prompt.max(512), ..EngineOptions::default() };
    let engine = Engine::start(model, tokenizer, pool, options)?;

    let mut random = 0x2545_f491_u32;
    let mut tokens = |count: usize| -> Vec<u32> {
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            random % vocab
        };
        (0..count).map(|_| next()).collect()
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=repeat {
        let (first, _) = time(&engine, tokens(prompt), 1)?;
        let (_, rest) = time(&engine, tokens(1), generate + 1)?;
        if round > 0 {
            prefill.push(prompt as f64 / first.as_secs_f64());
            decode.push(generate as f64 / rest.as_secs_f64());
        }
    }
    let result = serde_json::json!({
        "model": path, "threads": threads, "fingerprint": engine.fingerprint(),
        "prefill_tokens": prompt, "prefill_tokens_per_second": prefill,
        "decode_tokens": generate, "decode_tokens_per_second": decode,
    });
    println!("{result}");
    Ok(())
}

/// Time to the first token, and from there to the last.
fn time(
    engine: &Engine,
    prompt: Vec<u32>,
    max_tokens: usize,
) -> Result<(Duration, Duration), Box<dyn Error>> {
    let request = Request {
        prompt,
        emitted: Vec::new(),
        sampling: Sampling::default(),
        end_tokens: Vec::new(),
        max_tokens,
        ignore_end: true,
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        deadline: None,
    };
    let started = Instant::now();
    let mut submission = engine.submit(request)?;
    let (mut first, mut last, mut count) = (None, started, 0);
    while let Some(event) = submission.events.blocking_recv() {
        match event {
            Event::Token(_) => {
                last = Instant::now();
                first.get_or_insert(last);
                count += 1;
            }
            Event::Finished { .. } => break,
            Event::Failed { reason } => return Err(reason.into()),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
    let first = first.ok_or("the engine sent no token")?;
    if count != max_tokens {
        return Err(format!("asked for {max_tokens} tokens, got {count}").into());
    }
    Ok((first - started, last - first))
}

//! A first program: load a model, ask it something, print the answer as it comes.
//!
//! ```text
//! cargo run --release -p consort-inference --example generate -- MODEL.gguf "What is a consort?"
//! ```

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use consort_inference::{Engine, EngineOptions, Event, Request, Sampling, TextAssembler};
use consort_model::chat::ChatOptions;
use consort_tensor::{Cpu, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, question] = &arguments[..] else { return Err("usage: generate MODEL QUESTION".into()) };

    // A pool of compute threads, and the model packed for it.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(threads, Cpu::detect());
    let opened = consort_model::open(Path::new(path))?;
    let tokenizer = Arc::new(opened.tokenizer()?);
    let template = opened.chat_template()?.ok_or("the model has no chat template")?;
    let model = Arc::new(opened.load(&pool)?);

    // The engine has a thread of its own; handles are cheap to clone and share.
    let engine = Engine::start(model, Arc::clone(&tokenizer), pool, EngineOptions::default())?;

    let messages = [serde_json::json!({ "role": "user", "content": question })];
    let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
    let request = Request {
        prompt: template.encode(&tokenizer, &messages, &options)?,
        emitted: Vec::new(),
        // The same seed gives the same answer, today, tomorrow and among a thousand others.
        sampling: Sampling { temperature: 0.7, top_p: 0.9, seed: 1, ..Sampling::default() },
        end_tokens: tokenizer.end_tokens().to_vec(),
        max_tokens: 200,
        ignore_end: false,
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        deadline: None,
    };

    let mut answer = engine.submit(request)?;
    let mut text = TextAssembler::new(Vec::new());
    let mut out = std::io::stdout().lock();
    while let Some(event) = answer.events.blocking_recv() {
        match event {
            Event::Token(token) => write!(out, "{}", text.push(&tokenizer, token.id).text)?,
            Event::Finished { usage, .. } => {
                writeln!(out, "{}\n\n{usage:?}, {}", text.finish().text, engine.fingerprint())?;
            }
            Event::Failed { reason } => return Err(reason.into()),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
        out.flush()?;
    }
    Ok(())
}

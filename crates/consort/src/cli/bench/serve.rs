//! `consort bench serve`: a closed loop of streamed chats against any OpenAI-compatible server.
//!
//! Each of C workers sends one request after another, over a new connection each time and with a prompt of its own, so
//! that no server's prefix cache can help. Greedy, `ignore_eos`: every answer has the same length. Only fields that
//! llama.cpp's server and vLLM know too are sent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::statistics::Times;
use super::stream::{Measured, Target};
use crate::cli::UsageError;
use crate::terminal::{line, note};

/// A server under load: throughput, first-token and inter-token times
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort bench serve --concurrency 8 --requests 64\n  consort bench serve --url http://127.0.0.1:9000 --concurrency 16 --prompt-tokens 200 --max-tokens 64 --json\n  consort bench serve --url http://127.0.0.1:8081 --extra cache_prompt=false   # a field that only llama.cpp's server knows"
)]
pub(crate) struct ServeBench {
    /// The server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Requests under way at once
    #[arg(long, short, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    /// Requests in all [default: eight a worker]
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests: Option<u32>,
    /// Tokens of each prompt, roughly
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(40..=1_000_000))]
    prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tokens: u32,
    /// Model to ask for [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The server's key [default: CONSORT_API_KEY]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Another seed asks other prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A request that takes longer is a fault
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// A further field of the request, its value in JSON; repeatable
    #[arg(long = "extra", value_name = "FIELD=JSON", value_parser = extra)]
    extras: Vec<(String, Value)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Serialize)]
struct Report {
    url: String,
    model: String,
    concurrency: u32,
    requests: u32,
    completed: usize,
    /// Faults by status or word.
    errors: BTreeMap<String, usize>,
    seconds: f64,
    prompt_tokens: u64,
    output_tokens: u64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
    requests_per_second: f64,
    first_token_ms: Option<Times>,
    inter_token_ms: Option<Times>,
    latency_ms: Option<Times>,
}

impl ServeBench {
    pub(crate) fn run(self) -> Result<()> {
        let key = self.api_key.clone().or_else(crate::environment::api_key);
        let target =
            Target::parse(&self.url, key).map_err(|e| UsageError(format!("--url {:?}: {e}", self.url)))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("can't start the load generator's runtime")?;
        let report = runtime.block_on(self.measure(target))?;
        if self.json {
            line(serde_json::to_string_pretty(&report)?)?;
        } else {
            report.print()?;
        }
        if report.completed == 0 {
            bail!("no request was answered; is the server at {} ready?", self.url);
        }
        Ok(())
    }

    async fn measure(&self, target: Target) -> Result<Report> {
        let patience = Duration::from_secs(self.timeout);
        let model = match &self.model {
            Some(model) => model.clone(),
            None => tokio::time::timeout(Duration::from_secs(10), target.first_model())
                .await
                .unwrap_or_else(|_| Err("timeout".into()))
                .map_err(|fault| no_model(&self.url, &fault))?,
        };
        let requests = self.requests.unwrap_or(self.concurrency.saturating_mul(8));
        if !self.json {
            note(&format!("{requests} requests to {model} at {}, {} at once", self.url, self.concurrency));
        }
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let mut workers = Vec::new();
        for _ in 0..self.concurrency.min(requests) {
            let (target, next, model) = (target.clone(), next.clone(), model.clone());
            let bodies = Bodies {
                model,
                seed: self.seed,
                words: self.prompt_tokens.saturating_sub(35).max(1),
                max_tokens: self.max_tokens,
                extras: self.extras.clone(),
            };
            workers.push(tokio::spawn(async move {
                let mut outcomes: Vec<Result<Measured, String>> = Vec::new();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= requests as usize {
                        return outcomes;
                    }
                    let body = bodies.body(i as u64);
                    let outcome = tokio::time::timeout(patience, target.stream(&body)).await;
                    outcomes.push(outcome.unwrap_or_else(|_| Err("timeout".into())));
                }
            }));
        }
        let mut outcomes = Vec::new();
        for worker in workers {
            outcomes.extend(worker.await.context("a worker of the load generator ended early")?);
        }
        Ok(self.report(model, requests, start.elapsed(), outcomes))
    }

    fn report(
        &self,
        model: String,
        requests: u32,
        elapsed: Duration,
        outcomes: Vec<Result<Measured, String>>,
    ) -> Report {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let mut errors = BTreeMap::new();
        let (mut first, mut between, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        let (mut prompt_tokens, mut output_tokens) = (0, 0);
        for outcome in outcomes {
            match outcome {
                Ok(measured) => {
                    first.extend(measured.first);
                    between.extend(measured.between);
                    whole.push(measured.whole);
                    prompt_tokens += measured.prompt_tokens;
                    output_tokens += measured.output_tokens;
                }
                Err(fault) => *errors.entry(fault).or_insert(0) += 1,
            }
        }
        Report {
            url: self.url.clone(),
            model,
            concurrency: self.concurrency,
            requests,
            completed: whole.len(),
            errors,
            seconds,
            prompt_tokens,
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            total_tokens_per_second: (prompt_tokens + output_tokens) as f64 / seconds,
            requests_per_second: whole.len() as f64 / seconds,
            first_token_ms: Times::of(first),
            inter_token_ms: Times::of(between),
            latency_ms: Times::of(whole),
        }
    }
}

/// Why there is nothing to measure, and the cure.
fn no_model(url: &str, fault: &str) -> anyhow::Error {
    match fault {
        "connect" => anyhow!("no server answers at {url}; start one, or check --url"),
        "401" | "403" => anyhow!("{url} refuses the key ({fault}); check --api-key or CONSORT_API_KEY"),
        other => anyhow!("{url} lists no model ({other}); name one with --model, or check --url"),
    }
}

/// Makes the requests.
struct Bodies {
    model: String,
    seed: u64,
    words: u32,
    max_tokens: u32,
    extras: Vec<(String, Value)>,
}

impl Bodies {
    fn body(&self, i: u64) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": prompt(self.seed, i, self.words) }],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        for (field, value) in &self.extras {
            body[field] = value.clone();
        }
        body
    }
}

/// Common short words, so that a word is a token in most vocabularies.
const WORDS: &[&str] = &[
    "river", "stone", "light", "winter", "garden", "music", "letter", "window", "market", "bridge", "summer",
    "paper", "island", "forest", "silver", "morning", "table", "doctor", "village", "engine", "mountain",
    "story", "water", "road", "night", "house", "friend", "teacher", "school", "train", "field", "horse",
    "ocean", "city", "family", "clock", "color", "bread", "ship", "storm", "star", "wind", "door", "glass",
    "tree", "fire", "child", "voice",
];

/// Prompt number `i`: its number, a task, and words picked by a generator seeded with both.
fn prompt(seed: u64, i: u64, words: u32) -> String {
    let mut text = format!("Request {i} of set {seed}. Write a short story that uses these words:");
    let mut state =
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ 0x2545_f491;
    for _ in 0..words {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push(' ');
        text.push_str(WORDS[(state >> 33) as usize % WORDS.len()]);
    }
    text
}

/// `field=JSON`; what is no JSON is taken as a string.
fn extra(text: &str) -> Result<(String, Value), String> {
    let (field, value) = text.split_once('=').ok_or("write FIELD=JSON, like cache_prompt=false")?;
    Ok((field.to_string(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

impl Report {
    fn print(&self) -> Result<()> {
        let times = |name: &str, t: &Option<Times>| match t {
            Some(t) => line(format_args!(
                "{name:<18} p50 {:>9.2} ms   p99 {:>9.2} ms   mean {:>9.2} ms",
                t.p50, t.p99, t.mean
            )),
            None => Ok(()),
        };
        line(format_args!(
            "{:<18} {:.1} tok/s  ({} tokens in {:.2} s)",
            "output", self.output_tokens_per_second, self.output_tokens, self.seconds
        ))?;
        line(format_args!(
            "{:<18} {:.1} tok/s  (with {} prompt tokens)",
            "total", self.total_tokens_per_second, self.prompt_tokens
        ))?;
        line(format_args!(
            "{:<18} {} of {} done, {:.2}/s",
            "requests", self.completed, self.requests, self.requests_per_second
        ))?;
        times("first token", &self.first_token_ms)?;
        times("between tokens", &self.inter_token_ms)?;
        times("whole answer", &self.latency_ms)?;
        for (fault, count) in &self.errors {
            line(format_args!("{:<18} {count} × {fault}", "faults"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_for_a_seed_and_differ_between_requests() {
        assert_eq!(prompt(1, 2, 50), prompt(1, 2, 50));
        let heads: std::collections::BTreeSet<String> =
            (0..100).map(|i| prompt(0, i, 4).split(": ").nth(1).unwrap_or_default().to_string()).collect();
        assert!(heads.len() > 95, "{}", heads.len());
    }

    #[test]
    fn extras_are_json_or_text() {
        assert_eq!(extra("a=false"), Ok(("a".into(), json!(false))));
        assert_eq!(extra("a=x y"), Ok(("a".into(), json!("x y"))));
        assert!(extra("a").is_err());
    }
}

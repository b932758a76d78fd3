//! One measurement of one side.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Sides;
use super::llama::ModelFile;
use crate::command::{output, spelled};
use crate::replica::Replica;

/// Tokens of the prompt and of the answer in the single-sequence measurements.
pub(crate) const PROMPT: usize = 512;
pub(crate) const GENERATE: usize = 128;
/// The load: tokens of each prompt, roughly, and of each answer.
const QUESTION: usize = 200;
const ANSWER: usize = 64;
/// Requests for each stream.
pub(crate) const ROUNDS: usize = 4;
/// After its warm-up a server may do what it does when idle: a server that is measured is rarely one second old.
const REST: Duration = Duration::from_secs(2);

/// Tokens a second of one sequence.
pub(crate) struct Single {
    pub(crate) prefill: f64,
    pub(crate) decode: f64,
}

#[derive(Deserialize)]
struct EngineBench {
    prefill_tokens_per_second: Vec<f64>,
    decode_tokens_per_second: Vec<f64>,
}

/// Our engine, through its scheduler and sampler.
pub(crate) fn ours_single(sides: &Sides, model: &ModelFile) -> Result<Single> {
    let mut command = Command::new(&sides.engine_bench);
    command.arg(&model.path).args(["--threads", &sides.threads.to_string()]);
    command.args(["--prompt", &PROMPT.to_string(), "--generate", &GENERATE.to_string()]);
    let bench: EngineBench = serde_json::from_str(&output(&mut command)?)?;
    let one = |values: &[f64]| values.first().copied().context("engine_bench printed no value");
    Ok(Single {
        prefill: one(&bench.prefill_tokens_per_second)?,
        decode: one(&bench.decode_tokens_per_second)?,
    })
}

#[derive(Deserialize)]
struct LlamaBench {
    n_prompt: usize,
    avg_ts: f64,
}

/// llama-bench, with its own warm-up.
pub(crate) fn theirs_single(sides: &Sides, model: &ModelFile) -> Result<Single> {
    let mut command = Command::new(sides.llama.bin.join("llama-bench"));
    command.arg("-m").arg(&model.path).args(["-t", &sides.threads.to_string(), "-r", "1", "-o", "jsonl"]);
    command.args(["-p", &PROMPT.to_string(), "-n", &GENERATE.to_string()]).stderr(Stdio::null());
    let text = command.output().with_context(|| format!("cannot start `{}`", spelled(&command)))?;
    let (mut prefill, mut decode) = (None, None);
    for line in String::from_utf8_lossy(&text.stdout).lines().filter(|l| l.starts_with('{')) {
        let run: LlamaBench = serde_json::from_str(line)?;
        if run.n_prompt > 0 { prefill = Some(run.avg_ts) } else { decode = Some(run.avg_ts) }
    }
    match (prefill, decode) {
        (Some(prefill), Some(decode)) => Ok(Single { prefill, decode }),
        _ => bail!("`{}` printed no result", spelled(&command)),
    }
}

/// What clients of a loaded server see.
pub(crate) struct Load {
    pub(crate) output_tokens_per_second: f64,
    pub(crate) first_token_ms: f64,
    pub(crate) peak_mib: f64,
}

#[derive(Deserialize)]
struct BenchServe {
    output_tokens_per_second: f64,
    first_token_ms: Option<Quantiles>,
    errors: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Quantiles {
    p50: f64,
}

/// Starts our replica and loads it.
pub(crate) fn ours_load(sides: &Sides, model: &ModelFile, streams: usize, seed: usize) -> Result<Load> {
    let replica = Replica::start("/ready", &sides.work.join("consort-serve.log"), |address| {
        let mut command = Command::new(&sides.consort);
        command.arg("serve").arg(&model.path).args(["--port", &address.port().to_string()]);
        command.args(["--threads", &sides.threads.to_string()]);
        command
    })?;
    load(sides, &replica, streams, seed)
}

/// Starts llama-server with a slot for each stream and loads it.
pub(crate) fn theirs_load(sides: &Sides, model: &ModelFile, streams: usize, seed: usize) -> Result<Load> {
    let threads = sides.threads.to_string();
    let replica = Replica::start("/health", &sides.work.join("llama-server.log"), |address| {
        let mut command = Command::new(sides.llama.bin.join("llama-server"));
        command.arg("-m").arg(&model.path).args(["-t", &threads, "-tb", &threads, "--no-webui"]);
        command.args(["--parallel", &streams.to_string(), "-c", &(streams * 512).to_string()]);
        command.args(["--host", "127.0.0.1", "--port", &address.port().to_string()]);
        command
    })?;
    load(sides, &replica, streams, seed)
}

/// The same generator for both: each prompt is another one, greedy, exactly `ANSWER` tokens. Both sides keep their
/// prefix caches on, as they come; all prompts have the template's opening in common and nothing else.
fn load(sides: &Sides, replica: &Replica, streams: usize, seed: usize) -> Result<Load> {
    let bench = |requests: usize, seed: usize| -> Result<BenchServe> {
        let mut command = Command::new(&sides.consort);
        command.args(["bench", "serve", "--json", "--url", &replica.url()]);
        command.args(["--concurrency", &streams.to_string(), "--requests", &requests.to_string()]);
        command.args(["--prompt-tokens", &QUESTION.to_string(), "--max-tokens", &ANSWER.to_string()]);
        command.args(["--seed", &seed.to_string()]);
        let result: BenchServe = serde_json::from_str(&output(&mut command)?)?;
        if !result.errors.is_empty() {
            bail!("of {requests} requests to {} failed: {:?}", replica.url(), result.errors);
        }
        Ok(result)
    };
    bench(streams, 1_000_000 + seed)?;
    std::thread::sleep(REST);
    let result = bench(streams * ROUNDS, seed)?;
    Ok(Load {
        output_tokens_per_second: result.output_tokens_per_second,
        first_token_ms: result.first_token_ms.context("consort bench serve saw no first token")?.p50,
        peak_mib: replica.peak_bytes()? / f64::from(1 << 20),
    })
}

/// Milliseconds from starting the process to the first byte of a one-token answer on its stdout.
pub(crate) fn ours_start(sides: &Sides, model: &ModelFile) -> Result<f64> {
    let mut command = Command::new(&sides.consort);
    command.arg("run").arg(&model.path).args(["Say hello.", "--max-tokens", "1"]);
    command.args(["--threads", &sides.threads.to_string()]);
    first_byte(&mut command)
}

/// The same of llama-completion, its fastest way to one answer.
pub(crate) fn theirs_start(sides: &Sides, model: &ModelFile) -> Result<f64> {
    let mut command = Command::new(sides.llama.bin.join("llama-completion"));
    command.arg("-m").arg(&model.path).args([
        "-p",
        "Say hello.",
        "-n",
        "1",
        "-no-cnv",
        "--no-display-prompt",
    ]);
    command.args(["-t", &sides.threads.to_string(), "-c", "2048", "--no-warmup"]);
    first_byte(&mut command)
}

fn first_byte(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", spelled(command)))?;
    let mut stdout = child.stdout.take().context("the child has no stdout")?;
    let mut byte = [0];
    let read = stdout.read(&mut byte)?;
    let time = started.elapsed().as_secs_f64() * 1000.0;
    std::io::copy(&mut stdout, &mut std::io::sink())?;
    let status = child.wait()?;
    if read == 0 || !status.success() {
        bail!("`{}` ended with {status} and wrote {read} bytes", spelled(command));
    }
    Ok(time)
}

/// Bytes of a file, for the table's notes.
pub(crate) fn file_mib(path: &Path) -> f64 {
    std::fs::metadata(path).map_or(f64::NAN, |m| m.len() as f64 / f64::from(1 << 20))
}

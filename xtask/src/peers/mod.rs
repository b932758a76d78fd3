//! `cargo xtask peers llama.cpp` (and `peers collectives` and `train`, see there): both sides on this machine, in turns, and the table that says how they compare.
//!
//! The peer is built natively with all its instruction sets and runs with as many threads as we do. Every pair is
//! A then B within seconds, because machines drift; the ratio quoted is the median of the pairs' ratios. Nothing
//! else should run meanwhile.

mod collectives;
mod gateway;
mod llama;
mod measure;
mod table;
mod train;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::command::{cargo, run, target_folder};
pub(crate) use gateway::OpenLoop;
use llama::{Llama, ModelFile};
pub(crate) use table::median;
use table::{Better, Row};

/// Which comparison to run.
#[derive(Args)]
pub(crate) struct PeersArguments {
    /// The other side.
    peer: Peer,
    /// A finished build of the peer (the folder with its bin/), instead of building it; for `train` a virtual environment
    /// with torch and transformers.
    #[arg(long, value_name = "FOLDER")]
    build_dir: Option<PathBuf>,
    /// Pairs of measurements for each row.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Threads of both sides; all of the machine's by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Model files: q4_1, q4_0, q8_0, q4_k_m, bf16 (all SmolLM2 135M) and gemma (Gemma 3 270M Q4_K_M).
    #[arg(long, value_delimiter = ',', default_value = "q4_1,q4_0,q8_0,q4_k_m,bf16,gemma")]
    models: Vec<String>,
    /// Model files that are served to concurrent streams.
    #[arg(long, value_delimiter = ',', default_value = "q4_0")]
    serve: Vec<String>,
    /// Shapes that `train` trains: small and smollm2.
    #[arg(long, value_delimiter = ',', default_value = "small,smollm2")]
    shapes: Vec<String>,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "single,load,start")]
    parts: Vec<Part>,
    /// Measures the release build that is there instead of making one.
    #[arg(long)]
    no_build: bool,
    /// Prints the pairs as JSON and writes no document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    collectives: collectives::CollectivesArguments,
}

/// A system that we measure beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// llama.cpp, from its Python source package.
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// nginx, HAProxy and LiteLLM, beside `consort gateway`.
    Gateway,
    /// gloo (through PyTorch) and Open MPI, beside the process groups.
    Collectives,
    /// PyTorch, training on the CPU, eager and compiled.
    Train,
}

/// A group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One sequence: prefill and decode.
    Single,
    /// 8 and 16 streams over HTTP.
    Load,
    /// From starting the process to the first token.
    Start,
}

/// Everything the measurements need.
struct Sides {
    work: PathBuf,
    consort: PathBuf,
    engine_bench: PathBuf,
    llama: Llama,
    threads: usize,
}

/// Sets both sides up, measures, and writes docs/peers-llama.cpp.md.
pub(crate) fn compare(root: &Path, arguments: &PeersArguments) -> Result<()> {
    if arguments.pairs == 0 {
        bail!("--pairs must be at least 1");
    }
    match arguments.peer {
        Peer::LlamaCpp => {}
        Peer::Gateway => return gateway::compare(root, arguments),
        Peer::Collectives => {
            let (build, json) = (!arguments.no_build, arguments.json);
            return collectives::compare(root, &arguments.collectives, arguments.pairs, build, json);
        }
        Peer::Train => return train::compare(root, arguments),
    }
    let work = target_folder(root).join("peers");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let note = |text: &str| eprintln!("xtask: {text}");
    if !arguments.no_build {
        note("building consort (release)");
        let example = ["--example", "engine_bench"];
        run(&mut cargo(root, ["build", "--release", "--quiet", "-p", "consort"]))?;
        run(cargo(root, ["build", "--release", "--quiet", "-p", "consort-inference"]).args(example))?;
    }
    let release = target_folder(root).join("release");
    let sides = Sides {
        consort: release.join("consort"),
        engine_bench: release.join("examples/engine_bench"),
        llama: llama::set_up(&work, arguments.build_dir.as_deref())?,
        threads: arguments
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        work,
    };
    let models = llama::models(&sides.work, &sides.consort, &sides.llama, &arguments.models)?;
    let served = llama::models(&sides.work, &sides.consort, &sides.llama, &arguments.serve)?;

    let mut rows = Vec::new();
    let has = |part| arguments.parts.contains(&part);
    for model in models.iter().filter(|_| has(Part::Single)) {
        note(&format!("{}: one sequence", model.label));
        rows.extend(single(&sides, model, arguments.pairs)?);
    }
    for model in served.iter().filter(|_| has(Part::Load)) {
        for streams in [8, 16] {
            note(&format!("{}: {streams} streams", model.label));
            rows.extend(load(&sides, model, streams, arguments.pairs)?);
        }
    }
    if let Some(model) = models.first().filter(|_| has(Part::Start)) {
        note(&format!("{}: start", model.label));
        rows.push(start(&sides, model, arguments.pairs)?);
    }
    let table = table::markdown(&rows, "llama.cpp");
    if arguments.json {
        let result = serde_json::json!({
            "llama_cpp": sides.llama.version, "machine": machine(), "threads": sides.threads, "rows": rows,
        });
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(());
    }
    println!("{table}");
    let document = root.join("docs/peers-llama.cpp.md");
    fs::write(&document, page(&sides, arguments, &models, &served, &table))?;
    println!("written to {}", document.display());
    Ok(())
}

fn row(model: &ModelFile, what: impl Into<String>, unit: &'static str, better: Better) -> Row {
    Row { model: model.label.clone(), what: what.into(), unit, better, pairs: Vec::new() }
}

fn single(sides: &Sides, model: &ModelFile, pairs: usize) -> Result<[Row; 2]> {
    let mut rows = [
        row(model, format!("decode of {}", measure::GENERATE), "tok/s", Better::Higher),
        row(model, format!("prefill of {}", measure::PROMPT), "tok/s", Better::Higher),
    ];
    for _ in 0..pairs {
        let (ours, theirs) = (measure::ours_single(sides, model)?, measure::theirs_single(sides, model)?);
        rows[0].pairs.push((ours.decode, theirs.decode));
        rows[1].pairs.push((ours.prefill, theirs.prefill));
    }
    Ok(rows)
}

fn load(sides: &Sides, model: &ModelFile, streams: usize, pairs: usize) -> Result<[Row; 3]> {
    let mut rows = [
        row(model, format!("{streams} streams, output"), "tok/s", Better::Higher),
        row(model, format!("{streams} streams, first token (p50)"), "ms", Better::Lower),
        row(model, format!("{streams} streams, peak memory"), "MiB", Better::Lower),
    ];
    for pair in 0..pairs {
        let ours = measure::ours_load(sides, model, streams, pair)?;
        let theirs = measure::theirs_load(sides, model, streams, pair)?;
        rows[0].pairs.push((ours.output_tokens_per_second, theirs.output_tokens_per_second));
        rows[1].pairs.push((ours.first_token_ms, theirs.first_token_ms));
        rows[2].pairs.push((ours.peak_mib, theirs.peak_mib));
    }
    Ok(rows)
}

fn start(sides: &Sides, model: &ModelFile, pairs: usize) -> Result<Row> {
    let mut row = row(model, "process start to first token", "ms", Better::Lower);
    // Once each beforehand, so that both find the file in the page cache.
    let pair = || -> Result<(f64, f64)> {
        Ok((measure::ours_start(sides, model)?, measure::theirs_start(sides, model)?))
    };
    pair()?;
    for _ in 0..pairs {
        row.pairs.push(pair()?);
    }
    Ok(row)
}

/// The processor's name as Linux knows it.
pub(crate) fn machine() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|p| p.1));
    name.unwrap_or("unknown processor").to_owned()
}

fn page(
    sides: &Sides,
    arguments: &PeersArguments,
    models: &[ModelFile],
    served: &[ModelFile],
    table: &str,
) -> String {
    let mut sizes: Vec<_> =
        models.iter().chain(served).map(|m| (m.label.as_str(), measure::file_mib(&m.path))).collect();
    sizes.sort_by(|a, b| a.0.cmp(b.0));
    sizes.dedup_by(|a, b| a.0 == b.0);
    let sizes: Vec<_> = sizes.into_iter().map(|(label, mib)| format!("{label} {mib:.0} MiB")).collect();
    format!(
        "# Beside llama.cpp\n\n\
        Made by `cargo xtask peers llama.cpp --pairs {pairs}`, which builds llama.cpp natively, fetches the models and \
        writes this page. Machine: {machine}, {threads} threads on both sides. llama.cpp: {version}.\n\n\
        {table}\n\
        Both sides ran in turns (A B A B …), {pairs} pairs a row. A figure is the median of its side; the last column \
        is the median of the pairs' ratios, with the lowest and the highest pair.\n\n\
        - *decode*, *prefill*: `llama-bench -p 512 -n 128` beside `engine_bench`, which goes through our scheduler and \
        sampler (llama-bench has none).\n\
        - *streams*: one generator, `consort bench serve`, against `llama-server` with a slot for each stream and against \
        `consort serve`: a different prompt of about 200 tokens each time, 64 tokens out, greedy, {rounds} requests a stream, \
        after a warm-up of one and two seconds of rest.\n\
        - *process start*: a one-token answer by `llama-completion --no-warmup` and by `consort run`, the file in the \
        page cache, to the first byte on stdout.\n\
        - Files: {sizes}. All SmolLM2 files but Q4_1 are requantized from it, which is fine for speed and not for quality.\n",
        pairs = arguments.pairs,
        machine = machine(),
        threads = sides.threads,
        version = sides.llama.version,
        rounds = measure::ROUNDS,
        sizes = sizes.join(", "),
    )
}

//! `cargo xtask peers train`: a training step beside PyTorch's, eager and compiled.
//!
//! All three sides are processes that stay and take a step when they are sent a line, so a round is one step of each
//! within seconds. A side's speed is the median of its steps, a ratio the median of the rounds'.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::PeersArguments;
use super::table::{Better, Row, markdown};
use crate::command::{cargo, run, spelled, target_folder};
use crate::machine;

/// What PyTorch's side is made of.
const PACKAGES: [&str; 3] = ["torch==2.15.0", "transformers==5.23.0", "numpy"];
/// PyTorch's side.
const SCRIPT: &str = "xtask/src/peers/train.py";

/// A model's shape: its name for both programs, its label, tokens a step.
const SHAPES: [(&str, &str, f64); 2] = [
    ("small", "6 layers, 384 wide, 4,096 tokens; 8 × 256", 2048.0),
    ("smollm2", "SmolLM2-135M; 4 × 256", 1024.0),
];
/// Before each step: threads that still spin after the other side's last one would take part of this side's time.
const PAUSE: Duration = Duration::from_millis(400);
const PRECISIONS: [&str; 2] = ["f32", "bf16"];
const MODES: [&str; 2] = ["eager", "compiled"];

/// Sets both sides up, measures, and writes docs/peers-train.md.
pub(super) fn compare(root: &Path, arguments: &PeersArguments) -> Result<()> {
    let work = target_folder(root).join("peers");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let note = |text: &str| eprintln!("xtask: {text}");
    if !arguments.no_build {
        note("building train_bench (release)");
        let build = ["build", "--release", "--quiet", "-p", "consort-training", "--example", "train_bench"];
        run(&mut cargo(root, build))?;
    }
    let python = match &arguments.build_dir {
        Some(folder) => folder.join("bin/python"),
        None => machine::python(&work, "train", &PACKAGES)?,
    };
    let sides = Sides {
        bench: target_folder(root).join("release/examples/train_bench"),
        python,
        script: root.join(SCRIPT),
        threads: arguments
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
    };
    if let Some(other) = arguments.shapes.iter().find(|name| SHAPES.iter().all(|shape| shape.0 != **name)) {
        bail!("no shape is called {other}; there are small and smollm2");
    }
    let mut rows = Vec::new();
    for (shape, label, tokens) in
        SHAPES.into_iter().filter(|shape| arguments.shapes.iter().any(|s| s == shape.0))
    {
        for precision in PRECISIONS {
            note(&format!("{label}, {precision}"));
            rows.extend(sides.measure(shape, (label, tokens), precision, arguments.pairs)?);
        }
    }
    if arguments.json {
        let threads = sides.threads;
        let result = serde_json::json!({"machine": super::machine(), "threads": threads, "rows": rows});
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(());
    }
    let table = markdown(&rows, "PyTorch");
    println!("{table}");
    let document = root.join("docs/peers-train.md");
    fs::write(&document, page(&sides, arguments.pairs, &table))?;
    println!("written to {}", document.display());
    Ok(())
}

struct Sides {
    bench: PathBuf,
    python: PathBuf,
    script: PathBuf,
    threads: usize,
}

impl Sides {
    /// A row for each of PyTorch's modes.
    fn measure(
        &self,
        shape: &str,
        (label, tokens): (&str, f64),
        precision: &str,
        rounds: usize,
    ) -> Result<Vec<Row>> {
        let threads = self.threads.to_string();
        let mut command = Command::new(&self.bench);
        command.args(["--shape", shape, "--precision", precision, "--threads", &threads]);
        let mut ours = Stepper::start(command)?;
        let mut theirs = Vec::new();
        for mode in MODES {
            let mut command = Command::new(&self.python);
            command.arg(&self.script).args([shape, precision, mode, &threads]);
            theirs.push(Stepper::start(command)?);
        }
        let mut rows: Vec<Row> = MODES
            .map(|mode| Row {
                model: label.to_owned(),
                what: format!("{precision}, {mode}"),
                unit: "tok/s",
                better: Better::Higher,
                pairs: Vec::new(),
            })
            .into();
        for _ in 0..rounds {
            for (theirs, row) in theirs.iter_mut().zip(&mut rows) {
                row.pairs.push((tokens / ours.step()?, tokens / theirs.step()?));
            }
        }
        Ok(rows)
    }
}

/// A program that takes a step for each line.
struct Stepper {
    child: Child,
    lines: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    spelled: String,
}

impl Stepper {
    fn start(mut command: Command) -> Result<Stepper> {
        let spelled = spelled(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{spelled}`"))?;
        let lines = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the child has no stdout")?);
        let mut stepper = Stepper { child, lines, answers, spelled };
        let ready = stepper.answer()?;
        if !ready.starts_with("ready") {
            bail!("`{}` said {ready:?} instead of ready", stepper.spelled);
        }
        Ok(stepper)
    }

    /// Seconds of one step.
    fn step(&mut self) -> Result<f64> {
        thread::sleep(PAUSE);
        let lines = self.lines.as_mut().context("the child has no stdin")?;
        lines.write_all(b"\n").and_then(|()| lines.flush()).with_context(|| self.spelled.clone())?;
        let answer = self.answer()?;
        answer.trim().parse().with_context(|| format!("`{}` said {answer:?}, no number", self.spelled))
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("`{}` ended without an answer", self.spelled);
        }
        Ok(line)
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        // No more lines: it ends by itself. Whether it did so well changes nothing that was measured.
        self.lines = None;
        let _ = self.child.wait();
    }
}

fn page(sides: &Sides, rounds: usize, table: &str) -> String {
    format!(
        "# Training beside PyTorch\n\n\
        Made by `cargo xtask peers train --pairs {rounds}`, which sets PyTorch up in a virtual environment and writes \
        this page. Machine: {machine}, {threads} threads on both sides. {packages}.\n\n\
        {table}\n\
        Tokens a second of whole training steps: forward, backward, clipping to a norm of 1, AdamW. All sides are \
        running processes that take turns step by step, {rounds} rounds a row, with a pause of {pause} ms before each step (threads \
        that wait spin for a while). A figure is the median of its side; the \
        last column is the median of the rounds' ratios, with the lowest and the highest round.\n\n\
        - *PyTorch*: transformers' `LlamaForCausalLM` with `scaled_dot_product_attention`, `AdamW(fused=True)`; *compiled* \
        is `torch.compile` around forward and loss, *bf16* is `torch.autocast`. The script: [train.py](../{script}).\n\
        - *Consort*: `train_bench`, an example of `consort-training`. *bf16* rounds the inputs of products and keeps \
        everything else in f32, as autocast does for most of it.\n\
        - Random tokens, weights from scratch, the embedding is also the head, no activation is computed twice.\n",
        machine = super::machine(),
        threads = sides.threads,
        pause = PAUSE.as_millis(),
        packages = PACKAGES.join(", "),
        script = SCRIPT,
    )
}

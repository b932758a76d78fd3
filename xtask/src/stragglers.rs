//! `cargo xtask stragglers`: what one slow worker of four costs, in each way of keeping workers together. Writes
//! `docs/stragglers.md` and its plot.
//!
//! Real jobs: `consort train` on a job's file, with the processes that it starts. Each worker has an allowance of processor
//! time from the kernel ([`Allowance`]), so that it has the pace of a machine of its own however many cores this one has;
//! the slow one has a quarter of the others'. (Sleeping in between would be another thing: a slow machine is slow at
//! everything that it does, and waits as fast as any other.) Servers and launcher are not held back.
//!
//! Ten runs of some seconds each: under four minutes. Needs root, for the allowances.

mod allowance;
mod page;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use self::allowance::Allowance;
use crate::command::{cargo, run, target_folder};

const WORKERS: usize = 4;
/// Of a core, for a worker; the slow one has a quarter of it. Four of them leave room for servers on two cores.
const SHARE: f64 = 0.3;
/// How long a job may take to come to its first step.
const STARTING: Duration = Duration::from_secs(60);

/// How it is measured.
#[derive(Args)]
pub(crate) struct StragglersArguments {
    /// Seconds of each of the ten runs, from its first step.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..=600))]
    seconds: u32,
    /// Where the page and its plot go.
    #[arg(long, default_value = "docs")]
    output: PathBuf,
}

/// A way of keeping workers together: its name, and its lines in `[train]` and in `[servers]`.
struct Way {
    name: &'static str,
    train: &'static str,
    servers: &'static str,
}

const WAYS: [Way; 5] = [
    Way { name: "ring", train: "sync = \"ring\"", servers: "" },
    Way { name: "server, synchronous", train: "sync = \"server\"", servers: "mode = \"synchronous\"" },
    Way {
        name: "… with backup workers",
        train: "sync = \"server\"",
        servers: "mode = \"synchronous\"\nspeculate = \"150ms\"",
    },
    Way {
        name: "server, bounded by 2",
        train: "sync = \"server\"\nexact = false",
        servers: "mode = \"bounded\"\nstaleness = 2",
    },
    Way {
        name: "server, asynchronous",
        train: "sync = \"server\"\nexact = false",
        servers: "mode = \"asynchronous\"",
    },
];

/// When a step was done, in seconds since the first one, and its loss.
type Curve = Vec<(f64, f64)>;

/// What a way came to.
struct Row {
    name: &'static str,
    alike: Curve,
    slowed: Curve,
}

/// The job: a small model, and far more stories than a run sees, so that each loss is of data that no step saw before.
fn job(way: &Way, out: &Path) -> String {
    let servers = match way.servers {
        "" => String::new(),
        lines => format!("[servers]\ncount = 2\nclaim = 1\n{lines}\n"),
    };
    format!(
        "out = \"{}\"\n\
         [model]\nlayers = 4\nhidden = 96\nheads = 3\nffn = 256\ncontext = 64\nvocabulary = 512\n\
         [data]\nstories = \"3M\"\n\
         [train]\nsteps = 100000\nbatch = 32\nmicro_batch = 4\nsilence = \"10s\"\n{}\n\
         [schedule]\nlearning_rate = 3e-3\nwarmup = 0.0001\ndecay = \"constant\"\n\
         [checkpoints]\nevery = 100000\n{servers}",
        out.display(),
        way.train,
    )
}

/// Measures, and writes the page.
pub(crate) fn measure(root: &Path, arguments: &StragglersArguments) -> Result<()> {
    run(&mut cargo(root, ["build", "--release", "--quiet", "--locked", "-p", "consort"]))?;
    let binary = target_folder(root).join("release/consort");
    let folder = target_folder(root).join("xtask/stragglers");
    let seconds = f64::from(arguments.seconds);
    let mut rows = Vec::new();
    for way in &WAYS {
        let alike = train(&binary, &folder, way, SHARE, seconds)?;
        let slowed = train(&binary, &folder, way, SHARE / 4.0, seconds)?;
        let row = Row { name: way.name, alike, slowed };
        print!("{}", page::row(&row, seconds));
        rows.push(row);
    }
    page::write(&root.join(&arguments.output), &rows, seconds)
}

/// One run; the first worker has `first` of a core.
fn train(binary: &Path, folder: &Path, way: &Way, first: f64, seconds: f64) -> Result<Curve> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder)?;
    let (file, out) = (folder.join("job.toml"), folder.join("out"));
    fs::write(&file, job(way, &out))?;
    let mut command = Command::new(binary);
    command.arg("train").arg(&file).args(["--workers", &WORKERS.to_string(), "--json"]);
    let mut launcher = Launcher::start(command)?;
    let mut allowances = Vec::new();
    for worker in 0..WORKERS {
        let pid = launcher.worker(worker)?;
        let share = if worker == 0 { first } else { SHARE };
        allowances.push(Allowance::give(&format!("worker-{worker}"), pid, share)?);
    }
    let metrics = out.join("metrics.jsonl");
    let begun = Instant::now();
    while curve(&metrics).is_empty() {
        launcher.alive()?;
        if begun.elapsed() > STARTING {
            bail!("{}: no step in {STARTING:?}", way.name);
        }
        // A file tells nobody that it grows.
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs_f64(seconds));
    launcher.alive()?;
    drop(launcher);
    drop(allowances);
    let mut curve = curve(&metrics);
    let begin = curve.first().map_or(0.0, |(at, _)| *at);
    curve.iter_mut().for_each(|(at, _)| *at -= begin);
    curve.retain(|(at, _)| *at <= seconds);
    Ok(curve)
}

/// The steps in a metrics file, which may end in the middle of one.
fn curve(metrics: &Path) -> Curve {
    let text = fs::read_to_string(metrics).unwrap_or_default();
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records
        .filter(|record| record["kind"] == "step")
        .filter_map(|record| Some((record["at"].as_f64()?, record["loss"].as_f64()?)))
        .collect()
}

/// `consort train` at work. Its workers end with it.
struct Launcher {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Launcher {
    fn start(mut command: Command) -> Result<Launcher> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start consort")?;
        let errors = child.stderr.take().context("a process without its standard error")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(errors).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Launcher { child, lines, said: Vec::new() })
    }

    /// The process of a worker, as soon as the launcher says it.
    fn worker(&mut self, number: usize) -> Result<u32> {
        let wanted = format!("worker {number} is process ");
        let until = Instant::now() + STARTING;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let Ok(line) = line else { bail!("no worker {number}; it said:\n{}", self.said.join("\n")) };
            self.said.push(line.clone());
            if let Some(pid) = line.strip_prefix(&wanted) {
                return pid.trim().parse().with_context(|| format!("no process in {line:?}"));
            }
        }
    }

    fn alive(&mut self) -> Result<()> {
        self.said.extend(self.lines.try_iter());
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("consort train ended with {status}; it said:\n{}", self.said.join("\n")),
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_read_from_a_file_that_is_being_written() {
        let folder = std::env::temp_dir().join(format!("xtask-stragglers-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("metrics.jsonl");
        assert_eq!(curve(&file), []);
        let text = "{\"kind\":\"start\",\"unix_ms\":1}\n{\"kind\":\"step\",\"step\":1,\"at\":0.5,\"loss\":6.25}\n{\"kind\":\"st";
        fs::write(&file, text).unwrap();
        assert_eq!(curve(&file), [(0.5, 6.25)]);
        fs::remove_dir_all(folder).unwrap();
    }
}

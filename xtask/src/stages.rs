//! `cargo xtask test`: the stages in order, each with its time; the first failure ends the run.
//!
//! Everything is built in the dev profile, where the root Cargo.toml optimises kernels and dependencies: one set of
//! artifacts serves the unit tests, the binary under test and the real models. Installing and fetching for the
//! machine runs beside the compiler.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;

use crate::command::{cargo, output, run, target_folder, watched, watched_as};
use crate::machine::{self, Machine};

/// One part of the test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stage {
    /// Installs what the machine lacks: a browser, a Python with the OpenAI client, mpirun.
    Machine,
    /// rustfmt finds nothing to change.
    Format,
    /// clippy finds nothing, in tests and examples too.
    Lint,
    /// Documentation builds without a warning.
    Docs,
    /// Compiles the binary and every test.
    Build,
    /// Fetches the two real models with the binary itself.
    Models,
    /// Runs every test: units, the real binary, the page in a browser, the OpenAI client.
    Tests,
}

/// A system test that takes so many seconds is shown with its time.
const SLOW: f64 = 1.0;

/// A model the tests run on.
struct TestModel {
    name: &'static str,
    variable: &'static str,
}

const MODELS: [TestModel; 2] = [
    TestModel { name: "smollm2-135m-instruct", variable: "CONSORT_TEST_SMOLLM2" },
    TestModel { name: "gemma-3-270m", variable: "CONSORT_TEST_GEMMA3" },
];

/// Runs all stages, or `only` one and what it stands on.
pub(crate) fn test(root: &Path, only: Option<Stage>) -> Result<()> {
    let started = Instant::now();
    let wants = |stage: Stage| match only {
        None => true,
        Some(Stage::Tests) => matches!(stage, Stage::Machine | Stage::Build | Stage::Models | Stage::Tests),
        Some(Stage::Models) => matches!(stage, Stage::Build | Stage::Models),
        Some(one) => one == stage,
    };
    let machine = wants(Stage::Machine).then(|| {
        let root = root.to_owned();
        thread::spawn(move || stage("machine", || machine::prepare(&root)))
    });
    if wants(Stage::Format) {
        stage("format", || run(&mut cargo(root, ["fmt", "--all", "--check"])))?;
    }
    if wants(Stage::Lint) {
        stage("lint", || {
            let arguments =
                ["clippy", "--workspace", "--all-targets", "--quiet", "--locked", "--", "-D", "warnings"];
            run(&mut cargo(root, arguments))
        })?;
    }
    if wants(Stage::Docs) {
        stage("docs", || {
            let mut doc = cargo(root, ["doc", "--workspace", "--no-deps", "--quiet", "--locked"]);
            run(doc.env("RUSTDOCFLAGS", "-D warnings"))
        })?;
    }
    if wants(Stage::Build) {
        stage("build", || run(&mut cargo(root, ["test", "--workspace", "--no-run", "--quiet", "--locked"])))?;
    }
    let models = match wants(Stage::Models) {
        true => stage("models", || fetch_models(root, &target_folder(root).join("debug/consort"), &MODELS))?,
        false => Vec::new(),
    };
    let machine = match machine {
        Some(thread) => Some(thread.join().map_err(|_| anyhow!("preparing the machine panicked"))??),
        None => None,
    };
    let mut tally = Tally::default();
    if let Some(machine) = machine.filter(|_| wants(Stage::Tests)) {
        stage("tests", || run_tests(root, &machine, &models, &mut tally))?;
        if tally.suites == 0 {
            bail!("cargo test ran and reported no suite");
        }
    }
    let time = started.elapsed().as_secs_f64();
    match tally.suites {
        0 => println!("xtask: done in {time:.0} s"),
        suites => println!(
            "test result: ok. {} passed; {} failed; {} ignored; {suites} suites; finished in {time:.0} s",
            tally.passed, tally.failed, tally.ignored
        ),
    }
    Ok(())
}

fn stage<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("xtask: {name} …");
    let started = Instant::now();
    let done = work().with_context(|| format!("stage {name}"))?;
    println!("xtask: {name} done in {:.0} s", started.elapsed().as_secs_f64());
    Ok(done)
}

/// Fetches the SmolLM2 test model with a release build; returns its variable and file.
pub(crate) fn release_model(root: &Path) -> Result<(&'static str, String)> {
    run(&mut cargo(root, ["build", "--release", "--quiet", "--locked", "-p", "consort"]))?;
    let files = fetch_models(root, &target_folder(root).join("release/consort"), &MODELS[..1])?;
    files.into_iter().next().context("no test model")
}

/// Pulls each model; returns the variable and file of each.
fn fetch_models(root: &Path, binary: &Path, models: &[TestModel]) -> Result<Vec<(&'static str, String)>> {
    let home = target_folder(root).join("models");
    let mut files = Vec::new();
    for model in models {
        let mut pull = Command::new(binary);
        let json = output(pull.env("CONSORT_HOME", &home).args(["pull", model.name, "--json"]))?;
        let answer: serde_json::Value = serde_json::from_str(&json)
            .with_context(|| format!("`consort pull {} --json` printed {json:?}", model.name))?;
        let path = answer["path"].as_str().with_context(|| format!("no path in {answer}"))?;
        files.push((model.variable, path.to_owned()));
    }
    Ok(files)
}

#[derive(Default)]
struct Tally {
    suites: u32,
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.suites += other.suites;
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Adds a line such as `test result: ok. 12 passed; 0 failed; 1 ignored; …`.
    fn see(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        self.suites += 1;
        for part in counts.split("; ") {
            let Some((count, what)) = part.split_once(' ') else { continue };
            let Ok(count) = count.parse::<u32>() else { continue };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }
}

/// The tests of the real processes, in two lanes that run side by side: real models, which want the machine, and training
/// jobs, which mostly wait. In each, one test at a time.
const LANES: [&[&str]; 2] = [&["system::waits::"], &["system::", "--skip", "system::waits::"]];

fn run_tests(root: &Path, machine: &Machine, models: &[(&str, String)], tally: &mut Tally) -> Result<()> {
    // The same packages each time: others would be built with other features.
    let tests = || {
        let mut tests = cargo(root, ["test", "--workspace", "--locked"]);
        tests.env("CONSORT_TEST_PYTHON", &machine.python).env("CONSORT_TEST_CHROMIUM", &machine.chromium);
        tests.envs(models.iter().map(|(variable, path)| (variable, path)));
        tests
    };
    watched(tests().args(["--", "--skip", "system::"]), |line| tally.see(line))?;
    let lanes = LANES.map(|lane| {
        let mut tests = tests();
        tests.args(["--test", "system", "--", "--test-threads", "1"]).args(lane);
        // Both are heard to their end: what is wrong in one lane says nothing of the other.
        thread::spawn(move || {
            let (mut tally, mut clock) = (Tally::default(), Instant::now());
            let ended = watched_as(
                &mut tests,
                |line| {
                    let took = clock.elapsed().as_secs_f64();
                    clock = Instant::now();
                    match line.starts_with("test ") && took >= SLOW {
                        true => format!("{line} ({took:.1} s)"),
                        false => line.to_owned(),
                    }
                },
                |line| tally.see(line),
            );
            (ended, tally)
        })
    });
    let mut ended = Ok(());
    for lane in lanes {
        let (result, counts) = lane.join().map_err(|_| anyhow!("reading the tests' output panicked"))?;
        tally.add(&counts);
        ended = ended.and(result);
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_summaries_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            tally.see(line);
        }
        assert_eq!((tally.suites, tally.passed, tally.failed, tally.ignored), (2, 15, 2, 1));
    }
}

//! `consort train`: real launchers and workers, killed, stopped, starved of their launcher and resumed; the weights at the end
//! are the same.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::replica::{Lane, turn};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A model of some ten thousand weights on stories; a step takes milliseconds.
const JOB: &str = r#"
out = "OUT"
prompts = ["Once upon a time"]
save = "f32"
[model]
layers = 2
hidden = 32
heads = 2
context = 64
vocabulary = 300
[data]
stories = "64K"
[train]
steps = STEPS
batch = 8
micro_batch = 2
silence = "1s"
[schedule]
learning_rate = 3e-3
[checkpoints]
every = 5
"#;

/// A folder with a job.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Place {
    pub(crate) fn new(steps: u64) -> Place {
        Place::with(steps, |job| job)
    }

    pub(crate) fn with(steps: u64, change: impl Fn(String) -> String) -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap(), _turn: turn(Lane::Waits) };
        let job = JOB.replace("OUT", place.out().to_str().unwrap()).replace("STEPS", &steps.to_string());
        fs::write(place.job(), change(job)).unwrap();
        place
    }

    pub(crate) fn job(&self) -> PathBuf {
        self.folder.path().join("job.toml")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// The same job in another folder.
    pub(crate) fn again(mut self) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let job = fs::read_to_string(self.job()).unwrap();
        let (before, after) = (self.folder.path().to_str().unwrap(), folder.path().to_str().unwrap());
        fs::write(folder.path().join("job.toml"), job.replace(before, after)).unwrap();
        self.folder = folder;
        self
    }

    /// `consort train` with these arguments behind the job.
    pub(crate) fn train(&self, arguments: &[&str]) -> Training {
        self.train_with(arguments, &[])
    }

    /// The same with variables.
    pub(crate) fn train_with(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Training {
        let mut command = consort();
        command.arg("train").arg(self.job()).args(arguments).envs(variables.iter().copied());
        Training::start(command)
    }

    /// The records of `metrics.jsonl`.
    pub(crate) fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.out().join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until so many steps are taken.
    pub(crate) fn wait_for_step(&self, step: u64) {
        let taken = || self.metrics().iter().filter_map(|r| r["step"].as_u64()).max().unwrap_or(0);
        wait(&format!("step {step}"), || taken() >= step);
    }
}

pub(crate) fn consort() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_consort"));
    for name in [
        "RANK",
        "WORLD_SIZE",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_RANK",
        "CONSORT_TRAIN_TOKEN",
        "CONSORT_API_KEY",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// A file changes without telling anybody.
pub(crate) fn wait(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what} never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A launcher at work.
pub(crate) struct Training {
    child: Child,
    lines: Receiver<String>,
    heard: Vec<String>,
}

impl Drop for Training {
    /// A test that failed leaves nobody behind: workers end with their launcher.
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Training {
    pub(crate) fn start(mut command: Command) -> Training {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let errors = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Training { child, lines, heard: Vec::new() }
    }

    /// Waits for a line that holds this.
    pub(crate) fn hear(&mut self, wanted: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.heard.push(line.clone());
                    if line.contains(wanted) {
                        return line;
                    }
                }
                Err(_) => panic!("no {wanted:?} in:\n{}", self.heard.join("\n")),
            }
        }
    }

    /// The process of a worker, as the launcher says it.
    pub(crate) fn pid(&mut self, worker: usize) -> i32 {
        self.process(&format!("worker {worker}"))
    }

    /// The process at a place.
    pub(crate) fn process(&mut self, place: &str) -> i32 {
        let line = self.hear(&format!("{place} is process "));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// The launcher's process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        send(self.child.id() as i32, signal);
    }

    pub(crate) fn end(mut self) -> Ended {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            self.heard.extend(self.lines.try_iter());
            assert!(Instant::now() < until, "it doesn't end; it said:\n{}", self.heard.join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.heard.extend(self.lines.iter());
        Ended { status, said, errors: self.heard.join("\n") }
    }
}

pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) said: String,
    pub(crate) errors: String,
}

impl Ended {
    /// The result that `--json` prints.
    pub(crate) fn json(&self) -> Value {
        assert!(self.status.success(), "{}", self.errors);
        serde_json::from_str(&self.said).unwrap_or_else(|_| panic!("{}\n{}", self.said, self.errors))
    }

    pub(crate) fn weights(&self) -> String {
        let json = self.json();
        assert_eq!(json["complete"], true, "{json}");
        json["weights"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn send(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

pub(crate) fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
}

/// Steps of the jobs below.
pub(crate) const STEPS: u64 = 60;

/// The weights that every one of them ends with: one worker's, without a failure.
pub(crate) fn expected() -> &'static str {
    static WEIGHTS: OnceLock<String> = OnceLock::new();
    WEIGHTS.get_or_init(|| {
        let place = Place::new(STEPS);
        place.train(&["--json"]).end().weights()
    })
}

#[test]
fn a_job_ends_with_a_model_that_runs_and_a_report() {
    let place = Place::with(8, |job| format!("gguf = \"q8_0\"\n{job}"));
    let ended = place.train(&["--workers", "2"]).end();
    assert!(ended.status.success(), "{}", ended.errors);
    let (out, shown) = (place.out(), place.out().display().to_string());
    assert!(
        ended.said.contains("8 steps in ") && ended.said.contains(&format!("consort run {shown}")),
        "{}",
        ended.said
    );
    assert!(ended.errors.contains("2 workers have met"), "{}", ended.errors);
    for file in ["config.json", "model.safetensors", "tokenizer.json", "model.gguf"] {
        assert!(out.join(file).exists(), "{file}");
    }
    let steps: Vec<u64> =
        place.metrics().iter().filter(|r| r["kind"] == "step").filter_map(|r| r["step"].as_u64()).collect();
    assert_eq!(steps, (1..=8).collect::<Vec<_>>());
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(
        report.contains("<svg")
            && report.contains("What it writes")
            && report.contains("<em>Once upon a time</em>")
    );
    for model in [out.clone(), out.join("model.gguf")] {
        let run = consort()
            .args(["run", model.to_str().unwrap(), "Once upon a time", "--json", "--max-tokens", "8"])
            .output()
            .unwrap();
        let said: Value = serde_json::from_slice(&run.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&run.stderr)));
        assert!(said["usage"]["prompt_tokens"].as_u64().unwrap() > 3, "{said}");
    }
    let status = consort().args(["train", "status", &shown]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&status.stdout).trim(), "step 8/8: the job is complete");
    // Nobody else can join a job that is over, and nothing of it is lost by asking for it again.
    assert!(!out.join("job/meeting.json").exists());
    let again = place.train(&[]).end();
    assert_eq!(again.status.code(), Some(2));
    assert!(again.errors.contains("--resume") && again.errors.contains("--restart"), "{}", again.errors);
}

#[test]
fn workers_that_are_killed_change_no_bit() {
    let expected = expected();
    let place = Place::new(STEPS);
    let mut training = place.train(&["--json", "--workers", "3"]);
    let first = training.pid(0);
    let second = training.pid(1);
    place.wait_for_step(5);
    send(second, rustix::process::Signal::KILL);
    let next = training.pid(1);
    assert_ne!(second, next);
    place.wait_for_step(25);
    send(first, rustix::process::Signal::KILL);
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    let report = fs::read_to_string(place.out().join("report.html")).unwrap();
    assert!(report.contains(&format!("worker 1 (process {second}) was killed")), "{}", ended.errors);
}

#[test]
fn a_job_that_is_stopped_goes_on_with_another_number_of_workers() {
    let expected = expected();
    let place = Place::new(STEPS);
    let training = place.train(&["--restart", "--workers", "2", "--threads", "2"]);
    place.wait_for_step(7);
    training.signal(rustix::process::Signal::INT);
    let stopped = training.end();
    assert!(stopped.status.success(), "{}", stopped.errors);
    assert!(stopped.said.starts_with("stopped behind step "), "{}", stopped.said);
    // What it says to type goes on with every option that was given, and says the same again when it is stopped again.
    let line = stopped.said.trim_end().rsplit("go on with: ").next().unwrap().to_owned();
    let job = place.job().display().to_string();
    assert_eq!(line, format!("consort train {job} --workers 2 --threads 2 --resume"));
    let mut command = consort();
    command.args(line.split(' ').skip(1));
    let taken = place.metrics().iter().filter(|r| r["kind"] == "step").count() as u64;
    let training = Training::start(command);
    place.wait_for_step(taken + 2);
    training.signal(rustix::process::Signal::INT);
    let stopped = training.end();
    assert!(stopped.errors.contains("going on behind step "), "{}", stopped.errors);
    assert!(stopped.said.trim_end().ends_with(&line), "{}", stopped.said);
    let resumed = place.train(&["--json", "--resume", "--workers", "4"]).end();
    assert!(resumed.errors.contains("going on behind step "), "{}", resumed.errors);
    assert_eq!(resumed.weights(), expected, "{}", resumed.errors);
    let steps: Vec<u64> =
        place.metrics().iter().filter(|r| r["kind"] == "step").filter_map(|r| r["step"].as_u64()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "every step once, over both parts");
}

#[test]
fn workers_whose_launcher_is_killed_stop_with_a_checkpoint() {
    let expected = expected();
    let place = Place::new(STEPS);
    let mut training = place.train(&["--workers", "2"]);
    let workers = [training.pid(0), training.pid(1)];
    place.wait_for_step(6);
    training.signal(rustix::process::Signal::KILL);
    training.child.wait().unwrap();
    wait("the workers' end", || !workers.iter().any(|pid| alive(*pid)));
    let newest = fs::read_dir(place.out().join("checkpoints"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok())
        .max();
    assert!(newest >= Some(6), "{newest:?}");
    let resumed = place.train(&["--json", "--resume"]).end();
    assert_eq!(resumed.weights(), expected, "{}", resumed.errors);
}

#[test]
fn a_job_whose_workers_all_die_at_once_goes_on_from_its_checkpoint() {
    let expected = expected();
    let place = Place::new(STEPS);
    let mut training = place.train(&["--json", "--workers", "2"]);
    let workers = [training.pid(0), training.pid(1)];
    wait("a checkpoint", || place.metrics().iter().any(|r| r["what"] == "checkpoint"));
    workers.iter().for_each(|pid| send(*pid, rustix::process::Signal::KILL));
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    assert!(ended.errors.contains("going on behind step "), "{}", ended.errors);
}

#[test]
fn a_worker_that_hangs_is_named_and_passed_over() {
    let expected = expected();
    let place = Place::with(STEPS, |job| job.replace("silence = \"1s\"", "silence = \"4s\""));
    let mut training = place.train(&["--json", "--workers", "2"]);
    let hung = training.pid(1);
    place.wait_for_step(5);
    send(hung, rustix::process::Signal::STOP);
    let explained = || {
        let status = consort().args(["train", "status", place.out().to_str().unwrap()]).output().unwrap();
        String::from_utf8_lossy(&status.stdout).into_owned()
    };
    wait("an explanation", || explained().contains(&format!("kill -CONT {hung}")));
    wait("the others' going on", || place.metrics().iter().any(|r| r["what"] == "lost"));
    send(hung, rustix::process::Signal::CONT);
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
}

#[test]
fn processes_of_a_clusters_starter_find_each_other() {
    let expected = expected();
    let place = Place::new(STEPS);
    let start = |rank: &str| {
        let mut command = consort();
        command.arg("train").arg(place.job()).arg("--json");
        command.envs([
            ("RANK", rank),
            ("WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("TORCHELASTIC_RUN_ID", "a b"),
        ]);
        Training::start(command)
    };
    let others = [start("1"), start("2")];
    let first = start("0").end();
    assert_eq!(first.weights(), expected, "{}", first.errors);
    for other in others {
        let ended = other.end();
        assert!(ended.status.success(), "{}", ended.errors);
    }
}

#[test]
fn a_place_that_takes_no_checkpoint_costs_no_step() {
    // Root may write anywhere, so what is in the way is a file where a checkpoint's folder would be.
    let blocked = tempfile::tempdir().unwrap();
    for step in [5, 10, 12] {
        fs::write(blocked.path().join(format!("step-{step:010}")), "").unwrap();
    }
    let place = Place::with(12, |job| {
        job.replace("every = 5", &format!("every = 5\nlocation = \"{}\"", blocked.path().display()))
    });
    let mut training = place.train(&[]);
    training.hear("step 5 was not written, the job goes on: ");
    training.hear("the last checkpoint, of step 12, can't be written: ");
    training.signal(rustix::process::Signal::INT);
    let ended = training.end();
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.errors.contains("so there is no model to save; mend that place"), "{}", ended.errors);
    assert_eq!(place.metrics().iter().filter(|r| r["kind"] == "step").count(), 12);
}

#[test]
fn jobs_that_cannot_be_are_refused_before_anything_starts() {
    let refused = |change: fn(String) -> String, arguments: &[&str]| {
        let place = Place::with(5, change);
        let ended = place.train(arguments).end();
        assert_eq!(ended.status.code(), Some(2), "{}", ended.errors);
        assert!(!ended.errors.contains("is process"), "{}", ended.errors);
        ended.errors
    };
    let unknown = refused(|job| job.replace("micro_batch = 2", "micro_bach = 2"), &[]);
    assert!(unknown.contains("did you mean `micro_batch`?") && unknown.contains("job.toml:"), "{unknown}");
    assert!(!unknown.contains("error: error:"), "{unknown}");
    let uneven = refused(|job| job.replace("batch = 8", "batch = 9"), &[]);
    assert!(uneven.contains("9 = 4 × 2 + 1"), "{uneven}");
    let idle = refused(|job| job, &["--workers", "5"]);
    assert!(idle.contains("5 workers share 8 / 2 = 4 micro-batches"), "{idle}");
    let huge = |job: String| {
        job.replace("layers = 2", "layers = 900")
            .replace("hidden = 32", "hidden = 16384")
            .replace("heads = 2", "heads = 128")
    };
    let large = refused(huge, &["--workers", "2"]);
    assert!(large.contains("of memory on this machine") && large.contains("optimizer"), "{large}");
    let missing = consort().args(["train", "/nowhere/job.toml"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
}

#[test]
fn a_plan_is_shown_without_starting_anything() {
    let place = Place::new(5);
    let ended = place.train(&["--check", "--workers", "2"]).end();
    assert!(
        ended.status.success() && ended.said.contains("2 for each of 2 workers"),
        "{}{}",
        ended.said,
        ended.errors
    );
    assert!(ended.said.contains("activations") && !Path::new(&place.out().join("metrics.jsonl")).exists());
}

//! What a job says of itself while it runs: a line for every step in `metrics.jsonl`, and text as Prometheus reads it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use consort_training::job::{Job, Plan};
use consort_training::parallel::StepEvent;
use consort_training::report::{End, Event, Record, Start, Step, What};

use super::unix_ms;
use crate::terminal::note;

/// The records, as a file and as counts.
pub(crate) struct Metrics {
    path: PathBuf,
    file: Option<File>,
    plan: Plan,
    workers: usize,
    /// Whether the beginning is written; it says what the job goes on from, which workers find out.
    begun: bool,
    resumed: Option<u64>,
    pub(crate) counts: Counts,
}

/// Counts since the launcher began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) last: Option<Step>,
    pub(crate) tokens: f64,
    pub(crate) lost: u64,
    pub(crate) joined: u64,
    pub(crate) checkpoints: u64,
    pub(crate) failed_checkpoints: u64,
    pub(crate) communication: f64,
    pub(crate) exposed: f64,
}

impl Metrics {
    /// Opens the file of `job`; a resumed job goes on in it, a new one begins it anew.
    pub(crate) fn open(job: &Job, plan: &Plan, workers: usize, resume: bool) -> Result<Metrics> {
        let path = job.out.join("metrics.jsonl");
        let mut options = OpenOptions::new();
        options.create(true).append(resume).write(true).truncate(!resume);
        let file = options.open(&path).with_context(|| format!("can't write {}", path.display()))?;
        let (file, plan) = (Some(file), plan.clone());
        Ok(Metrics { path, file, plan, workers, begun: false, resumed: None, counts: Counts::default() })
    }

    /// The job goes on behind this step.
    pub(crate) fn resumed(&mut self, step: u64) {
        self.resumed = Some(step.max(self.resumed.unwrap_or(0)));
    }

    /// Steps in all.
    pub(crate) fn steps(&self) -> u64 {
        self.plan.steps
    }

    /// A step was taken.
    pub(crate) fn step(&mut self, event: &StepEvent, now: Duration) -> Result<Step> {
        let seconds = |us: u64| us as f64 / 1e6;
        let under_way: u64 = event.spans.iter().map(|span| span.end_us.saturating_sub(span.start_us)).sum();
        let step = Step {
            step: event.step + 1,
            at: now.as_secs_f64(),
            seconds: seconds(event.took_us),
            loss: event.loss,
            tokens: event.rows as f64,
            gradient_norm: event.gradient_norm,
            learning_rate: event.learning_rate,
            workers: event.workers,
            epoch: event.epoch,
            communication: seconds(under_way),
            exposed: seconds(under_way.saturating_sub(event.overlapped_us)),
        };
        self.counts.last = Some(step);
        self.counts.tokens += step.tokens;
        self.counts.communication += step.communication;
        self.counts.exposed += step.exposed;
        self.write(&Record::Step(step));
        Ok(step)
    }

    /// Something happened.
    pub(crate) fn event(&mut self, what: What, text: String, step: u64, now: Duration) {
        match what {
            What::Lost => self.counts.lost += 1,
            What::Joined => self.counts.joined += 1,
            What::Checkpoint => self.counts.checkpoints += 1,
            What::CheckpointFailed => self.counts.failed_checkpoints += 1,
            What::Stopped | What::Note => {}
        }
        self.write(&Record::Event(Event { at: now.as_secs_f64(), step, what, text }));
    }

    /// The job ended, or this part of it.
    pub(crate) fn end(&mut self, step: u64, complete: bool, weights: Option<String>) {
        let at = self.counts.last.map_or(0.0, |step| step.at);
        self.write(&Record::End(End { at, step, complete, weights }));
    }

    /// All records of the file, those of earlier parts of the job too.
    pub(crate) fn records(&self) -> Vec<Record> {
        std::fs::read_to_string(&self.path)
            .map(|text| consort_training::report::read(&text))
            .unwrap_or_default()
    }

    fn write(&mut self, record: &Record) {
        if !self.begun {
            self.begun = true;
            let start = Start {
                unix_ms: unix_ms(),
                steps: self.plan.steps,
                resumed: self.resumed,
                workers: self.workers,
                parameters: self.plan.parameters,
            };
            self.put(&Record::Start(start));
        }
        self.put(record);
    }

    /// A full disk costs metrics and not the job.
    fn put(&mut self, record: &Record) {
        let Some(file) = &mut self.file else { return };
        let Ok(mut line) = serde_json::to_string(record) else { return };
        line.push('\n');
        if let Err(error) = file.write_all(line.as_bytes()) {
            note(&format!("{}: {error}; no more metrics are written", self.path.display()));
            self.file = None;
        }
    }

    /// The metrics as Prometheus reads them.
    pub(crate) fn prometheus(&self, step: u64, members: usize) -> String {
        let counts = &self.counts;
        let last = counts.last.as_ref();
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: f64| {
            let value = match value {
                f64::INFINITY => "+Inf".to_owned(),
                f64::NEG_INFINITY => "-Inf".to_owned(),
                value => value.to_string(),
            };
            out.push_str(&format!(
                "# HELP consort_train_{name} {help}\n# TYPE consort_train_{name} {kind}\nconsort_train_{name} {value}\n"
            ));
        };
        metric("steps", "gauge", "Steps of the job in all.", self.plan.steps as f64);
        metric("step", "gauge", "Steps taken, those before a resumption too.", step as f64);
        metric("workers", "gauge", "Workers that take steps together.", members as f64);
        metric(
            "tokens_total",
            "counter",
            "Tokens that were predicted since the launcher began.",
            counts.tokens,
        );
        metric("workers_lost_total", "counter", "Workers that were lost.", counts.lost as f64);
        metric("workers_joined_total", "counter", "Times that workers joined.", counts.joined as f64);
        metric("checkpoints_total", "counter", "Checkpoints that are complete.", counts.checkpoints as f64);
        metric(
            "checkpoints_failed_total",
            "counter",
            "Checkpoints that were not written.",
            counts.failed_checkpoints as f64,
        );
        metric(
            "communication_seconds_total",
            "counter",
            "Time that gradients were under way.",
            counts.communication,
        );
        metric(
            "communication_exposed_seconds_total",
            "counter",
            "Time of it that backward didn't hide.",
            counts.exposed,
        );
        if let Some(last) = last {
            metric("loss", "gauge", "Mean loss of the last step, in nats a token.", last.loss);
            metric("gradient_norm", "gauge", "Length of the last step's gradient.", last.gradient_norm);
            metric("learning_rate", "gauge", "Learning rate of the last step.", last.learning_rate);
            metric("step_seconds", "gauge", "Time that the last step took.", last.seconds);
        }
        out
    }
}

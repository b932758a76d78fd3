//! What a job will take: steps, micro-batches for each worker, threads, memory. What can't be is refused, with the
//! numbers that say so.

use std::fmt::{self, Write as _};

use consort_model::ModelConfig;
use consort_model::train::Layout;

use super::{Job, Length, ModelSource, memory};
use crate::data::Report;

/// What a machine has for the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Bytes of memory; `None` where nobody knows.
    pub memory: Option<u64>,
    /// Cores.
    pub cores: usize,
    /// Workers of the job that run on it.
    pub workers: usize,
}

/// A part of a worker's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it holds.
    pub what: &'static str,
    /// How much that is, in words: `135M parameters × 4 bytes`.
    pub why: String,
    /// Bytes.
    pub bytes: u64,
}

/// Processes beside the workers: servers, and the launcher where it holds more than a page of notes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// What one is called.
    pub name: &'static str,
    /// How many there are on the launcher's machine.
    pub count: usize,
    /// The memory of one.
    pub parts: Vec<Part>,
}

impl Process {
    /// Bytes of one.
    pub fn bytes(&self) -> u64 {
        total(&self.parts)
    }
}

fn total(parts: &[Part]) -> u64 {
    parts.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
}

/// What a job will take.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Steps in all.
    pub steps: u64,
    /// Trainable values.
    pub parameters: u64,
    /// Micro-batches of a step, shared among the workers.
    pub micro_batches: usize,
    /// Processes that train.
    pub workers: usize,
    /// Compute threads of each worker on this machine.
    pub threads: usize,
    /// Times that every sample is seen.
    pub epochs: f64,
    /// Predicted tokens of a step, on average.
    pub tokens: f64,
    /// A worker's memory.
    pub memory: Vec<Part>,
    /// Processes beside the workers.
    pub around: Vec<Process>,
    /// What the machine has.
    pub machine: Machine,
}

/// Why a job can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// Counts what `job` takes with this model and this data on `machine`.
///
/// # Errors
/// [`Refusal`] with the arithmetic.
pub fn plan(job: &Job, model: &ModelConfig, data: &Report, machine: Machine) -> Result<Plan, Refusal> {
    let refuse = |why: String| Err(Refusal(why));
    let layout = Layout::new(model).map_err(|error| Refusal(error.to_string()))?;
    if job.data.context > model.max_context {
        return refuse(format!(
            "samples have {} rows and the model has {} positions: make [data]'s `context` at most {}",
            job.data.context, model.max_context, model.max_context
        ));
    }
    let micro_batches = job.train.batch / job.train.micro_batch;
    if micro_batches < job.workers {
        let (batch, micro, workers) = (job.train.batch, job.train.micro_batch, job.workers);
        let idle = workers - micro_batches;
        let smaller = batch / workers;
        let cure = match smaller {
            0 => format!("make `batch` at least {workers}"),
            _ => format!("make `micro_batch` at most {smaller}"),
        };
        return refuse(format!(
            "{workers} workers share {batch} / {micro} = {micro_batches} micro-batches a step, so {idle} of them would have \
             nothing to do: {cure}, or take {micro_batches} workers"
        ));
    }
    let around = match &job.servers {
        None => Vec::new(),
        Some(servers) => {
            let (groups, each) = servers.groups(&job.train, job.workers).map_err(Refusal)?;
            if groups < job.workers as u64 {
                return refuse(format!(
                    "{} workers claim {micro_batches} micro-batches of a step {each} at a time, so {} of them would have nothing \
                     to do: make [servers]'s `claim` at most {}, or take {groups} workers",
                    job.workers,
                    job.workers as u64 - groups,
                    micro_batches / job.workers
                ));
            }
            memory::around(job, servers, &layout, groups)
        }
    };
    let samples = data.samples.max(1) as f64;
    let steps = match job.train.length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => ((epochs * samples / job.train.batch as f64).ceil() as u64).max(1),
    };
    let threads = (job.threads.unwrap_or(machine.cores) / machine.workers.max(1)).max(1);
    let parameters = layout.len() as u64;
    let plan = Plan {
        steps,
        parameters: layout.parameter_count() as u64,
        micro_batches,
        workers: job.workers,
        threads,
        epochs: steps as f64 * job.train.batch as f64 / samples,
        tokens: data.predicted as f64 / samples * job.train.batch as f64,
        memory: memory::worker(job, model, parameters),
        around,
        machine,
    };
    let (needed, workers) = (plan.machine_bytes(), machine.workers);
    match machine.memory {
        Some(has) if needed > has => {
            let mut why = format!(
                "the job needs {} of memory on this machine, which has {}\n",
                in_bytes(needed),
                in_bytes(has)
            );
            plan.table(&mut why);
            let such = plan.worker_bytes().saturating_mul(workers as u64);
            let _ = writeln!(why, "  {workers} such workers on this machine: {}", in_bytes(such));
            for process in &plan.around {
                let bytes = process.bytes().saturating_mul(process.count as u64);
                let _ = writeln!(why, "  {} × {}: {}", process.count, process.name, in_bytes(bytes));
            }
            why.push_str(&cures(job, &plan, has));
            refuse(why)
        }
        _ => Ok(plan),
    }
}

/// What would make the job fit.
fn cures(job: &Job, plan: &Plan, has: u64) -> String {
    let bytes = |what: &str| plan.memory.iter().find(|p| p.what == what).map_or(0, |p| p.bytes);
    let mut cures = Vec::new();
    let workers = plan.worker_bytes().saturating_mul(plan.machine.workers as u64);
    let rest = plan.machine_bytes().saturating_sub(workers);
    let fit = has.saturating_sub(rest) / plan.worker_bytes().max(1);
    if fit >= 1 {
        cures.push(format!("take {fit} workers"));
    }
    if !job.train.recompute && bytes("activations") > plan.worker_bytes() / 4 {
        cures.push("set `recompute = true`".to_owned());
    }
    if job.train.micro_batch > 1 && bytes("activations") > plan.worker_bytes() / 4 {
        cures.push("make `micro_batch` smaller".to_owned());
    }
    if matches!(job.model, ModelSource::New(_)) {
        cures.push("make the model smaller".to_owned());
    } else if cures.is_empty() {
        cures.push("take a smaller model, or a machine with more memory".to_owned());
    }
    format!("to fit: {}", cures.join(", or "))
}

impl Plan {
    /// Bytes of one worker.
    pub fn worker_bytes(&self) -> u64 {
        total(&self.memory)
    }

    /// Bytes of all processes on the launcher's machine.
    pub fn machine_bytes(&self) -> u64 {
        let workers = self.worker_bytes().saturating_mul(self.machine.workers as u64);
        let others = |sum: u64, p: &Process| sum.saturating_add(p.bytes().saturating_mul(p.count as u64));
        self.around.iter().fold(workers, others)
    }

    /// The lines of a worker's memory, and of those beside it.
    fn table(&self, out: &mut String) {
        let mut process = |parts: &[Part], name: &str| {
            for Part { what, why, bytes } in parts {
                // Writing to a String doesn't fail.
                let _ = writeln!(out, "  {what:<12} {:>9}   {why}", in_bytes(*bytes));
            }
            let _ = writeln!(out, "  {name:<12} {:>9}", in_bytes(total(parts)));
        };
        process(&self.memory, "a worker");
        for Process { name, parts, .. } in &self.around {
            process(parts, name);
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { steps, parameters, micro_batches, workers, threads, epochs, tokens, machine, .. } = self;
        let (each, more) = (micro_batches / workers, micro_batches % workers);
        let noun = if *threads == 1 { "thread" } else { "threads" };
        let share = if more == 0 { format!("{each}") } else { format!("{each} or {}", each + 1) };
        writeln!(f, "model        {} parameters", in_count(*parameters))?;
        writeln!(f, "steps        {steps} of about {} tokens, {epochs:.2} epochs", in_count(*tokens as u64))?;
        writeln!(
            f,
            "a step       {micro_batches} micro-batches; {share} for each of {workers} workers with {threads} {noun}"
        )?;
        match self.around.iter().find(|process| process.name == "a server").map(|process| process.count) {
            None => {}
            Some(1) => writeln!(
                f,
                "servers      1, without a backup: if it dies, the job goes on from a checkpoint"
            )?,
            Some(count) => writeln!(
                f,
                "servers      {count}; each has a shard of the weights and is the backup of another"
            )?,
        }
        let mut text = String::from("memory\n");
        self.table(&mut text);
        let all = self.machine_bytes();
        let _ = match machine.memory {
            Some(has) => write!(text, "  {:<12} {:>9}   of {}", "this machine", in_bytes(all), in_bytes(has)),
            None => write!(text, "  {:<12} {:>9}", "this machine", in_bytes(all)),
        };
        f.write_str(&text)
    }
}

/// Bytes for people, in powers of 1024 as memory is counted.
pub(crate) fn in_bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" {
        format!("{n} B")
    } else if value < 10.0 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// A count for people: `134.5M`.
pub fn in_count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.0}k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", n as f64 / 1e6),
        _ => format!("{:.2}G", n as f64 / 1e9),
    }
}

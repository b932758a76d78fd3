//! What a job will take: steps, micro-batches for each worker, threads, memory. What can't be is refused, with the
//! numbers that say so.
//!
//! A worker holds for every parameter its weight, its gradient and what the optimizer remembers; with exact sums an
//! integer too; and copies its share of weights and optimizer for a checkpoint. Activations follow from the rows of a
//! micro-batch ([`Arena::bytes_for`]). What isn't counted is small or shared: the program, and the data, which is
//! mapped into memory once for all workers.

use std::fmt::{self, Write as _};

use consort_model::ModelConfig;
use consort_model::train::{Arena, Layout};

use super::{Job, Length, ModelSource};
use crate::OptimizerConfig;
use crate::data::Report;

/// The program itself and the buffers that the loss works in, for each worker.
const PROGRAM: u64 = 128 << 20;

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
        memory: memory(job, model, parameters),
        machine,
    };
    let (needed, workers) = (plan.worker_bytes().saturating_mul(machine.workers as u64), machine.workers);
    match machine.memory {
        Some(has) if needed > has => {
            let mut why = format!(
                "the job needs {} of memory on this machine, which has {}\n",
                in_bytes(needed),
                in_bytes(has)
            );
            plan.table(&mut why);
            let _ = writeln!(why, "  {workers} such workers on this machine: {}", in_bytes(needed));
            why.push_str(&cures(job, &plan, has));
            refuse(why)
        }
        _ => Ok(plan),
    }
}

/// A worker's memory, part by part; `values` are those of the flat buffer.
fn memory(job: &Job, model: &ModelConfig, values: u64) -> Vec<Part> {
    let count = in_count(values);
    let each = |what, bytes: u64| Part {
        what,
        why: format!("{count} values × {bytes} bytes"),
        bytes: values.saturating_mul(bytes),
    };
    let state = match job.optimizer {
        OptimizerConfig::AdamW { .. } => 8,
        OptimizerConfig::Sgd { .. } => 4,
    };
    let rows = job.train.micro_batch.saturating_mul(job.data.context);
    let activations = Arena::bytes_for(model, rows, job.train.recompute, job.train.dropout > 0.0) as u64;
    let how = if job.train.recompute { ", computed again in backward" } else { "" };
    let mut parts = vec![each("weights", 4), each("gradients", 4)];
    if job.train.exact {
        parts.push(each("exact sums", 8));
    }
    parts.push(each("optimizer", state));
    let share = values.saturating_mul(4 + state) / job.workers.max(1) as u64;
    parts.push(Part {
        what: "checkpoint",
        why: format!("a copy of 1/{} of weights and optimizer", job.workers.max(1)),
        bytes: share,
    });
    parts.push(Part {
        what: "activations",
        why: format!(
            "{} samples × {} rows, {} layers{how}",
            job.train.micro_batch, job.data.context, model.layers
        ),
        bytes: activations,
    });
    parts.push(Part { what: "program", why: "about".into(), bytes: PROGRAM });
    parts
}

/// What would make the job fit.
fn cures(job: &Job, plan: &Plan, has: u64) -> String {
    let bytes = |what: &str| plan.memory.iter().find(|p| p.what == what).map_or(0, |p| p.bytes);
    let mut cures = Vec::new();
    let fit = has / plan.worker_bytes().max(1);
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
        self.memory.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
    }

    /// The lines of a worker's memory.
    fn table(&self, out: &mut String) {
        for Part { what, why, bytes } in &self.memory {
            // Writing to a String doesn't fail.
            let _ = writeln!(out, "  {what:<12} {:>9}   {why}", in_bytes(*bytes));
        }
        let _ = writeln!(out, "  {:<12} {:>9}", "a worker", in_bytes(self.worker_bytes()));
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { steps, parameters, micro_batches, workers, threads, epochs, tokens, machine, .. } = self;
        let (each, more) = (micro_batches / workers, micro_batches % workers);
        let share = if more == 0 { format!("{each}") } else { format!("{each} or {}", each + 1) };
        writeln!(f, "model        {} parameters", in_count(*parameters))?;
        writeln!(f, "steps        {steps} of about {} tokens, {epochs:.2} epochs", in_count(*tokens as u64))?;
        writeln!(
            f,
            "a step       {micro_batches} micro-batches; {share} for each of {workers} workers with {threads} threads"
        )?;
        let mut text = String::from("memory\n");
        self.table(&mut text);
        let all = self.worker_bytes().saturating_mul(machine.workers as u64);
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

//! The memory of a job's processes, part by part.
//!
//! A worker holds for every parameter its weight, its gradient and what the optimizer remembers; with exact sums an
//! integer too; and copies its share of weights and optimizer for a checkpoint. Activations follow from the rows of a
//! micro-batch ([`Arena::bytes_for`]). Where servers keep the weights, the optimizer's memory is theirs, and that of
//! their sums; a shard is there twice, as the primary's and as the backup's. What isn't counted is small or shared: the
//! data, which is mapped into memory once for all workers.

use consort_model::ModelConfig;
use consort_model::train::{Arena, Layout};

use super::plan::{Part, Process, in_count};
use super::{Job, Servers};
use crate::OptimizerConfig;
use crate::server::{Mode, Spec};

/// The program itself and the buffers that the loss works in, for each worker.
const PROGRAM: u64 = 128 << 20;
/// The program itself and its connections, for a server.
const SERVER: u64 = 32 << 20;

fn each(what: &'static str, values: u64, bytes: u64) -> Part {
    Part {
        what,
        why: format!("{} values × {bytes} bytes", in_count(values)),
        bytes: values.saturating_mul(bytes),
    }
}

/// What the optimizer remembers of a value.
fn state_bytes(job: &Job) -> u64 {
    match job.optimizer {
        OptimizerConfig::AdamW { .. } => 8,
        OptimizerConfig::Sgd { .. } => 4,
    }
}

/// A worker's memory, part by part; `values` are those of the flat buffer.
pub(super) fn worker(job: &Job, model: &ModelConfig, values: u64) -> Vec<Part> {
    let each = |what, bytes| each(what, values, bytes);
    let state = state_bytes(job);
    let rows = job.train.micro_batch.saturating_mul(job.data.context);
    let activations = Arena::bytes_for(model, rows, job.train.recompute, job.train.dropout > 0.0) as u64;
    let how = if job.train.recompute { ", computed again in backward" } else { "" };
    let mut parts = vec![each("weights", 4), each("gradients", 4)];
    match job.servers {
        // What it pushed is kept until it counts.
        Some(servers) if servers.exact() => parts.push(each("exact sums", 8)),
        Some(_) => parts.push(each("pushes", 4)),
        None => {
            if job.train.exact {
                parts.push(each("exact sums", 8));
            }
            parts.push(each("optimizer", state));
            parts.push(Part {
                what: "checkpoint",
                why: format!("a copy of 1/{} of weights and optimizer", job.workers.max(1)),
                bytes: values.saturating_mul(4 + state) / job.workers.max(1) as u64,
            });
        }
    }
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

/// The processes beside the workers of a job around servers. `groups` are those of a step.
pub(super) fn around(job: &Job, servers: &Servers, layout: &Layout, groups: u64) -> Vec<Process> {
    let (buckets, shards) = Spec::buckets(layout, servers.count);
    let values = |shard: &Vec<usize>| shard.iter().map(|&bucket| buckets[bucket].len as u64).sum::<u64>();
    let shard = shards.iter().map(values).max().unwrap_or(0);
    let state = state_bytes(job);
    let (sums, push) = match (servers.mode, servers.exact()) {
        (Mode::Synchronous, true) => (each("sums", shard, 12), 8),
        (Mode::Synchronous, false) => {
            let mut part = each("gradients", shard, 4 * (groups + 1));
            part.why = format!("{}: {groups} that are compared, and the result", part.why);
            (part, 4)
        }
        _ => (each("sums", shard, 0), 4),
    };
    let mut parts = vec![each("weights", shard, 4), each("optimizer", shard, state), sums];
    parts.retain(|part| part.bytes > 0);
    let own: u64 = parts.iter().fold(0, |sum, part| sum.saturating_add(part.bytes));
    if servers.count > 1 {
        let why = "the same again, of the shard whose backup it is".into();
        parts.push(Part { what: "backup", why, bytes: own });
        let why = "its shard once more, while a new backup is given it".into();
        parts.push(Part { what: "copy", why, bytes: own });
    }
    let pushes = groups.min(job.workers as u64);
    parts.push(Part {
        what: "pushes",
        why: format!("{} values × {push} bytes × {pushes} on their way", in_count(shard)),
        bytes: shard.saturating_mul(push).saturating_mul(pushes),
    });
    parts.push(Part { what: "program", why: "about".into(), bytes: SERVER });
    let all = layout.len() as u64;
    let fetched = all.saturating_mul(4 + state);
    let launcher = vec![
        Part { what: "fetched", why: "weights and optimizer, for a checkpoint".into(), bytes: fetched },
        Part { what: "checkpoint", why: "a copy of them, while it is written".into(), bytes: fetched },
    ];
    vec![
        Process { name: "a server", count: servers.count, parts },
        Process { name: "the launcher", count: 1, parts: launcher },
    ]
}

//! The threads that talk to servers, one a shard: they push and pull while the worker computes.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};

use consort_collectives::link;

use crate::Error;
use crate::server::client::{Connect, Office, Shards};
use crate::server::op::{Op, Outcome, Push};
use crate::server::spec::Spec;
use crate::server::wire::{Answer, Order};

/// The numbers of a push, kept until it counts.
#[derive(Debug)]
pub(super) enum Numbers {
    Sums(Vec<i64>),
    Values(Vec<f32>),
}

impl Numbers {
    fn bytes(&self) -> &[u8] {
        match self {
            Numbers::Sums(sums) => link::bytes(sums),
            Numbers::Values(values) => link::bytes(values),
        }
    }
}

pub(super) enum Task {
    Pull { bucket: usize, step: u64 },
    Push { push: Push, numbers: Arc<Numbers> },
}

pub(super) enum Done {
    Pulled { bucket: usize, step: u64, values: Vec<f32> },
    Pushed { bucket: usize, epoch: u64, outcome: Outcome },
    Failed(Error),
}

/// The threads that talk to servers, one a shard.
pub(super) struct Carriers {
    tasks: Vec<SyncSender<Task>>,
    /// The shard of each bucket.
    pub(super) shard: Vec<usize>,
    done: Receiver<Done>,
}

impl Carriers {
    pub(super) fn start<'s>(
        scope: &'s std::thread::Scope<'s, '_>,
        connect: &Connect,
        spec: &Arc<Spec>,
    ) -> Result<Carriers, Error> {
        let buckets = spec.buckets.len();
        let (report, done) = mpsc::sync_channel(2 * buckets + spec.shards.len());
        let mut tasks = Vec::new();
        for shard in 0..spec.shards.len() {
            let (give, tasks_of_shard) = mpsc::sync_channel(2 * buckets);
            tasks.push(give);
            let (office, connect, report) = (connect.coordinator()?, connect.clone(), report.clone());
            let spec = Arc::clone(spec);
            std::thread::Builder::new()
                .name("worker-carries".into())
                .spawn_scoped(scope, move || carry(shard, &office, &connect, &spec, &tasks_of_shard, &report))
                .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))?;
        }
        let place = |bucket| spec.shards.iter().position(|own| own.contains(&bucket)).unwrap_or_default();
        Ok(Carriers { tasks, shard: (0..buckets).map(place).collect(), done })
    }

    pub(super) fn give(&self, bucket: usize, task: Task) {
        // A thread that has ended has said why.
        let _ = self.tasks[self.shard[bucket]].send(task);
    }

    pub(super) fn next(&self) -> Result<Done, Error> {
        match self.done.recv() {
            Ok(Done::Failed(error)) => Err(error),
            Ok(done) => Ok(done),
            Err(_) => Err(Error::Server("the threads that talk to servers have ended".into())),
        }
    }
}

fn carry(
    shard: usize,
    office: &Office,
    connect: &Connect,
    spec: &Spec,
    tasks: &Receiver<Task>,
    report: &SyncSender<Done>,
) {
    let mut shards = Shards::new(office, connect, spec);
    while let Ok(task) = tasks.recv() {
        let done = match task {
            Task::Pull { bucket, step } => {
                let order = |epoch| Order::Pull { shard, epoch, bucket, step };
                shards.ask(shard, order, &[]).and_then(|(answer, message)| match answer {
                    Answer::Values { step, .. } => {
                        let values = link::numbers(&message.body);
                        let values =
                            values.ok_or_else(|| Error::Server("weights of uneven length".into()))?;
                        Ok(Done::Pulled { bucket, step, values })
                    }
                    other => Err(Error::Server(format!("a server answers a pull with {other:?}"))),
                })
            }
            Task::Push { push, numbers } => {
                let order = |epoch| Order::Change { shard, epoch, op: Op::Push(push) };
                shards.ask(shard, order, numbers.bytes()).and_then(|(answer, _)| match answer {
                    Answer::Outcome { epoch, outcome } => {
                        Ok(Done::Pushed { bucket: push.bucket, epoch, outcome })
                    }
                    other => Err(Error::Server(format!("a server answers a push with {other:?}"))),
                })
            }
        };
        let failed = done.is_err();
        if report.send(done.unwrap_or_else(Done::Failed)).is_err() || failed {
            return;
        }
    }
}

//! Parameter servers: the weights live in server processes, workers push gradients and pull weights, and no process is
//! one that must not die (but the launcher).
//!
//! The textbook's parameter server (Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI
//! 2014) tolerates workers and is itself the point that fails. Here each shard has a primary and a backup with the same
//! log, and everything that a worker sends has a name, so that it can be sent again to whoever answers by then.
//!
//! ```no_run
//! use consort_training::server::{Connect, Holdings, HostOptions, Lead, Learner, Spec, host, work};
//! # use consort_training::{Error, Trainer, data::Dataset, parallel::Plan};
//! # fn train(spec: Spec, trainer: Trainer, data: Dataset, plan: Plan) -> Result<(), Error> {
//! // In the launcher:
//! let begin = Holdings { weights: trainer.weights().to_vec(), ..Holdings::default() };
//! let lead = Lead::listen("127.0.0.1:0", b"a secret of this job", spec, 2, &begin)?;
//! // In each of two server processes:
//! let connect = Connect::new(lead.address().to_string(), b"a secret of this job");
//! host(&HostOptions::new(connect.clone(), 1))?;
//! // In each worker:
//! work(&connect, &mut Learner::of_plan(trainer, &data, &plan))?;
//! // In the launcher, once the servers are there:
//! lead.load(&begin)?;
//! lead.run(&mut |event| eprintln!("{event:?}"))?;
//! let end = lead.fetch()?;
//! # Ok(()) }
//! ```
//!
//! Decisions are pure state machines, run under seeds in `simulation`, each without knowledge of the next one up:
//!
//! - [`Shard`]: buckets of weights; takes changes ([`Op`]), says what is new, known or wrong. `aggregate`: means that
//!   survive wrong workers.
//! - [`Replica`]: one server's copy of a shard; what may be acknowledged when.
//! - [`Cluster`]: which server holds what, with fencing epochs. [`Progress`]: who computes what, how far ahead, and when
//!   a step is over. [`Coordinator`]: both together.
//!
//! Around them: `host` (a server process), `lead` (the coordinator's), `worker`, all over
//! [`consort_collectives::link`]. What each mode promises, and what becomes of each failure, stands in
//! `docs/parameter-server.md`.
//!
//! Cost: a synchronous push has 8 bytes a value, since it is an exact sum, and travels once more to the backup; weights
//! come back with 4. With micro-batches claimed one by one, that is so for each micro-batch and not for each worker.

mod aggregate;
mod client;
mod cluster;
mod coordinator;
mod host;
mod lead;
mod learner;
mod op;
mod progress;
mod replica;
mod seen;
mod shard;
#[cfg(test)]
mod simulation;
mod spec;
mod transfer;
mod wire;
mod worker;

pub use client::Connect;
pub use cluster::{Change, Cluster, Duty, Placement, Route, ServerId};
pub use coordinator::{Coordinator, Event, ShardView, Start, View, Waits, WorkerView};
pub use host::{HostOptions, host};
pub use lead::{Holdings, Lead, Loading};
pub use learner::Learner;
pub use op::{Bits, Decision, Op, Outcome, Push, Ready, Terms};
pub use progress::{Claim, Grant, Happened, Progress, Spent, Verdict, WorkerId};
pub use replica::{Entry, Held, Replica};
pub use seen::Seen;
pub use shard::{Counts, Shard};
pub use spec::{Aggregate, BucketSpec, Mode, Replication, Spec};
pub use wire::{Duties, Effort, Report};
pub use worker::{Completed, Compute, Worked, work};

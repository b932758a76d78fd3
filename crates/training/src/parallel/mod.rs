//! Training one model on many workers, with the same bits as on one.
//!
//! A [`Plan`] fixes each step's micro-batches; workers divide them among themselves. Their gradients are added on a grid
//! of integers ([`consort_tensor::train::exact`]), so that the sum doesn't depend on who computed what, on the algorithm
//! that added it, or on who died meanwhile. A [`Worker`] is one process's part:
//!
//! ```no_run
//! use consort_collectives::JoinOptions;
//! use consort_training::parallel::{Control, Event, Membership, Plan, Worker};
//! # use consort_training::{Error, Trainer, data::Dataset};
//! # fn train(trainer: Trainer, dataset: Dataset) -> Result<(), Error> {
//! let plan = Plan::new(1, 1000, 8, 4);
//! let store = JoinOptions::new("127.0.0.1:29500", b"a secret of this job");
//! let worker = Worker::new(trainer, &dataset, plan, Membership::Group(store), None)?;
//! let finished = worker.run(&mut |event| {
//!     if let Event::Step(step) = event {
//!         eprintln!("step {}: loss {:.3}", step.step, step.loss);
//!     }
//!     Control::Go
//! })?;
//! eprintln!("weights {}", finished.weights_hash);
//! # Ok(()) }
//! ```
//!
//! Parts, each without knowledge of the next one up:
//!
//! - `tail`: what every worker must know at a step's end, in one short reduction;
//! - `reduce`: one bucket's gradients, from one worker's to everybody's; `wire`: the same in fewer bits;
//! - `link`: the thread that owns the group and keeps it standing while the worker computes;
//! - `state`: who has the newest state after members changed, and how the others get it;
//! - `step`: one step, whose `buckets` are reduced while backward goes on; `outer`: a round of local steps;
//! - `saving`: checkpoints of members that change; [`JobRecord`]: what they say of the job; `holding`: the last one, where its
//!   place takes none;
//! - `worker`: the loop over all that. [`Board`] says what a worker is doing right now.
//!
//! The coordinator (who is in which epoch) is [`consort_collectives::rendezvous`], a pure state machine that the store
//! drives; one that outlives the launcher would drive the same machine.

mod board;
mod buckets;
mod event;
mod holding;
mod link;
mod outer;
mod plan;
mod record;
mod reduce;
mod saving;
mod state;
mod step;
mod tail;
mod wire;
mod worker;

pub use board::{Activity, Board, Status, Talking};
pub use event::{Control, Event, Holding, Span, StepEvent, seen};
pub use holding::{HOLD, Keeper, keep};
pub use plan::{HOST_SETTLE, HOST_SILENCE, Outer, Plan, Wire};
pub use record::JobRecord;
pub use worker::{Finished, Membership, Reason, Resumed, Samples, Worker};

/// BLAKE3 of weights, as hexadecimal digits: what [`Finished::weights_hash`] is.
pub fn weights_hash(weights: &[f32]) -> String {
    let mut hasher = blake3::Hasher::new();
    state::hash(weights, &mut hasher);
    hasher.finalize().to_hex().to_string()
}

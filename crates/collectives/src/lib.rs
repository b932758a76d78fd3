//! Process groups: the ranks of a job add vectors, pass them round and wait for each other, over shared memory on one
//! host or over TLS, and never hang.
//!
//! ```no_run
//! use consort_collectives::{Group, JoinOptions, ReduceOp, Store, StoreOptions};
//! # fn main() -> Result<(), consort_collectives::Error> {
//! // In the launcher:
//! let store = Store::listen("127.0.0.1:0", b"a secret of this job", StoreOptions::new(4))?;
//! // In each of four workers:
//! let mut group = Group::join(JoinOptions::new(store.address().to_string(), b"a secret of this job"))?;
//! let mut gradient = vec![group.rank() as f32; 1 << 20];
//! group.all_reduce(&mut gradient, ReduceOp::Sum)?;
//! # Ok(()) }
//! ```
//!
//! Four parts, each without knowledge of the next one up:
//!
//! - [`schedule`]: an algorithm (ring, halving and doubling, tree, one-shot) is a *list of steps* for one rank, made by
//!   a pure function. Nothing else knows what a ring is.
//! - `transport`: ordered bytes between each pair of ranks, without blocking; shared memory or TCP.
//! - `flow`: one engine that runs any schedule on any transport, as a dataflow: a step may work on the bytes that the
//!   steps before it are done with, so chunks are pipelined in segments whatever the algorithm.
//! - `control`: who is alive. One thread a group listens to a connection from every peer; a process that dies closes it.
//!
//! [`link`] is the other way to talk: questions and answers between any two processes of a job, without ranks.
//!
//! [`Store`] is where members meet: it forms an epoch, and after a failure the survivors' next one.
//!
//! The protocol, the order of additions and what each failure becomes are in `ALGORITHM.md` beside this crate's
//! manifest. Traffic between hosts is encrypted and both ends have certificates of the job's own authority; the job's
//! token is what lets a member in.

mod auth;
pub mod bench;
mod call;
mod control;
mod element;
mod error;
mod flow;
mod group;
pub mod link;
mod lobby;
mod mesh;
mod net;
mod pending;
pub mod rendezvous;
pub mod schedule;
mod store;
mod tls;
mod transport;

pub use call::{Call, Operation};
pub use element::{DType, Element, Reduce, ReduceOp};
pub use error::{Error, Where};
pub use group::{Group, JoinOptions, chunk};
pub use pending::{Pending, Queue};
pub use schedule::Algorithm;
pub use store::{Store, StoreOptions};
pub use transport::TransportKind;

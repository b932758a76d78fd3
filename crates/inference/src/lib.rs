//! The engine: continuous batching over a paged cache, with answers that don't depend on the company they keep.
//!
//! One thread owns model, cache and scheduler and repeats *plan, forward, sample, send*. Requests reach it through
//! one bounded channel; each answer leaves through a bounded channel of its own.
//!
//! # Same request, same tokens
//!
//! The same request gives the same token ids and the same log-probability bits, whatever else is in the batch,
//! however its prompt was chunked, cached, preempted or resumed elsewhere. Three things make it so: rows of a
//! forward pass are independent ([`consort_tensor`]), a token is a function of its logits, the request and its
//! index in the answer ([`sampler`]), and the scheduler decides only when a row is computed ([`scheduler`]).
//! Replicas whose [`Engine::fingerprint`] is equal agree with each other.

mod answer;
pub mod blocks;
mod check;
pub mod engine;
pub mod grammar;
pub mod hash_runner;
mod memory;
pub mod request;
pub mod runner;
pub mod sampler;
pub mod scheduler;
#[cfg(test)]
mod simulation;
mod stats;
pub mod text;
mod worker;

pub use engine::{Engine, EngineOptions, Stats};
pub use hash_runner::HashRunner;
pub use memory::machine_memory;
pub use request::{Event, FinishReason, Request, Sampling, Submission, SubmitError, TokenEvent, Usage};
pub use runner::Runner;
pub use stats::{STEP_ROW_BOUNDS, StepRows};
pub use text::{Piece, StopMatch, TextAssembler};

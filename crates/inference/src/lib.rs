//! The engine: continuous batching over a paged cache, with answers that don't depend on the company they keep.
//!
//! One thread owns model, cache and scheduler and repeats *plan, forward, sample, send*. Requests reach it through
//! one bounded channel; each answer leaves through a bounded channel of its own.

pub mod engine;
pub mod grammar;
pub mod request;

pub use engine::{Engine, EngineOptions, Stats};
pub use grammar::{GrammarEngine, GrammarError, GrammarState};
pub use request::{Event, FinishReason, Request, Sampling, Submission, SubmitError, TokenEvent, Usage};

//! One replica's HTTP face: the OpenAI API over the engine.
//!
//! A request is read, understood field by field, turned into token ids, handed to the engine through
//! one bounded channel, and its events come back as one JSON body or as server-sent events. Nothing here computes:
//! [`runtime`] is a single thread, so that HTTP never takes a core from the two or more that do.
//!
//! What this crate promises: a parameter that is accepted is obeyed, one that isn't is refused by name; a client that
//! goes away frees its rows at once; a client that is slow or hostile costs bounded memory and time, and its own
//! connection only.

mod answer;
mod chat;
mod completions;
mod engine;
mod error;
mod fields;
mod http;
mod logprobs;
mod metrics;
mod models;
mod options;
mod params;
mod plan;
mod respond;
mod serve;
mod tokens;
mod tools;

pub use engine::{Generate, Replica, Slot};
pub use options::{ApiKey, Options};
pub use serve::{ServeError, runtime, serve};

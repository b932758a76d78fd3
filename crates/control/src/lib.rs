//! What a deployment is and how it is kept running: `consort.toml`, the supervisor of replicas, the autoscaler, and
//! the store of what outlasts a process.
//!
//! Decisions are pure functions of state, time and events ([`config`], [`supervisor`], [`autoscale`], [`threads`]);
//! processes, files and clocks are touched by thin drivers alone ([`keeper`], [`store`]). No request passes through
//! here.

pub mod autoscale;
mod child;
pub mod config;
pub mod keeper;
pub mod keys;
pub mod launch;
pub mod process;
pub mod rollout;
pub mod store;
pub mod supervisor;
pub mod threads;

pub use child::Said;

//! The real `consort serve` process, treated the way the world treats a server: clients that die, dawdle, flood and
//! lie, signals, long hours.
//!
//! Each test starts its own process on the real model, found through `CONSORT_TEST_SMOLLM2` (`cargo xtask test`
//! sets it). They take turns in two lanes ([`replica::Lane`]), which run side by side. All are in one module, and those of
//! the lane that mostly waits in one of their own, `waits`: `cargo xtask test` runs each lane in a process of its own, so
//! that a test's time is its own and not that of its turn.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "."]
mod system {
    pub(crate) mod client;
    pub(crate) mod clients;
    pub(crate) mod contract;
    pub(crate) mod fleet;
    pub(crate) mod hostile;
    pub(crate) mod one_answer;
    pub(crate) mod overload;
    pub(crate) mod relay;
    pub(crate) mod replica;
    pub(crate) mod resume;
    pub(crate) mod rollout;
    pub(crate) mod scripted;
    pub(crate) mod signals;
    pub(crate) mod steady;
    pub(crate) mod up;
    pub(crate) mod watching;

    /// Mostly training jobs.
    #[path = "."]
    pub(crate) mod waits {
        pub(crate) mod served;
        pub(crate) mod slow;
        pub(crate) mod train;
        pub(crate) mod train_disk;
        pub(crate) mod train_garbage;
        pub(crate) mod train_metrics;
        pub(crate) mod train_starters;
    }
}

use system::waits::*;
use system::*;

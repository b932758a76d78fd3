//! The real `consort serve` process, treated the way the world treats a server: clients that die, dawdle, flood and
//! lie, signals, long hours.
//!
//! Each test starts its own process on the real model, found through `CONSORT_TEST_SMOLLM2` (`cargo xtask test`
//! sets it). They take turns in two lanes ([`replica::Lane`]), so they want as many threads as there are tests, most of
//! which wait: `cargo xtask test` gives them those. All are in one module, by which it tells them from other tests.

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
    pub(crate) mod served;
    pub(crate) mod signals;
    pub(crate) mod steady;
    pub(crate) mod train;
    pub(crate) mod train_disk;
    pub(crate) mod train_garbage;
    pub(crate) mod train_metrics;
    pub(crate) mod train_starters;
    pub(crate) mod up;
    pub(crate) mod watching;
}

use system::*;

//! The real `consort serve` process, treated the way the world treats a server: clients that die, dawdle, flood and
//! lie, signals, long hours.
//!
//! Each test starts its own process on the real model, found through `CONSORT_TEST_SMOLLM2` (`cargo xtask test`
//! sets it). They take turns, since each of them wants the whole machine.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod client;
mod clients;
mod contract;
mod fleet;
mod hostile;
mod one_answer;
mod overload;
mod relay;
mod replica;
mod resume;
mod rollout;
mod scripted;
mod served;
mod signals;
mod steady;
mod train;
mod train_disk;
mod train_garbage;
mod train_metrics;
mod train_starters;
mod up;
mod watching;

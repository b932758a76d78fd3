//! `consort bench …`: measurements that a user can repeat.

mod collectives;
mod plot;
mod serve;
mod statistics;
mod stream;
mod train;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Measure
#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// A server under load: throughput, first-token and inter-token times
    Serve(serve::ServeBench),
    /// All-reduce and its relatives between processes: time and bandwidth by length
    Collectives(collectives::CollectivesBench),
    /// A training step on this machine: tokens a second, and how much of the machine that is
    Train(train::TrainBench),
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        match self.what {
            What::Serve(serve) => serve.run(),
            What::Collectives(collectives) => collectives.run(),
            What::Train(train) => train.run(),
        }
    }
}

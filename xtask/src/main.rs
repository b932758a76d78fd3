//! The repository's chores: `cargo xtask test` checks everything, `cargo xtask peers llama.cpp` measures both
//! sides of the README's table, `cargo xtask peers gateway`, `balance` and `streams` measure the front door, `cargo xtask
//! overload` floods a replica for a minute, `stragglers` slows a worker of a training job down.
//!
//! Written in Rust so that a machine with a Rust toolchain needs nothing else to start.

#![allow(clippy::print_stdout, reason = "printing is what this program is for")]

mod balance;
mod command;
mod graph;
mod machine;
mod overload;
mod peers;
mod replica;
mod stages;
mod stragglers;
mod streams;
mod tune;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The repository's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Everything that must hold before a change is taken; installs and fetches what it needs.
    Test {
        /// Runs one stage alone (and `machine` and `models` where it needs them).
        #[arg(long)]
        only: Option<stages::Stage>,
    },
    /// Measures Consort beside another system and writes the table.
    Peers(peers::PeersArguments),
    /// Floods a replica with four times the clients it has room for.
    Overload {
        /// How long.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Compares the ways of choosing a replica, before real replicas: first token, whole answer, prefix cache.
    Balance(balance::BalanceArguments),
    /// Opens many streams at once through the gateway: memory, and time between tokens.
    Streams(streams::StreamsArguments),
    /// Measures what one slow worker of four costs a training job, and writes docs/stragglers.md.
    Stragglers(stragglers::StragglersArguments),
    /// Measures which algorithm of the process groups is fastest for which length, and writes the table they choose by.
    Tune(tune::TuneArguments),
    /// Sends chat requests at a rate; a part of `peers gateway`.
    #[command(hide = true)]
    OpenLoop(peers::OpenLoop),
    /// Holds the crates' dependencies to the table in ARCHITECTURE.md.
    Graph,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.chore {
        Chore::Test { only } => stages::test(&root(), only),
        Chore::Peers(arguments) => peers::compare(&root(), &arguments),
        Chore::Balance(arguments) => balance::measure(&root(), &arguments),
        Chore::Streams(arguments) => streams::measure(&root(), &arguments),
        Chore::Stragglers(arguments) => stragglers::measure(&root(), &arguments),
        Chore::Tune(arguments) => tune::tune(&root(), &arguments),
        Chore::OpenLoop(load) => load.run(),
        Chore::Overload { seconds } => overload::flood(&root(), seconds),
        Chore::Graph => graph::check(&root()).map(|floors| println!("{floors} crates stand on their floors")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("xtask: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's root: the folder above this crate's.
fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(PathBuf::from).unwrap_or(here)
}

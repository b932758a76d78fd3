//! The `consort` command. Each subcommand is a file in [`cli`]; this file gives exit codes their meaning:
//! 0 done, 1 failed, 2 asked wrongly.

mod admin_client;
mod cli;
mod environment;
mod listen;
mod loading;
mod page;
mod progress;
mod settings;
mod signals;
mod supervised;
mod terminal;
mod train;
mod up;
mod written;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let started = std::time::Instant::now();
    // clap prints usage errors itself and exits with 2.
    let cli = cli::Cli::parse();
    match cli.run(started) {
        Ok(()) => ExitCode::SUCCESS,
        // `consort … | head`: the reader has what it wanted.
        Err(error) if terminal::is_closed_output(&error) => ExitCode::SUCCESS,
        // A launcher has heard it, and says it.
        Err(error) if error.downcast_ref::<cli::Told>().is_some() => ExitCode::FAILURE,
        Err(error) => {
            let said = terminal::said(&error);
            // Each of a file's problems begins like this by itself.
            let begin = if said.starts_with("error: ") { "" } else { "error: " };
            terminal::note(&format!("{begin}{said}"));
            ExitCode::from(if error.downcast_ref::<cli::UsageError>().is_some() { 2 } else { 1 })
        }
    }
}

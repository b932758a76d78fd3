//! As many requests as a proxy can take: wrk with one thread and keep-alive connections.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::REQUEST;
use super::proxies::Cores;
use crate::command::output;

/// Connections at one time.
pub(super) const CONNECTIONS: u32 = 64;

/// One run of wrk.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Burst {
    /// Requests a second.
    pub(super) rate: f64,
    /// Microseconds, of a closed loop: the connections' number over the rate, mostly.
    pub(super) p50: f64,
    pub(super) p99: f64,
    /// Answers that were none.
    pub(super) errors: u64,
}

/// Writes what wrk runs: the request, and one line of JSON at the end.
pub(super) fn script(work: &Path) -> Result<PathBuf> {
    let path = work.join("post.lua");
    let text = format!(
        "wrk.method = \"POST\"\n\
         wrk.body = [==[{REQUEST}]==]\n\
         wrk.headers[\"content-type\"] = \"application/json\"\n\
         done = function(summary, latency, requests)\n\
         \x20 local errors = summary.errors\n\
         \x20 io.write(string.format('RESULT {{\"rate\":%.1f,\"p50\":%d,\"p99\":%d,\"errors\":%d}}\\n',\n\
         \x20   summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99),\n\
         \x20   errors.connect + errors.read + errors.write + errors.status + errors.timeout))\n\
         end\n"
    );
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Loads `address` for so many seconds.
pub(super) fn burst(cores: &Cores, script: &Path, address: SocketAddr, seconds: u64) -> Result<Burst> {
    let mut command = cores.pinned(cores.load, "wrk");
    command.args([
        "-t1",
        &format!("-c{CONNECTIONS}"),
        &format!("-d{seconds}s"),
        "--timeout",
        "20s",
        "--latency",
        "-s",
    ]);
    command.arg(script).arg(format!("http://{address}/v1/chat/completions"));
    let text = output(&mut command)?;
    let result = text.lines().find_map(|line| line.strip_prefix("RESULT "));
    let result = result.with_context(|| format!("wrk printed no result:\n{text}"))?;
    serde_json::from_str(result).with_context(|| format!("wrk printed {result}"))
}

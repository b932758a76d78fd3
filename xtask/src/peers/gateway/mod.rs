//! `cargo xtask peers gateway`: Consort's front door beside nginx, HAProxy and LiteLLM, on one core each.
//!
//! One core has the proxy, another one the load and the upstream, which is an nginx with a fixed answer and several
//! times faster than any of the proxies. All proxies run all the time, and take turns under load; what is quoted is the
//! median of the rounds. Two things are measured: how many requests a second a proxy passes on when it has as many
//! as it can take (wrk, 64 connections), and what it adds to a request's time at seventy per cent of *our* limit (an
//! open loop: requests come when they are due, whether answers are late or not).

mod open_loop;
mod page;
mod pauses;
mod proxies;
mod wrk;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::PeersArguments;
use super::table::median;
use crate::command::{cargo, run, target_folder};
use crate::machine;
pub(crate) use open_loop::{Latency, OpenLoop};
use proxies::{Cores, Proxy, Upstream};
use wrk::Burst;

/// The request: what the simplest of clients sends.
const REQUEST: &str = r#"{"model":"m","messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":"Hello!"}],"max_tokens":16}"#;

/// Seconds of one measurement.
const SECONDS: u64 = 2;

/// Of our limit, at which times are compared.
const LOAD: f64 = 0.7;

/// What was measured of one proxy.
struct Side {
    name: &'static str,
    bursts: Vec<Burst>,
    /// (through it, to the upstream alone), in turns.
    times: Vec<(Latency, Latency)>,
}

impl Side {
    fn rate(&self) -> f64 {
        median(self.bursts.iter().map(|burst| burst.rate).collect())
    }

    /// Microseconds at the limit. Of the 99th percentiles the least: what else runs on the machine only ever adds, and
    /// a round in which it didn't tells most of the proxy.
    fn at_limit(&self) -> (f64, f64) {
        (
            median(self.bursts.iter().map(|burst| burst.p50).collect()),
            least(self.bursts.iter().map(|burst| burst.p99)),
        )
    }

    /// Microseconds that it adds, the medians of the rounds' differences: at the 50th percentile, at the 99th within a
    /// window, at the 99th of everything.
    fn added(&self) -> [f64; 3] {
        let at = |figure: fn(&Latency) -> f64| {
            median(self.times.iter().map(|(through, alone)| figure(through) - figure(alone)).collect())
        };
        [at(|time| time.p50), at(|time| time.p99_window), at(|time| time.p99)]
    }
}

fn least(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min)
}

/// Sets all sides up, measures, and writes docs/peers-gateway.md.
pub(super) fn compare(root: &Path, arguments: &PeersArguments) -> Result<()> {
    let work = target_folder(root).join("peers/gateway");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let note = |text: &str| eprintln!("xtask: {text}");
    if !arguments.no_build {
        note("building consort (release)");
        run(&mut cargo(root, ["build", "--release", "--quiet", "-p", "consort"]))?;
    }
    let missing: Vec<&str> =
        [("nginx", "nginx-light"), ("haproxy", "haproxy"), ("wrk", "wrk"), ("taskset", "util-linux")]
            .into_iter()
            .filter(|(program, _)| proxies::program(program).is_none())
            .map(|(_, package)| package)
            .collect();
    machine::install(&missing, &work)?;
    let python = machine::python(&work, "litellm", &[proxies::LITELLM])?;
    let cores = Cores::of_this_machine()?;
    let consort = target_folder(root).join("release/consort");

    note("starting an upstream and the proxies");
    let upstream = Upstream::start(&work, &cores)?;
    let proxies = [
        Proxy::nginx(&work, &cores, &upstream)?,
        Proxy::haproxy(&work, &cores, &upstream)?,
        Proxy::consort(&work, &cores, &consort, "consort", upstream.plain)?,
        Proxy::consort(&work, &cores, &consort, "consort-replica", upstream.replica)?,
        Proxy::litellm(&work, &cores, &python, &upstream)?,
    ];
    let script = wrk::script(&work)?;
    let mut alone = Side { name: "upstream alone", bursts: Vec::new(), times: Vec::new() };
    let mut sides: Vec<Side> =
        proxies.iter().map(|p| Side { name: p.name, bursts: Vec::new(), times: Vec::new() }).collect();
    for proxy in &proxies {
        // Connections, caches, a just-in-time compiler: nobody is measured cold.
        wrk::burst(&cores, &script, proxy.address, 1)?;
    }
    for round in 1..=arguments.pairs {
        note(&format!("round {round} of {}: requests a second", arguments.pairs));
        alone.bursts.push(wrk::burst(&cores, &script, upstream.plain, SECONDS)?);
        let mut limits = Vec::new();
        for (proxy, side) in proxies.iter().zip(&mut sides) {
            let burst = wrk::burst(&cores, &script, proxy.address, SECONDS)?;
            limits.push(burst.rate);
            side.bursts.push(burst);
        }
        note(&format!("round {round} of {}: added time", arguments.pairs));
        // The limit is this round's: a machine that others share is faster in one minute than in the next, and a share of
        // what it could do an hour ago may be more than it can do now.
        let ours = proxies.iter().zip(&limits).find(|(proxy, _)| proxy.name == "consort");
        let ours = ours.map_or(0.0, |(_, limit)| *limit);
        for ((proxy, side), limit) in proxies.iter().zip(&mut sides).zip(limits) {
            // Ours to replicas and LiteLLM can't keep up with that rate: at seventy per cent of their own.
            let own = proxy.name.starts_with("litellm") || proxy.name == "consort-replica";
            let rate = LOAD * if own { limit } else { ours };
            let through = open_loop::pinned(&cores, proxy.address, rate, SECONDS)?;
            let alone = open_loop::pinned(&cores, upstream.plain, rate, SECONDS)?;
            side.times.push((through, alone));
        }
    }
    for side in &sides {
        if let Some(burst) = side.bursts.iter().find(|burst| burst.errors > 0) {
            bail!("{}: {} requests failed under load; nothing else it did counts", side.name, burst.errors);
        }
    }
    note("how long this machine itself stands still");
    let pauses = pauses::measure();
    let table = page::table(&alone, &sides);
    println!("{table}");
    if arguments.json {
        return Ok(());
    }
    let document = root.join("docs/peers-gateway.md");
    fs::write(&document, page::page(arguments.pairs, &cores, &proxies, &pauses, &table))?;
    println!("written to {}", document.display());
    Ok(())
}

//! Measures all-reduce between processes of this machine.
//!
//! ```text
//! cargo run --release -p consort-collectives --example bench -- [RANKS] [shm|tcp|tls|mixed|auto] [ALGORITHM|auto] [BYTES …]
//! cargo run --release -p consort-collectives --example bench -- [RANKS] [shm|tcp|tls|mixed|auto] each-OPERATION [BYTES …]
//! ```
//!
//! With `--json` each length is one JSON object on a line; `each-OPERATION` (`each-all_reduce`) takes every algorithm in
//! turn and prints so always. `BENCH_HOSTS` divides the ranks among so many hosts that share no memory. The transport `auto`
//! is the one that a job takes by itself; `--json` then says first which, and which ranks are on one host. What is
//! measured and how: [`consort_collectives::bench`].

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use consort_collectives::bench::{compare, measure};
use consort_collectives::{Algorithm, Group, JoinOptions, Operation, Store, StoreOptions, TransportKind};

const TOKEN: &[u8] = b"only for the benchmark on this machine";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Ok(store) = std::env::var("BENCH_STORE") {
        return worker(&store, &args);
    }
    let ranks: usize = args.first().map_or(Ok(2), |n| n.parse())?;
    // Another address than the loopback's, where the ranks are on several hosts.
    let address = std::env::var("BENCH_LISTEN").unwrap_or_else(|_| "127.0.0.1:0".into());
    let store = Store::listen(&address, TOKEN, StoreOptions::new(ranks))?;
    let hosts: usize = std::env::var("BENCH_HOSTS").map_or(Ok(1), |n| n.parse())?;
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&args).env("BENCH_STORE", store.address().to_string());
        if hosts > 1 {
            command.env("BENCH_HOST", (rank * hosts / ranks).to_string());
        }
        command.spawn()
    };
    // The others are started elsewhere, with BENCH_STORE in their environment.
    let starts = std::env::var("BENCH_STARTS").map_or(Ok(ranks), |n| n.parse())?;
    let workers: Vec<_> = (0..starts).map(start).collect::<Result<_, _>>()?;
    for mut worker in workers {
        if !worker.wait()?.success() {
            return Err("a worker failed".into());
        }
    }
    Ok(())
}

fn worker(store: &str, args: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let json = args.iter().any(|arg| arg == "--json");
    let args: Vec<&str> = args.iter().map(String::as_str).filter(|arg| *arg != "--json").collect();
    let kind = args.get(1).copied().unwrap_or("shm");
    let mut options = JoinOptions::new(store, TOKEN);
    let known = TransportKind::by_name(kind);
    if known.is_none() && kind != "auto" {
        return Err("the transport is shm, tcp, tls, mixed or auto".into());
    }
    options.transport = known;
    options.host = std::env::var("BENCH_HOST").ok();
    let mut group = Group::join(options)?;
    let algorithm = args.get(2).copied().unwrap_or("auto");
    group.set_algorithm(Algorithm::by_name(algorithm));
    let mut sizes: Vec<usize> = args.iter().skip(3).filter_map(|bytes| bytes.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = (12..=28).step_by(2).map(|power| 1 << power).collect();
    }
    let talks = group.rank() == 0;
    let seconds = std::env::var("BENCH_SECONDS").map_or(Ok(0.2), |n| n.parse())?;
    let budget = Duration::try_from_secs_f64(seconds)?;
    if let Some(operation) = algorithm.strip_prefix("each-") {
        let operation = Operation::by_name(operation).ok_or("an operation's name must follow each-")?;
        for bytes in sizes {
            let compared = compare(&mut group, operation, bytes, budget)?;
            if talks {
                println!("{}", serde_json::to_string(&compared)?);
            }
        }
        return Ok(());
    }
    if talks && json && known.is_none() {
        let (transport, hosts) = (group.transport().name(), group.hosts());
        println!("{}", serde_json::json!({ "transport": transport, "hosts": hosts }));
    }
    if talks && !json {
        println!("all_reduce (sum, f32), {} processes, {kind}, {algorithm}", group.world_size());
        println!("{:>12} {:>12} {:>14} {:>14}", "bytes", "µs", "alg GB/s", "bus GB/s");
    }
    for bytes in sizes {
        let m = measure(&mut group, Operation::AllReduce, bytes, budget)?;
        if talks && json {
            println!("{}", serde_json::to_string(&m)?);
        } else if talks {
            let (algorithm, bus) = (m.algorithm_gb_per_s, m.bus_gb_per_s);
            println!("{bytes:>12} {:>12.1} {algorithm:>14.2} {bus:>14.2}", m.micros);
        }
    }
    Ok(())
}

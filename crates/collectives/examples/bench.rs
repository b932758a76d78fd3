//! Measures all-reduce between processes of this machine.
//!
//! ```text
//! cargo run --release -p consort-collectives --example bench -- [RANKS] [shm|tcp|tls] [ALGORITHM|auto] [BYTES …]
//! ```
//!
//! Bandwidths by the formulas of NCCL's tests: algorithm bandwidth is bytes of the vector over time; bus bandwidth is
//! that times 2·(n−1)/n, what each rank must at least send and receive. The time of a call is the median over calls,
//! each taken on the slowest rank; every sixteenth result is checked.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::process::Command;
use std::time::{Duration, Instant};

use consort_collectives::{Algorithm, Group, JoinOptions, ReduceOp, Store, StoreOptions, TransportKind};

const TOKEN: &[u8] = b"only for the benchmark on this machine";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Ok(store) = std::env::var("BENCH_STORE") {
        return worker(&store, &args);
    }
    let ranks: usize = args.first().map_or(Ok(2), |n| n.parse())?;
    let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(ranks))?;
    let start = || {
        Command::new(std::env::current_exe()?)
            .args(&args)
            .env("BENCH_STORE", store.address().to_string())
            .spawn()
    };
    let workers: Vec<_> = (0..ranks).map(|_| start()).collect::<Result<_, _>>()?;
    for mut worker in workers {
        if !worker.wait()?.success() {
            return Err("a worker failed".into());
        }
    }
    Ok(())
}

fn worker(store: &str, args: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let mut options = JoinOptions::new(store, TOKEN);
    let kind = args.get(1).map_or("shm", String::as_str);
    options.transport = Some(TransportKind::by_name(kind).ok_or("the transport is shm, tcp or tls")?);
    let mut group = Group::join(options)?;
    let algorithm = args.get(2).map_or("auto", String::as_str);
    group.set_algorithm(Algorithm::by_name(algorithm));
    let mut sizes: Vec<usize> = args.iter().skip(3).filter_map(|bytes| bytes.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = (12..=28).step_by(2).map(|power| 1 << power).collect();
    }
    let (rank, n) = (group.rank(), group.world_size());
    if rank == 0 {
        println!("all_reduce (sum, f32), {n} processes, {}, {algorithm}", group.transport().name());
        println!("{:>12} {:>12} {:>14} {:>14}", "bytes", "µs", "alg GB/s", "bus GB/s");
    }
    for bytes in sizes {
        let micros = measure(&mut group, bytes / 4)?;
        if rank == 0 {
            let algorithm_bandwidth = bytes as f64 / micros / 1e3;
            let bus_bandwidth = algorithm_bandwidth * 2.0 * (n - 1) as f64 / n as f64;
            println!("{bytes:>12} {micros:>12.1} {algorithm_bandwidth:>14.2} {bus_bandwidth:>14.2}");
        }
    }
    Ok(())
}

/// The median time of a call in microseconds, the slowest rank's for each call.
fn measure(group: &mut Group, count: usize) -> Result<f64, Box<dyn std::error::Error>> {
    // Small vectors are timed in batches: a clock costs as much as a few of them.
    let batch = (65_536 / (count + 1)).clamp(1, 100);
    let mut buffer = vec![0f32; count];
    let mut times = Vec::new();
    let mut go = [1i32];
    let started = Instant::now();
    while go[0] == 1 {
        let check = times.len() % 16 == 0;
        if check {
            buffer.fill(1.0);
        } else {
            buffer.fill(0.0);
        }
        group.barrier()?;
        let start = Instant::now();
        for _ in 0..batch {
            group.all_reduce(&mut buffer, ReduceOp::Sum)?;
        }
        times.push(start.elapsed().as_secs_f32() * 1e6 / batch as f32);
        if check && batch == 1 && !buffer.iter().all(|x| *x == group.world_size() as f32) {
            return Err("a wrong sum".into());
        }
        // The longest-running rank decides, so that all stop together.
        go[0] =
            i32::from(times.len() < 5 || started.elapsed() < Duration::from_millis(400) && times.len() < 400);
        group.all_reduce(&mut go, ReduceOp::Max)?;
    }
    group.all_reduce(&mut times, ReduceOp::Max)?;
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[times.len() / 2]))
}

//! Averages a vector over four processes.
//!
//! ```text
//! cargo run -p consort-collectives --example average
//! ```
//!
//! Run without arguments it is the launcher: it opens a store and starts four copies of itself, which find the store's
//! address and the job's token in their environment.

#![allow(clippy::print_stdout)]

use std::process::Command;

use consort_collectives::{Group, JoinOptions, ReduceOp, Store, StoreOptions};

const WORKERS: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let (Ok(store), Ok(token)) = (std::env::var("AVERAGE_STORE"), std::env::var("AVERAGE_TOKEN")) {
        return worker(&store, &token);
    }
    // A token must not be guessable: this one is made anew for each job.
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)?;
    let token = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let store = Store::listen("127.0.0.1:0", token.as_bytes(), StoreOptions::new(WORKERS))?;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        let mut command = Command::new(std::env::current_exe()?);
        command.env("AVERAGE_STORE", store.address().to_string()).env("AVERAGE_TOKEN", &token);
        workers.push(command.spawn()?);
    }
    for mut worker in workers {
        if !worker.wait()?.success() {
            return Err("a worker failed".into());
        }
    }
    Ok(())
}

fn worker(store: &str, token: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut group = Group::join(JoinOptions::new(store, token.as_bytes()))?;
    let mut vector: Vec<f32> = (0..8).map(|i| (group.rank() * 10 + i) as f32).collect();
    let before = format!("{vector:?}");
    group.all_reduce(&mut vector, ReduceOp::Sum)?;
    let n = group.world_size() as f32;
    vector.iter_mut().for_each(|x| *x /= n);
    println!("rank {} of {} over {}: {before} became {vector:?}", group.rank(), n, group.transport().name());
    Ok(())
}

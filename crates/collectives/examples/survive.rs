//! Four processes add; one is killed in the middle; the other three form a group of three and go on.
//!
//! ```text
//! cargo run -p consort-collectives --example survive
//! ```

#![allow(clippy::print_stdout)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use consort_collectives::{Group, JoinOptions, ReduceOp, Store, StoreOptions};

const WORKERS: usize = 4;
/// Sums that each group makes.
const ROUNDS: usize = 2000;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    if let (Ok(store), Ok(token)) = (std::env::var("SURVIVE_STORE"), std::env::var("SURVIVE_TOKEN")) {
        return worker(&store, &token);
    }
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)?;
    let token = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let store = Store::listen("127.0.0.1:0", token.as_bytes(), StoreOptions::new(WORKERS))?;
    let start = || {
        let mut command = Command::new(std::env::current_exe()?);
        command.env("SURVIVE_STORE", store.address().to_string()).env("SURVIVE_TOKEN", &token);
        command.stdout(Stdio::piped()).spawn()
    };
    let mut workers: Vec<Child> = (0..WORKERS).map(|_| start()).collect::<Result<_, _>>()?;
    let mut voices = Vec::new();
    for worker in &mut workers {
        let out = worker.stdout.take().ok_or("a worker without a voice")?;
        voices.push(BufReader::new(out).lines());
    }
    // Once the last one has begun, all are adding.
    for voice in &mut voices {
        println!("{}", voice.next().ok_or("a worker ended early")??);
    }
    println!("the launcher kills process {}", workers[1].id());
    workers[1].kill()?;
    for (worker, voice) in workers.iter_mut().zip(voices) {
        voice.map_while(Result::ok).for_each(|line| println!("{line}"));
        worker.wait()?;
    }
    Ok(())
}

fn worker(store: &str, token: &str) -> Result<(), Failure> {
    let mut group = Group::join(JoinOptions::new(store, token.as_bytes()))?;
    let process = std::process::id();
    println!("process {process} is rank {} of {}", group.rank(), group.world_size());
    let mut round = 0;
    // The first group adds until it breaks, the next one so many times.
    while group.epoch() == 1 || round < ROUNDS {
        let mut vector = vec![1f32; 50_000];
        match group.all_reduce(&mut vector, ReduceOp::Sum) {
            Ok(()) => round += 1,
            Err(error) => {
                println!("process {process}: {error}");
                group = group.rejoin()?;
                println!("process {process} is rank {} of {}", group.rank(), group.world_size());
                round = 0;
            }
        }
    }
    println!("process {process}: {ROUNDS} sums among {}", group.world_size());
    Ok(())
}

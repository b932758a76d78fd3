//! What a replica costs: start, memory, and nothing at all while nobody asks.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client;
use crate::replica::{chat, model, serve};

#[test]
fn starts_quickly_in_little_memory() {
    /// What a process may use beside the model's file and its cache.
    const ROOM: u64 = 150 << 20;
    const KV: u64 = 256 << 20;
    let replica = serve(&["--kv-bytes", "256M"]);
    let mut events = client::stream(replica.address, "/v1/chat/completions", &chat("Say hello.", 8)).unwrap();
    let first =
        |event: &Value| event["choices"][0]["delta"]["content"].as_str().is_some_and(|t| !t.is_empty());
    while !first(&events.next().unwrap().unwrap()) {}
    let to_first_token = replica.started.elapsed();
    events.all().unwrap();
    // A long prompt, so that every buffer reaches its size.
    let long = "word ".repeat(1500);
    assert_eq!(replica.post("/v1/chat/completions", &chat(&long, 4)).status, 200);
    let file = fs::metadata(model()).unwrap().len();
    let (_, peak) = replica.memory();
    println!(
        "process start to first token {:.0} ms; peak memory {} MiB, of which the model's file {} MiB",
        to_first_token.as_secs_f64() * 1000.0,
        peak >> 20,
        file >> 20,
    );
    assert!(peak < file + KV + ROOM, "peak memory is {} MiB", peak >> 20);
}

#[test]
fn idle_burns_nothing() {
    /// Hundredths of a second of processor time in three seconds: timers may tick, nothing may spin.
    const TICKS: u64 = 3;
    let replica = serve(&[]);
    replica.must_answer();
    replica.settled_memory();
    let before = replica.ticks();
    // Not a wait for anything: the time that is measured. The pool's microseconds of spinning after its last run are
    // far below a tick.
    std::thread::sleep(Duration::from_secs(3));
    let used = replica.ticks() - before;
    println!("{used} ticks of processor time in 3 s of idling");
    assert!(used <= TICKS, "an idle replica used {used} ticks in 3 s");
}

#[test]
fn memory_stays_level() {
    /// Growth over the second half of the requests; a leak of a kilobyte a token would be ten times that.
    const GROWTH: u64 = 8 << 20;
    let replica = serve(&["--kv-bytes", "64M"]);
    let round = |from: usize| {
        std::thread::scope(|scope| {
            for lane in 0..4 {
                let replica = &replica;
                scope.spawn(move || {
                    for request in 0..25 {
                        // Different prompts, so that the prefix cache fills up and turns over.
                        let text = format!(
                            "{} Tell me about {}.",
                            "and so on ".repeat(40),
                            from + lane * 25 + request
                        );
                        let response = replica.post("/v1/chat/completions", &chat(&text, 24));
                        assert_eq!(response.status, 200, "{}", response.text());
                    }
                });
            }
        });
    };
    let begun = Instant::now();
    round(0);
    let middle = replica.settled_memory();
    round(100);
    let end = replica.settled_memory();
    println!("200 requests in {:.1?}; memory {} MiB, then {} MiB", begun.elapsed(), middle >> 20, end >> 20);
    assert!(end < middle + GROWTH, "memory grew from {middle} to {end} bytes over 100 requests");
}

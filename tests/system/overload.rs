//! Four times more clients than there is room for: those who get in are served as fast as ever, the others are told
//! at once to come back.
//!
//! Ten seconds here; `cargo xtask overload` runs the same for a minute on a release build and then also holds the
//! goodput to within a tenth of the peak, which a shared test machine is too noisy for.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::client;
use crate::replica::{chat, serve};

/// Streams that run at once, and as many that may wait.
const ROOM: usize = 8;
const ANSWER: usize = 32;
/// Goodput under a flood, as a share of the goodput without.
const KEPT: f64 = 0.9;

#[derive(Default)]
struct Counts {
    completed: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

/// One client that asks again and again, and waits as told when it is refused.
fn ask_on(address: SocketAddr, client: usize, counts: &Counts) {
    let mut number = client * 100_000;
    while !counts.stop.load(Ordering::Relaxed) {
        number += 1;
        let text =
            format!("Request {number}: {}", "tell me a long story about ships and harbours ".repeat(5));
        let response = client::post(address, "/v1/chat/completions", &chat(&text, ANSWER)).unwrap();
        match response.status {
            200 => counts.completed.fetch_add(1, Ordering::Relaxed),
            429 => {
                let seconds = response.header("retry-after").expect("429 without Retry-After");
                assert!(seconds.parse::<u64>().is_ok_and(|s| s >= 1), "Retry-After: {seconds}");
                // Impatient: a tenth of what was asked, so that the flood goes on.
                thread::sleep(Duration::from_millis(100));
                counts.refused.fetch_add(1, Ordering::Relaxed)
            }
            status => panic!("{status}: {}", response.text()),
        };
    }
}

/// Tokens a second that `clients` get in `time`, and how often they were refused.
fn goodput(address: SocketAddr, clients: usize, time: Duration) -> (f64, u64) {
    let counts = Counts::default();
    let begun = Instant::now();
    thread::scope(|scope| {
        for client in 0..clients {
            let counts = &counts;
            scope.spawn(move || ask_on(address, client, counts));
        }
        thread::sleep(time);
        counts.stop.store(true, Ordering::Relaxed);
    });
    let tokens = counts.completed.load(Ordering::Relaxed) as f64 * ANSWER as f64;
    (tokens / begun.elapsed().as_secs_f64(), counts.refused.load(Ordering::Relaxed))
}

#[test]
fn overload_refuses_some_and_serves_the_rest_as_before() {
    let asked = std::env::var("CONSORT_TEST_OVERLOAD_SECONDS").ok().map(|s| s.parse::<u64>().unwrap());
    let flood = Duration::from_secs(asked.unwrap_or(10));
    let room = ROOM.to_string();
    // The cache fills up in any case; a small one does so before memory is looked at.
    let replica = serve(&["--max-running", &room, "--max-queued", &room, "--kv-bytes", "48M"]);
    goodput(replica.address, ROOM, Duration::from_secs(1));
    let (peak, none) = goodput(replica.address, ROOM, flood / 4);
    assert_eq!(none, 0, "a client was refused although there was room");
    let (_, before) = replica.memory();
    let (flooded, refused) = goodput(replica.address, 4 * 2 * ROOM, flood);
    let (_, after) = replica.memory();
    println!(
        "{ROOM} clients: {peak:.0} tok/s; {} clients for {flood:?}: {flooded:.0} tok/s ({:.0} %), {refused} refusals",
        8 * ROOM,
        100.0 * flooded / peak
    );
    assert!(refused > 0, "nobody was refused: this was no overload");
    assert!(flooded > 0.0);
    assert!(after < before + (64 << 20), "memory grew from {before} to {after} bytes");
    if asked.is_some() {
        assert!(flooded >= KEPT * peak, "goodput fell from {peak:.0} to {flooded:.0} tok/s");
    }
    replica.must_answer();
}

//! How long this machine itself stands still.
//!
//! A virtual machine's core isn't always there: the host gives it to somebody else for some milliseconds, and nothing
//! inside the machine tells. Whoever measures a 99th percentile in it measures that as well, so it is measured by itself.

use std::thread;
use std::time::{Duration, Instant};

/// Seconds of looking.
const SECONDS: u64 = 4;

/// What counts as a pause.
pub(super) const LEAST: Duration = Duration::from_millis(1);

/// Of a core, while all cores had something to do.
pub(super) struct Pauses {
    /// Each second.
    pub(super) rate: f64,
    /// The longest, and their sum each second.
    pub(super) longest: Duration,
    pub(super) share: f64,
}

/// A thread a core asks for the time, over and over.
pub(super) fn measure() -> Pauses {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut pauses: Vec<Duration> = Vec::new();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(watch)).collect();
        pauses.extend(threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()));
    });
    let looked = (cores as u64 * SECONDS) as f64;
    Pauses {
        rate: pauses.len() as f64 / looked,
        longest: pauses.iter().max().copied().unwrap_or_default(),
        share: pauses.iter().sum::<Duration>().as_secs_f64() / looked,
    }
}

fn watch() -> Vec<Duration> {
    let mut pauses = Vec::new();
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let mut last = Instant::now();
    while last < end {
        let now = Instant::now();
        if now - last >= LEAST {
            pauses.push(now - last);
        }
        last = now;
    }
    pauses
}

//! Groups of threads, for tests: each rank is a thread of this process.

#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, missing_docs, unreachable_pub)]

#[cfg(target_os = "linux")]
pub mod network;
pub mod worker;

use std::time::Duration;

use consort_collectives::{Group, JoinOptions, Store, StoreOptions, TransportKind};

pub const TOKEN: &[u8] = b"a token for tests, long enough";
pub const KINDS: [TransportKind; 3] = TransportKind::ALL;

pub fn store(world_size: usize) -> Store {
    let options = StoreOptions { settle: Duration::from_secs(2), ..StoreOptions::new(world_size) };
    Store::listen("127.0.0.1:0", TOKEN, options).unwrap()
}

pub fn options(store: &Store, kind: TransportKind) -> JoinOptions {
    JoinOptions { transport: Some(kind), ..JoinOptions::new(store.address().to_string(), TOKEN) }
}

/// Runs `body` on every rank; the results are in the order of ranks.
pub fn world<R: Send>(kind: TransportKind, world_size: usize, body: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let store = store(world_size);
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|_| {
                scope.spawn(|| {
                    let group = Group::join(options(&store, kind)).unwrap();
                    (group.rank(), body(group))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    results.sort_by_key(|(rank, _)| *rank);
    results.into_iter().map(|(_, result)| result).collect()
}

//! Groups of threads, for tests: each rank is a thread of this process.

#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, missing_docs, unreachable_pub)]

#[cfg(target_os = "linux")]
pub mod network;
pub mod worker;

use std::time::Duration;

use consort_collectives::{Group, JoinOptions, Store, StoreOptions, TransportKind};

pub const TOKEN: &[u8] = b"a token for tests, long enough";
pub const KINDS: [TransportKind; 4] = TransportKind::ALL;

pub fn store(world_size: usize) -> Store {
    let options = StoreOptions { settle: Duration::from_secs(2), ..StoreOptions::new(world_size) };
    Store::listen("127.0.0.1:0", TOKEN, options).unwrap()
}

pub fn options(store: &Store, kind: TransportKind) -> JoinOptions {
    JoinOptions { transport: Some(kind), ..JoinOptions::new(store.address().to_string(), TOKEN) }
}

/// Runs `body` on every rank; the results are in the order of ranks.
pub fn world<R: Send>(kind: TransportKind, world_size: usize, body: impl Fn(Group) -> R + Sync) -> Vec<R> {
    world_on(kind, &vec![0; world_size], body)
}

/// The same, with a rank for each entry of `hosts`, which says on what host. Who comes to the store first gets the first
/// rank, so the order of hosts among the ranks is any.
pub fn world_on<R: Send>(kind: TransportKind, hosts: &[usize], body: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let store = store(hosts.len());
    let (store, body) = (&store, &body);
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let join = |host: &usize| {
            let options = JoinOptions { host: Some(format!("host {host}")), ..options(store, kind) };
            scope.spawn(move || {
                let group = Group::join(options).unwrap();
                (group.rank(), body(group))
            })
        };
        let ranks: Vec<_> = hosts.iter().map(join).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    results.sort_by_key(|(rank, _)| *rank);
    results.into_iter().map(|(_, result)| result).collect()
}

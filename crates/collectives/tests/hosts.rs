//! Hosts that lose each other: each worker lives in a network namespace of its own, with a virtual cable to a bridge in
//! this one, where the store is. Needs root and iproute2.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::TOKEN;
use common::network::{Network, ip};
use common::worker::{SILENCE, Worker, clock_us};
use consort_collectives::{Store, StoreOptions};

#[test]
fn worker_process() {
    common::worker::live();
}

/// The ranks of workers that have met, over this transport.
fn joined(workers: &mut [Worker], transport: &str) -> Vec<String> {
    let rank = |worker: &mut Worker| {
        let words = worker.says("joined");
        let (rank, over) = words.split_once(' ').unwrap();
        assert!(over.ends_with(transport), "{words}");
        rank.to_owned()
    };
    workers.iter_mut().map(rank).collect()
}

/// What a worker says of a peer that it lost, within the limit for silence.
fn failed(worker: &mut Worker, who: &str, struck: u128) -> String {
    let words = worker.says("failed");
    let (at, rest) = words.split_once(' ').unwrap();
    let after = Duration::from_micros((at.parse::<u128>().unwrap() - struck) as u64);
    println!("{who}: error {:.0} ms after the cut: {rest}", after.as_secs_f64() * 1e3);
    // The limit, and generous room for a busy machine: a call's own deadline would be a minute.
    assert!(after > SILENCE / 2 && after < SILENCE * 20, "{after:?}");
    rest.to_owned()
}

/// Three hosts reduce over TLS, the default between hosts. One's cable is pulled: the other two name it within the limit
/// for silence and go on; it notices that it is alone; plugged in again it comes back as a new member.
#[test]
fn a_cut_cable_is_noticed_on_both_sides_the_rest_goes_on_and_the_host_comes_back() {
    let network = Network::new(3);
    let options = StoreOptions { settle: Duration::from_secs(1), ..StoreOptions::new(3) };
    let store = Store::listen(&format!("{}:0", network.address(254)), TOKEN, options).unwrap();
    let address = store.address().to_string();
    let mut workers: Vec<Worker> =
        (0..3).map(|host| Worker::start(&address, None, Some(&network.space(host)))).collect();
    // The default between hosts.
    let ranks = joined(&mut workers, "tls");
    let struck = clock_us();
    ip(&format!("link set {} down", network.cable(2)));
    for (host, worker) in workers.iter_mut().enumerate() {
        let rest = failed(worker, &format!("host {host}"), struck);
        // Who has lost the cable may name either of the others.
        assert!(host == 2 || rest.starts_with(&format!("Some({})", ranks[2])), "{rest}");
        assert!(rest.contains("all_reduce (sum) of 200000 f32"), "{rest}");
    }
    for worker in &mut workers[..2] {
        assert_eq!(worker.says("reformed"), "2 2 2");
        worker.go_on();
    }
    ip(&format!("link set {} up", network.cable(2)));
    // The host that was away finds itself fenced and asks for an epoch as a new member; those who run meet it when their
    // group next ends. Nothing but the store knows when it has come.
    let deadline = Instant::now() + Duration::from_secs(60);
    while store.waiting() == 0 {
        assert!(Instant::now() < deadline, "the host didn't come back");
        std::thread::sleep(Duration::from_millis(20));
    }
    workers[0].signal("-KILL");
    assert!(workers[1].says("failed").contains("all_reduce"));
    // The third epoch, or a later one where a busy machine took too long over connecting.
    let words = [1, 2].map(|worker: usize| workers[worker].says("reformed"));
    assert!(words[0] == words[1] && words[0].ends_with(" 2 2") && !words[0].starts_with("2 "), "{words:?}");
}

/// Two hosts of two ranks over a link of 1 Gb/s find by themselves who shares one. The cable between them is cut in the
/// middle of reductions: everyone names a rank of the other host in time, and each host's two go on by themselves.
#[test]
fn a_cut_link_between_hosts_of_two_ranks_is_noticed_by_all_four() {
    let network = Network::new(2);
    network.shape();
    let options = StoreOptions { settle: Duration::from_secs(1), ..StoreOptions::new(4) };
    let store = Store::listen(&format!("{}:0", network.address(254)), TOKEN, options).unwrap();
    let address = store.address().to_string();
    let mut workers: Vec<Worker> =
        (0..4).map(|worker| Worker::start(&address, None, Some(&network.space(worker / 2)))).collect();
    // Two ranks on each of two hosts.
    let ranks = joined(&mut workers, "mixed");
    let struck = clock_us();
    ip(&format!("link set {} down", network.cable(1)));
    for (index, worker) in workers.iter_mut().enumerate() {
        let rest = failed(worker, &format!("rank {}", ranks[index]), struck);
        let there = if index < 2 { &ranks[2..] } else { &ranks[..2] };
        assert!(there.iter().any(|rank| rest.starts_with(&format!("Some({rank})"))), "{rest}");
    }
    for worker in &mut workers[..2] {
        let words = worker.says("reformed");
        assert!(words.ends_with(" 2 2"), "the two that reach the store, in epoch {words}");
    }
}

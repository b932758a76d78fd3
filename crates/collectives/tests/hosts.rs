//! Hosts that lose each other: each worker lives in a network namespace of its own, with a virtual cable to a bridge in
//! this one, where the store is. Needs root and iproute2.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::TOKEN;
use common::worker::{SILENCE, Worker, clock_us};
use consort_collectives::{Store, StoreOptions};

#[test]
fn worker_process() {
    common::worker::live();
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).output();
    let done = done.expect("this test makes network namespaces: it needs `ip` (package iproute2)");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {words}: {said} (this test makes network namespaces: it needs root)");
}

/// Some hosts on one switch.
struct Network {
    id: u32,
    hosts: usize,
}

impl Network {
    fn new(hosts: usize) -> Self {
        let network = Self { id: std::process::id() % 50_000, hosts };
        let (id, bridge) = (network.id, network.bridge());
        ip(&format!("link add {bridge} type bridge"));
        ip(&format!("addr add {}/24 dev {bridge}", network.address(254)));
        ip(&format!("link set {bridge} up"));
        for host in 0..hosts {
            let (space, cable) = (network.space(host), network.cable(host));
            ip(&format!("netns add {space}"));
            ip(&format!("link add {cable} type veth peer name cc{id}i netns {space}"));
            ip(&format!("link set {cable} master {bridge} up"));
            ip(&format!("-n {space} addr add {}/24 dev cc{id}i", network.address(host + 1)));
            ip(&format!("-n {space} link set cc{id}i up"));
            ip(&format!("-n {space} link set lo up"));
        }
        network
    }

    fn bridge(&self) -> String {
        format!("cc{}b", self.id)
    }

    fn space(&self, host: usize) -> String {
        format!("cc{}-{host}", self.id)
    }

    fn cable(&self, host: usize) -> String {
        format!("cc{}c{host}", self.id)
    }

    fn address(&self, host: usize) -> String {
        format!("10.{}.{}.{host}", 200 + self.id / 250 % 50, self.id % 250)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Whatever of it was made.
        for host in 0..self.hosts {
            let _ = Command::new("ip").args(["link", "del", &self.cable(host)]).output();
            let _ = Command::new("ip").args(["netns", "del", &self.space(host)]).output();
        }
        let _ = Command::new("ip").args(["link", "del", &self.bridge()]).output();
    }
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
    let ranks: Vec<String> = workers
        .iter_mut()
        .map(|worker| {
            let words = worker.says("joined");
            assert!(words.ends_with(" tls"), "between hosts: {words}");
            words.split(' ').next().unwrap().to_owned()
        })
        .collect();
    let struck = clock_us();
    ip(&format!("link set {} down", network.cable(2)));
    for (host, worker) in workers.iter_mut().enumerate() {
        let words = worker.says("failed");
        let (at, rest) = words.split_once(' ').unwrap();
        let after = Duration::from_micros((at.parse::<u128>().unwrap() - struck) as u64);
        println!("host {host}: error {:.0} ms after the cut: {rest}", after.as_secs_f64() * 1e3);
        // Who has lost the cable may name either of the others.
        assert!(host == 2 || rest.starts_with(&format!("Some({})", ranks[2])), "{rest}");
        assert!(rest.contains("all_reduce (sum) of 200000 f32"), "{rest}");
        // The limit, and generous room for a busy machine: a call's own deadline would be a minute.
        assert!(after > SILENCE / 2 && after < SILENCE * 20, "{after:?}");
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
    assert_eq!(workers[1].says("reformed"), "3 2 2");
    assert_eq!(workers[2].says("reformed"), "3 2 2");
}

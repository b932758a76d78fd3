//! Hosts on one machine: network namespaces, each with a virtual cable to a bridge. Needs root and iproute2.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs `ip` with these words.
pub fn ip(words: &str) {
    run("ip", words);
}

fn run(program: &str, words: &str) {
    let done = Command::new(program).args(words.split(' ')).output();
    let done = done.expect("this test makes network namespaces: it needs `ip` and `tc` (package iproute2)");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "{program} {words}: {said} (this test makes network namespaces: it needs root)"
    );
}

/// Some hosts on one switch.
pub struct Network {
    id: u32,
    hosts: usize,
    _alone: MutexGuard<'static, ()>,
}

impl Network {
    pub fn new(hosts: usize) -> Self {
        // One at a time: the names are those of the process, and what one test's workers take of a small machine would
        // look like silence to another's.
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let network = Self { id: std::process::id() % 50_000, hosts, _alone: alone };
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

    /// Makes every cable carry 1 Gb/s each way, as a token bucket does.
    pub fn shape(&self) {
        for host in 0..self.hosts {
            let (space, inner) = (self.space(host), format!("cc{}i", self.id));
            run(
                "tc",
                &format!("-n {space} qdisc add dev {inner} root tbf rate 1gbit burst 128kb latency 20ms"),
            );
        }
    }

    fn bridge(&self) -> String {
        format!("cc{}b", self.id)
    }

    /// Its namespace.
    pub fn space(&self, host: usize) -> String {
        format!("cc{}-{host}", self.id)
    }

    /// Its cable's end at the switch.
    pub fn cable(&self, host: usize) -> String {
        format!("cc{}c{host}", self.id)
    }

    /// Its address; 254 is this host's.
    pub fn address(&self, host: usize) -> String {
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

//! A `consort serve` process under test.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{self, PATIENCE, Response};

/// Tests of one lane take turns; the two lanes run side by side.
#[derive(Clone, Copy)]
pub(crate) enum Lane {
    /// A real model computes, and wants the machine.
    Models,
    /// Mostly waits, for processes that start, fall silent or end.
    Waits,
}

/// Waits for a lane.
pub(crate) fn turn(lane: Lane) -> MutexGuard<'static, ()> {
    static LANES: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];
    LANES[lane as usize].lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running replica.
pub(crate) struct Replica {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) started: Instant,
    machine: Option<MutexGuard<'static, ()>>,
}

/// The model under test.
pub(crate) fn model() -> PathBuf {
    let path = std::env::var_os("CONSORT_TEST_SMOLLM2").map(PathBuf::from);
    path.expect("CONSORT_TEST_SMOLLM2 names no model file; `cargo xtask test` fetches one and sets it")
}

/// Starts a replica with these further arguments and waits until it is ready.
pub(crate) fn serve(arguments: &[&str]) -> Replica {
    serve_in(Lane::Models, arguments)
}

/// The same, in this lane's turn.
pub(crate) fn serve_in(lane: Lane, arguments: &[&str]) -> Replica {
    let guard = turn(lane);
    let mut replica = start(arguments);
    replica.machine = Some(guard);
    replica
}

/// Starts one more, beside another that holds the machine.
pub(crate) fn start(arguments: &[&str]) -> Replica {
    // A statement of its own: the listener must be gone when the replica wants its port.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    start_at(address, arguments)
}

/// Starts one at an address that was another's.
pub(crate) fn start_at(address: SocketAddr, arguments: &[&str]) -> Replica {
    let started = Instant::now();
    let child = Command::new(env!("CARGO_BIN_EXE_consort"))
        .arg("serve")
        .arg(model())
        .args(["--port", &address.port().to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut replica = Replica { child, address, started, machine: None };
    replica.await_that("the replica is ready", |replica| {
        if let Some(status) = replica.child.try_wait().unwrap() {
            let mut said = String::new();
            replica.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("consort serve ended with {status}: {said}");
        }
        client::send(replica.address, "GET", "/ready", b"").is_ok_and(|r| r.status == 200)
    });
    // The log is drained so that the process never waits for us.
    let mut stderr = replica.child.stderr.take().unwrap();
    thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    replica
}

impl Replica {
    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        client::post(self.address, path, body).unwrap()
    }

    /// A greedy chat answer of exactly `tokens` tokens.
    pub(crate) fn chat(&self, tokens: usize) -> Response {
        self.post("/v1/chat/completions", &chat("Tell me about the sea.", tokens))
    }

    /// Asserts that it still answers a well-behaved client.
    pub(crate) fn must_answer(&self) {
        let response = self.chat(3);
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.json()["usage"]["completion_tokens"], 3);
    }

    /// A series of `/metrics` without labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = client::send(self.address, "GET", "/metrics", b"").unwrap().text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse().unwrap()
    }

    /// Waits until something holds that only the other process can bring about.
    pub(crate) fn await_that(&mut self, what: &str, mut holds: impl FnMut(&mut Replica) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            assert!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} until {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Bytes in memory now, and the most there ever were.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        (kib("VmRSS:") * 1024, kib("VmHWM:") * 1024)
    }

    /// Bytes in memory once an idle replica has got its cache's memory ready, which takes a second at most.
    pub(crate) fn settled_memory(&self) -> u64 {
        let begun = Instant::now();
        // Equal for a second, as other tests may take the processor meanwhile.
        let (mut before, mut same) = (self.memory().0, 0);
        while same < 5 {
            assert!(begun.elapsed() < PATIENCE, "an idle replica's memory grows and grows: {before} bytes");
            std::thread::sleep(Duration::from_millis(200));
            let now = self.memory().0;
            same = if now == before { same + 1 } else { 0 };
            before = now;
        }
        before
    }

    /// Processor time used so far, in clock ticks (a hundredth of a second on every Linux we run on).
    pub(crate) fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The name in parentheses may hold spaces; utime and stime are the 12th and 13th field after it.
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Gives up the machine, for the one that takes its place.
    pub(crate) fn take_machine(&mut self) -> Option<MutexGuard<'static, ()>> {
        self.machine.take()
    }

    /// Takes it over.
    pub(crate) fn give_machine(&mut self, machine: Option<MutexGuard<'static, ()>>) {
        self.machine = machine;
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits for the process to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.await_that("the process ends", |replica| replica.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process; the shell has it built in.
pub(crate) fn signal(process: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {process}")]).status().unwrap();
    assert!(status.success());
}

/// A greedy chat request for exactly `tokens` tokens.
pub(crate) fn chat(text: &str, tokens: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": text}],
        "temperature": 0, "max_tokens": tokens, "ignore_eos": true,
    })
}

//! A `consort gateway` process before `consort serve` processes.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{self, PATIENCE};
use crate::relay::{self, Faults};
use crate::replica::{self, Replica};

/// Replicas share the machine, so each gets one thread.
pub(crate) const ARGUMENTS: [&str; 4] = ["--threads", "1", "--name", "model"];

/// A gateway under test.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Gateway {
    /// Starts one before replicas at these addresses, and waits until all of them are known to be ready.
    pub(crate) fn start(upstreams: &[SocketAddr], arguments: &[&str]) -> Gateway {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_consort"));
        command.arg("gateway").args(["--port", &address.port().to_string()]).args(arguments);
        for upstream in upstreams {
            command.args(["--upstream", &format!("http://{upstream}")]);
        }
        // Of each fault that a test brings about it would say a word.
        command.env("CONSORT_LOG", "error");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let gateway = Gateway { child, address };
        gateway.await_that("the gateway is ready", |gateway| {
            client::send(gateway.address, "GET", "/ready", b"").is_ok_and(|r| r.status == 200)
        });
        gateway
    }

    /// Waits until something holds that another process brings about.
    pub(crate) fn await_that(&self, what: &str, mut holds: impl FnMut(&Gateway) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            assert!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} until {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two replicas behind relays, a gateway before them.
pub(crate) struct Fleet {
    pub(crate) gateway: Gateway,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) faults: Faults,
}

/// Starts a fleet of `count` replicas.
pub(crate) fn start(count: usize, arguments: &[&str]) -> Fleet {
    let mut replicas = vec![replica::serve(&ARGUMENTS)];
    replicas.extend((1..count).map(|_| replica::start(&ARGUMENTS)));
    let faults = Faults::default();
    let relays: Vec<SocketAddr> = replicas.iter().map(|r| relay::start(r.address, &faults)).collect();
    Fleet { gateway: Gateway::start(&relays, arguments), replicas, faults }
}

/// A streamed answer as its bytes: events, with what may differ between two runs (ids, times, what was found in a
/// prefix cache) taken out, and what doesn't belong to the answer (comments, event ids) left out.
pub(crate) fn events(address: SocketAddr, path: &str, body: &Value) -> Vec<String> {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    let response = client::post(address, path, &body).unwrap();
    assert_eq!(response.status, 200, "{}", response.text());
    plain(&response.text())
}

/// See [`events`].
pub(crate) fn plain(text: &str) -> Vec<String> {
    let id = between(text, "\"id\":\"", "\"").expect("an id").to_owned();
    let own = id.rsplit('-').next().unwrap().to_owned();
    text.split_inclusive("\n\n")
        .filter_map(|event| {
            let lines: Vec<&str> = event
                .lines()
                .filter(|l| !l.starts_with(':') && !l.starts_with("id:") && !l.is_empty())
                .collect();
            (!lines.is_empty()).then(|| lines.join("\n"))
        })
        .map(|event| {
            if event.starts_with("data: {") {
                assert_eq!(
                    between(&event, "\"id\":\"", "\""),
                    Some(id.as_str()),
                    "one id throughout: {event}"
                );
            }
            let event = event.replace(&own, "…");
            let event = without(&event, "\"created\":", ",");
            without(&event, ",\"prompt_tokens_details\":{", "}")
        })
        .collect()
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    Some(text.split_once(from)?.1.split_once(to)?.0)
}

fn without(text: &str, from: &str, to: &str) -> String {
    match text.split_once(from) {
        Some((before, rest)) => format!("{before}{}", rest.split_once(to).map_or("", |(_, after)| after)),
        None => text.to_owned(),
    }
}

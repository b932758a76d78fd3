//! `consort train … --metrics`: what Prometheus reads of a job that runs, and clients that the job must not feel.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::client::{Response, connect, read, request};
use crate::train::{Place, Training, wait};

/// Far longer than the job takes in these tests.
const LONG: u64 = 1_000_000;
/// Longer than a client that says nothing, or reads nothing, is borne; on a busy machine.
const BORNE: Duration = Duration::from_secs(30);
/// What bad clients may cost the launcher in memory.
const ROOM: u64 = 32 << 20;

fn address(training: &mut Training) -> SocketAddr {
    let line = training.hear("Prometheus metrics at http://");
    let rest = line.split("http://").nth(1).unwrap();
    let address: SocketAddr = rest.split('/').next().unwrap().parse().unwrap();
    SocketAddr::from(([127, 0, 0, 1], address.port()))
}

fn ask(address: SocketAddr, method: &str, path: &str, headers: &str) -> Response {
    let mut stream = connect(address).unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    read(stream).unwrap()
}

/// Reads the page as Prometheus' text format has it; every line must be of it.
fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let answer = ask(address, "GET", "/metrics", &format!("host: {address}\r\n"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let text = answer.text();
    let (mut kinds, mut helps, mut values) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(helps.insert(name.to_owned(), help.len()).is_none(), "{name} twice");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
            kinds.insert(name.to_owned(), kind.to_owned());
        } else {
            let (name, value) = line.split_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            assert!(name.starts_with("consort_train_"), "{name}");
            assert!(kinds.contains_key(name) && helps.contains_key(name), "{name} has no type or no help");
            values.insert(name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line:?}")));
        }
    }
    values
}

/// Waits until the page shows this step.
fn reached(address: SocketAddr, step: f64) -> BTreeMap<String, f64> {
    wait(&format!("step {step}"), || scrape(address).get("consort_train_step").is_some_and(|s| *s >= step));
    scrape(address)
}

/// Waits until the other side has closed.
fn closed(stream: &mut TcpStream, since: Instant) {
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
        assert!(since.elapsed() < BORNE, "it is still open");
    }
}

fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn prometheus_reads_a_job_and_bad_clients_cost_it_nothing() {
    let place = Place::new(LONG);
    let mut training = place.train(&["--workers", "2", "--metrics", "127.0.0.1:0"]);
    let address = address(&mut training);
    let first = reached(address, 3.0);
    assert_eq!(first["consort_train_steps"], LONG as f64);
    assert_eq!(first["consort_train_workers"], 2.0);
    for name in ["tokens_total", "loss", "gradient_norm", "learning_rate", "step_seconds"] {
        let value = first[&format!("consort_train_{name}")];
        assert!(value.is_finite() && value > 0.0, "{name} is {value}");
    }
    assert_eq!(first["consort_train_workers_lost_total"], 0.0);
    let later = reached(address, first["consort_train_step"] + 20.0);
    for name in ["tokens_total", "communication_seconds_total", "checkpoints_total"] {
        let name = format!("consort_train_{name}");
        assert!(later[&name] > first[&name], "{name} doesn't rise");
    }

    // What isn't for this address, or isn't HTTP.
    assert_eq!(ask(address, "GET", "/", "host: localhost\r\n").status, 404);
    assert_eq!(ask(address, "POST", "/metrics", "host: localhost\r\ncontent-length: 0\r\n").status, 405);
    assert_eq!(ask(address, "GET", "/metrics", "host: rebound.example\r\n").status, 403);
    let page = "host: localhost\r\norigin: https://evil.example\r\n";
    assert_eq!(ask(address, "GET", "/metrics", page).status, 403);
    let before = memory(training.id());
    let since = Instant::now();
    for garbage in
        [&b"\x16\x03\x01\x02\x00\x01\x00 hello TLS\r\n\r\n"[..], &[b'x'; 1 << 20], b"\0\0\0\0\r\n\r\n"]
    {
        let mut stream = connect(address).unwrap();
        // It may be closed before all is written.
        let _ = stream.write_all(garbage);
        closed(&mut stream, since);
    }

    // Some hundred that say nothing, one that says a byte at a time, one that asks and asks and reads nothing.
    let idle: Vec<TcpStream> = (0..300).map(|_| connect(address).unwrap()).collect();
    let open = || fs::read_dir(format!("/proc/{}/fd", training.id())).unwrap().count();
    let during = reached(address, later["consort_train_step"] + 5.0);
    assert!(open() < 120, "{} files are open", open());
    // All at once, as each is borne for some seconds.
    let since = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| idle.into_iter().for_each(|mut stream| closed(&mut stream, since)));
        scope.spawn(|| {
            let mut slow = connect(address).unwrap();
            let text = request("GET", "/metrics", address, b"");
            for byte in text[..text.len() - 4].iter().cycle() {
                if slow.write_all(&[*byte]).is_err() {
                    break;
                }
                assert!(since.elapsed() < BORNE, "a byte at a time is borne for ever");
                scrape(address);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        scope.spawn(|| {
            let mut deaf = connect(address).unwrap();
            deaf.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
            let question = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\n\r\n").repeat(100);
            loop {
                match deaf.write(question.as_bytes()) {
                    Ok(_) => {}
                    Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(_) => break,
                }
                assert!(since.elapsed() < BORNE, "who never reads is borne for ever");
            }
        });
    });
    let after = memory(training.id());
    assert!(after < before + ROOM, "memory went from {before} to {after} bytes");

    let last = reached(address, during["consort_train_step"] + 5.0);
    assert_eq!(last["consort_train_workers_lost_total"], 0.0);
    training.signal(Signal::INT);
    let ended = training.end();
    assert!(ended.status.success() && ended.said.starts_with("stopped behind step "), "{}", ended.errors);
    let again = ended.said.lines().next().unwrap();
    assert!(again.ends_with("--workers 2 --metrics 127.0.0.1:0 --resume"), "{again}");
}

#[test]
fn beyond_this_machine_metrics_need_a_key() {
    let place = Place::new(LONG);
    let mut training = place.train(&["--metrics", "0.0.0.0:0"]);
    let line = training.hear("Prometheus metrics at http://");
    let key = line.rsplit("bearer token that it demands: ").next().unwrap().to_owned();
    assert!(key.starts_with("sk-consort-") && key.len() > 50, "{line}");
    let port: u16 = line.split("0.0.0.0:").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(ask(address, "GET", "/metrics", "host: x\r\n").status, 401);
    let header = |key: &str| format!("host: x\r\nauthorization: Bearer {key}\r\n");
    assert_eq!(ask(address, "GET", "/metrics", &header("sk-consort-guess")).status, 401);
    assert_eq!(ask(address, "GET", "/metrics", &header(&key)).status, 200);
    training.signal(Signal::INT);
    training.end();

    let place = place.again();
    let mut training = place.train_with(&["--metrics", "0.0.0.0:0"], &[("CONSORT_API_KEY", "a-long-secret")]);
    let line = training.hear("Prometheus metrics at http://");
    assert!(line.contains("CONSORT_API_KEY") && !line.contains("a-long-secret"), "{line}");
    training.signal(Signal::INT);
    training.end();
}

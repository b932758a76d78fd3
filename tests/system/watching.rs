//! What a fleet lets its operators see: one trace a request across the gateway and the replica that answered, log lines
//! that one id connects, and a dashboard whose every series exists.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

use crate::client::{self, PATIENCE};
use crate::replica::{chat, model, signal};
use crate::up::{Up, start_with, up_file};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A span that reached the collector.
#[derive(Debug)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    attributes: Vec<(String, String)>,
    /// Of the request that brought it.
    headers: Vec<(String, String)>,
}

/// A collector that takes what is sent to `/v1/traces`; in TLS where it has a certificate.
fn collector(tls: Option<Arc<ServerConfig>>) -> (String, Receiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoint = format!("{scheme}://localhost:{}", listener.local_addr().unwrap().port());
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, sender, tls) = (stream.unwrap(), sender.clone(), tls.clone());
            thread::spawn(move || match tls {
                None => collect(stream, &sender),
                Some(tls) => collect(StreamOwned::new(ServerConnection::new(tls).unwrap(), stream), &sender),
            });
        }
    });
    (endpoint, receiver)
}

fn collect(stream: impl Read + Write, sender: &Sender<Span>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            // One that doesn't trust the certificate ends here.
            if stream.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        assert!(head.starts_with("POST /v1/traces "), "{head}");
        let lower = head.to_lowercase();
        assert!(lower.contains("content-type: application/x-protobuf"), "{head}");
        let length = lower.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
        let mut body = vec![0; length.trim().parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
        let headers: Vec<(String, String)> = lower
            .lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        for mut span in spans(&body) {
            span.headers.clone_from(&headers);
            sender.send(span).unwrap_or(());
        }
        stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        stream.get_mut().flush().unwrap();
    }
}

/// The fields of a protobuf message: number, and bytes (those of a number as text).
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let content = match tag & 7 {
            0 => varint(&mut bytes).to_string().into_bytes(),
            1 => {
                let (fixed, rest) = bytes.split_at(8);
                bytes = rest;
                fixed.to_vec()
            }
            2 => {
                let length = varint(&mut bytes) as usize;
                let (content, rest) = bytes.split_at(length);
                bytes = rest;
                content.to_vec()
            }
            other => panic!("wire type {other}"),
        };
        fields.push((tag >> 3, content));
    }
    fields
}

fn one(fields: &[(u64, Vec<u8>)], number: u64) -> Vec<u8> {
    fields.iter().find(|(n, _)| *n == number).map(|(_, content)| content.clone()).unwrap_or_default()
}

fn attributes(of: &[(u64, Vec<u8>)], number: u64) -> Vec<(String, String)> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let pairs = of.iter().filter(|(n, _)| *n == number).map(|(_, pair)| fields(pair));
    pairs.map(|pair| (text(one(&pair, 1)), text(fields(&one(&pair, 2)).remove(0).1))).collect()
}

fn spans(body: &[u8]) -> Vec<Span> {
    let hex = |bytes: Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let resource_spans = fields(&one(&fields(body), 1));
    let resource = attributes(&fields(&one(&resource_spans, 1)), 1);
    let service = resource.iter().find(|(name, _)| name == "service.name").unwrap().1.clone();
    let scope = fields(&one(&resource_spans, 2));
    scope
        .iter()
        .filter(|(number, _)| *number == 2)
        .map(|(_, span)| {
            let span = fields(span);
            Span {
                service: service.clone(),
                trace: hex(one(&span, 1)),
                id: hex(one(&span, 2)),
                parent: hex(one(&span, 4)),
                attributes: attributes(&span, 9),
                headers: Vec::new(),
            }
        })
        .collect()
}

/// A request with these headers.
fn ask(up: &Up, headers: &str) -> u16 {
    let body = chat("Hello.", 3).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}",
        up.address,
        body.len()
    );
    let mut stream = client::connect(up.address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    client::read(stream).unwrap().status
}

#[test]
fn one_trace_and_one_id_connect_the_gateway_and_the_replica() {
    let (endpoint, spans) = collector(None);
    let model = model();
    let up = start_with(
        tempfile::tempdir().unwrap(),
        &["--model", model.to_str().unwrap(), "--name", "smol", "--replicas", "1", "--log", "json"],
        &[("CONSORT_OTLP_ENDPOINT", &endpoint)],
    );
    let traced = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\nx-request-id: find-me\r\n");
    assert_eq!(ask(&up, &traced), 200);
    // Not sampled by whoever began it: not exported.
    assert_eq!(ask(&up, &format!("traceparent: 00-{}-{PARENT}-00\r\n", TRACE.replace('4', "5"))), 200);
    assert_eq!(ask(&up, ""), 200);
    let got: Vec<Span> = (0..4).map(|_| spans.recv_timeout(PATIENCE).unwrap()).collect();
    let of = |service: &str, trace: bool| {
        let found = got.iter().find(|span| span.service == service && (span.trace == TRACE) == trace);
        found.unwrap_or_else(|| panic!("{service}, {trace}: {got:#?}"))
    };
    let (gateway, replica) = (of("consort-gateway", true), of("consort-replica", true));
    assert_eq!((gateway.parent.as_str(), replica.parent.as_str()), (PARENT, gateway.id.as_str()));
    assert_ne!(gateway.id, replica.id);
    for span in [gateway, replica] {
        let has = |name: &str, value: &str| span.attributes.contains(&(name.to_owned(), value.to_owned()));
        assert!(has("consort.request_id", "find-me") && has("http.response.status_code", "200"), "{span:?}");
    }
    assert!(gateway.attributes.contains(&("gen_ai.usage.output_tokens".into(), "3".into())), "{gateway:?}");
    // One that begins here is a trace of its own, in both.
    let (gateway, replica) = (of("consort-gateway", false), of("consort-replica", false));
    assert_eq!((gateway.parent.as_str(), &replica.trace, &replica.parent), ("", &gateway.trace, &gateway.id));
    assert!(spans.try_recv().is_err(), "no more than was asked for");

    let log = up.log();
    let lines: Vec<Value> =
        log.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let found: Vec<_> = lines.iter().filter(|l| l["request_id"] == "find-me").collect();
    assert_eq!(found.len(), 2, "{log}");
    assert!(found.iter().all(|line| line["trace_id"] == TRACE), "{found:?}");
    assert!(found.iter().any(|line| line["replica"] == "smol-0.1"), "{found:?}");
    assert!(!log.contains("Hello."), "no prompt is logged");
}

#[test]
fn a_collector_is_spoken_to_in_tls_where_its_certificate_is_known() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = vec![made.cert.der().clone()];
    let tls = tls.with_no_client_auth().with_single_cert(chain, key.into()).unwrap();
    let (endpoint, spans) = collector(Some(Arc::new(tls)));
    let (folder, model) = (tempfile::tempdir().unwrap(), model());
    let file = folder.path().join("collector.pem");
    fs::write(&file, made.cert.pem()).unwrap();
    let known = [
        ("CONSORT_OTLP_ENDPOINT", endpoint.as_str()),
        ("CONSORT_OTLP_CERTIFICATE", file.to_str().unwrap()),
        ("CONSORT_OTLP_HEADERS", "x-collector-key=a%20secret"),
    ];
    let arguments = ["--model", model.to_str().unwrap(), "--replicas", "1"];
    let up = start_with(folder, &arguments, &known);
    assert_eq!(ask(&up, ""), 200);
    let mut services = BTreeSet::new();
    while services.len() < 2 {
        let span = spans.recv_timeout(PATIENCE).unwrap();
        let secret = ("x-collector-key".to_owned(), "a secret".to_owned());
        assert!(span.headers.contains(&secret), "{span:?}");
        services.insert(span.service);
    }
    assert_eq!(services.into_iter().collect::<Vec<_>>(), ["consort-gateway", "consort-replica"]);
    assert!(!up.log().contains("secret"), "{}", up.log());
    drop(up);
    // A certificate that nobody vouches for is not believed: nothing arrives, and the log says why.
    let up = start_with(tempfile::tempdir().unwrap(), &arguments, &known[..1]);
    assert_eq!(ask(&up, ""), 200);
    up.until_log("the certificate is refused", "the trace collector doesn't take spans");
    assert!(up.log().contains("certificate"), "{}", up.log());
    assert!(spans.try_recv().is_err());
}

#[test]
fn a_collector_that_is_dead_costs_nothing_and_a_wrong_one_is_refused() {
    // Bound and never accepted from: it takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let (folder, model) = (tempfile::tempdir().unwrap(), model());
    let up = start_with(
        folder,
        &["--model", model.to_str().unwrap(), "--replicas", "1"],
        &[("CONSORT_OTLP_ENDPOINT", &endpoint)],
    );
    for _ in 0..20 {
        assert_eq!(ask(&up, ""), 200);
    }
    assert!(!up.log().contains("panicked"), "{}", up.log());
    drop(up);
    let wrong = std::process::Command::new(env!("CARGO_BIN_EXE_consort"))
        .args(["up", "--port", "0"])
        .env("CONSORT_OTLP_ENDPOINT", "grpc://collector:4318")
        .env("CONSORT_STATE", tempfile::tempdir().unwrap().path())
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("CONSORT_OTLP_ENDPOINT"), "{wrong:?}");
}

/// Names of series in a dashboard's queries.
fn queried(dashboard: &Value, into: &mut BTreeSet<String>) {
    match dashboard {
        Value::Object(members) => members.iter().for_each(|(name, value)| match value.as_str() {
            Some(query) if name == "expr" || name == "query" || name == "definition" => {
                let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
                into.extend(words.filter(|w| w.starts_with("consort_")).map(str::to_owned));
            }
            _ => queried(value, into),
        }),
        Value::Array(values) => values.iter().for_each(|value| queried(value, into)),
        _ => {}
    }
}

#[test]
fn every_series_of_the_dashboard_exists() {
    let dashboard = include_str!("../../deploy/grafana/consort.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let mut wanted = BTreeSet::new();
    queried(&dashboard, &mut wanted);
    assert!(wanted.len() > 25, "{wanted:?}");
    let up = up_file("[models.smol]\nsource = \"{model}\"\nreplicas = 1\n");
    // What has a label is there once it has happened: a candidate that scores answers, a replica that fails a request.
    let rollout = [
        "rollout",
        "start",
        "smol",
        "--max-running",
        "8",
        "--steps",
        "50",
        "--bake",
        "1h",
        "--shadow",
        "100",
    ];
    assert!(up.consort(&rollout).status.success());
    up.until("an answer is scored", |fleet| {
        assert_eq!(up.post(&chat(&format!("Say {}.", fleet["uptime_ms"]), 4)).status, 200);
        fleet["rollouts"][0]["candidate_did"]["scored"].as_u64().is_some_and(|scored| scored > 0)
    });
    let mut events =
        client::stream(up.address, "/v1/chat/completions", &chat("Tell me a story.", 60)).unwrap();
    events.next().unwrap().unwrap();
    up.pids().into_iter().for_each(|pid| signal(pid, "KILL"));
    events.all().unwrap();
    up.until("the replicas are back", |fleet| {
        let slots = fleet["slots"].as_array().unwrap();
        slots.iter().all(|slot| slot["state"] == "ready")
    });
    let replica: std::net::SocketAddr = {
        let fleet = up.fleet();
        fleet["slots"][0]["replicas"][0]["address"].as_str().unwrap().parse().unwrap()
    };
    let door = client::send(up.address, "GET", "/metrics", b"").unwrap().text();
    let own = client::send(replica, "GET", "/metrics", b"").unwrap().text();
    let exists = |name: &str| {
        // A family without a member yet has its type in the text and no line; its name there lacks the ending.
        let family =
            ["_total", "_bucket", "_count", "_sum", "_info"].iter().find_map(|e| name.strip_suffix(e));
        [&door, &own].into_iter().flat_map(|text| text.lines()).any(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                || line
                    .strip_prefix("# TYPE ")
                    .is_some_and(|l| l.split(' ').next() == Some(family.unwrap_or(name)))
        })
    };
    let missing: Vec<_> = wanted.iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "the dashboard asks for {missing:?}\n{door}\n{own}");
    assert!(fs::metadata(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/grafana/README.md")).is_ok());
}

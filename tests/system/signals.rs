//! Clients that die and replicas that are told to stop.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::client;
use crate::replica::{chat, serve, signal};

/// More tokens than the tests wait for.
const ENDLESS: usize = 7000;

#[test]
fn a_killed_client_frees_its_rows() {
    let mut replica = serve(&[]);
    let mut body = chat("Count.", ENDLESS);
    body["stream"] = json!(true);
    let request = String::from_utf8(client::request(
        "POST",
        "/v1/chat/completions",
        replica.address,
        body.to_string().as_bytes(),
    ));
    // A process of its own, so that the kernel ends its connection and no destructor of ours.
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{}; printf '%s' \"$0\" >&3; exec cat <&3",
        replica.address.port()
    );
    let mut client =
        Command::new("bash").args(["-c", &script, &request.unwrap()]).stdout(Stdio::null()).spawn().unwrap();
    replica.await_that("its answer is under way", |r| r.metric("consort_generated_tokens_total") > 20.0);
    assert_eq!(replica.metric("consort_running"), 1.0);
    signal(client.id(), "KILL");
    client.wait().unwrap();
    replica.await_that("its row is free", |r| r.metric("consort_running") == 0.0);
    assert!(
        replica.metric("consort_generated_tokens_total") < ENDLESS as f64 / 2.0,
        "the answer went on to its end although nobody was there to read it"
    );
    replica.must_answer();
}

#[test]
fn sigterm_lets_streams_finish_and_exits_0() {
    const TOKENS: usize = 200;
    let mut replica = serve(&[]);
    let mut body = chat("Tell me a story.", TOKENS);
    body["stream_options"] = json!({"include_usage": true});
    let mut events = client::stream(replica.address, "/v1/chat/completions", &body).unwrap();
    assert_eq!(events.status, 200);
    // The role, then the first text: it runs.
    events.next().unwrap().unwrap();
    events.next().unwrap().unwrap();
    replica.signal("TERM");
    let rest = events.all().unwrap();
    let usage = rest.iter().find_map(|event| event["usage"].as_object()).unwrap();
    assert_eq!(usage["completion_tokens"], TOKENS);
    let reasons: Vec<_> =
        rest.iter().filter_map(|event| event["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(reasons, ["length"]);
    assert_eq!(replica.wait().code(), Some(0));
}

#[test]
fn sigint_while_idle_exits_at_once() {
    let mut replica = serve(&[]);
    replica.must_answer();
    replica.signal("INT");
    assert_eq!(replica.wait().code(), Some(0));
}

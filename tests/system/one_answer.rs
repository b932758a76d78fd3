//! One answer of many replicas: whatever happens to the replica that gives it, and at whichever token, the client's
//! bytes are those of an undisturbed run.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::client;
use crate::fleet::{self, Fleet, events};
use crate::relay::Fault;
use crate::replica;

const CHAT: &str = "/v1/chat/completions";
const TOKENS: usize = 64;
/// Streams at one time.
const BESIDE: usize = 8;
/// Short, so that a silent stream is soon given up; a busy machine's own pauses only cost a needless continuation.
const ARGUMENTS: [&str; 2] = ["--silence-timeout", "1500"];

fn chat(extra: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": TOKENS,
        "stream_options": {"include_usage": true},
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn greedy() -> Value {
    chat(json!({"temperature": 0, "ignore_eos": true}))
}

fn seeded() -> Value {
    chat(json!({"temperature": 1.1, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.3, "ignore_eos": true}))
}

fn schema() -> Value {
    let schema = json!({
        "type": "object", "required": ["places"], "additionalProperties": false,
        "properties": {"places": {"type": "array", "minItems": 12, "items": {"type": "string", "minLength": 4}}},
    });
    chat(json!({
        "seed": 3, "response_format": {"type": "json_schema", "json_schema": {"name": "places", "schema": schema}},
    }))
}

fn tool_call() -> Value {
    let parameters = json!({
        "type": "object", "required": ["text", "places"], "additionalProperties": false,
        "properties": {
            "text": {"type": "string", "minLength": 60},
            "places": {"type": "array", "minItems": 8, "items": {"type": "string"}},
        },
    });
    chat(json!({
        "seed": 5, "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "write_down", "parameters": parameters}}],
    }))
}

fn logprobs() -> Value {
    chat(json!({"seed": 9, "logprobs": true, "top_logprobs": 3, "ignore_eos": true}))
}

/// Breaks the answer behind each of its events, several streams at a time, each in another way; `turn` moves the ways,
/// so that over all tests every place breaks in every way.
fn check_every_place(path: &str, turn: usize, body: Value) {
    let fleet = fleet::start(2, &ARGUMENTS);
    let undisturbed = events(fleet.replicas[0].address, path, &body);
    assert_eq!(undisturbed.last().map(String::as_str), Some("data: [DONE]"));
    assert!(undisturbed.len() > TOKENS / 2, "too short to say anything: {undisturbed:?}");
    assert!(undisturbed[undisturbed.len() - 2].contains(&format!("\"completion_tokens\":{TOKENS}")));
    assert_eq!(events(fleet.gateway.address, path, &body), undisturbed, "before any fault");
    // Each takes the next place when it has done its own: one that waits out a silence holds no other up.
    let next = AtomicUsize::new(0);
    let check = || {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            if place >= undisturbed.len() {
                return;
            }
            check_place(&fleet, path, &body, &undisturbed, place, turn);
        }
    };
    thread::scope(|scope| (0..BESIDE).for_each(|_| drop(scope.spawn(check))));
}

fn check_place(fleet: &Fleet, path: &str, body: &Value, undisturbed: &[String], place: usize, turn: usize) {
    let fault = Fault::ALL[(place + turn) % Fault::ALL.len()];
    // Every other stream breaks a second time, three events later.
    let again = if place.is_multiple_of(2) { ",cut:3" } else { "" };
    let user = format!("{path} {place}#{}:{place}{again}", fault.name());
    let mut body = body.clone();
    body["user"] = json!(user);
    let got = events(fleet.gateway.address, path, &body);
    assert!(fleet.faults.suffered(&user) > 0, "{user}: nothing was broken");
    for (i, (got, expected)) in got.iter().zip(undisturbed).enumerate() {
        assert_eq!(got, expected, "{user}: event {i}");
    }
    assert_eq!(got.len(), undisturbed.len(), "{user}");
}

#[test]
fn a_greedy_answer_survives_at_every_token() {
    check_every_place(CHAT, 0, greedy());
}

#[test]
fn a_sampled_answer_survives_at_every_token() {
    check_every_place(CHAT, 1, seeded());
}

#[test]
fn an_answer_under_a_schema_survives_at_every_token() {
    check_every_place(CHAT, 2, schema());
}

#[test]
fn a_tool_call_survives_at_every_token() {
    check_every_place(CHAT, 3, tool_call());
}

#[test]
fn logprobs_survive_at_every_token() {
    check_every_place(CHAT, 4, logprobs());
}

#[test]
fn a_completion_with_echo_survives_at_every_token() {
    let body = json!({
        "prompt": "Once upon a time", "max_tokens": TOKENS, "seed": 4, "logprobs": 2, "echo": true,
        "ignore_eos": true, "stream_options": {"include_usage": true},
    });
    check_every_place("/v1/completions", 2, body);
}

/// Several choices in one stream: each is whole, whatever the order among them.
#[test]
fn several_choices_survive() {
    let fleet = fleet::start(2, &ARGUMENTS);
    let mut body = seeded();
    body["n"] = json!(3);
    body["max_tokens"] = json!(24);
    let choices = |all: &[String]| -> Vec<Vec<String>> {
        let own = |i: usize| {
            let mark = format!("\"choices\":[{{\"index\":{i},");
            all.iter().filter(|event| event.contains(&mark)).cloned().collect()
        };
        (0..3).map(own).collect()
    };
    let undisturbed = events(fleet.replicas[0].address, CHAT, &body);
    for place in (0..undisturbed.len()).step_by(7) {
        body["user"] = json!(format!("choices {place}#cut:{place}"));
        let got = events(fleet.gateway.address, CHAT, &body);
        assert_eq!(choices(&got), choices(&undisturbed), "{place}");
        assert_eq!(got[got.len() - 2..], undisturbed[undisturbed.len() - 2..], "{place}: usage");
    }
}

/// A client that wants the answer as a whole doesn't notice either.
#[test]
fn whole_answers_are_what_a_replica_would_have_sent() {
    let fleet = fleet::start(2, &ARGUMENTS);
    for (i, mut body) in [greedy(), seeded(), schema(), tool_call(), logprobs()].into_iter().enumerate() {
        body.as_object_mut().unwrap().remove("stream_options");
        let plain = |response: client::Response| {
            assert_eq!(response.status, 200, "{}", response.text());
            fleet::plain(&format!("data: {}\n\n", response.text()))
        };
        let expected = plain(fleet.replicas[0].post(CHAT, &body));
        for place in [0, 1, 20, 60] {
            body["user"] = json!(format!("whole {i} {place}#half:{place},noise:2"));
            let got = plain(client::post(fleet.gateway.address, CHAT, &body).unwrap());
            assert_eq!(got, expected, "{i}, {place}");
        }
    }
}

/// Real processes: killed, and stopped so that they hang.
#[test]
fn real_kills_and_hangs_are_not_noticed() {
    let mut fleet = fleet::start(2, &ARGUMENTS);
    let cases =
        [(greedy(), 20, "KILL"), (tool_call(), 40, "KILL"), (schema(), 3, "STOP"), (logprobs(), 63, "KILL")];
    for (body, place, signal) in cases {
        let undisturbed = events(fleet.replicas[0].address, CHAT, &body);
        let mut stream = client::stream(fleet.gateway.address, CHAT, &body).unwrap();
        let mut text = String::new();
        for _ in 0..place {
            text += &stream.event().unwrap();
        }
        let serving =
            fleet.replicas.iter().position(|r| r.metric("consort_running") > 0.0).expect("one that runs it");
        fleet.replicas[serving].signal(signal);
        while !text.ends_with("data: [DONE]\n\n") {
            text += &stream.event().unwrap();
        }
        assert_eq!(fleet::plain(&text), undisturbed, "{signal} at {place}");
        // The fleet heals: a new process at the old address is taken in again.
        let address = fleet.replicas[serving].address;
        fleet.replicas[serving].signal("KILL");
        fleet.replicas[serving].wait();
        let held = fleet.replicas[serving].take_machine();
        fleet.replicas[serving] = replica::start_at(address, &fleet::ARGUMENTS);
        fleet.replicas[serving].give_machine(held);
    }
}

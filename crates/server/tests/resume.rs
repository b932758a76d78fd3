//! An answer taken over by another replica: for every place it may have broken at, the two parts are the whole.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::sync::Arc;

use consort_inference::{Engine, EngineOptions, HashRunner};
use consort_server::{Generate, Options};
use serde_json::{Value, json};
use support::*;

/// The events of a stream as they went over the wire, `[DONE]` included.
fn raw_events(server: &Server, path: &str, body: &Value) -> Vec<String> {
    let response = server.post(path, body);
    assert_eq!(response.status, 200, "{}", response.text());
    response.text().split_inclusive("\n\n").map(str::to_owned).collect()
}

fn token_ids(event: &str) -> Vec<u64> {
    let json: Value = match event.strip_prefix("data: ").map(str::trim_end) {
        None | Some("[DONE]") => return Vec::new(),
        Some(text) => serde_json::from_str(text).unwrap(),
    };
    let ids = json["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
    ids.iter().map(|id| id.as_u64().unwrap()).collect()
}

fn text(events: &[String]) -> String {
    let body: String = events.iter().filter(|e| !e.contains("[DONE]")).cloned().collect();
    streamed_text(&parse_events(&body), 0)
}

/// Breaks the answer after every chunk that carries ids, and between any two tokens.
fn check(server: &Server, path: &str, body: Value) {
    let resume = json!({"id": "chatcmpl-fixed", "created": 1_700_000_000});
    let body = merge(body, json!({"stream": true, "return_token_ids": true, "consort": resume}));
    let whole = raw_events(server, path, &body);
    let go_on = |emitted: &[u64]| {
        let mut body = body.clone();
        body["consort"]["emitted_token_ids"] = json!(emitted);
        raw_events(server, path, &body)
    };
    // A client that has the chunk with the reason has the whole answer.
    let last = whole.iter().position(|event| event.contains("\"finish_reason\":\"")).unwrap();
    let mut emitted = Vec::new();
    for (i, event) in whole[..last].iter().enumerate() {
        let new = token_ids(event);
        // Between chunks: the bytes are the same.
        if !new.is_empty() {
            emitted.extend(new);
            assert_eq!(go_on(&emitted), whole[i + 1..], "after {} ids", emitted.len());
        }
    }
    assert!(emitted.len() > 5, "too short to say anything: {whole:?}");
    // At any token, also within a character, a stop string or a call: no text is lost or said twice.
    let text_before = |count: usize| -> String {
        let mut seen = 0;
        let upto = whole[..last].iter().take_while(|event| {
            seen += token_ids(event).len();
            seen <= count
        });
        text(&upto.cloned().collect::<Vec<_>>())
    };
    for count in 1..=emitted.len() {
        let both = text_before(count) + &text(&go_on(&emitted[..count]));
        assert_eq!(both, text(&whole), "after {count} ids");
    }
}

#[test]
fn a_scripted_answer_goes_on_at_every_token() {
    let said = "Grüße 😀 ST STO <tool_call> and\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"é\"}}\n</tool_call> STOP never";
    for template in [PLAIN_TEMPLATE, TOOL_TEMPLATE] {
        let server = Server::with(Scripted::always(Script::say(said)), template, Options::default());
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let usage = json!({"include_usage": true});
        for extra in [
            json!({}),
            json!({"stop": ["STOP"]}),
            json!({"max_tokens": 30, "stream_options": usage}),
            json!({"logprobs": true, "top_logprobs": 2, "stop": ["STOP"]}),
            json!({"tools": tools, "stream_options": usage}),
            json!({"tools": tools, "stop": ["STOP"], "logprobs": true}),
        ] {
            check(&server, "/v1/chat/completions", merge(chat_body(json!({"seed": 1})), extra));
        }
    }
}

fn hash_engine() -> impl Generate {
    let options =
        EngineOptions { max_running: 4, max_queued: 8, step_tokens: 16, ..EngineOptions::default() };
    Engine::start_runner(HashRunner::new(VOCAB, 512, 64), Some(tokenizer()), options).unwrap()
}

#[test]
fn an_engines_answer_goes_on_at_every_token() {
    let server = Server::start(hash_engine());
    for extra in [
        json!({"temperature": 0, "max_tokens": 40}),
        json!({"seed": 11, "max_tokens": 40, "temperature": 1.5, "top_p": 0.9, "frequency_penalty": 0.5}),
        json!({"seed": 12, "max_tokens": 40, "logprobs": 2, "repetition_penalty": 1.2, "ignore_eos": true}),
    ] {
        check(&server, "/v1/completions", merge(json!({"prompt": "Once upon"}), extra));
    }
}

#[test]
fn several_choices_go_on_each_from_its_own_place() {
    let server = Server::start(hash_engine());
    let body = json!({
        "prompt": ["Once upon", "a time"], "n": 2, "seed": 5, "max_tokens": 24, "temperature": 1.2, "logprobs": 1,
        "echo": true, "stream": true, "return_token_ids": true, "stream_options": {"include_usage": true},
        "consort": {"id": "cmpl-fixed", "created": 1_700_000_000},
    });
    let whole = raw_events(&server, "/v1/completions", &body);
    let choice = |event: &String| -> Option<usize> {
        let json: Value = serde_json::from_str(event.strip_prefix("data: ")?.trim_end()).ok()?;
        Some(json["choices"][0]["index"].as_u64()? as usize)
    };
    // Choice `i` had `3 i` of its events when the replica died; choice 0 none.
    let mut body = body.clone();
    let own: Vec<Vec<&String>> =
        (0..4).map(|i| whole.iter().filter(|event| choice(event) == Some(i)).collect()).collect();
    body["consort"]["choices"] = (0..4)
        .map(|i| own[i][..3 * i].iter().flat_map(|event| token_ids(event)).collect::<Vec<_>>())
        .map(|ids| json!(ids))
        .collect();
    let rest = raw_events(&server, "/v1/completions", &body);
    for i in 0..4 {
        let theirs: Vec<&String> = rest.iter().filter(|event| choice(event) == Some(i)).collect();
        assert_eq!(theirs, own[i][3 * i..], "choice {i}");
    }
    let usage = |events: &[String]| events[events.len() - 2].clone();
    assert!(usage(&whole).contains("\"completion_tokens\":96"), "{}", usage(&whole));
    assert_eq!(usage(&rest), usage(&whole));
    body["consort"]["choices"] = json!([[1], [2]]);
    let error = server.post("/v1/completions", &body);
    assert_eq!(error.status, 400);
    assert!(error.text().contains("this request has 4 choices"), "{}", error.text());
}

#[test]
fn an_answer_that_was_complete_is_only_ended() {
    let engine = Scripted::always(Script::say("abc STOP"));
    let server = Server::start(Arc::clone(&engine));
    let go_on = |emitted: &str, extra: Value| {
        let resume = json!({"seed": 1, "consort": {"emitted_token_ids": ids(emitted)}});
        server.chat(merge(resume, extra)).ok()["choices"][0].clone()
    };
    assert_eq!(go_on("abc STOP", json!({"stop": "STOP"}))["finish_reason"], "stop");
    let choice = go_on("abc", json!({"max_tokens": 3}));
    assert_eq!(
        (choice["finish_reason"].as_str(), choice["message"]["content"].as_str()),
        (Some("length"), Some(""))
    );
    assert!(engine.requests.lock().unwrap().is_empty(), "nothing was left to compute");
}

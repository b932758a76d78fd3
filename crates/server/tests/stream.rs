//! Streams: their shape, text that spans tokens, calls as they come, silence.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::time::Duration;

use consort_inference::request::Grammar;
use consort_server::{Options, Replica};
use serde_json::{Value, json};
use support::*;

#[test]
fn a_stream_begins_with_the_role_and_ends_with_the_reason() {
    let server = Server::start(Scripted::always(Script::say("Hey")));
    let events = server.chat(json!({"stream": true, "stream_options": {"include_usage": true}})).events();
    let first = &events[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["system_fingerprint"], "fp_scripted");
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let deltas: Vec<&Value> = events[1..4].iter().map(|e| &e["choices"][0]["delta"]).collect();
    assert_eq!(deltas, [&json!({"content": "H"}), &json!({"content": "e"}), &json!({"content": "y"})]);
    assert_eq!(
        events[4]["choices"][0],
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"})
    );
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 4);
    assert_eq!(events.len(), 6);
    for event in &events {
        assert_eq!(event["id"], first["id"]);
        assert_eq!(event["created"], first["created"]);
        assert_eq!(event["model"], "scripted");
        assert!(event.as_object().unwrap().contains_key("usage"), "null until the last");
    }
    let events = server.chat(json!({"stream": true})).events();
    assert!(events.iter().all(|e| e.get("usage").is_none()), "not asked for");
}

#[test]
fn whole_and_streamed_answers_are_equal() {
    let server =
        Server::start(Scripted::new(|r| Script::say(&format!("Grüße, 😀 {}!", r.sampling.seed % 7))));
    for extra in [
        json!({}),
        json!({"n": 3}),
        json!({"stop": "😀"}),
        json!({"max_tokens": 4}),
        json!({"logprobs": true}),
    ] {
        let base = merge(json!({"seed": 3, "return_token_ids": true}), extra);
        let whole = server.chat(base.clone()).ok();
        let events = server.chat(merge(base, json!({"stream": true}))).events();
        for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let of_choice = || {
                events.iter().map(|e| &e["choices"][0]).filter(move |c| c["index"].as_u64() == Some(i as u64))
            };
            assert_eq!(streamed_text(&events, i as u64), choice["message"]["content"]);
            let ids: Vec<Value> =
                of_choice().filter_map(|c| c["token_ids"].as_array().cloned()).flatten().collect();
            assert_eq!(json!(ids), choice["token_ids"]);
            assert_eq!(of_choice().next_back().unwrap()["finish_reason"], choice["finish_reason"]);
            let logprobs: Vec<Value> =
                of_choice().filter_map(|c| c["logprobs"]["content"].as_array().cloned()).flatten().collect();
            if !choice["logprobs"].is_null() {
                assert_eq!(json!(logprobs), choice["logprobs"]["content"]);
            }
        }
    }
}

#[test]
fn characters_that_span_tokens_come_out_whole() {
    let server = Server::start(Scripted::always(Script::say("a😀é")));
    let events = server.chat(json!({"stream": true})).events();
    let contents: Vec<&str> =
        events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(contents, ["", "a", "😀", "é"]);
    // One that is never finished says so, at the end.
    let server = Server::start(Scripted::always(Script::Say(vec![97, 0xF0, 0x9F])));
    assert_eq!(server.chat(json!({})).ok()["choices"][0]["message"]["content"], "a\u{FFFD}");
}

#[test]
fn stop_strings_that_span_tokens_are_cut_and_cancel_the_rest() {
    let engine = Scripted::always(Script::Hang(ids("one END two")));
    let server = Server::start(engine.clone());
    let answer = server.chat(json!({"stop": ["END"], "logprobs": true})).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "one ");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(
        choice["logprobs"]["content"].as_array().unwrap().len(),
        4,
        "the stop's tokens are no part of it"
    );
    assert_eq!(answer["usage"]["completion_tokens"], 7, "but they were generated");
    engine.wait_idle();
    let events = server.chat(json!({"stop": "END", "stream": true})).events();
    assert_eq!(streamed_text(&events, 0), "one ");
    engine.wait_idle();
    // What only looked like a stop comes out.
    let server = Server::start(Scripted::always(Script::say("an E, an EN")));
    assert_eq!(server.chat(json!({"stop": "END"})).ok()["choices"][0]["message"]["content"], "an E, an EN");
}

#[test]
fn silence_is_filled_with_comments() {
    let options = Options { keep_alive: Duration::from_millis(20), ..Options::default() };
    let server = Server::with(Scripted::always(Script::Hang(vec![])), PLAIN_TEMPLATE, options);
    let mut stream = server.open("/v1/chat/completions", &chat_body(json!({"stream": true})));
    for _ in 0..3 {
        assert_eq!(read_chunk(&mut stream).unwrap(), b": keep-alive\n\n");
    }
}

fn tools() -> Value {
    let function = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    json!([function("weather"), function("time")])
}

/// The text of the last prompt.
fn shown(server: &Server, engine: &Scripted) -> String {
    server.post("/detokenize", &json!({"tokens": engine.last_request().prompt})).ok()["prompt"].to_string()
}

const CALLS: &str = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";

#[test]
fn calls_are_read_out_of_whole_and_streamed_answers() {
    for template in [TOOL_TEMPLATE, PLAIN_TEMPLATE] {
        let engine = Scripted::always(Script::say(CALLS));
        let server = Server::with(engine.clone(), template, Options::default());
        let answer = server.chat(json!({"tools": tools()})).ok();
        let prompt = shown(&server, &engine);
        assert!(
            prompt.contains("weather") && prompt.contains("city"),
            "the model is shown the tools: {prompt}"
        );
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!(choice["message"]["content"], "Let me see.");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": "{\"city\": \"Zürich\"}"}));
        assert_eq!(calls[1]["function"], json!({"name": "time", "arguments": "{}"}));
        assert_ne!(calls[0]["id"], calls[1]["id"]);

        let events = server.chat(json!({"tools": tools(), "stream": true})).events();
        let mut arguments = [String::new(), String::new()];
        let mut names = Vec::new();
        for delta in events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array()).flatten()
        {
            let index = delta["index"].as_u64().unwrap() as usize;
            if let Some(name) = delta["function"]["name"].as_str() {
                assert!(delta["id"].is_string() && delta["type"] == "function");
                names.push(name.to_owned());
            }
            arguments[index].push_str(delta["function"]["arguments"].as_str().unwrap_or_default());
        }
        assert_eq!(names, ["weather", "time"]);
        assert_eq!(arguments, ["{\"city\": \"Zürich\"}", "{}"]);
        assert_eq!(streamed_text(&events, 0), "Let me see.");
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

        // One call, where only one is allowed; no calls, where none are.
        let answer = server.chat(json!({"tools": tools(), "parallel_tool_calls": false})).ok();
        assert_eq!(answer["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
        let answer = server.chat(json!({"tools": tools(), "tool_choice": "none"})).ok();
        assert_eq!(answer["choices"][0]["message"]["content"], CALLS);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn a_special_token_can_announce_calls() {
    let template = PLAIN_TEMPLATE.to_owned() + "{% if tools %}[TOOL_CALLS]{% endif %}";
    let mut script = vec![TOOL_CALLS];
    script.extend(ids("[{\"name\": \"time\", \"arguments\": {}}]"));
    let server = Server::with(Scripted::always(Script::Say(script)), &template, Options::default());
    let answer = server.chat(json!({"tools": tools()})).ok();
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "time");
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
}

/// In some models the tags around a call are special tokens, which have no text of their own. The closing one must be
/// read too: unread, the next call's opening would look like text among calls.
#[test]
fn special_tokens_can_open_and_close_calls() {
    let (open, close) = (VOCAB as u32, VOCAB as u32 + 1);
    let call = ids("{\"name\": \"time\", \"arguments\": {}}");
    let one = [&[open][..], &call, &[close]].concat();
    let script = [&one[..], &ids("\n"), &one, &ids(" Done.")].concat();
    let replica = Replica {
        tokenizer: tokenizer_with(&["<tool_call>", "</tool_call>"]),
        ..replica(Scripted::always(Script::Say(script)), TOOL_TEMPLATE)
    };
    let server = Server::serve(replica, Options::default());
    let answer = server.chat(json!({"tools": tools()})).ok();
    let message = &answer["choices"][0]["message"];
    let names: Vec<_> =
        message["tool_calls"].as_array().unwrap().iter().map(|c| &c["function"]["name"]).collect();
    assert_eq!(names, ["time", "time"]);
    assert_eq!(message["content"], " Done.");
}

#[test]
fn enforced_calls_follow_a_grammar() {
    let engine = Scripted::always(Script::say("{\"name\": \"time\", \"arguments\": {\"city\": \"Bern\"}}"));
    let server = Server::start(engine.clone());
    let named = json!({"type": "function", "function": {"name": "time"}});
    for choice in [json!("required"), named] {
        let answer = server.chat(json!({"tools": tools(), "tool_choice": choice})).ok();
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(call, &json!({"name": "time", "arguments": "{\"city\": \"Bern\"}"}));
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
        let Some(Grammar::Lark(lark)) = engine.last_request().grammar else { panic!("no grammar") };
        assert!(lark.contains("time"));
        assert_eq!(lark.contains("weather"), choice == "required", "{lark}");
    }
}

#[test]
fn a_conversation_with_calls_and_results_reaches_the_template() {
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "Rain."},
    ]);
    let shown = |template: &str| {
        let engine = Scripted::always(Script::say("ok"));
        let server = Server::with(engine.clone(), template, Options::default());
        server.chat(json!({"messages": messages, "tools": tools()})).ok();
        shown(&server, &engine)
    };
    assert!(shown(TOOL_TEMPLATE).contains("Bern"));
    let plain = shown(PLAIN_TEMPLATE);
    assert!(plain.contains("<tool_call>") && plain.contains("<tool_response>"), "{plain}");
}

//! An answer that breaks after any of its tokens and goes on elsewhere is the answer that never broke: over HTTP, on
//! the real model, for every kind of answer whose state a continuation has to rebuild.

use serde_json::{Value, json};

use crate::client;
use crate::replica::{Replica, chat, serve};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: usize = 40;
/// Continuations asked for at the same time: they keep each other company, which is part of what is tested.
const TOGETHER: usize = 8;

/// What must not differ, gathered over the chunks of an answer or of its two parts.
#[derive(Debug, Default, PartialEq)]
struct Told {
    text: String,
    /// Name and arguments of each call, and the id of those that began.
    calls: Vec<(String, String, String)>,
    ids: Vec<u64>,
    /// Each token's entry, as it was written.
    logprobs: Vec<String>,
    finish: Option<String>,
}

impl Told {
    fn add(&mut self, event: &Value) {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        self.text += delta["content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let at = call["index"].as_u64().unwrap() as usize;
            if self.calls.len() <= at {
                self.calls.resize(at + 1, Default::default());
            }
            let (id, name, arguments) = &mut self.calls[at];
            *id += call["id"].as_str().unwrap_or_default();
            *name += call["function"]["name"].as_str().unwrap_or_default();
            *arguments += call["function"]["arguments"].as_str().unwrap_or_default();
        }
        self.ids.extend(choice["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        let logprobs = choice["logprobs"]["content"].as_array().into_iter().flatten();
        self.logprobs.extend(logprobs.map(Value::to_string));
        if let Some(reason) = choice["finish_reason"].as_str() {
            assert!(self.finish.is_none(), "two ends");
            self.finish = Some(reason.to_owned());
        }
    }
}

fn stream(replica: &Replica, body: &Value) -> Vec<Value> {
    let events = client::stream(replica.address, CHAT, body).unwrap();
    assert_eq!(events.status, 200);
    events.all().unwrap()
}

/// Breaks the answer after each of its chunks, and after each of its tokens.
fn check(replica: &Replica, name: &str, mut body: Value) -> Told {
    body["return_token_ids"] = json!(true);
    body["consort"] = json!({"id": "chatcmpl-0123", "created": 1_700_000_000});
    let events = stream(replica, &body);
    let mut whole = Told::default();
    events.iter().for_each(|event| whole.add(event));
    assert!(whole.ids.len() > 8, "{name}: too short to say anything: {whole:?}");
    let cuts: Vec<usize> = (1..whole.ids.len()).collect();
    for together in cuts.chunks(TOGETHER) {
        std::thread::scope(|scope| {
            for &cut in together {
                let (body, events, whole) = (body.clone(), &events, &whole);
                scope.spawn(move || {
                    assert_eq!(broken(replica, body, events, whole, cut), *whole, "{name}, after {cut}")
                });
            }
        });
    }
    whole
}

/// The first `cut` tokens of an answer as its reader has them, and the rest as the replica then goes on.
fn broken(replica: &Replica, mut body: Value, events: &[Value], whole: &Told, cut: usize) -> Told {
    body["consort"]["emitted_token_ids"] = json!(whole.ids[..cut]);
    let mut both = Told::default();
    // A chunk goes out with the token that releases its text: who has just these ids has just these chunks.
    for event in events {
        let more = event["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        if both.ids.len() + more > cut || event["choices"][0]["finish_reason"].is_string() {
            break;
        }
        both.add(event);
    }
    let had = both.ids.len();
    both.ids.extend(&whole.ids[had..cut]);
    both.logprobs.extend(whole.logprobs.iter().take(cut).skip(had).cloned());
    stream(replica, &body).iter().for_each(|event| both.add(event));
    both
}

#[test]
fn an_answer_goes_on_at_every_token() {
    let replica = serve(&[]);
    let ask = "Write about the wind and the sea, with an é and a 😀 in it.";
    let with = |extra: Value| {
        let mut body = chat(ask, TOKENS);
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        body
    };
    let told = check(&replica, "greedy", with(json!({})));
    let sampled = json!({"temperature": 1.1, "seed": 5, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.5,
        "frequency_penalty": 0.4, "repetition_penalty": 1.1, "logit_bias": {"28": -2, "260": 1}});
    check(&replica, "sampled", with(sampled));
    let logprobs = check(
        &replica,
        "logprobs",
        with(json!({"temperature": 0.9, "seed": 6, "logprobs": true, "top_logprobs": 3})),
    );
    assert_eq!(logprobs.logprobs.len(), TOKENS);
    // Text is held back for a stop string that comes, and for one that doesn't.
    let stop: String = told.text.chars().skip(told.text.chars().count() / 2).take(6).collect();
    let stopped = check(&replica, "stopped", with(json!({"stop": [stop, "sea?"]})));
    assert_eq!((stopped.finish.as_deref(), told.text.starts_with(&stopped.text)), (Some("stop"), true));

    let schema = json!({"type": "object", "properties": {"wind": {"type": "string", "maxLength": 20},
        "knots": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 1}, "minItems": 2, "maxItems": 2}},
        "required": ["wind", "knots"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "wind", "schema": schema}});
    let tools = json!([{"type": "function", "function": {"name": "set_sail", "parameters": schema}}]);
    let free = json!({"temperature": 1, "seed": 8, "max_tokens": 80, "ignore_eos": false});
    let both = |extra: Value| {
        let mut body = with(free.clone());
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let json = check(&replica, "schema", both(json!({"response_format": format})));
    assert!(serde_json::from_str::<Value>(&json.text).unwrap()["knots"].is_array());
    let called = check(
        &replica,
        "call",
        both(json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false})),
    );
    assert_eq!((called.finish.as_deref(), called.calls[0].1.as_str()), (Some("tool_calls"), "set_sail"));
    check(&replica, "calls or schema", both(json!({"tools": tools, "response_format": format})));
}

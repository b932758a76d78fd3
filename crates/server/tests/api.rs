//! The API's shapes: every endpoint, whole answers, errors.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::time::Duration;

use consort_inference::request::Grammar;
use consort_inference::{FinishReason, SubmitError};
use consort_server::{ApiKey, Options, ServeError, Slot};
use serde_json::{Value, json};
use support::*;

#[test]
fn a_chat_is_answered() {
    let engine = Scripted::always(Script::say("Hello!"));
    let server = Server::start(engine.clone());
    let response = server.chat(json!({"seed": 5, "temperature": 0.5, "max_tokens": 40}));
    let answer = response.ok();
    assert_eq!(response.header("x-seed"), Some("5"));
    assert!(response.header("x-request-id").unwrap().starts_with("req-"));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "scripted");
    assert_eq!(answer["system_fingerprint"], "fp_scripted");
    let choice = json!({"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(answer["choices"], json!([choice]));
    let request = engine.last_request();
    let usage = json!({"prompt_tokens": request.prompt.len(), "completion_tokens": 7, "total_tokens": request.prompt.len() + 7,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
    assert_eq!(request.prompt[0], IM_START, "the template's special tokens are tokens");
    assert_eq!(request.sampling.seed, 5);
    assert_eq!(request.sampling.temperature, 0.5);
    assert_eq!(request.max_tokens, 40);
    assert_eq!(request.end_tokens, [IM_END]);
    assert!(request.deadline.is_some());
}

#[test]
fn special_tokens_in_what_a_person_says_stay_text() {
    let engine = Scripted::always(Script::say("ok"));
    let server = Server::start(engine.clone());
    server.chat(json!({"messages": [{"role": "user", "content": "a<|im_end|>b"}]})).ok();
    let ends = engine.last_request().prompt.iter().filter(|id| **id == IM_END).count();
    assert_eq!(ends, 1, "the template's own");
    server.complete(json!({"prompt": "<|im_end|>"})).ok();
    assert_eq!(engine.last_request().prompt, ids("<|im_end|>"));
}

#[test]
fn every_sampling_parameter_reaches_the_engine() {
    let engine = Scripted::always(Script::say("ok"));
    let server = Server::start(engine.clone());
    server
        .chat(json!({"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "presence_penalty": -1,
            "frequency_penalty": 1.5, "repetition_penalty": 1.25, "logit_bias": {"12": -100, "3": 2}, "seed": -1,
            "ignore_eos": true, "logprobs": true, "top_logprobs": 2, "max_completion_tokens": 9}))
        .ok();
    let request = engine.last_request();
    let s = &request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.25, 0.5, 7, 0.125));
    assert_eq!((s.presence_penalty, s.frequency_penalty, s.repetition_penalty), (-1.0, 1.5, 1.25));
    assert_eq!(s.logit_bias, [(3, 2.0), (12, -100.0)]);
    assert_eq!(s.seed, u64::MAX);
    assert!(request.ignore_end && request.end_tokens.is_empty());
    assert_eq!((request.logprobs, request.max_tokens), (Some(2), 9));
    server.chat(json!({"stop_token_ids": [65], "ignore_eos": true})).ok();
    let request = engine.last_request();
    assert_eq!((request.end_tokens.as_slice(), request.ignore_end), ([65].as_slice(), false));
    server.chat(json!({})).ok();
    let (a, b) = (engine.last_request(), server.chat(json!({})));
    assert_eq!((a.sampling.temperature, a.sampling.top_p), (1.0, 1.0), "OpenAI's defaults");
    assert_ne!(
        b.header("x-seed").unwrap(),
        a.sampling.seed.to_string(),
        "a request without a seed gets its own"
    );
    assert_eq!(a.max_tokens, 4096 - a.prompt.len(), "what the context holds");
}

#[test]
fn response_formats_become_grammars() {
    let engine = Scripted::always(Script::say("{}"));
    let server = Server::start(engine.clone());
    server.chat(json!({"response_format": {"type": "json_object"}})).ok();
    assert_eq!(engine.last_request().grammar, Some(Grammar::JsonObject));
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
    server.chat(json!({"response_format": format})).ok();
    assert_eq!(engine.last_request().grammar, Some(Grammar::JsonSchema(schema)));
    server.chat(json!({"response_format": {"type": "text"}})).ok();
    assert_eq!(engine.last_request().grammar, None);
}

/// Fields of a chat, and the parameter that the refusal names.
#[test]
fn what_a_chat_cannot_obey_is_refused_by_name() {
    let server = Server::start(Scripted::always(Script::say("never")));
    let tool = json!({"type": "function", "function": {"name": "f"}});
    for (extra, param) in [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -3}), "max_tokens"),
        (json!({"max_tokens": 5000}), "max_tokens"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "max_tokens"),
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": []}), "functions"),
        (json!({"function_call": "auto"}), "function_call"),
        (json!({"audio": {}}), "audio"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"prediction": {}}), "prediction"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
        (json!({"verbosity": "low"}), "verbosity"),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"store": true}), "store"),
        (json!({"service_tier": "flex"}), "service_tier"),
        (json!({"echo": true}), "echo"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"prompt": "x"}), "prompt"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
        (json!({"chat_template_kwargs": {"tools": []}}), "chat_template_kwargs.tools"),
    ] {
        let response = server.chat(extra.clone());
        assert_eq!(response.status, 400, "{extra}");
        assert_eq!(response.error().0.as_deref(), Some(param), "{extra}");
    }
    // And what changes nothing is taken.
    for extra in [
        json!({"user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "modalities": ["text"]}),
        json!({"model": "scripted"}),
        json!({"model": "other-name"}),
        json!({"audio": null, "stop": null, "tools": null, "logit_bias": null, "n": null, "stream": null}),
        json!({"tools": [tool], "response_format": {"type": "json_object"}}),
    ] {
        server.chat(extra).ok();
    }
}

#[test]
fn numbers_in_the_refusal_of_a_long_answer_are_clear() {
    let server = Server::start(Scripted::always(Script::say("never")));
    let (_, code, message) = server.chat(json!({"max_tokens": 5000})).error();
    assert_eq!(code, "context_length_exceeded");
    assert!(message.contains("5000") && message.contains("4096"), "{message}");
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(20_000)}]});
    let (param, code, message) = server.chat(long).error();
    assert_eq!((param.as_deref(), code.as_str()), (Some("messages"), "context_length_exceeded"));
    assert!(message.contains("4096"), "{message}");
}

#[test]
fn n_answers_come_with_seeds_of_their_own() {
    let engine = Scripted::new(|request| Script::say(&format!("seed {}", request.sampling.seed)));
    let server = Server::start(engine.clone());
    let one = server.chat(json!({"seed": 9})).ok();
    let answer = server.chat(json!({"seed": 9, "n": 3})).ok();
    let texts: Vec<&Value> =
        answer["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!(texts.len(), 3);
    assert_eq!(texts[0], &one["choices"][0]["message"]["content"], "n adds answers and changes none");
    assert_ne!(texts[1], texts[2]);
    assert_eq!(answer["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"], "a prompt counts once");
}

#[test]
fn logprobs_come_with_bytes_and_alternatives() {
    let server = Server::start(Scripted::always(Script::say("aé")));
    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 2})).ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3, "one entry a token, the end token not among them");
    assert_eq!(content[0]["token"], "a");
    assert_eq!(content[0]["bytes"], json!([97]));
    assert_eq!(content[0]["logprob"].as_f64().unwrap() as f32, fake_logprob(97));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[1]["bytes"], json!([0xC3]));
    let answer = server.complete(json!({"logprobs": 1})).ok();
    let lists = &answer["choices"][0]["logprobs"];
    assert_eq!(lists["tokens"], json!(["a", "bytes:\\xc3", "bytes:\\xa9"]));
    assert_eq!(lists["text_offset"], json!([0, 1, 2]));
    assert_eq!(lists["top_logprobs"].as_array().unwrap().len(), 3);
}

/// The answer ends at a stop string before the engine says how it ended.
#[test]
fn cached_tokens_are_counted_however_the_answer_ends() {
    let server = Server::start(Scripted::always(Script::say("one two STOP three")));
    for extra in [json!({}), json!({"stop": "STOP"}), json!({"max_tokens": 3})] {
        let body = merge(json!({"prompt": "cached", "n": 2}), extra);
        let usage = server.complete(body.clone()).ok()["usage"].clone();
        assert_eq!(usage["prompt_tokens_details"], json!({"cached_tokens": 5}), "{body}");
        let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
        let events = server.complete(merge(body, stream)).events();
        assert_eq!(events.last().unwrap()["usage"], usage, "and the same in a stream");
    }
}

#[test]
fn completions_take_four_kinds_of_prompt() {
    let engine = Scripted::new(|request| Script::say(&format!("<{}>", request.prompt.len())));
    let server = Server::start(engine.clone());
    let texts = |prompt: Value| -> Vec<String> {
        let answer = server.complete(json!({"prompt": prompt, "n": 2})).ok();
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(json!("abc")), ["<3>", "<3>"]);
    assert_eq!(texts(json!(["abc", "de"])), ["<3>", "<3>", "<2>", "<2>"]);
    assert_eq!(texts(json!([1, 2, 3, 4])), ["<4>", "<4>"]);
    assert_eq!(texts(json!([[1], [1, 2]])), ["<1>", "<1>", "<2>", "<2>"]);
    let answer = server.complete(json!({"prompt": ["abc", "de"]})).ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 5);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(engine.last_request().max_tokens, 16, "OpenAI's default");
}

#[test]
fn echo_repeats_the_prompt_and_scores_it() {
    let engine = Scripted::always(Script::say("yz"));
    let server = Server::start(engine.clone());
    let answer = server.complete(json!({"prompt": "Hé", "echo": true, "logprobs": 0, "max_tokens": 2})).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "Héyz");
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(choice["logprobs"]["token_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 2, 3]));
    assert_eq!(choice["finish_reason"], "length");
    // Scoring alone.
    let answer =
        server.complete(json!({"prompt": [72, 105], "echo": true, "logprobs": 0, "max_tokens": 0})).ok();
    assert_eq!(answer["choices"][0]["text"], "Hi");
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(["H", "i"]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    // As a stream: the prompt first.
    let body = json!({"prompt": "Hé", "echo": true, "logprobs": 0, "max_tokens": 2, "stream": true});
    let events = server.post("/v1/completions", &body).events();
    assert_eq!(events[0]["choices"][0]["text"], "Hé");
    assert_eq!(streamed_text(&events, 0), "Héyz");
    let offsets: Vec<Value> = events
        .iter()
        .filter_map(|e| e["choices"][0]["logprobs"]["text_offset"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(json!(offsets), json!([0, 1, 2, 2, 3]));
}

#[test]
fn what_a_completion_cannot_obey_is_refused_by_name() {
    let server = Server::start(Scripted::always(Script::say("never")));
    for (extra, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": [9999]}), "prompt"),
        (json!({"prompt": [[1], [-1]]}), "prompt"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"messages": []}), "messages"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
    ] {
        let response = server.complete(extra.clone());
        assert_eq!(response.status, 400, "{extra}");
        assert_eq!(response.error().0.as_deref(), Some(param), "{extra}");
    }
    server.complete(json!({"best_of": 2, "n": 2, "suffix": ""})).ok();
}

#[test]
fn what_one_request_can_make_the_server_hold_is_bounded() {
    let server = Server::start(Scripted::always(Script::say("ok")));
    let many = vec!["x"; 20];
    let ids = |count: usize| vec![120; count];
    for (body, param) in [
        (json!({"prompt": many, "n": 16}), "n"),
        (json!({"prompt": vec![ids(4000); 64], "echo": true, "logprobs": 20, "max_tokens": 0}), "logprobs"),
        (json!({"prompt": vec!["x"; 60], "logprobs": 20, "max_tokens": 4000}), "logprobs"),
        (
            json!({"prompt": "x", "seed": 1, "max_tokens": 3, "consort": {"emitted_token_ids": ids(4)}}),
            "consort.emitted_token_ids",
        ),
        (
            json!({"prompt": "x", "seed": 1, "max_tokens": 3, "consort": {"choices": [ids(4)]}}),
            "consort.choices",
        ),
    ] {
        let response = server.complete(body);
        assert_eq!((response.status, response.error().0.as_deref()), (400, Some(param)));
    }
    // A stream keeps nothing of what it has sent.
    server
        .complete(json!({"prompt": vec!["x"; 60], "logprobs": 20, "max_tokens": 4000, "stream": true}))
        .events();
    server.complete(json!({"prompt": vec!["x"; 16], "n": 16})).ok();
}

#[test]
fn a_batch_larger_than_the_engine_takes_is_worked_off() {
    let engine = Scripted::with_capacity(3, |request| Script::say(&format!("{}", request.prompt.len())));
    let server = Server::start(engine);
    let prompts: Vec<String> = (1..=40).map(|n| "x".repeat(n)).collect();
    let answer = server.complete(json!({"prompt": prompts})).ok();
    for (i, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["text"], (i + 1).to_string());
    }
}

#[test]
fn models_tokens_health_and_metrics_answer() {
    let server = Server::start(Scripted::always(Script::say("hello")));
    let list = server.get("/v1/models").ok();
    assert_eq!(list["data"][0]["id"], "scripted");
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert_eq!(server.get("/v1/models/scripted").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/org/nothing").status, 404);
    let tokens = server.post("/tokenize", &json!({"prompt": "th<|im_end|>", "return_token_strs": true})).ok();
    assert_eq!(tokens["tokens"][0], 259);
    assert_eq!(tokens["token_strs"][0], "th");
    assert_eq!(tokens["count"], 11);
    let parsed = server.post("/tokenize", &json!({"prompt": "th<|im_end|>", "parse_special": true})).ok();
    assert_eq!(parsed["tokens"], json!([259, IM_END]));
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "Hi"}]})).ok();
    assert_eq!(chat["tokens"][0], IM_START);
    assert_eq!(server.post("/detokenize", &json!({"tokens": [259, 101, IM_END]})).ok()["prompt"], "the");
    assert_eq!(server.post("/detokenize", &json!({"tokens": [9999]})).error().0.as_deref(), Some("tokens"));
    assert_eq!(server.post("/tokenize", &json!({})).error().0.as_deref(), Some("prompt"));
    assert_eq!(server.get("/health").ok()["status"], "ok");
    assert_eq!(server.get("/ready").ok()["status"], "ready");
    server.chat(json!({})).ok();
    let metrics = server.get("/metrics").text();
    for line in [
        "consort_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "consort_requests_total{route=\"/v1/models/{*id}\",status=\"404\"} 1",
        "consort_time_to_first_token_seconds_count 1",
        "consort_inter_token_seconds_count 5",
        "consort_kv_use_ratio 0.25",
        "consort_running 0.0",
        // 14 steps of one row, 13 of two, …: see the scripted engine's numbers.
        "consort_step_rows_bucket{le=\"1.0\"} 14",
        "consort_step_rows_bucket{le=\"2.0\"} 27",
        "consort_step_rows_bucket{le=\"1024.0\"} 104",
        "consort_step_rows_bucket{le=\"+Inf\"} 105",
        "consort_step_rows_count 105",
        "consort_step_rows_sum 1234.0",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is missing in\n{metrics}");
    }
    assert!(metrics.contains("consort_build_info{version="));
    // Every series of the table in docs/api.md.
    let table = include_str!("../../../docs/api.md");
    let table = table.split_once("## Metrics").unwrap().1;
    let named: Vec<&str> = table.split('`').filter(|word| word.starts_with("consort_")).collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        let name = name.split('{').next().unwrap();
        assert!(metrics.lines().any(|l| l.starts_with(name)), "{name} is missing in\n{metrics}");
    }
    let described: Vec<&str> = metrics.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
    for line in described {
        let name = line.split(' ').next().unwrap();
        assert!(table.contains(name), "{name} is not in docs/api.md");
    }
}

#[test]
fn other_paths_and_methods_get_the_envelope() {
    let server = Server::start(Scripted::always(Script::say("x")));
    let response = server.get("/v1/nothing");
    assert_eq!((response.status, response.error().1.as_str()), (404, "not_found"));
    let response = server.get("/v1/chat/completions");
    assert_eq!((response.status, response.error().1.as_str()), (405, "method_not_allowed"));
    assert_eq!(response.header("allow"), Some("post"));
    assert_eq!(server.post("/health", &json!({})).status, 405);
    assert_eq!(server.get("/").status, 404, "no page was given");
    let response = server.get("/v1/models/%ff");
    assert_eq!((response.status, response.error().1.as_str()), (400, "invalid_value"));
    let response = server.chat(json!({"model": "gpt-5"}));
    assert_eq!(response.status, 404);
    assert_eq!(response.error().1, "model_not_found");
}

#[test]
fn the_engines_refusals_have_their_statuses() {
    let invalid = SubmitError::Invalid { field: "response_format", reason: "no such keyword".to_owned() };
    for (error, status, code, retry) in [
        (SubmitError::Busy { queued: 4, retry_after_seconds: 7 }, 429, "overloaded", Some("7")),
        (SubmitError::Draining, 503, "draining", Some("1")),
        (invalid, 400, "invalid_value", None),
        (SubmitError::Stopped, 503, "stopped", Some("5")),
    ] {
        let server = Server::start(Scripted::always(Script::Refuse(error)));
        for stream in [false, true] {
            let response = server.chat(json!({"stream": stream}));
            assert_eq!(response.status, status);
            assert_eq!(response.error().1, code);
            assert_eq!(response.header("retry-after"), retry);
        }
    }
}

#[test]
fn ends_that_are_no_answer_are_errors() {
    for (script, status, code) in [
        (Script::End(ids("ab"), FinishReason::Deadline), 504, "deadline_exceeded"),
        (Script::End(ids("ab"), FinishReason::HandedOver), 503, "handed_over"),
        (Script::Fail(ids("ab")), 500, "internal_error"),
    ] {
        let server = Server::start(Scripted::always(script));
        let response = server.chat(json!({}));
        assert_eq!((response.status, response.error().1.as_str()), (status, code));
        let text = server.chat(json!({"stream": true})).text();
        let (before, after) = text.split_once("event: error\ndata: ").unwrap();
        assert_eq!(streamed_text(&parse_events(before), 0), "ab");
        let error: Value = serde_json::from_str(after.trim_end()).unwrap();
        assert_eq!(error["error"]["code"], code, "and nothing follows");
    }
}

#[test]
fn the_timeout_header_sets_the_deadline() {
    let engine = Scripted::always(Script::say("x"));
    let server = Server::start(engine.clone());
    let body = chat_body(json!({})).to_string();
    let before = std::time::Instant::now();
    assert_eq!(
        server.request("POST", "/v1/chat/completions", "x-request-timeout-ms: 1500\r\n", &body).status,
        200
    );
    let left = engine.last_request().deadline.unwrap() - before;
    assert!(
        left <= Duration::from_millis(1500) + before.elapsed() && left > Duration::from_millis(1000),
        "{left:?}"
    );
    let response = server.request("POST", "/v1/chat/completions", "x-request-timeout-ms: soon\r\n", &body);
    assert_eq!((response.status, response.error().0.as_deref()), (400, Some("X-Request-Timeout-Ms")));
}

#[test]
fn a_key_guards_the_api() {
    let options = Options {
        api_key: Some(ApiKey::new("sk-test")),
        page: Some("<title>page</title>"),
        ..Options::default()
    };
    let server = Server::with(Scripted::always(Script::say("x")), PLAIN_TEMPLATE, options);
    let body = chat_body(json!({})).to_string();
    for (headers, status) in
        [("", 401), ("authorization: Bearer sk-wrong\r\n", 401), ("authorization: Bearer sk-test\r\n", 200)]
    {
        let response = server.request("POST", "/v1/chat/completions", headers, &body);
        assert_eq!(response.status, status, "{headers}");
        if status == 401 {
            assert_eq!(response.error().1, "invalid_api_key");
            assert_eq!(response.header("www-authenticate"), Some("bearer"));
        }
    }
    assert_eq!(server.get("/v1/nothing").status, 401);
    for open in ["/health", "/ready", "/metrics", "/"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    assert!(server.get("/").header("content-security-policy").unwrap().contains("frame-ancestors 'none'"));
}

#[test]
fn a_public_address_without_a_key_is_refused() {
    let outcome = consort_server::runtime().unwrap().block_on(async {
        let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
        consort_server::serve(listener, Slot::empty(), Options::default(), async {}).await
    });
    assert!(matches!(outcome, Err(ServeError::KeyNeeded { .. })), "{outcome:?}");
}

#[test]
fn pages_from_elsewhere_cannot_drive_it() {
    let options = Options { allowed_origins: vec!["https://app.example".to_owned()], ..Options::default() };
    let server = Server::with(Scripted::always(Script::say("x")), PLAIN_TEMPLATE, options);
    let body = chat_body(json!({})).to_string();
    let post = |headers: &str| server.request("POST", "/v1/chat/completions", headers, &body);
    assert_eq!(post("origin: https://evil.example\r\n").status, 403);
    assert_eq!(post("origin: http://localhost\r\n").status, 200);
    let allowed = post("origin: https://app.example\r\n");
    assert_eq!(
        (allowed.status, allowed.header("access-control-allow-origin")),
        (200, Some("https://app.example"))
    );
    assert_eq!(server.raw(b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n").status, 403);
    let preflight = |origin: &str| {
        server.request("OPTIONS", "/v1/chat/completions", &format!("origin: {origin}\r\n"), "")
    };
    assert_eq!(preflight("https://app.example").status, 204);
    assert_eq!(preflight("https://evil.example").status, 403);
}

#[test]
fn a_replica_whose_engine_stopped_is_live_and_not_ready() {
    let engine = Scripted::always(Script::say("ok"));
    let server = Server::start(engine.clone());
    assert_eq!(server.get("/ready").status, 200);
    engine.stopped.store(true, std::sync::atomic::Ordering::SeqCst);
    for response in [server.get("/ready"), server.chat(json!({}))] {
        assert_eq!((response.status, response.error().1.as_str()), (503, "stopped"));
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn it_is_live_before_it_is_ready_and_refuses_while_it_drains() {
    let slot = Slot::empty();
    let engine = Scripted::always(Script::Hang(ids("a")));
    let mut server = Server::serve(slot.clone(), Options { drain_budget: PATIENCE, ..Options::default() });
    assert_eq!(server.get("/health").status, 200);
    for path in ["/ready", "/v1/models"] {
        let response = server.get(path);
        assert_eq!((response.status, response.error().1.as_str()), (503, "loading"));
    }
    let response = server.chat(json!({}));
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
    slot.fill(replica(engine.clone(), PLAIN_TEMPLATE));
    assert_eq!(server.get("/ready").status, 200);

    let running = server.open("/v1/chat/completions", &chat_body(json!({"stream": true})));
    server.stop();
    wait_for("the drain to begin", || server.get("/ready").status == 503);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.chat(json!({"stream": true})).status, 503);
    drop(running);
    drop(server);
    assert_eq!(engine.running.load(std::sync::atomic::Ordering::SeqCst), 0);
}

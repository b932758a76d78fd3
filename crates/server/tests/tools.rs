//! Tools together with a response format: an answer is calls, or text in the format, and never both.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use consort_inference::grammar::GrammarEngine;
use consort_inference::request::Grammar;
use consort_inference::{Engine, EngineOptions, HashRunner};
use consort_server::Options;
use serde_json::{Value, json};
use support::*;

/// Templates that teach each of the formats.
const MARKER_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }} [TOOL_CALLS]{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}";
const BARE_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }} {\"name\": function, \"parameters\": {}}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}";

fn tools() -> Value {
    // The schema's reference points into itself, wherever it is put.
    let zone = json!({"type": "object", "properties": {"zone": {"$ref": "#/$defs/zone"}}, "required": ["zone"],
        "additionalProperties": false, "$defs": {"zone": {"enum": ["UTC", "CET"]}}});
    let add = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"], "additionalProperties": false});
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    json!([tool("get_time", zone), tool("add", add)])
}

fn format() -> Value {
    let schema = json!({"type": "object", "properties": {"n": {"$ref": "#/$defs/zone"}}, "required": ["n"],
        "additionalProperties": false, "$defs": {"zone": {"type": "integer", "minimum": 0, "maximum": 99}}});
    json!({"type": "json_schema", "json_schema": {"name": "number", "schema": schema}})
}

/// Whether a grammar takes all of `text` (`␅` stands for the special token `[TOOL_CALLS]`) and may end there.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut state = GrammarEngine::new(tokenizer()).compile(grammar).unwrap();
    let mask = state.mask().unwrap();
    eprintln!("{:?}", (0..VOCAB).filter(|i| mask[i / 32] >> (i % 32) & 1 == 1).collect::<Vec<_>>());
    let ids = text.chars().flat_map(|c| if c == '␅' { vec![TOOL_CALLS] } else { ids(&c.to_string()) });
    ids.into_iter().all(|id| state.accept(id).is_ok()) && state.can_end()
}

#[test]
fn the_grammar_is_calls_as_the_template_writes_them_or_the_format() {
    let time = r#"{"name": "get_time", "KEY": {"zone": "UTC"}}"#;
    let add = r#"{"name": "add", "KEY": {"a": 7}}"#;
    let tagged = |call: &str| format!("<tool_call>\n{call}\n</tool_call>").replace("KEY", "arguments");
    let marked = |calls: &str| format!("␅[{calls}]").replace("KEY", "arguments");
    let bare = |calls: &str| calls.replace("KEY", "parameters");
    let table = [
        (TOOL_TEMPLATE, tagged(time), [tagged(time), tagged(add)].join("\n")),
        // Taught by us, since the template knows nothing of tools.
        (PLAIN_TEMPLATE, tagged(add), [tagged(time), tagged(add)].join("\n")),
        (MARKER_TEMPLATE, marked(add), marked(&format!("{add}, {time}"))),
        (BARE_TEMPLATE, bare(add), bare(&format!("{add}\n{time}"))),
    ];
    for (template, one, two) in table {
        let engine = Scripted::always(Script::say("{\"n\": 1}"));
        let server = Server::with(engine.clone(), template, Options::default());
        for parallel in [true, false] {
            for (format, other) in [(format(), false), (json!({"type": "json_object"}), true)] {
                let fields =
                    json!({"tools": tools(), "parallel_tool_calls": parallel, "response_format": format});
                server.chat(fields).ok();
                let grammar = engine.last_request().grammar.unwrap();
                for (text, taken) in [
                    ("{\"n\": 1}", true),
                    ("{\"n\":99}", true),
                    ("{\"n\": -1}", other),
                    ("{\"na\": 1}", other),
                    (&one, true),
                    (&two, parallel && template != BARE_TEMPLATE),
                    ("Hello", false),
                    ("", false),
                    (&format!("{{\"n\": 1}}\n{one}"), false),
                    (&format!("{one}\n{{\"n\": 1}}"), false),
                    (
                        &one.replace("add", "subtract").replace("get_time", "get_date"),
                        other && template == BARE_TEMPLATE,
                    ),
                ] {
                    assert_eq!(
                        takes(&grammar, text),
                        taken,
                        "{text:?} parallel {parallel} {format} in {grammar:?}"
                    );
                }
                let wrong = one.replace("UTC", "XYZ").replace('7', "100");
                assert_eq!(takes(&grammar, &wrong), other && template == BARE_TEMPLATE, "{wrong:?}");
            }
        }
    }
}

#[test]
fn a_choice_that_leaves_no_choice_has_one_grammar() {
    let engine = Scripted::always(Script::say("{}"));
    let server = Server::with(engine.clone(), TOOL_TEMPLATE, Options::default());
    let grammar = |choice: Value| {
        server.chat(json!({"tools": tools(), "tool_choice": choice, "response_format": format()})).ok();
        engine.last_request().grammar.unwrap()
    };
    let schema = format()["json_schema"]["schema"].clone();
    assert_eq!(grammar(json!("none")), Grammar::JsonSchema(schema));
    let (time, add) = (
        r#"{"name": "get_time", "arguments": {"zone": "UTC"}}"#,
        r#"{"name": "add", "arguments": {"a": 7}}"#,
    );
    for (choice, takes_time) in
        [(json!("required"), true), (json!({"type": "function", "function": {"name": "add"}}), false)]
    {
        let grammar = grammar(choice);
        assert_eq!(takes(&grammar, time), takes_time);
        assert!(takes(&grammar, add));
        assert!(!takes(&grammar, "{\"n\": 1}"));
        // No more white space than a model needs, nor options of the grammar's own.
        assert!(!takes(&grammar, &add.replace('7', &" ".repeat(99))));
    }
}

#[test]
fn either_is_read_whole_and_as_a_stream() {
    let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 7}}\n</tool_call>";
    let odd = r#"{"n": 1, "s": "<tool_call>{", "name": "add", "arguments": {}}"#;
    for (said, text, called) in [("{\"n\": 1}", "{\"n\": 1}", false), (odd, odd, false), (call, "", true)] {
        let server = Server::with(Scripted::always(Script::say(said)), TOOL_TEMPLATE, Options::default());
        let fields = json!({"tools": tools(), "response_format": {"type": "json_object"}});
        let answer = server.chat(fields.clone()).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], if called { "tool_calls" } else { "stop" }, "{said}");
        assert_eq!(choice["message"]["content"].as_str().unwrap_or_default(), text);
        let arguments = &choice["message"]["tool_calls"][0]["function"]["arguments"];
        assert_eq!(arguments.as_str(), called.then_some("{\"a\": 7}"));
        let events = server.chat(merge(fields, json!({"stream": true}))).events();
        assert_eq!(streamed_text(&events, 0), text);
        let reasons: Vec<&Value> =
            events.iter().map(|e| &e["choices"][0]["finish_reason"]).filter(|r| !r.is_null()).collect();
        assert_eq!(reasons, [if called { "tool_calls" } else { "stop" }]);
    }
}

#[test]
fn an_engine_that_says_anything_obeys_one_or_the_other() {
    for template in [TOOL_TEMPLATE, MARKER_TEMPLATE, BARE_TEMPLATE] {
        let options = EngineOptions { max_running: 4, ..EngineOptions::default() };
        let engine =
            Engine::start_runner(HashRunner::new(VOCAB, 2048, 512), Some(tokenizer()), options).unwrap();
        let server = Server::with(engine, template, Options::default());
        let (mut called, mut said) = (0, 0);
        for seed in 0..24 {
            // A leaning towards JSON (its first brace, no second letter of "name") or away from it.
            let leaning = if seed % 2 == 0 { 20 } else { -20 };
            let bias = json!({"123": leaning, "97": -leaning});
            let fields = json!({"tools": tools(), "response_format": format(), "seed": seed, "logit_bias": bias,
                "max_tokens": 900});
            let answer = server.chat(fields).ok();
            let choice = &answer["choices"][0];
            let message = &choice["message"];
            match choice["finish_reason"].as_str().unwrap() {
                "tool_calls" => {
                    called += 1;
                    assert_eq!(message["content"], Value::Null, "{choice}");
                    for call in message["tool_calls"].as_array().unwrap() {
                        let arguments = call["function"]["arguments"].as_str().unwrap();
                        let arguments: Value = serde_json::from_str(arguments).unwrap();
                        match call["function"]["name"].as_str().unwrap() {
                            "add" => assert!(arguments["a"].as_u64().unwrap() < 100),
                            _ => assert!(["UTC", "CET"].contains(&arguments["zone"].as_str().unwrap())),
                        }
                    }
                }
                "stop" => {
                    said += 1;
                    let answer: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
                    assert!(answer["n"].as_u64().unwrap() < 100);
                }
                other => panic!("{other}: {choice}"),
            }
        }
        assert!(said > 0 && called > 0, "{called} called, {said} said: {template}");
    }
}

#[test]
fn a_schema_that_is_refused_is_named_by_its_place() {
    let options = EngineOptions::default();
    let engine = Engine::start_runner(HashRunner::new(VOCAB, 2048, 512), Some(tokenizer()), options).unwrap();
    let server = Server::with(engine, TOOL_TEMPLATE, Options::default());
    let deep = (0..100).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let tool = |parameters: Value| json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let unsupported = json!({"type": "object", "properties": {"a": {"not": {"type": "null"}}}});
    for (fields, param) in [
        (
            json!({"tools": tool(json!({"properties": {"a": deep}})), "tool_choice": "required"}),
            "tools[0].function.parameters",
        ),
        (json!({"tools": tool(unsupported.clone()), "tool_choice": "required"}), "tools"),
        (
            json!({"tools": tools(), "response_format": {"type": "json_schema", "json_schema": {"schema": deep}}}),
            "response_format.json_schema.schema",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": unsupported}}}),
            "response_format",
        ),
    ] {
        let response = server.chat(fields);
        assert_eq!(
            (response.status, response.error().0.as_deref()),
            (400, Some(param)),
            "{}",
            response.text()
        );
    }
}

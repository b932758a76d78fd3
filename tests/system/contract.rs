//! Same request, same tokens, over HTTP and on the real model: the company a request keeps, the replica's threads, and
//! a death in mid-answer change nothing.

use serde_json::{Value, json};

use crate::client;
use crate::replica::{Replica, chat, serve, start};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: usize = 48;

fn sampled() -> Value {
    let mut body = chat("Write a poem about the north wind and the sun.", TOKENS);
    for (name, value) in [
        ("temperature", json!(0.9)),
        ("top_p", json!(0.95)),
        ("min_p", json!(0.02)),
        ("top_k", json!(80)),
        ("frequency_penalty", json!(0.3)),
        ("seed", json!(20_011)),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(3)),
        ("return_token_ids", json!(true)),
    ] {
        body[name] = value;
    }
    body
}

/// The answer, every token's log-probabilities, and the numerics class.
fn answer(replica: &Replica, body: &Value) -> (Value, Value, Value) {
    let response = replica.post(CHAT, body);
    assert_eq!(response.status, 200, "{}", response.text());
    let mut json = response.json();
    let choice = json["choices"][0].take();
    (choice["message"]["content"].clone(), choice["logprobs"].clone(), json["system_fingerprint"].clone())
}

#[test]
fn company_and_threads_change_nothing() {
    let replica = serve(&["--threads", "2"]);
    let greedy = {
        let mut body = chat("Why is the sky blue?", TOKENS);
        body["logprobs"] = json!(true);
        body
    };
    let bodies = [sampled(), greedy];
    let alone = bodies.each_ref().map(|body| answer(&replica, body));
    assert_ne!(alone[0].0, alone[1].0);

    // Among sixteen others of all lengths, five times over; the second time around with a warm prefix cache.
    std::thread::scope(|scope| {
        for other in 0..16 {
            let replica = &replica;
            scope.spawn(move || {
                for round in 0..3 {
                    let text = format!(
                        "Number {other}.{round}. {}",
                        "More words for the prompt. ".repeat(other * 4)
                    );
                    assert_eq!(replica.post(CHAT, &chat(&text, 20 + other * 3)).status, 200);
                }
            });
        }
        for _ in 0..5 {
            for (body, alone) in bodies.iter().zip(&alone) {
                assert_eq!(answer(&replica, body), *alone);
            }
        }
    });

    let single = start(&["--threads", "1"]);
    for (body, alone) in bodies.iter().zip(&alone) {
        assert_eq!(answer(&single, body), *alone, "one thread");
    }
}

#[test]
fn another_replica_continues_where_one_was_killed() {
    let mut first = serve(&[]);
    let second = start(&[]);
    let body = sampled();
    let whole = client::stream(second.address, CHAT, &body).unwrap().all().unwrap();

    let mut events = client::stream(first.address, CHAT, &body).unwrap();
    let mut seen = Vec::new();
    while ids(&seen).len() < TOKENS / 3 {
        seen.push(events.next().unwrap().unwrap());
    }
    first.signal("KILL");
    first.wait();
    while let Ok(Some(event)) = events.next() {
        seen.push(event);
    }
    let emitted = ids(&seen);
    assert!(emitted.len() < TOKENS, "the answer was complete before the replica died");

    let mut resumed = body.clone();
    resumed["consort"] = json!({"emitted_token_ids": emitted});
    let rest = client::stream(second.address, CHAT, &resumed).unwrap().all().unwrap();
    assert_eq!([ids(&seen), ids(&rest)].concat(), ids(&whole));
    assert_eq!(text(&seen) + &text(&rest), text(&whole));
    assert_eq!(seen[0]["system_fingerprint"], rest[0]["system_fingerprint"]);
}

fn ids(events: &[Value]) -> Vec<u64> {
    let choices = events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array());
    choices.flatten().filter_map(Value::as_u64).collect()
}

fn text(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
}

//! What a client meets at the front door, with replicas that fail as the script says.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::time::Duration;

use consort_api::deployment::Balancing;
use consort_api::{ApiKeyRecord, KeyLimits, Numerics};
use consort_gateway::HedgeSettings;
use serde_json::json;
use support::*;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};

const WORDS: &str = "w0 w1 w2 w3 w4 ";

fn key(id: &str, limits: KeyLimits) -> ApiKeyRecord {
    let hash = blake3::hash(format!("sk-{id}").as_bytes()).to_hex().to_string();
    ApiKeyRecord { id: id.to_owned(), name: String::new(), hash, limits, created: 0 }
}

#[tokio::test]
async fn a_request_that_fails_before_its_first_token_is_tried_elsewhere() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    for act in
        [Act::Status(500, "internal_error"), Act::Status(429, "overloaded"), Act::Break(0), Act::Break(1)]
    {
        for stream in [true, false] {
            replicas.iter().for_each(|replica| replica.act(act.clone()));
            let response = door.post(&[], &chat(json!({"stream": stream}))).await;
            assert_eq!(response.status, 200, "{act:?}: {response:?}");
            let text = if stream {
                response.text()
            } else {
                response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
            };
            assert_eq!(text, WORDS, "{act:?}");
            replicas.iter().for_each(|replica| replica.acts.lock().unwrap().clear());
        }
    }
    let asked = replicas[0].asked.lock().unwrap();
    let (head, body) = &asked[0];
    assert!(
        head.contains("authorization: Bearer replica-secret") && head.contains("traceparent: 00-"),
        "{head}"
    );
    assert!(head.contains("x-request-timeout-ms: "), "{head}");
    assert!(body.get("model").is_none(), "a replica has its own name for the model: {body}");
}

#[tokio::test]
async fn what_is_the_clients_fault_stays_the_clients() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    for _ in 0..20 {
        replicas.iter().for_each(|replica| replica.act(Act::Status(400, "invalid_value")));
        let response = door.post(&[], &chat(json!({}))).await;
        assert_eq!(
            (response.status, response.json()["error"]["code"].as_str()),
            (400, Some("invalid_value"))
        );
        replicas.iter().for_each(|replica| replica.acts.lock().unwrap().clear());
    }
    let snapshot = door.gateway.snapshot();
    let states: Vec<_> =
        snapshot.models[0].versions[0].replicas.iter().map(|r| (r.errors, r.ejections)).collect();
    assert_eq!(states, [(0, 0), (0, 0)]);
    assert_eq!((snapshot.totals.requests, snapshot.totals.retries), (20, 0));
}

#[tokio::test]
async fn an_answer_crosses_classes_only_where_that_is_allowed_and_says_so() {
    for numerics in [Numerics::SameClass, Numerics::AnyClass] {
        let replicas = [Replica::start("a").await, Replica::start("b").await];
        let mut settings = settings();
        settings.retries.wait = Duration::from_millis(300);
        let door = door(settings, &fleet(&replicas, numerics)).await;
        replicas.iter().for_each(|replica| replica.act(Act::Break(3)));
        let response = door.post(&[], &chat(json!({"stream": true}))).await;
        if numerics == Numerics::AnyClass {
            assert_eq!(response.text(), WORDS);
            assert!(response.body.contains("continued_across"), "{}", response.body);
        } else {
            // The same replica takes it up again; where it is gone, the stream ends with an error.
            assert_eq!(response.text(), WORDS);
            assert!(!response.body.contains("continued_across"));
        }
    }
}

/// Its client has nothing of it, so nothing speaks for waiting until a replica of the first class is back.
#[tokio::test]
async fn a_whole_answer_whose_class_is_lost_begins_anew_on_another() {
    let replicas = [Replica::start("a").await, Replica::start("b").await];
    let mut settings = settings();
    settings.retries.wait = Duration::from_secs(60);
    let door = door(settings, &fleet(&replicas[..1], Numerics::SameClass)).await;
    replicas[0].act(Act::HoldAndBreak(3));
    let asking = door.open(&[], &chat(json!({}))).await;
    while replicas[0].count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    door.gateway.set_fleet(&fleet(&replicas, Numerics::SameClass)).unwrap();
    door.all_ready().await;
    replicas[0].kill();
    replicas[0].go_on.notify_one();
    let answer = read(asking).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], WORDS, "{answer}");
    assert_eq!(answer["system_fingerprint"], "b");
    assert!(answer.get("consort").is_none(), "it is of one class: {answer}");
}

#[tokio::test]
async fn the_way_to_balance_is_the_owners_choice_also_while_it_runs() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let ask = async |times: usize| {
        let before = replicas.each_ref().map(|replica| replica.count());
        for _ in 0..times {
            // Long enough to be worth a look at its beginning.
            let body = chat(json!({"messages": [{"role": "user", "content": "same ".repeat(200)}]}));
            assert_eq!(door.post(&[], &body).await.status, 200);
        }
        [0, 1].map(|i| replicas[i].count() - before[i])
    };
    let mut home = ask(6).await;
    home.sort_unstable();
    assert_eq!(home, [0, 6], "a prompt goes where its beginning is");
    let mut turns = settings();
    turns.replicas.balancing = Balancing::RoundRobin;
    door.gateway.set_settings(turns);
    assert_eq!(ask(6).await, [3, 3]);
}

#[tokio::test]
async fn a_replica_that_does_not_begin_is_left_for_another() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let mut settings = settings();
    settings.retries.begin = Duration::from_millis(50);
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    // Whichever is asked, and the other one after it.
    replicas.iter().for_each(|replica| replica.act(Act::Late(600_000)));
    let response = door.post(&[], &chat(json!({"stream": true}))).await;
    assert_eq!(response.text(), WORDS);
    let metrics = door.get("/metrics").await.body;
    assert!(metrics.contains("reason=\"slow\""), "{metrics}");
}

#[tokio::test]
async fn a_broken_stream_that_nobody_can_continue_ends_with_an_error_event() {
    let replicas = [Replica::start("a").await, Replica::start("b").await];
    let mut settings = settings();
    settings.retries.attempts = 3;
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    for replica in &replicas {
        replica.act(Act::Break(3));
        (0..5).for_each(|_| replica.act(Act::Status(500, "internal_error")));
    }
    let response = door.post(&[], &chat(json!({"stream": true}))).await;
    assert_eq!((response.status, response.text().as_str()), (200, "w0 w1 "));
    assert!(response.body.contains("event: error\ndata: {\"error\""), "{}", response.body);
    assert!(!response.body.contains("[DONE]"));
}

#[tokio::test]
async fn a_stream_goes_on_at_a_replica_that_was_started_after_it() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas[..1], Numerics::SameClass)).await;
    replicas[0].act(Act::HoldAndBreak(3));
    (0..9).for_each(|_| replicas[0].act(Act::Status(500, "internal_error")));
    let streaming = door.open(&[], &chat(json!({"stream": true}))).await;
    while replicas[0].count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut successors = fleet(&replicas[1..], Numerics::SameClass);
    successors.models[0].versions[0].replicas[0].id = "r0.2".to_owned();
    door.gateway.set_fleet(&successors).unwrap();
    door.all_ready().await;
    replicas[0].go_on.notify_one();
    assert_eq!(read(streaming).await.text(), WORDS);
    assert_eq!((replicas[0].count(), replicas[1].count()), (1, 1), "who is gone isn't asked again");
}

#[tokio::test]
async fn a_repeat_gets_the_same_answer_and_another_body_is_told() {
    let replicas = [Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let idempotent = [("idempotency-key", "one")];
    for stream in [true, false] {
        let body = chat(json!({"stream": stream, "user": stream.to_string()}));
        let name = format!("{stream}");
        let headers = [("idempotency-key", name.as_str())];
        replicas[0].act(Act::Hold(2));
        let before = replicas[0].count();
        let first = door.open(&headers, &body).await;
        while replicas[0].count() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let second = door.open(&headers, &body).await;
        replicas[0].go_on.notify_one();
        let (first, second) = (read(first).await, read(second).await);
        assert_eq!(first.status, 200);
        assert_eq!(first.body, second.body, "attached to the one that ran");
        let third = door.post(&headers, &body).await;
        assert_eq!(third.body, first.body);
        assert_eq!(third.header("idempotent-replayed").as_deref(), Some("true"));
        assert_eq!(replicas[0].count(), before + 1, "computed once");
        let other = door.post(&headers, &chat(json!({"stream": stream, "max_tokens": 6}))).await;
        assert_eq!(
            (other.status, other.json()["error"]["code"].as_str()),
            (422, Some("idempotency_key_reused"))
        );
    }
    (0..10).for_each(|_| replicas[0].act(Act::Status(500, "internal_error")));
    assert_eq!(door.post(&idempotent, &chat(json!({}))).await.status, 500);
    replicas[0].acts.lock().unwrap().clear();
    assert_eq!(door.post(&idempotent, &chat(json!({}))).await.status, 200, "what failed may be tried again");
}

#[tokio::test]
async fn a_dropped_stream_goes_on_at_the_next_event() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let body = chat(json!({"stream": true, "max_tokens": 20}));
    replicas.iter().for_each(|replica| replica.act(Act::Hold(8)));
    let mut first = door.open(&[], &body).await;
    let (mut seen, mut last) = (String::new(), String::new());
    while !seen.contains("w4 ") {
        let mut line = String::new();
        first.read_line(&mut line).await.unwrap();
        if let Some(id) = line.strip_prefix("id: ") {
            last = id.trim().to_owned();
        }
        seen += &line;
    }
    // Another client's hands are kept off it, and so is another request.
    let wrong = door.post(&[("last-event-id", "chatcmpl-0:3")], &body).await;
    assert_eq!(wrong.status, 410, "{}", wrong.body);
    let other = door.post(&[("last-event-id", &last)], &chat(json!({"stream": true}))).await;
    assert_eq!(other.status, 400, "{}", other.body);
    drop(first);
    replicas.iter().for_each(|replica| replica.acts.lock().unwrap().clear());
    let rest = door.post(&[("last-event-id", &last)], &body).await;
    assert_eq!(rest.status, 200, "{}", rest.body);
    let expected: String = (5..20).map(|i| format!("w{i} ")).collect();
    assert_eq!(rest.text(), expected);
    let number: u64 = last.rsplit_once(':').unwrap().1.parse().unwrap();
    let id = last.rsplit_once(':').unwrap().0;
    assert!(rest.body.starts_with(&format!("id: {id}:{}\n", number + 1)), "{}", rest.body);
    assert!(rest.body.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn keys_have_limits_and_models_and_are_asked_for() {
    let replicas = [Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let limited =
        KeyLimits { requests_per_minute: Some(2), tokens_per_minute: Some(1000), ..KeyLimits::default() };
    let elsewhere = KeyLimits { models: vec!["other".to_owned()], ..KeyLimits::default() };
    door.gateway.set_keys(&[key("a", limited), key("b", elsewhere)], true).unwrap();
    assert_eq!(door.post(&[], &chat(json!({}))).await.status, 401);
    assert_eq!(door.post(&[("authorization", "Bearer sk-c")], &chat(json!({}))).await.status, 401);
    let a = [("authorization", "Bearer sk-a")];
    let first = door.post(&a, &chat(json!({}))).await;
    assert_eq!((first.status, first.header("x-ratelimit-remaining-requests").as_deref()), (200, Some("1")));
    assert_eq!(first.header("x-ratelimit-limit-tokens").as_deref(), Some("1000"));
    assert_eq!(door.post(&a, &chat(json!({}))).await.status, 200);
    let third = door.post(&a, &chat(json!({}))).await;
    assert_eq!((third.status, third.json()["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")));
    assert!(third.header("retry-after").is_some());
    let b = door.post(&[("authorization", "Bearer sk-b")], &chat(json!({}))).await;
    assert_eq!((b.status, b.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    let metrics = door.get("/metrics").await.body;
    assert!(metrics.contains("consort_gateway_key_requests_total{key=\"a\",status=\"200\"} 2"), "{metrics}");
    assert!(metrics.contains("consort_gateway_breaker_state{replica=\"r0\"} 0"), "{metrics}");
    assert!(!metrics.contains("sk-"), "no secret in metrics");
}

#[tokio::test]
async fn a_slow_first_token_is_hedged_and_the_loser_cancelled() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let mut settings = settings();
    settings.hedging = HedgeSettings { enabled: true, after: Duration::from_millis(30), budget: 1.0 };
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    replicas.iter().for_each(|replica| replica.act(Act::Hold(0)));
    // Whichever gets it first holds it; the other one's hold is taken away once both were asked.
    let waiting = door.open(&[], &chat(json!({"stream": true}))).await;
    while replicas.iter().any(|replica| replica.count() == 0) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    replicas[1].go_on.notify_one();
    let response = read(waiting).await;
    assert_eq!(response.text(), WORDS);
    assert_eq!(door.gateway.snapshot().totals.hedges, 1);
    assert_eq!(replicas[0].finished.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_full_fleet_makes_requests_wait_and_a_full_queue_refuses() {
    let replicas = [Replica::start("a").await];
    let mut settings = settings();
    settings.replicas.max_outstanding = 1;
    settings.replicas.max_pending = 1;
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    replicas[0].act(Act::Hold(1));
    let first = door.open(&[], &chat(json!({}))).await;
    while replicas[0].count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = door.open(&[], &chat(json!({}))).await;
    while door.gateway.snapshot().models[0].queued == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let third = door.post(&[], &chat(json!({}))).await;
    assert_eq!((third.status, third.json()["error"]["code"].as_str()), (429, Some("overloaded")));
    assert_eq!(replicas[0].count(), 1, "the second one waits here");
    replicas[0].go_on.notify_one();
    assert_eq!((read(first).await.status, read(second).await.status), (200, 200));
}

#[tokio::test]
async fn hostile_requests_are_refused_and_cheap() {
    let replicas = [Replica::start("a").await];
    let mut settings = settings();
    settings.clients.max_body_bytes = 10_000;
    settings.clients.body_timeout = Duration::from_millis(200);
    settings.clients.header_timeout = Duration::from_millis(200);
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    let path = "/v1/chat/completions";
    let huge = door.post(&[], &chat(json!({"user": "x".repeat(20_000)}))).await;
    assert_eq!(huge.status, 413);
    let foreign = read(door.raw("POST", path, &[("origin", "https://evil.example")], "{}").await).await;
    assert_eq!(foreign.status, 403);
    let many: Vec<(String, String)> = (0..200).map(|i| (format!("x-{i}"), "y".to_owned())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(read(door.raw("POST", path, &many, "{}").await).await.status, 431);
    // Raw bytes: what two readers could read in two ways is refused, whatever follows it.
    for (request, status) in [
        (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ncontent-length: 9\r\n\r\n{}{}",
            400,
        ),
        ("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n{}", 400),
        ("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{\"a\":", 408),
        ("GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n", 403),
    ] {
        let mut stream = tokio::net::TcpStream::connect(door.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = vec![0; 12];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&head), format!("HTTP/1.1 {status}"), "{request}");
    }
    // Headers for one hop, and a client's own key, end here.
    let headers =
        [("te", "trailers"), ("x-forwarded-for", "1.2.3.4"), ("authorization", "Bearer client-secret")];
    assert_eq!(door.post(&headers, &chat(json!({}))).await.status, 200);
    let asked = replicas[0].asked.lock().unwrap();
    let head = asked.last().unwrap().0.to_ascii_lowercase();
    for absent in ["te:", "x-forwarded-for", "client-secret"] {
        assert!(!head.contains(absent), "{absent} in {head}");
    }
}

#[tokio::test]
async fn what_a_version_on_trial_cannot_do_another_does() {
    let replicas = [Replica::start("a").await, Replica::start("b").await];
    let mut fleet = fleet(&replicas, Numerics::SameClass);
    let versions = &mut fleet.models[0].versions;
    let mut trial = versions[0].clone();
    (trial.name, trial.on_trial, trial.weight) = ("v2".to_owned(), true, 100);
    trial.replicas.remove(0);
    versions[0].replicas.remove(1);
    versions[0].weight = 0;
    versions.push(trial);
    let door = door(settings(), &fleet).await;
    let did = |door: &Door| {
        let versions = door.gateway.snapshot().models[0].versions.clone();
        versions.iter().map(|v| (v.requests, v.errors, v.diverted)).collect::<Vec<_>>()
    };
    assert_eq!(door.post(&[], &chat(json!({}))).await.status, 200);
    assert_eq!((replicas[0].count(), replicas[1].count()), (0, 1));
    for act in [Act::Status(500, "internal_error"), Act::Break(0), Act::Status(503, "draining")] {
        replicas[1].act(act);
        let response = door.post(&[], &chat(json!({"stream": true}))).await;
        assert_eq!((response.status, response.text().as_str()), (200, WORDS));
    }
    assert_eq!(replicas[0].count(), 3);
    assert_eq!(did(&door), [(3, 0, 0), (4, 3, 3)]);
    // An answer that has begun is the version's: its client would get another model's words.
    replicas[1].act(Act::Break(2));
    let response = door.post(&[], &chat(json!({"stream": true}))).await;
    assert_eq!(response.text(), WORDS);
    assert_eq!((replicas[0].count(), did(&door)[1]), (3, (5, 3, 3)));

    // Without a replica at all.
    fleet.models[0].versions[1].replicas.clear();
    door.gateway.set_fleet(&fleet).unwrap();
    assert_eq!(door.post(&[], &chat(json!({}))).await.status, 200);
    assert_eq!(did(&door), [(4, 0, 0), (6, 4, 4)]);
    let metrics = door.get("/metrics").await.body;
    for line in [
        "consort_gateway_version_requests_total{model=\"m\",version=\"v2\",outcome=\"diverted\"} 4",
        "consort_gateway_version_time_to_first_token_seconds_count{model=\"m\",version=\"v2\"} 2",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
}

//! Before servers that speak OpenAI's API and nothing else, in the clear and over TLS; and questions to a tokenizer.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::sync::Arc;
use std::time::Duration;

use consort_api::{FleetReplica, Numerics, Protocol};
use consort_gateway::{Discovery, Gateway, Tls, Trust};
use serde_json::json;
use support::*;
use tokio::net::TcpListener;

#[tokio::test]
async fn a_server_that_is_not_ours_gets_the_request_as_it_came() {
    let servers = [Replica::plain().await];
    let door = door(settings(), &fleet(&servers, Numerics::SameClass)).await;
    let body = chat(json!({"temperature": 0.5}));
    let response = door.post(&[("authorization", "Bearer client")], &body).await;
    assert_eq!(
        (response.status, response.json()["choices"][0]["message"]["content"].as_str()),
        (200, Some("plain"))
    );
    let (head, asked) = servers[0].asked.lock().unwrap().pop().unwrap();
    assert_eq!(asked, body, "nothing is added");
    assert!(
        head.contains("Bearer replica-secret") && !head.contains("client") && !head.contains("-ms"),
        "{head}"
    );
    // A name that it doesn't know, and none, become its own.
    for mut named in [json!({"model": "alias"}), json!({"model": null}), json!({})] {
        let mut body = chat(json!({}));
        body.as_object_mut().unwrap().remove("model");
        body.as_object_mut().unwrap().append(named.as_object_mut().unwrap());
        assert_eq!(door.post(&[], &body).await.status, 200, "{body}");
        let (_, asked) = servers[0].asked.lock().unwrap().pop().unwrap();
        assert_eq!(asked, chat(json!({})), "{body}");
    }
    let stream = door.post(&[], &chat(json!({"stream": true}))).await;
    assert_eq!(stream.text(), "w0 w1 w2 w3 w4 ");
    let expected = events(&chat(json!({"stream": true})), "").concat();
    assert_eq!(stream.body, expected, "byte for byte");
    let metrics = door.get("/metrics").await.body;
    assert!(metrics.contains(r#"consort_gateway_key_tokens_total{key="-"} "#), "{metrics}");
    assert!(metrics.contains(r#"status="200""#) && !metrics.contains(r#"status="499""#), "{metrics}");
}

#[tokio::test]
async fn a_failure_before_the_answer_is_tried_elsewhere_and_a_later_one_is_told() {
    let servers = [Replica::plain().await, Replica::plain().await];
    let mut settings = settings();
    settings.replicas.outlier.consecutive = 1000;
    settings.retries.attempts = 10;
    let door = door(settings, &fleet(&servers, Numerics::SameClass)).await;
    let head = |rest: &str| format!("HTTP/1.1 200 OK\r\n{rest}").into_bytes();
    let early = [
        Act::Status(500, "internal_error"),
        Act::Status(503, "loading"),
        Act::Raw(Vec::new()),
        Act::Raw(head("content-type: application/json\r\ncontent-length: 0\r\n\r\n")),
        Act::Raw(head("content-type: application/json\r\ncontent-length: 100\r\n\r\n{\"choices\":[")),
        Act::Raw(head("content-type: application/json\r\ncontent-length: 5\r\n\r\nhello")),
        Act::Raw(STREAM_HEAD.as_bytes().to_vec()),
    ];
    for act in early {
        for stream in [true, false] {
            servers.iter().for_each(|server| server.act(act.clone()));
            let response = door.post(&[], &chat(json!({"stream": stream}))).await;
            assert_eq!(response.status, 200, "{act:?}: {response:?}");
            assert!(response.body.contains(if stream { "[DONE]" } else { "plain" }), "{act:?}: {response:?}");
            servers.iter().for_each(|server| server.acts.lock().unwrap().clear());
        }
    }
    // The answer has begun: it can't go on elsewhere. What the client has are whole events and a clear end.
    let event = events(&chat(json!({})), "")[1].clone();
    let mut broken = STREAM_HEAD.as_bytes().to_vec();
    broken.extend(chunked(event.as_bytes()));
    broken.extend(chunked(&event.as_bytes()[..20]));
    servers.iter().for_each(|server| server.act(Act::Raw(broken.clone())));
    let response = door.post(&[], &chat(json!({"stream": true}))).await;
    let (said, error) = response.body.split_once("event: error\ndata: ").unwrap();
    assert_eq!(said, event, "the half event isn't told");
    assert!(error.contains("\"code\":\"upstream_lost\""), "{error}");
    // A refusal is the client's, in the server's words.
    servers.iter().for_each(|server| {
        server.acts.lock().unwrap().clear();
        server.act(Act::Status(422, "unknown_field"));
    });
    let refused = door.post(&[], &chat(json!({}))).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (422, Some("unknown_field")));
}

#[tokio::test]
async fn repeats_get_the_answer_of_a_server_that_is_not_ours() {
    let servers = [Replica::plain().await];
    let door = door(settings(), &fleet(&servers, Numerics::SameClass)).await;
    for stream in [true, false] {
        let name = stream.to_string();
        let headers = [("idempotency-key", name.as_str())];
        let first = door.post(&headers, &chat(json!({"stream": stream}))).await;
        let before = servers[0].count();
        let again = door.post(&headers, &chat(json!({"stream": stream}))).await;
        assert_eq!((first.status, &first.body), (200, &again.body));
        assert_eq!(again.header("idempotent-replayed").as_deref(), Some("true"));
        assert_eq!(servers[0].count(), before, "asked once");
    }
}

/// A gateway with TLS, found by another one as a server of OpenAI's API.
#[tokio::test]
async fn an_upstream_over_tls_is_spoken_to_where_its_certificate_is_trusted() {
    let servers = [Replica::plain().await];
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let inner = Gateway::new(settings());
    inner.set_tls(Tls::new(made.cert.pem().as_bytes(), made.signing_key.serialize_pem().as_bytes()).unwrap());
    inner.set_fleet(&fleet(&servers, Numerics::SameClass)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(inner.serve(listener, std::future::pending()));
    let found = async |trust: Trust| {
        let mut settings = settings();
        settings.replicas.trust = trust.clone();
        settings.retries.wait = Duration::from_millis(200);
        let outer = Gateway::new(settings);
        let replica = FleetReplica {
            id: "inner".to_owned(),
            url: format!("https://localhost:{port}"),
            key: None,
            slow_start_ms: 0,
            draining: false,
            protocol: Protocol::Consort,
        };
        let discovery = Discovery::new(vec![replica], Numerics::SameClass, &trust).unwrap();
        tokio::spawn(discovery.run(outer.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Arc::clone(&outer).serve(listener, std::future::pending()));
        Door { gateway: outer, address }
    };
    let trusted = found(Trust::pem(made.cert.pem().as_bytes()).unwrap()).await;
    let up = || trusted.gateway.snapshot().models.iter().any(|m| m.versions[0].replicas[0].report.is_some());
    while !up() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for stream in [true, false] {
        let response = trusted.post(&[], &chat(json!({"stream": stream}))).await;
        assert_eq!(response.status, 200, "{response:?}");
        assert!(response.body.contains(if stream { "[DONE]" } else { "plain" }), "{response:?}");
    }
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let stranger = found(Trust::pem(other.cert.pem().as_bytes()).unwrap()).await;
    let refused = stranger.post(&[], &chat(json!({}))).await;
    assert_eq!(refused.status, 404, "nobody whose certificate isn't trusted is asked: {refused:?}");
}

#[tokio::test]
async fn questions_to_a_tokenizer_go_to_a_replica_that_is_there() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    replicas[0].kill();
    for _ in 0..8 {
        let body = json!({"model": "alias", "prompt": "a b c"}).to_string();
        let response = read(door.raw("POST", "/tokenize", &[], &body).await).await;
        assert_eq!((response.status, response.body.as_str()), (200, "{\"count\":3}"), "{response:?}");
    }
    assert!(replicas[1].asked.lock().unwrap().iter().all(|(_, body)| body["model"].is_null()));
    let unknown = read(door.raw("POST", "/detokenize", &[], "{\"model\":\"x\"}").await).await;
    assert_eq!(unknown.status, 404);
    assert_eq!(read(door.raw("POST", "/tokenize", &[], "[]").await).await.status, 400);
    let plain = [Replica::plain().await];
    let door = support::door(settings(), &fleet(&plain, Numerics::SameClass)).await;
    let response = read(door.raw("POST", "/tokenize", &[], "{}").await).await;
    assert_eq!(response.status, 404, "{response:?}");
}

//! Replicas that send what nobody should, clients that don't read, handshakes that never end.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use consort_api::Numerics;
use consort_gateway::Tls;
use serde_json::{Value, json};
use support::*;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket};

const WORDS: &str = "w0 w1 w2 w3 w4 ";

/// Two events of the answer, and then these bytes.
fn then(bytes: &[u8]) -> Act {
    Act::Then(2, Box::new(Act::Raw(bytes.to_vec())))
}

fn text(response: &Response, stream: bool) -> String {
    if stream {
        return response.text();
    }
    response.json()["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn garbage_of_any_kind_moves_the_answer_to_another_replica() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let mut settings = settings();
    settings.replicas.silence_timeout = Duration::from_millis(200);
    settings.retries.attempts = 10;
    settings.replicas.outlier.consecutive = 1000;
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    let event = events(&chat(json!({})), "a")[1].clone();
    let half = &event[..event.len() / 2];
    let head = |rest: &str| format!("HTTP/1.1 200 OK\r\n{rest}").into_bytes();
    let acts: Vec<(&str, Act)> = vec![
        ("bytes that are no text, within an event", then(&chunked(b"data: {\"id\":\"\xff\xfe\"}\n\n"))),
        ("half an event, then bytes that are no text", {
            let garbage = [half.as_bytes(), b"\xff\xff\n\n"].concat();
            then(&chunked(&garbage))
        }),
        ("an event cut short, with its end", then(&chunked(format!("{half}\n\n").as_bytes()))),
        ("a chunk's length that is none", then(b"zz\r\ndata")),
        ("a chunk cut short", then(format!("{:x}\r\n{half}", event.len()).as_bytes())),
        ("an event of another protocol", then(&chunked(b"HTTP/1.1 500 Oops\r\n\r\n"))),
        ("JSON that is no chunk", then(&chunked(b"data: {\"a\":1}\n\n"))),
        ("a choice that there isn't", then(&chunked(event.replace("\"index\":0", "\"index\":7").as_bytes()))),
        ("an end before the answer's", then(&[chunked(b"data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()].concat())),
        ("a hang within an event", Act::Then(2, Box::new(Act::Stuck(chunked(half.as_bytes()))))),
        (
            "an empty body of a known length",
            Act::Raw(head("content-type: text/event-stream\r\ncontent-length: 0\r\n\r\n")),
        ),
        (
            "an empty body in chunks",
            Act::Raw(head("content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
        ),
        (
            "an empty body of JSON",
            Act::Raw(head("content-type: application/json\r\ncontent-length: 0\r\n\r\n")),
        ),
        ("a page", Act::Raw(head("content-type: text/html\r\ncontent-length: 6\r\n\r\n<html>"))),
        ("a head that hangs", Act::Stuck(b"HTTP/1.1 200 OK\r\ncontent-ty".to_vec())),
        ("no HTTP", Act::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())),
        (
            "headers without an end",
            Act::Flood(b"HTTP/1.1 200 OK\r\n".to_vec(), b"x-filler: 0123456789\r\n".repeat(100)),
        ),
    ];
    for (what, act) in acts {
        for stream in [true, false] {
            replicas.iter().for_each(|replica| replica.act(act.clone()));
            let response = door.post(&[], &chat(json!({"stream": stream}))).await;
            assert_eq!(
                (response.status, text(&response, stream).as_str()),
                (200, WORDS),
                "{what}: {response:?}"
            );
            assert!(!response.body.contains('\u{fffd}'), "{what}: {}", response.body);
            // Who wasn't asked mustn't do it at the next request.
            replicas.iter().for_each(|replica| replica.acts.lock().unwrap().clear());
        }
    }
}

#[tokio::test]
async fn a_character_cut_in_two_by_chunks_arrives_whole() {
    let replicas = [Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let said = "ä€𝄞";
    for cut in 0..=said.len() {
        for stream in [true, false] {
            replicas[0].act(Act::Cut(said, cut));
            let response = door.post(&[], &chat(json!({"stream": stream, "max_tokens": 1}))).await;
            assert_eq!(text(&response, stream), said, "cut at {cut}: {response:?}");
        }
    }
    assert_eq!(door.gateway.snapshot().totals.retries + door.gateway.snapshot().totals.resumes, 0);
}

#[tokio::test]
async fn an_event_of_a_hundred_megabytes_is_not_held() {
    let replicas = [Replica::start("a").await, Replica::start("a").await];
    let door = door(settings(), &fleet(&replicas, Numerics::SameClass)).await;
    let flood = Act::Then(2, Box::new(Act::Flood(Vec::new(), chunked(&[b'x'; 64 << 10]))));
    replicas.iter().for_each(|replica| replica.act(flood.clone()));
    let response = door.post(&[], &chat(json!({"stream": true}))).await;
    assert_eq!(response.text(), WORDS);
    let most = replicas.iter().map(|replica| replica.flooded.load(Ordering::SeqCst)).max().unwrap();
    assert!(most < 60 << 20, "{most} bytes were taken");
}

#[tokio::test]
async fn a_client_that_stops_reading_costs_bounded_memory_and_its_replica_is_released() {
    for plain in [false, true] {
        let replica = if plain { Replica::plain().await } else { Replica::start("a").await };
        let replicas = [replica];
        let mut settings = settings();
        settings.clients.write_timeout = Duration::from_secs(1);
        // What is left of the stream isn't kept either.
        settings.clients.resume_window = Duration::ZERO;
        let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
        // Tokens of 16 KB: whatever the sockets between hold is soon full.
        let token = events(&chat(json!({"max_tokens": 9})), "a")[1].replace("w0 ", &"x".repeat(16 << 10));
        let flood = Act::Flood(Vec::new(), chunked(token.as_bytes()));
        replicas[0].act(Act::Then(1, Box::new(flood)));
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut client = socket.connect(door.address).await.unwrap();
        let body = chat(json!({"stream": true})).to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        client.write_all((head + &body).as_bytes()).await.unwrap();
        let released = tokio::time::timeout(Duration::from_secs(15), replicas[0].cut_off.notified()).await;
        assert!(released.is_ok(), "the replica still gives an answer that nobody reads");
        let sent = replicas[0].flooded.load(Ordering::SeqCst);
        // Two pairs of socket buffers at their largest, and a few events here.
        assert!(sent < 24 << 20, "{sent} bytes were taken for a client that read none");
        while door.gateway.snapshot().totals.streams > 0 {
            tokio::task::yield_now().await;
        }
        drop(client);
    }
}

#[tokio::test]
async fn the_last_replica_of_a_class_takes_the_answers_it_began_with_it() {
    let replicas = [Replica::start("a").await, Replica::start("b").await];
    for numerics in [Numerics::SameClass, Numerics::AnyClass] {
        let own = [Replica::start("a").await, replicas[1].clone()];
        let mut settings = settings();
        settings.retries.wait = Duration::from_millis(200);
        let door = door(settings, &fleet(&own, numerics)).await;
        // Whatever goes to the other one first ends there; the one that dies must have begun it.
        let response = loop {
            own[0].acts.lock().unwrap().clear();
            own[0].act(Act::Die(3));
            let before = own[0].count();
            let response = door.post(&[], &chat(json!({"stream": true}))).await;
            if own[0].count() > before {
                break response;
            }
        };
        assert_eq!(response.status, 200);
        if numerics == Numerics::AnyClass {
            assert_eq!(response.text(), WORDS);
            let crossed = response.body.contains(r#""continued_across":["a","b"]"#);
            assert!(crossed, "{}", response.body);
        } else {
            assert_eq!(response.text(), "w0 w1 ");
            let error = response.body.split("event: error\ndata: ").nth(1).unwrap();
            let error: Value = serde_json::from_str(error.lines().next().unwrap()).unwrap();
            assert_eq!(error["error"]["code"], "numerics_class_lost", "{error}");
            assert!(!response.body.contains("[DONE]"));
        }
        // What begins now has another class to itself.
        assert_eq!(door.post(&[], &chat(json!({}))).await.status, 200);
    }
}

#[tokio::test]
async fn half_open_tls_handshakes_are_cut_and_keep_nobody_out() {
    let replicas = [Replica::start("a").await];
    let mut settings = settings();
    settings.clients.header_timeout = Duration::from_millis(300);
    settings.clients.max_connections = 20;
    let gateway = consort_gateway::Gateway::new(settings);
    gateway.set_fleet(&fleet(&replicas, Numerics::SameClass)).unwrap();
    gateway.set_tls(Tls::self_signed(&["localhost".to_owned()]).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(gateway.serve(listener, std::future::pending()));
    // Twice as many as there are places; some say a little, some nothing.
    let mut open = Vec::new();
    for i in 0..40 {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        if i % 2 == 0 {
            stream.write_all(b"\x16\x03\x01\x02\x00\x01").await.unwrap();
        }
        open.push(stream);
    }
    for mut stream in open {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut byte)).await;
        assert!(matches!(read.expect("it is cut"), Ok(0) | Err(_)));
    }
}

#[tokio::test]
async fn connections_that_ask_nothing_make_room_and_busy_ones_stay() {
    let replicas = [Replica::start("a").await];
    let mut settings = settings();
    settings.clients.header_timeout = Duration::from_secs(3600);
    settings.clients.max_connections = 8;
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    replicas[0].act(Act::Hold(2));
    let stream = door.open(&[], &chat(json!({"stream": true}))).await;
    while replicas[0].count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut idle = Vec::new();
    for begun in ["", "POST /v1/chat/completions HTTP/1.1\r\nhost: loc"].iter().cycle().take(40) {
        let mut connection = tokio::net::TcpStream::connect(door.address).await.unwrap();
        connection.write_all(begun.as_bytes()).await.unwrap();
        idle.push(connection);
    }
    for _ in 0..3 {
        assert_eq!(door.post(&[], &chat(json!({}))).await.status, 200);
    }
    replicas[0].go_on.notify_one();
    assert_eq!(read(stream).await.text(), WORDS);
}

#[tokio::test]
async fn slow_headers_and_slow_bodies_are_cut() {
    let replicas = [Replica::start("a").await];
    let mut settings = settings();
    settings.clients.header_timeout = Duration::from_millis(200);
    settings.clients.body_timeout = Duration::from_millis(200);
    let door = door(settings, &fleet(&replicas, Numerics::SameClass)).await;
    for begun in [
        "",
        "POST /v1/chat",
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{",
    ] {
        let mut stream = tokio::net::TcpStream::connect(door.address).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        let mut rest = String::new();
        let mut stream = tokio::io::BufReader::new(stream);
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_line(&mut rest)).await;
        assert!(read.is_ok(), "{begun:?} is waited for");
        if begun.ends_with('{') {
            assert!(rest.starts_with("HTTP/1.1 408"), "{rest}");
        }
    }
}

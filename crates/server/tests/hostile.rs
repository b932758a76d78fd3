//! Clients that are slow, gone, greedy or hostile: each costs its own connection and nothing else.

#![allow(clippy::unwrap_used)] // Also in helpers, which the lint doesn't count as tests.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use consort_server::Options;
use serde_json::json;
use support::*;

fn says_hello(options: Options) -> Server {
    Server::with(Scripted::always(Script::say("hello")), PLAIN_TEMPLATE, options)
}

/// Reads until the other side closes; what came before.
fn drain(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("the connection stayed open: {error}"),
        }
    }
}

#[test]
fn headers_that_never_end_are_cut_off_while_others_are_served() {
    let server = says_hello(Options { header_timeout: Duration::from_millis(300), ..Options::default() });
    let mut slow: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    for stream in &mut slow {
        stream.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc").unwrap();
    }
    server.chat(json!({})).ok();
    for stream in &mut slow {
        drain(stream);
    }
    // An idle connection goes the same way.
    drain(&mut server.connect());
}

#[test]
fn a_body_that_never_ends_is_408() {
    let server = says_hello(Options { body_timeout: Duration::from_millis(200), ..Options::default() });
    let mut stream = server.connect();
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        .unwrap();
    let response = Response::read(&mut BufReader::new(stream));
    assert_eq!((response.status, response.error().1.as_str()), (408, "body_timeout"));
}

#[test]
fn bodies_past_the_limit_are_413_with_and_without_a_length() {
    let server = says_hello(Options { max_body_bytes: 10_000, ..Options::default() });
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n";
    let response = server.raw(format!("{head}content-length: 10000000000\r\n\r\n").as_bytes());
    assert_eq!((response.status, response.error().1.as_str()), (413, "body_too_large"));
    // In chunks without end: the answer, or a cut connection, comes long before the client is done.
    let mut stream = server.connect();
    stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).unwrap();
    let chunk = [b"400\r\n".as_slice(), &[b' '; 0x400], b"\r\n"].concat();
    let mut sent = 0;
    while sent < 1 << 30 && stream.write_all(&chunk).is_ok() {
        sent += chunk.len();
    }
    assert!(sent < 1 << 28, "{sent} bytes were taken");
    server.chat(json!({})).ok();
}

#[test]
fn malformed_bodies_are_400() {
    let server = says_hello(Options::default());
    let post = |body: &[u8]| {
        let mut bytes = request_bytes("POST", "/v1/chat/completions", "", "");
        let at = bytes.windows(17).position(|w| w == b"content-length: 0").unwrap();
        bytes.splice(at..at + 17, format!("content-length: {}", body.len()).into_bytes());
        bytes.extend_from_slice(body);
        server.raw(&bytes)
    };
    let deep = "[".repeat(100_000);
    let deep_object = "{\"a\":".repeat(100_000);
    let in_schema = format!(
        "{{\"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], \"response_format\": {}1{}}}",
        "{\"a\":".repeat(90_000),
        "}".repeat(90_000)
    );
    let zeros = format!("{{\"prompt\": [{}0]}}", "0,".repeat(1_000_000));
    for body in [
        b"".as_slice(),
        b"not json",
        b"[]",
        b"\"text\"",
        b"{\"messages\": NaN}",
        b"{\"messages\": -Infinity}",
        b"{\"messages\": \"\xff\xfe\"}",
        b"{\"temperature\": 1e400}",
        deep.as_bytes(),
        deep_object.as_bytes(),
        in_schema.as_bytes(),
        zeros.as_bytes(),
    ] {
        let response = post(body);
        assert_eq!(response.status, 400, "{:?}", String::from_utf8_lossy(&body[..body.len().min(40)]));
        response.error();
    }
    let gzip = server.request("POST", "/v1/completions", "content-encoding: gzip\r\n", "{}");
    assert_eq!(gzip.status, 415);
}

#[test]
fn headers_past_the_limits_are_refused() {
    let server = says_hello(Options::default());
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(server.request("GET", "/health", &many, "").status, 431);
    let long = format!("x-long: {}\r\n", "a".repeat(200_000));
    assert_eq!(server.request("GET", "/health", &long, "").status, 431);
    assert_eq!(server.raw(b"GARBAGE\r\n\r\n").status, 400);
}

#[test]
fn a_reader_that_stops_reading_is_cut_off_and_its_request_cancelled() {
    let engine = Scripted::always(Script::Flood);
    let options = Options { write_timeout: Duration::from_millis(300), ..Options::default() };
    let server = Server::with(engine.clone(), PLAIN_TEMPLATE, options);
    let stream = server.open("/v1/chat/completions", &chat_body(json!({"stream": true})));
    engine.wait_idle();
    assert_eq!(engine.cancelled.load(Ordering::SeqCst), 1);
    // It was held back by the socket, not collected in memory: a token is some 250 bytes here.
    let sent = engine.sent.load(Ordering::SeqCst);
    assert!(sent < 100_000, "{sent} tokens were generated for nobody");
    drop(stream);
}

#[test]
fn a_client_that_goes_away_frees_its_rows_at_once() {
    let engine = Scripted::always(Script::Hang(ids("ab")));
    let server = Server::start(engine.clone());
    for stream in [true, false] {
        for n in [1, 4] {
            let mut connection = server.connect();
            let body = chat_body(json!({"stream": stream, "n": n})).to_string();
            connection.write_all(&request_bytes("POST", "/v1/chat/completions", "", &body)).unwrap();
            wait_for("the request to run", || engine.running.load(Ordering::SeqCst) == n);
            drop(connection);
            engine.wait_idle();
        }
    }
    let metrics = server.get("/metrics").text();
    assert!(metrics.contains("status=\"499\""), "{metrics}");
}

#[test]
fn idle_connections_make_room_for_newcomers() {
    let server = says_hello(Options { max_connections: 4, ..Options::default() });
    let idle: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    for _ in 0..8 {
        server.chat(json!({})).ok();
    }
    drop(idle);
}

#[test]
fn connections_are_kept_alive_between_requests() {
    let server = says_hello(Options::default());
    let mut reader = BufReader::new(server.connect());
    for stream in [false, true, false] {
        let body = chat_body(json!({"stream": stream})).to_string();
        let bytes = request_bytes("POST", "/v1/chat/completions", "", &body);
        reader.get_mut().write_all(&bytes).unwrap();
        assert_eq!(Response::read(&mut reader).status, 200);
    }
    assert!(reader.buffer().is_empty());
}

/// Four times as many clients as places, each asking again as soon as it has an answer: the places stay full, and
/// whoever gets none is told so at once.
#[test]
fn overload_keeps_the_places_full() {
    const PLACES: usize = 4;
    const ANSWERS: usize = 200;
    let engine = Scripted::with_capacity(PLACES, |_| Script::Pace(Duration::from_millis(1), 3));
    let server = Server::start(engine.clone());
    let answered = std::sync::atomic::AtomicUsize::new(0);
    let refused = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 * PLACES {
            scope.spawn(|| {
                while answered.load(Ordering::SeqCst) < ANSWERS {
                    let response = server.chat(json!({}));
                    match response.status {
                        200 => {
                            assert_eq!(response.json()["choices"][0]["message"]["content"], "xxx");
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        429 => {
                            assert_eq!(response.header("retry-after"), Some("3"));
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                        other => panic!("{other}: {}", response.text()),
                    }
                }
            });
        }
    });
    assert!(refused.load(Ordering::SeqCst) > 0, "it was no overload");
    engine.wait_idle();
    server.chat(json!({})).ok();
}

/// A client that sends a byte now and then within its time is served.
#[test]
fn slow_but_honest_clients_are_served() {
    let server = says_hello(Options::default());
    let mut stream = server.connect();
    for byte in request_bytes("GET", "/health", "", "") {
        stream.write_all(&[byte]).unwrap();
    }
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
}

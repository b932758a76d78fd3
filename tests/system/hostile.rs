//! Input that is wrong on purpose: the answer is a 4xx or a closed connection, memory stays flat, others don't notice.

use std::io::{ErrorKind, Read, Write};

use serde_json::{Value, json};

use crate::client::{connect, read, request, send, stream};
use crate::replica::{Replica, chat, serve};

pub(crate) const CHAT: &str = "/v1/chat/completions";
/// What hostile input may cost in memory, at most.
pub(crate) const ROOM: u64 = 64 << 20;

fn refused(replica: &Replica, what: &str, body: &[u8]) -> String {
    let response = send(replica.address, "POST", CHAT, body).unwrap();
    assert!((400..500).contains(&response.status), "{what}: {} {}", response.status, response.text());
    response.error()
}

#[test]
fn malformed_requests_are_refused_and_harm_nobody() {
    let replica = serve(&[]);
    replica.must_answer();
    let before = replica.settled_memory();

    let deep = |open: &str, close: &str| format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let nested = deep(open, close);
        refused(&replica, "nested body", nested.as_bytes());
        refused(&replica, "unclosed nesting", open.repeat(100_000).as_bytes());
        for field in [
            "messages",
            "response_format",
            "tools",
            "chat_template_kwargs",
            "logit_bias",
            "model",
            "nonsense",
        ] {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":2,"{field}":{nested}}}"#
            );
            refused(&replica, &format!("nested {field}"), body.as_bytes());
        }
    }

    refused(
        &replica,
        "invalid UTF-8",
        b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\xc0\x80\"}]}",
    );
    refused(&replica, "half a surrogate", br#"{"messages":[{"role":"user","content":"\ud800"}]}"#);
    refused(&replica, "a NUL byte and no JSON", b"\0\0\0\0");
    refused(&replica, "nothing", b"");
    refused(&replica, "not an object", b"[]");
    refused(&replica, "trailing text", br#"{"messages":[{"role":"user","content":"x"}]} and more"#);

    let numbers = [
        (
            "max_tokens",
            vec!["-1", "0", "1.5", "1e99", "NaN", "Infinity", "18446744073709551616", "\"3\"", "true"],
        ),
        ("temperature", vec!["-0.1", "NaN", "-Infinity", "1e400", "\"hot\"", "[]"]),
        ("top_p", vec!["-1", "1.1", "NaN", "{}"]),
        ("n", vec!["-1", "0", "100000", "1e30"]),
        ("seed", vec!["1.5", "NaN", "99999999999999999999999"]),
        ("logit_bias", vec![r#"{"99999999":1}"#, r#"{"-1":1}"#, r#"{"1":1e9}"#, r#"{"x":1}"#, "[1]"]),
        ("top_logprobs", vec!["-1", "1000"]),
        ("stop", vec!["[1]", "{}", r#"[["a"]]"#]),
    ];
    for (field, values) in numbers {
        for value in values {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"logprobs":true,"{field}":{value}}}"#
            );
            let message = refused(&replica, &format!("{field}: {value}"), body.as_bytes());
            let parses = serde_json::from_str::<Value>(&body).is_ok();
            assert!(!parses || message.contains(field), "{field}: {value} is refused with {message:?}");
        }
    }

    replica.must_answer();
    let after = replica.settled_memory();
    assert!(after < before + ROOM, "memory went from {before} to {after} bytes");
}

#[test]
fn ten_gigabytes_are_not_read() {
    let replica = serve(&[]);
    replica.must_answer();
    let before = replica.settled_memory();

    // Announced: refused before any of it is sent.
    let mut stream = connect(replica.address).unwrap();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: 10000000000\r\n\r\n",
        replica.address
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status[9..], b"413");

    // Unannounced: cut off long before the end.
    let mut stream = connect(replica.address).unwrap();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        replica.address
    );
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    let mut sent = 0_u64;
    let refused = loop {
        if let Err(error) = stream.write_all(&chunk) {
            break error;
        }
        sent += 0x10000;
        assert!(sent < 10_000_000_000, "all of it was taken");
    };
    assert!(
        matches!(refused.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
        "the connection was not closed but: {refused}"
    );
    println!("a chunked body was cut off after {} MiB", sent >> 20);
    assert!(sent < 100 << 20, "{sent} bytes were taken");

    replica.must_answer();
    let after = replica.settled_memory();
    assert!(after < before + ROOM, "memory went from {before} to {after} bytes");
}

#[test]
fn a_bad_request_leaves_its_neighbours_alone() {
    let replica = serve(&[]);
    let mut body = chat("Tell me about rivers.", 100);
    body["logprobs"] = json!(true);
    let alone = replica.post(CHAT, &body).json()["choices"][0].clone();
    let neighbour = std::thread::spawn({
        let (address, body) = (replica.address, body.clone());
        move || stream(address, CHAT, &body).unwrap().all().unwrap()
    });
    while !neighbour.is_finished() {
        refused(&replica, "broken JSON", b"{\"messages\": [");
        let half = connect(replica.address).unwrap();
        (&half).write_all(&request("POST", CHAT, replica.address, b"{}")[..40]).unwrap();
        drop(half);
        let garbage = connect(replica.address).unwrap();
        (&garbage).write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello TLS\r\n\r\n").unwrap();
        let answer = read(garbage);
        assert!(answer.is_err() || answer.is_ok_and(|a| a.status == 400));
    }
    let events = neighbour.join().unwrap();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, alone["message"]["content"].as_str().unwrap());
}

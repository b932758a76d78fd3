//! A small HTTP server for the tests: one thread a connection, one request a connection, and a handler that may
//! misbehave in any way it likes.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What a client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
}

impl Request {
    /// The first byte asked for.
    pub(crate) fn range_start(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

pub(crate) struct Server {
    pub(crate) url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves until the test ends.
    pub(crate) fn start(handler: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let handler = Arc::new(handler);
        let seen = log.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (handler, seen) = (handler.clone(), seen.clone());
                let Ok(mut stream) = stream else { continue };
                std::thread::spawn(move || {
                    let Some(request) = read(&stream) else { return };
                    seen.lock().unwrap().push(request.clone());
                    handler(&request, &mut stream);
                });
            }
        });
        Server { url, log }
    }

    /// Requests so far, in order of arrival.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_string();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    Some(Request { path, headers })
}

/// A response with a status line and headers of its own.
pub(crate) fn reply(stream: &mut TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) {
    let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "content-length") {
        head += &format!("content-length: {}\r\n", body.len());
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    // A client that gave up is no fault of the server's.
    let _ = stream.write_all((head + "\r\n").as_bytes());
    let _ = stream.write_all(body);
    let _ = stream.flush();
}

/// Serves `body` as a well-behaved server does, ranges included.
pub(crate) fn serve_ranges(request: &Request, stream: &mut TcpStream, body: &[u8], etag: &str) {
    let fresh = request.headers.get("if-range").is_none_or(|e| e == etag);
    match request.range_start() {
        Some(start) if fresh && start < body.len() => {
            let range = format!("bytes {start}-{}/{}", body.len() - 1, body.len());
            reply(
                stream,
                "206 Partial Content",
                &[("content-range", &range), ("etag", etag)],
                &body[start..],
            );
        }
        _ => reply(stream, "200 OK", &[("etag", etag), ("accept-ranges", "bytes")], body),
    }
}

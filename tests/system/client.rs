//! A small HTTP client over plain sockets, so that a test can also misbehave.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// No answer takes longer; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A response, read to its end.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e} in {}: {}", self.status, self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The message of OpenAI's error envelope.
    pub(crate) fn error(&self) -> String {
        let json = self.json();
        json["error"]["message"].as_str().unwrap_or_else(|| panic!("no error envelope in {json}")).to_owned()
    }
}

/// A connection with deadlines on reading and writing.
pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The bytes of a request that closes its connection afterwards.
pub(crate) fn request(method: &str, path: &str, address: SocketAddr, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// Sends a request and reads its response.
pub(crate) fn send(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> io::Result<Response> {
    let mut stream = connect(address)?;
    stream.write_all(&request(method, path, address, body))?;
    read(stream)
}

/// Reads one response to its end.
pub(crate) fn read(stream: TcpStream) -> io::Result<Response> {
    let (status, headers, mut body) = head(stream)?;
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes)?;
    Ok(Response { status, headers, body: bytes })
}

/// Posts JSON.
pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> io::Result<Response> {
    send(address, "POST", path, body.to_string().as_bytes())
}

/// Posts JSON with `stream: true` and returns the server-sent events as they come.
pub(crate) fn stream(address: SocketAddr, path: &str, body: &Value) -> io::Result<Events> {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    let mut stream = connect(address)?;
    stream.write_all(&request("POST", path, address, body.to_string().as_bytes()))?;
    let (status, _, body) = head(stream)?;
    Ok(Events { status, lines: BufReader::new(body) })
}

/// Server-sent events, as JSON; ends after `[DONE]`.
pub(crate) struct Events {
    pub(crate) status: u16,
    lines: BufReader<Body>,
}

impl Events {
    /// The next event; `None` at `[DONE]`.
    ///
    /// # Errors
    /// Where the stream ends or breaks before.
    pub(crate) fn next(&mut self) -> io::Result<Option<Value>> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended before [DONE]"));
            }
            let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(None);
            }
            return serde_json::from_str(data).map(Some).map_err(io::Error::other);
        }
    }

    /// The next event's text, with its empty line.
    ///
    /// # Errors
    /// Where the stream ends or breaks before.
    pub(crate) fn event(&mut self) -> io::Result<String> {
        let mut text = String::new();
        while !text.ends_with("\n\n") {
            if self.lines.read_line(&mut text)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended within an event"));
            }
        }
        Ok(text)
    }

    /// All events to the end.
    pub(crate) fn all(mut self) -> io::Result<Vec<Value>> {
        let mut events = Vec::new();
        while let Some(event) = self.next()? {
            events.push(event);
        }
        Ok(events)
    }
}

/// A response's body: chunked, or up to its length or the connection's end.
pub(crate) enum Body {
    Chunked { stream: BufReader<TcpStream>, left: usize, ended: bool },
    Plain(io::Take<BufReader<TcpStream>>),
}

impl Read for Body {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (stream, left, ended) = match self {
            Body::Plain(plain) => return plain.read(into),
            Body::Chunked { stream, left, ended } => (stream, left, ended),
        };
        if *ended {
            return Ok(0);
        }
        if *left == 0 {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            *left = usize::from_str_radix(line.trim(), 16).map_err(|_| {
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("chunk length {line:?}"))
            })?;
            if *left == 0 {
                *ended = true;
                return Ok(0);
            }
        }
        let wanted = into.len().min(*left);
        let count = stream.read(&mut into[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        *left -= count;
        if *left == 0 {
            let mut end = [0; 2];
            stream.read_exact(&mut end)?;
        }
        Ok(count)
    }
}

type Head = (u16, Vec<(String, String)>, Body);

/// Status, headers and the body yet to be read.
fn head(stream: TcpStream) -> io::Result<Head> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status =
        status.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, format!("status {line:?}")))?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let body = if header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        Body::Chunked { stream, left: 0, ended: false }
    } else {
        let length = header("content-length").and_then(|v| v.parse().ok()).unwrap_or(u64::MAX);
        Body::Plain(stream.take(length))
    };
    Ok((status, headers, body))
}

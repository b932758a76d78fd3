//! One streamed chat completion over a connection of its own, timed.
//!
//! Raw hyper and a scanner for `data:` lines: the generator shares the machine with what it measures.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// The longest event line taken; a server that sends more is broken.
const MAX_LINE: usize = 4 << 20;

/// Where requests go.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// `host:port`.
    pub(super) authority: String,
    /// Path before `/v1`, without a trailing slash.
    pub(super) base: String,
    pub(super) api_key: Option<String>,
}

/// What one request took.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) first: Option<Duration>,
    pub(super) between: Vec<Duration>,
    pub(super) whole: Duration,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
}

/// Why a request brought no whole answer: a status, or a word (`connect`, `cut`, `timeout`).
pub(super) type Fault = String;

impl Target {
    /// Reads `http://host[:port][/base]`.
    pub(super) fn parse(url: &str, api_key: Option<String>) -> Result<Target, String> {
        let rest = url.strip_prefix("http://").ok_or("write http://HOST:PORT (https is not measured)")?;
        let (authority, base) =
            rest.split_once('/').map_or((rest, String::new()), |(a, b)| (a, format!("/{b}")));
        let base = base.trim_end_matches('/').trim_end_matches("/v1").to_string();
        if authority.is_empty() || authority.contains('@') || authority.contains(char::is_whitespace) {
            return Err("write http://HOST:PORT".into());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_string() } else { format!("{authority}:80") };
        Ok(Target { authority, base, api_key })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<hyper::Response<hyper::body::Incoming>, Fault> {
        let connect = |_| "connect".to_string();
        let stream = TcpStream::connect(&self.authority).await.map_err(connect)?;
        // Small writes and small events: waiting to fill a segment would be measured as the server's delay.
        stream.set_nodelay(true).map_err(connect)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| "connect".to_string())?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|_| "request".to_string())?;
        sender.send_request(request).await.map_err(|_| "cut".to_string())
    }

    /// The first model the server lists.
    pub(super) async fn first_model(&self) -> Result<String, Fault> {
        let response = self.send(Method::GET, "/v1/models", String::new()).await?;
        if response.status() != 200 {
            return Err(response.status().as_str().to_string());
        }
        let body = http_body_util::Limited::new(response.into_body(), MAX_LINE);
        let body = body.collect().await.map_err(|_| "cut".to_string())?.to_bytes();
        let listing: Value = serde_json::from_slice(&body).map_err(|_| "no JSON".to_string())?;
        listing["data"][0]["id"].as_str().map(str::to_string).ok_or_else(|| "no model listed".to_string())
    }

    /// Sends a chat completion with `"stream": true` in `body` and times its events.
    pub(super) async fn stream(&self, body: &Value) -> Result<Measured, Fault> {
        let start = Instant::now();
        let response = self.send(Method::POST, "/v1/chat/completions", body.to_string()).await?;
        if response.status() != 200 {
            return Err(response.status().as_str().to_string());
        }
        let mut incoming = response.into_body();
        let mut measured = Measured::default();
        let mut pending: Vec<u8> = Vec::new();
        let mut last = start;
        let mut pieces = 0;
        let mut usage = None;
        let mut done = false;
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|_| "cut".to_string())?;
            let Some(piece) = frame.data_ref() else { continue };
            pending.extend_from_slice(piece);
            let mut from = 0;
            while let Some(end) = pending[from..].iter().position(|b| *b == b'\n') {
                let line = &pending[from..from + end];
                from += end + 1;
                let Some(data) = line.strip_prefix(b"data:") else { continue };
                let data = data.trim_ascii();
                if data == b"[DONE]" {
                    done = true;
                    continue;
                }
                let event: Value = serde_json::from_slice(data).map_err(|_| "no JSON".to_string())?;
                if event.get("error").is_some_and(|e| !e.is_null()) {
                    return Err("error event".into());
                }
                if let Some(numbers) = event.get("usage").filter(|u| u.is_object()) {
                    usage = Some(numbers.clone());
                }
                if event["choices"][0]["delta"]["content"].as_str().is_some_and(|t| !t.is_empty()) {
                    let now = Instant::now();
                    pieces += 1;
                    match measured.first {
                        None => measured.first = Some(now - start),
                        Some(_) => measured.between.push(now - last),
                    }
                    last = now;
                }
            }
            pending.drain(..from);
            if pending.len() > MAX_LINE {
                return Err("endless line".into());
            }
        }
        if !done {
            return Err("cut".into());
        }
        measured.whole = start.elapsed();
        let count = |name: &str| usage.as_ref().and_then(|u| u[name].as_u64());
        measured.prompt_tokens = count("prompt_tokens").unwrap_or(0);
        measured.output_tokens = count("completion_tokens").unwrap_or(pieces);
        Ok(measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let target = |url| Target::parse(url, None);
        assert_eq!(target("http://h:1/a/v1/").unwrap().base, "/a");
        assert_eq!(target("http://h:1/v1").unwrap().base, "");
        assert_eq!(target("http://h").unwrap().authority, "h:80");
        assert_eq!(target("http://[::1]").unwrap().authority, "[::1]:80");
        for bad in ["h:1", "https://h", "http://", "http://u@h"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }
}

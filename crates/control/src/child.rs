//! One child process: started, listened to, probed, and reported on.
//!
//! The child is `consort serve … --supervised`. It ends when its standard input does, which is when this process does,
//! however that happens: the kernel closes the pipe. On standard output it writes one JSON line where it listens and
//! one when it is ready ([`Said`]); its standard error is passed on with its name in front, and the last lines of it
//! go into the report of its end.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use consort_api::ReadyReport;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc::Sender;

use crate::supervisor::{Event, ReplicaId};

/// Bytes of a line that are read; a longer one is cut.
const LINE: u64 = 16 << 10;
/// Lines of a child's log that are kept for the report of its end.
const LAST_LINES: usize = 3;
/// Bytes of an answer to `/ready`.
const ANSWER: usize = 64 << 10;

/// What a child says on standard output, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Said {
    /// Its socket is open; the model is being loaded.
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// It can answer.
    Ready,
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: u32,
    /// Held open: the child lives as long as this.
    _stdin: Option<ChildStdin>,
}

/// Starts `command` as replica `id`, whose events go to `events` until [`Event::Exited`], which is the last.
pub(crate) fn start(
    id: &ReplicaId,
    command: std::process::Command,
    events: Sender<Event>,
) -> std::io::Result<Running> {
    let mut command = Command::from(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // A group of its own: Ctrl-C in the terminal is for `up`, which then drains its children in order.
    #[cfg(unix)]
    command.process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id().ok_or_else(|| std::io::Error::other("the process was gone at once"))?;
    let stdin = child.stdin.take();
    let last = Arc::new(Mutex::new(VecDeque::new()));
    let log = child.stderr.take().map(|stderr| tokio::spawn(pass_on(id.clone(), stderr, last.clone())));
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(listen(id.clone(), stdout, events.clone()));
    }
    let id = id.clone();
    tokio::spawn(async move {
        let how = match child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => format!("its end could not be waited for: {error}"),
        };
        if let Some(log) = log {
            // What it said last is read before its end is told; a grandchild could hold the pipe open.
            let _ = tokio::time::timeout(Duration::from_millis(200), log).await;
        }
        let last = last.lock().unwrap_or_else(PoisonError::into_inner).make_contiguous().join(" | ");
        let how = if last.is_empty() { how } else { format!("{how}; it said: {last}") };
        // Nobody listens any more only where everything ends.
        let _ = events.send(Event::Exited(id, how)).await;
    });
    Ok(Running { pid, _stdin: stdin })
}

async fn pass_on(id: ReplicaId, stderr: impl AsyncRead + Unpin, last: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(stderr);
    while let Some(line) = line(&mut lines).await {
        let line = logged(&id, line);
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line.chars().take(400).collect());
    }
}

/// Logs what a replica logged, under its id; returns the words in it. Lines of JSON keep what connects them with a request
/// as fields of their own, so that one search finds it in every process.
fn logged(id: &ReplicaId, line: String) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str::<Value>(&line) else {
        tracing::info!(target: "replica", "[{id}] {line}");
        return line;
    };
    let mut take = |name: &str| match fields.remove(name) {
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let (level, message) = (take("level"), take("message"));
    let (request_id, trace_id) = (take("request_id"), take("trace_id"));
    take("timestamp");
    take("target");
    let detail = Value::Object(fields).to_string();
    let replica = id.as_str();
    match level.as_str() {
        "ERROR" => tracing::error!(target: "replica", replica, request_id, trace_id, detail, "{message}"),
        "WARN" => tracing::warn!(target: "replica", replica, request_id, trace_id, detail, "{message}"),
        _ => tracing::info!(target: "replica", replica, request_id, trace_id, detail, "{message}"),
    }
    format!("{message} {detail}")
}

async fn listen(id: ReplicaId, stdout: impl AsyncRead + Unpin, events: Sender<Event>) {
    let mut lines = BufReader::new(stdout);
    while let Some(line) = line(&mut lines).await {
        let event = match serde_json::from_str(&line) {
            Ok(Said::Listening { address }) if address.ip().is_loopback() => {
                Event::Listening(id.clone(), address)
            }
            Ok(Said::Ready) => Event::Ready(id.clone()),
            _ => {
                tracing::debug!(target: "replica", "[{id}] {line}");
                continue;
            }
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// The next line without its end, cut at [`LINE`] bytes; `None` at the end.
async fn line(from: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut bytes = Vec::new();
    let count = from.take(LINE).read_until(b'\n', &mut bytes).await.ok()?;
    (count > 0).then(|| String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// Asks a replica how it is; sends [`Event::Alive`] where it answers within `patience`.
pub(crate) async fn probe(id: ReplicaId, address: SocketAddr, patience: Duration, events: Sender<Event>) {
    match tokio::time::timeout(patience, ask(address)).await {
        Ok(Ok(report)) => {
            // Nobody listens any more only where everything ends.
            let stalled_ms = report.as_ref().map_or(0, |report| report.stalled_ms);
            let _ = events.send(Event::Alive(id.clone(), stalled_ms)).await;
            if let Some(report) = report {
                let _ = events.send(Event::Report(id, Box::new(report))).await;
            }
        }
        Ok(Err(error)) => tracing::debug!(replica = id.as_str(), %error, "the health check failed"),
        Err(_) => tracing::debug!(replica = id.as_str(), "no answer to the health check"),
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// How the replica is. One that says it isn't ready (it drains) lives too, and reports nothing.
async fn ask(address: SocketAddr) -> Result<Option<ReadyReport>, Failed> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("/ready")
        .header("host", address.to_string())
        .header("connection", "close")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let ready = response.status().is_success();
    let body = Limited::new(response.into_body(), ANSWER).collect().await?.to_bytes();
    connection.abort();
    if ready { Ok(Some(serde_json::from_slice(&body)?)) } else { Ok(None) }
}

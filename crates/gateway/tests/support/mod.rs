//! A gateway in this process, before replicas that are scripts: they answer as real ones do (any continuation has the
//! same bytes), and fail when told.

#![allow(dead_code)] // Not every test file uses all of it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consort_api::{Fleet, FleetModel, FleetReplica, FleetVersion, Numerics, Protocol};
use consort_gateway::{Gateway, Settings};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// What a replica does with the next request for an answer.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Answers, after this many milliseconds.
    Late(u64),
    /// Sends this many events of the stream and breaks off.
    Break(usize),
    /// Answers with this status and code.
    Status(u16, &'static str),
    /// Sends this many events and then waits to be told to go on.
    Hold(usize),
    /// Sends this many events, waits to be told to go on, and breaks off.
    HoldAndBreak(usize),
    /// Sends these bytes, head and all, and closes the connection.
    Raw(Vec<u8>),
    /// Sends these bytes and then nothing, with the connection open.
    Stuck(Vec<u8>),
    /// Sends the first bytes, and then the second again and again until it is cut off.
    Flood(Vec<u8>, Vec<u8>),
    /// Sends this many events and is dead from then on.
    Die(usize),
    /// Sends this many events and goes on with an act that sends bytes.
    Then(usize, Box<Act>),
    /// Answers with this text for its first word, in two pieces that are cut so many bytes behind the text's beginning.
    Cut(&'static str, usize),
}

/// A scripted replica.
pub(crate) struct Replica {
    pub(crate) address: SocketAddr,
    pub(crate) fingerprint: &'static str,
    /// Taken one a request; after the last one it answers.
    pub(crate) acts: Mutex<Vec<Act>>,
    /// Requests for answers that came, as JSON, with their heads.
    pub(crate) asked: Mutex<Vec<(String, Value)>>,
    pub(crate) finished: AtomicU64,
    pub(crate) go_on: Notify,
    /// Answers as any server of OpenAI's API does, and knows nothing of ours.
    plain: bool,
    /// Bytes that floods could send, and told when one was cut off.
    pub(crate) flooded: AtomicU64,
    pub(crate) cut_off: Notify,
    dead: watch::Sender<bool>,
}

impl Replica {
    pub(crate) async fn start(fingerprint: &'static str) -> Arc<Replica> {
        Replica::run(fingerprint, false).await
    }

    /// A server that isn't ours.
    pub(crate) async fn plain() -> Arc<Replica> {
        Replica::run("", true).await
    }

    async fn run(fingerprint: &'static str, plain: bool) -> Arc<Replica> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let replica = Arc::new(Replica {
            address: listener.local_addr().unwrap(),
            fingerprint,
            acts: Mutex::default(),
            asked: Mutex::default(),
            finished: AtomicU64::new(0),
            go_on: Notify::new(),
            plain,
            flooded: AtomicU64::new(0),
            cut_off: Notify::new(),
            dead: watch::channel(false).0,
        });
        let serving = replica.clone();
        tokio::spawn(async move {
            let mut dead = serving.dead.subscribe();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = dead.wait_for(|dead| *dead) => return,
                };
                let Ok((stream, _)) = accepted else { return };
                let (replica, mut dead) = (serving.clone(), serving.dead.subscribe());
                tokio::spawn(async move {
                    tokio::select! {
                        _ = replica.serve(stream) => {}
                        _ = dead.wait_for(|dead| *dead) => {}
                    }
                });
            }
        });
        replica
    }

    /// Nobody listens there any more, and all connections are closed.
    pub(crate) fn kill(&self) {
        self.dead.send_replace(true);
    }

    pub(crate) fn act(&self, act: Act) {
        self.acts.lock().unwrap().push(act);
    }

    pub(crate) fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    async fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).await.ok()? == 0 {
                    return None;
                }
            }
            let length = head
                .lines()
                .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned))
                .map_or(0, |l| l.parse().unwrap());
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.ok()?;
            if head.starts_with("POST /tokenize") {
                let body: Value = serde_json::from_slice(&body).unwrap();
                let count = body["prompt"].as_str().map_or(0, |text| text.split(' ').count());
                self.asked.lock().unwrap().push((head.clone(), body));
                respond(&mut stream, 200, &json!({"count": count})).await?;
            } else if head.starts_with("POST") {
                let body: Value = serde_json::from_slice(&body).unwrap();
                self.asked.lock().unwrap().push((head.clone(), body.clone()));
                let act = {
                    let mut acts = self.acts.lock().unwrap();
                    if acts.is_empty() { None } else { Some(acts.remove(0)) }
                };
                self.answer(&mut stream, &body, act).await?;
                self.finished.fetch_add(1, Ordering::SeqCst);
            } else if self.plain && head.starts_with("GET /ready") {
                respond(&mut stream, 404, &json!({"error": "not found"})).await?;
            } else if self.plain {
                let cards = json!([{"id": "m"}, {"id": "other"}]);
                respond(&mut stream, 200, &json!({"object": "list", "data": cards})).await?;
            } else if head.starts_with("GET /ready") {
                let ready = json!({"status": "ready", "model": "m", "system_fingerprint": self.fingerprint});
                respond(&mut stream, 200, &ready).await?;
            } else {
                let card = json!({"id": "m", "object": "model", "created": 1, "owned_by": "x", "max_model_len": 512, "system_fingerprint": self.fingerprint});
                respond(&mut stream, 200, &json!({"object": "list", "data": [card]})).await?;
            }
        }
    }

    async fn answer(&self, stream: &mut BufReader<TcpStream>, body: &Value, act: Option<Act>) -> Option<()> {
        let mut events = events(body, self.fingerprint);
        let act = match act {
            Some(Act::Then(count, act)) => {
                stream.write_all(STREAM_HEAD.as_bytes()).await.ok()?;
                for event in events.drain(..count.min(events.len())) {
                    chunk(stream, &event).await?;
                }
                Some(*act)
            }
            act => act,
        };
        match act {
            Some(Act::Cut(said, behind)) => {
                let all = events.concat().replace("w0 ", said);
                let at = all.find(said).unwrap_or(0) + behind;
                let (first, second) = all.as_bytes().split_at(at);
                let bytes =
                    [STREAM_HEAD.as_bytes(), &chunked(first), &chunked(second), b"0\r\n\r\n"].concat();
                return stream.write_all(&bytes).await.ok();
            }
            Some(Act::Raw(bytes)) => {
                stream.write_all(&bytes).await.ok()?;
                return None;
            }
            Some(Act::Stuck(bytes)) => {
                stream.write_all(&bytes).await.ok()?;
                return std::future::pending().await;
            }
            Some(Act::Flood(first, again)) => {
                stream.write_all(&first).await.ok()?;
                while stream.write_all(&again).await.is_ok() {
                    self.flooded.fetch_add(again.len() as u64, Ordering::SeqCst);
                }
                self.cut_off.notify_one();
                return None;
            }
            Some(Act::Die(count)) => {
                stream.write_all(STREAM_HEAD.as_bytes()).await.ok()?;
                for event in events.drain(..count) {
                    chunk(stream, &event).await?;
                }
                self.kill();
                return None;
            }
            Some(Act::Late(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Some(Act::Status(status, code)) => {
                let error = json!({"error": {"message": code, "type": "x", "param": null, "code": code}});
                return respond(stream, status, &error).await;
            }
            Some(Act::Break(count)) => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-seed: 7\r\ntransfer-encoding: chunked\r\n\r\n";
                stream.write_all(head.as_bytes()).await.ok()?;
                for event in events.drain(..count.min(events.len())) {
                    chunk(stream, &event).await?;
                }
                return None;
            }
            _ => {}
        }
        if self.plain && body["stream"] != true {
            let answer = json!({"id": "x", "object": "chat.completion", "model": "m",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": "plain"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}});
            return respond(stream, 200, &answer).await;
        }
        stream.write_all(STREAM_HEAD.as_bytes()).await.ok()?;
        for (i, event) in events.iter().enumerate() {
            match act {
                Some(Act::Hold(count)) if count == i => self.go_on.notified().await,
                Some(Act::HoldAndBreak(count)) if count == i => {
                    self.go_on.notified().await;
                    return None;
                }
                _ => {}
            }
            chunk(stream, event).await?;
        }
        stream.write_all(b"0\r\n\r\n").await.ok()
    }
}

/// What a stream of events begins with.
pub(crate) const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-seed: 7\r\ntransfer-encoding: chunked\r\n\r\n";

/// Bytes in chunked encoding.
pub(crate) fn chunked(bytes: &[u8]) -> Vec<u8> {
    let mut out = format!("{:x}\r\n", bytes.len()).into_bytes();
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
    out
}

async fn chunk(stream: &mut BufReader<TcpStream>, event: &str) -> Option<()> {
    stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await.ok()?;
    stream.flush().await.ok()
}

async fn respond(stream: &mut BufReader<TcpStream>, status: u16, body: &Value) -> Option<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.ok()
}

/// The answer to any request: `max_tokens` words, the ids 100, 101, …, behind what was emitted.
pub(crate) fn events(body: &Value, fingerprint: &str) -> Vec<String> {
    let (id, created) = (&body["consort"]["id"], &body["consort"]["created"]);
    let head = |choices: Value, usage: Value| {
        let json = json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": "m",
            "system_fingerprint": fingerprint, "choices": choices, "usage": usage});
        format!("data: {json}\n\n")
    };
    let total = body["max_tokens"].as_u64().unwrap_or(5);
    let said = body["consort"]["choices"][0].as_array().map_or(0, |ids| ids.len() as u64);
    let mut events = Vec::new();
    let choice =
        |delta: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
    if said == 0 {
        events.push(head(choice(json!({"role": "assistant", "content": ""})), Value::Null));
    }
    for i in said..total {
        let mut choices = choice(json!({"content": format!("w{i} ")}));
        choices[0]["token_ids"] = json!([100 + i]);
        if i + 1 == total {
            choices[0]["finish_reason"] = json!("length");
        }
        events.push(head(choices, Value::Null));
    }
    events.push(head(
        json!([]),
        json!({"prompt_tokens": 3, "completion_tokens": total, "total_tokens": total + 3}),
    ));
    events.push("data: [DONE]\n\n".to_owned());
    events
}

/// A gateway on a port of its own.
pub(crate) struct Door {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) address: SocketAddr,
}

/// Settings with short times.
pub(crate) fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.replicas.probe_interval = Duration::from_millis(20);
    settings.retries.wait = Duration::from_secs(2);
    settings
}

/// The fleet of one model, `m`, with these replicas.
pub(crate) fn fleet(replicas: &[Arc<Replica>], numerics: Numerics) -> Fleet {
    let replicas = replicas
        .iter()
        .enumerate()
        .map(|(i, replica)| FleetReplica {
            id: format!("r{i}"),
            url: format!("http://{}", replica.address),
            key: Some("replica-secret".to_owned()),
            slow_start_ms: 0,
            draining: false,
            protocol: if replica.plain { Protocol::OpenAi } else { Protocol::Consort },
        })
        .collect();
    let version = FleetVersion { name: "stable".to_owned(), weight: 1, numerics, on_trial: false, replicas };
    Fleet {
        models: vec![FleetModel {
            name: "m".to_owned(),
            aliases: vec!["alias".to_owned()],
            versions: vec![version],
            shadow: None,
        }],
    }
}

/// Starts a gateway and waits until all replicas are known to be ready.
pub(crate) async fn door(settings: Settings, fleet: &Fleet) -> Door {
    let gateway = Gateway::new(settings);
    gateway.set_fleet(fleet).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(gateway.clone().serve(listener, std::future::pending()));
    let door = Door { gateway, address };
    door.all_ready().await;
    door
}

/// A response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let mark = format!("{name}: ");
        self.head.lines().find_map(|line| line.strip_prefix(&mark)).map(str::to_owned)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub(crate) fn text(&self) -> String {
        let events =
            self.body.split("\n\n").filter_map(|event| event.split_once("data: ").map(|(_, data)| data));
        let chunks = events.filter_map(|data| serde_json::from_str::<Value>(data).ok());
        chunks.filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
    }
}

impl Door {
    /// Returns when all replicas of the fleet are known to be ready.
    pub(crate) async fn all_ready(&self) {
        let ready = || {
            let snapshot = self.gateway.snapshot();
            let mut replicas = snapshot.models.iter().flat_map(|m| &m.versions).flat_map(|v| &v.replicas);
            replicas.all(|replica| replica.report.is_some())
        };
        while !ready() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) async fn open(&self, headers: &[(&str, &str)], body: &Value) -> BufReader<TcpStream> {
        self.raw("POST", "/v1/chat/completions", headers, &body.to_string()).await
    }

    pub(crate) async fn raw(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        BufReader::new(stream)
    }

    pub(crate) async fn post(&self, headers: &[(&str, &str)], body: &Value) -> Response {
        read(self.open(headers, body).await).await
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        read(self.raw("GET", path, &[], "").await).await
    }
}

/// A response to its end; chunks are put together.
pub(crate) async fn read(mut stream: BufReader<TcpStream>) -> Response {
    let mut bytes = Vec::new();
    let reading = stream.read_to_end(&mut bytes);
    tokio::time::timeout(Duration::from_secs(20), reading).await.expect("an answer in time").unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let mut body = String::new();
    if head.contains("transfer-encoding: chunked") {
        let mut rest = rest;
        while let Some((length, after)) = rest.split_once("\r\n") {
            let Ok(length) = usize::from_str_radix(length, 16) else { break };
            body.push_str(after.get(..length).unwrap_or(after));
            rest = after.get(length + 2..).unwrap_or("");
        }
    } else {
        body = rest.to_owned();
    }
    Response { status, head: head.to_ascii_lowercase(), body }
}

/// A chat request.
pub(crate) fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

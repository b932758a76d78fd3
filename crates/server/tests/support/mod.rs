//! What the tests of the HTTP face share: a byte-level tokenizer, a scripted engine, a server on a free port, and a
//! client that speaks HTTP/1.1 by hand, so that it can also speak it badly.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use consort_inference::{
    Event, FinishReason, Request, Stats, StepRows, Submission, SubmitError, TokenEvent, Usage,
};
use consort_model::tokenizer::GgufVocab;
use consort_model::{ChatTemplate, Tokenizer};
use consort_server::{Generate, Options, Replica, ServeError, Slot};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

/// Past this a test is stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const PLAIN_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A template of the Hermes kind.
pub(crate) const TOOL_TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}Answer with <tool_call>{\"name\": …}</tool_call>.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Ids below 256 are the bytes themselves.
pub(crate) const IM_START: u32 = 256;
pub(crate) const IM_END: u32 = 257;
pub(crate) const TOOL_CALLS: u32 = 258;
pub(crate) const VOCAB: usize = 260;

/// One token a byte, and a few special ones.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    tokenizer_with(&[])
}

/// As [`tokenizer`], with more special tokens: ids from [`VOCAB`] on.
pub(crate) fn tokenizer_with(more: &[&str]) -> Arc<Tokenizer> {
    // GPT-2 spells bytes that can't be printed as the characters from U+0100 on, in order.
    let mut spelled: Vec<String> = Vec::new();
    let mut next = 256;
    for byte in 0..=255u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let c = if printable {
            byte
        } else {
            next += 1;
            next - 1
        };
        spelled.push(char::from_u32(c).unwrap().to_string());
    }
    for special in ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]"] {
        spelled.push(special.to_owned());
    }
    spelled.push("th".to_owned());
    let mut token_types = vec![1; 256];
    token_types.extend([3, 3, 3, 1]);
    spelled.extend(more.iter().map(|special| (*special).to_owned()));
    token_types.extend(more.iter().map(|_| 3));
    let vocab = GgufVocab {
        model: "gpt2",
        pre: Some("smollm"),
        tokens: spelled.iter().map(String::as_str).collect(),
        token_types,
        merges: vec!["t h"],
        eos: Some(IM_END),
        ..GgufVocab::default()
    };
    Arc::new(Tokenizer::from_vocab(&vocab, Path::new("bytes.gguf")).unwrap())
}

/// The bytes of `text` as ids.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// What the scripted engine does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Script {
    /// These tokens, then the end token and the end, or whatever limit comes first.
    Say(Vec<u32>),
    /// These tokens, then this end.
    End(Vec<u32>, FinishReason),
    /// These tokens, then a failure.
    Fail(Vec<u32>),
    /// These tokens, then silence until the reader goes away.
    Hang(Vec<u32>),
    /// Tokens without end.
    Flood,
    /// A token every so often, so many of them.
    Pace(Duration, usize),
    /// No.
    Refuse(SubmitError),
}

impl Script {
    pub(crate) fn say(text: &str) -> Script {
        Script::Say(ids(text))
    }
}

type Chooser = dyn Fn(&Request) -> Script + Send + Sync;

/// An engine that follows a script. It needs the runtime it is submitted from only to wait with.
pub(crate) struct Scripted {
    choose: Box<Chooser>,
    pub(crate) capacity: usize,
    pub(crate) running: Arc<AtomicUsize>,
    pub(crate) cancelled: Arc<AtomicUsize>,
    pub(crate) sent: Arc<AtomicUsize>,
    pub(crate) requests: Mutex<Vec<Request>>,
    /// Its thread is gone.
    pub(crate) stopped: AtomicBool,
    drained: AtomicUsize,
}

impl Scripted {
    pub(crate) fn new(choose: impl Fn(&Request) -> Script + Send + Sync + 'static) -> Arc<Scripted> {
        Scripted::with_capacity(usize::MAX, choose)
    }

    pub(crate) fn with_capacity(
        capacity: usize,
        choose: impl Fn(&Request) -> Script + Send + Sync + 'static,
    ) -> Arc<Scripted> {
        Arc::new(Scripted {
            choose: Box::new(choose),
            capacity,
            running: Arc::default(),
            cancelled: Arc::default(),
            sent: Arc::default(),
            requests: Mutex::default(),
            stopped: AtomicBool::new(false),
            drained: AtomicUsize::new(0),
        })
    }

    pub(crate) fn always(script: Script) -> Arc<Scripted> {
        Scripted::new(move |_| script.clone())
    }

    pub(crate) fn last_request(&self) -> Request {
        self.requests.lock().unwrap().last().unwrap().clone()
    }

    /// Waits until nothing runs.
    pub(crate) fn wait_idle(&self) {
        wait_for("the engine to be idle", || self.running.load(Ordering::SeqCst) == 0);
    }
}

/// A fake ln p: a function of the id alone, so that a continuation has the same.
pub(crate) fn fake_logprob(id: u32) -> f32 {
    -(id as f32) / 256.0
}

fn token(id: u32, request: &Request) -> Event {
    let top = request.logprobs.map_or(0, u32::from);
    Event::Token(TokenEvent {
        id,
        logprob: request.logprobs.map(|_| fake_logprob(id)),
        top: (0..top).map(|i| ((id + i) % 256, fake_logprob(id) - i as f32)).collect(),
    })
}

impl Generate for Scripted {
    fn submit(&self, request: Request) -> Result<Submission, SubmitError> {
        if self.drained.load(Ordering::SeqCst) > 0 {
            return Err(SubmitError::Draining);
        }
        let script = (self.choose)(&request);
        self.requests.lock().unwrap().push(request.clone());
        if let Script::Refuse(error) = script {
            return Err(error);
        }
        if self.running.fetch_add(1, Ordering::SeqCst) >= self.capacity {
            self.running.fetch_sub(1, Ordering::SeqCst);
            return Err(SubmitError::Busy { queued: self.capacity, retry_after_seconds: 3 });
        }
        let (events, receiver) = mpsc::channel(16);
        let (running, cancelled, sent) = (self.running.clone(), self.cancelled.clone(), self.sent.clone());
        tokio::runtime::Handle::current().spawn(async move {
            let gone = play(script, &request, &events, &sent).await.is_err();
            if gone {
                cancelled.fetch_add(1, Ordering::SeqCst);
            }
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Submission { events: receiver })
    }

    fn refusal(&self) -> Option<SubmitError> {
        self.stopped.load(Ordering::SeqCst).then_some(SubmitError::Stopped)
    }

    fn fingerprint(&self) -> &str {
        "fp_scripted"
    }

    fn max_context(&self) -> usize {
        4096
    }

    fn stats(&self) -> Stats {
        Stats {
            running: self.running.load(Ordering::SeqCst),
            kv_blocks: 8,
            step_rows: StepRows { counts: std::array::from_fn(|i| 14 - i as u64), sum: 1234 },
            kv_blocks_used: 2,
            ..Stats::default()
        }
    }

    fn drain(&self, budget: Duration) {
        self.drained.store(1, Ordering::SeqCst);
        let until = Instant::now() + budget;
        while self.running.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

async fn play(
    script: Script,
    request: &Request,
    events: &mpsc::Sender<Event>,
    sent: &AtomicUsize,
) -> Result<(), mpsc::error::SendError<Event>> {
    // As if all but the last token of a prompt of this beginning had been there before.
    let cached_tokens = if request.prompt.starts_with(&ids("cached")) { request.prompt.len() - 1 } else { 0 };
    events.send(Event::Started { cached_tokens }).await?;
    if let Some(top) = request.prompt_logprobs {
        let scored = Request { logprobs: Some(top), ..request.clone() };
        let tokens = request.prompt.iter().skip(1).map(|id| match token(*id, &scored) {
            Event::Token(token) => token,
            _ => unreachable!(),
        });
        events.send(Event::Prompt(tokens.collect())).await?;
    }
    let (tokens, last) = match script {
        Script::Say(mut tokens) => {
            tokens.push(IM_END);
            (tokens, Some(FinishReason::Stop))
        }
        Script::End(tokens, reason) => (tokens, Some(reason)),
        Script::Fail(tokens) => {
            for id in tokens {
                events.send(token(id, request)).await?;
            }
            return events.send(Event::Failed { reason: "the scripted engine broke".to_owned() }).await;
        }
        Script::Hang(tokens) => (tokens, None),
        Script::Flood => loop {
            events.send(token(u32::from(b'x'), request)).await?;
            sent.fetch_add(1, Ordering::SeqCst);
        },
        Script::Pace(step, count) => {
            for _ in 0..count {
                tokio::time::sleep(step).await;
                events.send(token(u32::from(b'x'), request)).await?;
            }
            (vec![IM_END], Some(FinishReason::Stop))
        }
        Script::Refuse(_) => unreachable!(),
    };
    let mut count = request.emitted.len();
    let mut reason = last;
    for id in tokens.iter().skip(request.emitted.len()) {
        if count >= request.max_tokens {
            reason = Some(FinishReason::Length);
            break;
        }
        events.send(token(*id, request)).await?;
        count += 1;
    }
    match reason {
        Some(reason) => {
            let usage =
                Usage { prompt_tokens: request.prompt.len(), cached_tokens, completion_tokens: count };
            events.send(Event::Finished { reason, usage }).await
        }
        None => {
            events.closed().await;
            Err(mpsc::error::SendError(Event::Failed { reason: String::new() }))
        }
    }
}

/// Waits for something that another thread brings about.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A server on a thread of its own; dropping it shuts it down and waits.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    pub(crate) fn start(engine: impl Generate) -> Server {
        Server::with(engine, PLAIN_TEMPLATE, Options::default())
    }

    pub(crate) fn with(engine: impl Generate, template: &str, options: Options) -> Server {
        Server::serve(replica(engine, template), options)
    }

    pub(crate) fn serve(replica: impl Into<Slot> + Send + 'static, options: Options) -> Server {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            consort_server::runtime().unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                consort_server::serve(listener, replica, options, async {
                    let _ = stopped.await;
                })
                .await
            })
        });
        Server { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Asks it to shut down, without waiting.
    pub(crate) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends raw bytes and reads one response.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Response {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Response::read(&mut BufReader::new(stream))
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Response {
        self.raw(&request_bytes(method, path, headers, body))
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.request("GET", path, "", "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, "", &body.to_string())
    }

    /// A chat with one user message and `extra` fields.
    pub(crate) fn chat(&self, extra: Value) -> Response {
        self.post("/v1/chat/completions", &chat_body(extra))
    }

    pub(crate) fn complete(&self, extra: Value) -> Response {
        self.post("/v1/completions", &merge(serde_json::json!({"prompt": "Hi"}), extra))
    }

    /// Sends a request and returns the connection, the response's head read.
    pub(crate) fn open(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        stream.write_all(&request_bytes("POST", path, "", &body.to_string())).unwrap();
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the connection ended in its head");
            if line == "\r\n" {
                return reader;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap().unwrap();
            }
        }
    }
}

pub(crate) fn replica(engine: impl Generate, template: &str) -> Replica {
    let tokenizer = tokenizer();
    let template = ChatTemplate::new(template).unwrap();
    Replica {
        engine: Arc::new(engine),
        template: Some(Arc::new(template)),
        tokenizer,
        model: "scripted".to_owned(),
        aliases: vec!["other-name".to_owned()],
    }
}

pub(crate) fn merge(mut base: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

pub(crate) fn chat_body(extra: Value) -> Value {
    merge(serde_json::json!({"messages": [{"role": "user", "content": "Hi"}]}), extra)
}

pub(crate) fn request_bytes(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
        .into_bytes()
}

/// A response, whole.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn read(reader: &mut impl BufRead) -> Response {
        let mut head = String::new();
        loop {
            let mut line = String::new();
            let count = reader.read_line(&mut line).unwrap();
            assert!(count > 0, "the connection ended in the head: {head:?}");
            if line == "\r\n" {
                break;
            }
            head.push_str(&line.to_ascii_lowercase());
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut response = Response { status, head, body: Vec::new() };
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = read_chunk(reader) {
                response.body.extend(chunk);
            }
        } else if let Some(length) = response.header("content-length") {
            response.body = vec![0; length.parse().unwrap()];
            std::io::Read::read_exact(reader, &mut response.body).unwrap();
        }
        response
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.text()))
    }

    /// 200, and its JSON.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// An error's `param`, `code` and message, the envelope checked.
    pub(crate) fn error(&self) -> (Option<String>, String, String) {
        let json = self.json();
        let error = json["error"].as_object().unwrap();
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (text("param"), text("code").unwrap(), text("message").unwrap())
    }

    /// The events of a stream: the JSON of each `data:` line; the end marker checked.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let text = self.text();
        let rest = text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no [DONE]: {text}"));
        parse_events(rest)
    }
}

pub(crate) fn parse_events(text: &str) -> Vec<Value> {
    text.split_terminator("\n\n")
        .filter(|event| !event.starts_with(':'))
        .map(|event| {
            serde_json::from_str(event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}"))).unwrap()
        })
        .collect()
}

/// One chunk of a chunked body; none at its end.
pub(crate) fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let length = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("chunk length {line:?}"));
    let mut chunk = vec![0; length + 2];
    std::io::Read::read_exact(reader, &mut chunk).unwrap();
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

/// All text that the chunks of choice `index` carry.
pub(crate) fn streamed_text(events: &[Value], index: u64) -> String {
    let choices = events.iter().flat_map(|e| e["choices"].as_array().unwrap());
    choices
        .filter(|c| c["index"] == index)
        .filter_map(|c| c["delta"]["content"].as_str().or_else(|| c["text"].as_str()))
        .collect()
}

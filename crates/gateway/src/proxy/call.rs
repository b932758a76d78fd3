//! A request for an answer, read once: what the gateway must know of it, and what it sends a replica instead.
//!
//! A replica is always asked for a stream with token ids and usage, under a seed, an id and a time of creation that
//! are the gateway's: whatever replica goes on with the answer then says the same. Everything else of the request
//! is passed on byte for byte, and it is the replica that judges it. Only the fields that are rewritten are judged
//! here, in the replica's words.

use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::random;
use crate::error::{Outcome, Refusal};
use crate::json::{self, List, Malformed, Object};

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

impl Shape {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Shape::Chat => "/v1/chat/completions",
            Shape::Completion => "/v1/completions",
        }
    }
}

/// Tokens an answer is taken to need where the request sets no limit.
const ASSUMED_TOKENS: u64 = 256;
/// Bytes of JSON that make a token, about.
const BYTES_PER_TOKEN: usize = 4;
/// Answers of one request: more than any replica gives.
const MAX_CHOICES: usize = 4096;
/// Token ids of an answer begun elsewhere, in all.
const MAX_EMITTED: usize = 1 << 20;

/// A request for an answer.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) shape: Shape,
    body: Bytes,
    /// The members that go on as they are, each with neighbours that follow it.
    kept: Vec<Range<usize>>,
    /// As JSON text: what the model is called here is the gateway's business.
    pub(crate) model: Option<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Members of `stream_options` that aren't ours, as they came.
    other_options: Vec<Range<usize>>,
    pub(crate) return_token_ids: bool,
    /// The seed, as the client wrote it or as drawn here.
    pub(crate) seed: i64,
    pub(crate) id: String,
    pub(crate) created: u64,
    /// What was emitted elsewhere before the request came here; one list a choice.
    pub(crate) emitted: Vec<Vec<u32>>,
    /// Answers: prompts times `n`.
    pub(crate) choices: usize,
    /// Where the prompt lies in the body.
    prompt: Range<usize>,
    max_tokens: u64,
    /// Whether logprobs were asked for.
    pub(crate) logprobs: bool,
}

impl Call {
    /// Reads a body.
    ///
    /// # Errors
    /// 400 where it is no JSON object or a field that is rewritten here is wrong.
    pub(crate) fn read(shape: Shape, body: Bytes) -> Outcome<Call> {
        let text = std::str::from_utf8(&body).map_err(|e| {
            Refusal::json(format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to()))
        })?;
        if text.trim_ascii().is_empty() {
            return Err(Refusal::json("the body is empty; send a JSON object"));
        }
        let mut fields = Fields::default();
        fields.read(text).map_err(|reason| match reason {
            Reason::Refused(refusal) => refusal,
            Reason::Malformed(at) => Refusal::json(explain(text, at)),
        })?;
        let Fields {
            kept,
            model,
            stream,
            options,
            token_ids,
            seed,
            n,
            prompts,
            prompt,
            max_tokens,
            resume,
            logprobs,
            ..
        } = fields;
        if options.is_some() && !stream {
            return Err(Refusal::param("stream_options", "stream_options is for stream: true"));
        }
        let (include_usage, other_options) = options.unwrap_or_default();
        let choices = n.saturating_mul(prompts).clamp(1, MAX_CHOICES as u64) as usize;
        let resume = resume.unwrap_or_default();
        let emitted = match (resume.choices.is_empty(), resume.emitted_token_ids.is_empty()) {
            (_, true) => resume.choices,
            (true, false) => vec![resume.emitted_token_ids],
            (false, false) => {
                return Err(Refusal::param(
                    "consort.choices",
                    "send consort.emitted_token_ids or consort.choices, not both",
                ));
            }
        };
        if !emitted.is_empty() && emitted.len() != choices {
            let message = format!("consort continues {} choices; this request has {choices}", emitted.len());
            return Err(Refusal::param("consort", message));
        }
        if emitted.iter().map(Vec::len).sum::<usize>() > MAX_EMITTED {
            return Err(Refusal::param(
                "consort",
                format!("consort holds more than {MAX_EMITTED} token ids"),
            ));
        }
        let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        let id = match resume.id {
            Some(id) if plain_id(&id) => id,
            Some(_) => {
                let message = "consort.id must be 1 to 128 letters, digits, - or _";
                return Err(Refusal::param("consort.id", message));
            }
            None => format!("{prefix}-{:016x}{:08x}", random(), random() as u32),
        };
        Ok(Call {
            shape,
            kept,
            model,
            stream,
            include_usage,
            other_options,
            return_token_ids: token_ids,
            // 53 bits, so that every JSON reader gets back what the header says.
            seed: seed.unwrap_or_else(|| (random() >> 11) as i64),
            id,
            created: resume.created.unwrap_or_else(now_seconds),
            emitted,
            choices,
            prompt,
            max_tokens,
            logprobs,
            body,
        })
    }

    /// What a replica is asked, where `emitted` was said of each choice.
    pub(crate) fn upstream_body<'a>(&self, emitted: impl Iterator<Item = &'a [u32]>) -> Bytes {
        let mut out = BytesMut::with_capacity(self.body.len() + 256);
        out.put_u8(b'{');
        for range in &self.kept {
            out.put_slice(&self.body[range.clone()]);
            out.put_u8(b',');
        }
        out.put_slice(b"\"stream\":true,\"stream_options\":{\"include_usage\":true");
        for range in &self.other_options {
            out.put_u8(b',');
            out.put_slice(&self.body[range.clone()]);
        }
        out.put_slice(b"},\"return_token_ids\":true,\"seed\":");
        put_number(&mut out, self.seed);
        out.put_slice(b",\"consort\":{\"id\":\"");
        out.put_slice(self.id.as_bytes());
        out.put_slice(b"\",\"created\":");
        put_number(&mut out, self.created);
        let mut any = false;
        for ids in emitted {
            out.put_slice(if any { b"],[" } else { b",\"choices\":[[" });
            any = true;
            for (i, id) in ids.iter().enumerate() {
                if i > 0 {
                    out.put_u8(b',');
                }
                put_number(&mut out, *id);
            }
        }
        if any {
            out.put_slice(b"]]");
        }
        out.put_slice(b"}}");
        out.freeze()
    }

    /// The body as the client sent it.
    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// The prompt's JSON.
    pub(crate) fn prompt_text(&self) -> &[u8] {
        &self.body[self.prompt.clone()]
    }

    /// A hash of how the conversation begins, up to its first message from a user: the same for each of its requests.
    pub(crate) fn conversation(&self) -> u64 {
        let text = std::str::from_utf8(self.prompt_text()).unwrap_or_default();
        let mut end = text.len();
        if self.shape == Shape::Chat
            && let Ok(mut messages) = List::within(text, 0..text.len())
        {
            while let Ok(Some(message)) = messages.next() {
                let mut object = match Object::within(text, message.clone()) {
                    Ok(object) => object,
                    Err(_) => break,
                };
                let mut user = false;
                while let Ok(Some(member)) = object.next() {
                    user |= member.key == "role" && &text[member.value] == "\"user\"";
                }
                if user {
                    end = message.end;
                    break;
                }
            }
        }
        crate::policy::canary::mix(1, &text[..end])
    }

    /// Tokens of the prompt, about.
    pub(crate) fn prompt_tokens(&self) -> u64 {
        (self.prompt.len() / BYTES_PER_TOKEN) as u64
    }

    /// Tokens of all answers, at most or about.
    pub(crate) fn answer_tokens(&self) -> u64 {
        self.max_tokens.saturating_mul(self.choices as u64)
    }
}

fn put_number(out: &mut BytesMut, number: impl std::fmt::Display) {
    use std::fmt::Write as _;
    // Writing to memory doesn't fail.
    let _ = write!(out, "{number}");
}

fn plain_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What is wrong with `text`, said as serde_json says it.
pub(crate) fn explain(text: &str, malformed: Malformed) -> String {
    match serde_json::from_str::<serde::de::IgnoredAny>(text) {
        Err(error) => format!("the body is not valid JSON: {error}"),
        Ok(_) if malformed.at <= text.len() - text.trim_ascii_start().len() => {
            format!("the body must be a JSON object, not {}", json::kind(text.trim_ascii_start()))
        }
        Ok(_) => format!("the body is not valid JSON at byte {}", malformed.at),
    }
}

enum Reason {
    Refused(Refusal),
    Malformed(Malformed),
}

impl From<Malformed> for Reason {
    fn from(at: Malformed) -> Reason {
        Reason::Malformed(at)
    }
}

impl From<Refusal> for Reason {
    fn from(refusal: Refusal) -> Reason {
        Reason::Refused(refusal)
    }
}

/// The fields that mean something here.
struct Fields {
    kept: Vec<Range<usize>>,
    model: Option<String>,
    stream: bool,
    /// `include_usage`, and what stands beside it.
    options: Option<(bool, Vec<Range<usize>>)>,
    token_ids: bool,
    seed: Option<i64>,
    n: u64,
    prompts: u64,
    prompt: Range<usize>,
    max_tokens: u64,
    resume: Option<consort_api::Resume>,
    logprobs: bool,
    /// Bits of [`KNOWN`].
    seen: u32,
}

impl Default for Fields {
    fn default() -> Fields {
        Fields {
            kept: Vec::with_capacity(4),
            model: None,
            stream: false,
            options: None,
            token_ids: false,
            seed: None,
            n: 1,
            prompts: 1,
            prompt: 0..0,
            max_tokens: ASSUMED_TOKENS,
            resume: None,
            logprobs: false,
            seen: 0,
        }
    }
}

/// Fields read here. One that stands twice is refused: two readers could take two different ones of them.
const KNOWN: [&str; 12] = [
    "model",
    "stream",
    "stream_options",
    "return_token_ids",
    "seed",
    "consort",
    "n",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
];

impl Fields {
    fn read(&mut self, text: &str) -> Result<(), Reason> {
        let mut object = Object::new(text)?;
        // The end of the member before, where it was kept: a run of kept members goes on in one piece.
        let mut run: Option<Range<usize>> = None;
        while let Some(member) = object.next()? {
            let key = member.key.as_ref();
            if let Some(i) = KNOWN.iter().position(|known| *known == key) {
                if self.seen & (1 << i) != 0 {
                    return Err(Refusal::param(key, format!("{key} stands twice; send it once")).into());
                }
                self.seen |= 1 << i;
            }
            let range = member.value.clone();
            let value = Value { name: key, text: &text[range.clone()] };
            let rewritten = match key {
                "model" => {
                    self.model = value.string()?;
                    true
                }
                "stream" => {
                    self.stream = value.boolean()?.unwrap_or(false);
                    true
                }
                "stream_options" => {
                    if value.text != "null" {
                        self.options = Some(stream_options(text, range)?);
                    }
                    true
                }
                "return_token_ids" => {
                    self.token_ids = value.boolean()?.unwrap_or(false);
                    true
                }
                "seed" => {
                    self.seed = value.integer()?;
                    true
                }
                "consort" => {
                    if value.text != "null" {
                        let resume = serde_json::from_str(value.text);
                        let wrong = |e| Refusal::param("consort", format!("consort is wrong: {e}"));
                        self.resume = Some(resume.map_err(wrong)?);
                    }
                    true
                }
                // What is wrong with the others is the replica's to say.
                "n" => {
                    self.n = value.text.parse().unwrap_or(1);
                    false
                }
                "max_tokens" | "max_completion_tokens" => {
                    self.max_tokens = value.text.parse().unwrap_or(ASSUMED_TOKENS);
                    false
                }
                "logprobs" => {
                    self.logprobs = !matches!(value.text, "null" | "false");
                    false
                }
                "messages" => {
                    self.prompt = range;
                    false
                }
                "prompt" => {
                    self.prompts = prompts(text, range.clone())?;
                    self.prompt = range;
                    false
                }
                _ => false,
            };
            match (&mut run, rewritten) {
                (Some(run), false) => run.end = member.whole.end,
                (None, false) => run = Some(member.whole),
                (_, true) => self.kept.extend(run.take()),
            }
        }
        self.kept.extend(run);
        Ok(())
    }
}

/// How many prompts there are: one text, one list of ids, or a list of either.
fn prompts(text: &str, range: Range<usize>) -> Result<u64, Malformed> {
    if !text[range.clone()].starts_with('[') {
        return Ok(1);
    }
    let mut list = List::within(text, range)?;
    let mut count = 0;
    while let Some(element) = list.next()? {
        if !text[element].starts_with(['"', '[']) {
            return Ok(1);
        }
        count += 1;
    }
    Ok(count)
}

fn stream_options(text: &str, range: Range<usize>) -> Result<(bool, Vec<Range<usize>>), Reason> {
    if !text[range.clone()].starts_with('{') {
        let kind = json::kind(&text[range]);
        return Err(Refusal::param(
            "stream_options",
            format!("stream_options must be an object, not {kind}"),
        )
        .into());
    }
    let (mut include_usage, mut others) = (None, Vec::new());
    let mut object = Object::within(text, range)?;
    while let Some(member) = object.next()? {
        if member.key == "include_usage" {
            let name = "stream_options.include_usage";
            let value = Value { name, text: &text[member.value] };
            if include_usage.replace(value.boolean()?.unwrap_or(false)).is_some() {
                return Err(Refusal::param(name, format!("{name} stands twice; send it once")).into());
            }
        } else {
            others.push(member.whole);
        }
    }
    Ok((include_usage.unwrap_or(false), others))
}

/// A field that is rewritten here.
struct Value<'a> {
    name: &'a str,
    text: &'a str,
}

impl Value<'_> {
    fn wrong(&self, wanted: &str) -> Refusal {
        Refusal::param(self.name, format!("{} must be {wanted}, not {}", self.name, json::kind(self.text)))
    }

    fn string(&self) -> Outcome<Option<String>> {
        match self.text {
            "null" => Ok(None),
            text => match json::string(text) {
                Some(string) => Ok(Some(string.into_owned())),
                None => Err(self.wrong("a string")),
            },
        }
    }

    fn boolean(&self) -> Outcome<Option<bool>> {
        match self.text {
            "null" => Ok(None),
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(self.wrong("true or false")),
        }
    }

    fn integer(&self) -> Outcome<Option<i64>> {
        match self.text {
            "null" => Ok(None),
            text => match text.parse() {
                Ok(integer) => Ok(Some(integer)),
                Err(_) if json::kind(text) == "a number" => Err(Refusal::param(
                    self.name,
                    format!(
                        "{} is {text}; it must be a whole number from {} to {}",
                        self.name,
                        i64::MIN,
                        i64::MAX
                    ),
                )),
                Err(_) => Err(self.wrong("a whole number")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn read(body: &str) -> Outcome<Call> {
        Call::read(Shape::Chat, Bytes::copy_from_slice(body.as_bytes()))
    }

    fn sent(call: &Call, emitted: &[&[u32]]) -> Json {
        serde_json::from_slice(&call.upstream_body(emitted.iter().copied())).unwrap()
    }

    #[test]
    fn the_replica_gets_the_request_with_the_gateways_fields() {
        let call =
            read(r#"{"model":"m","top_p":0.5, "messages":[1] ,"stream":null,"n":2,"seed":-7}"#).unwrap();
        assert_eq!((call.model.as_deref(), call.stream, call.choices), (Some("m"), false, 2));
        let expected = json!({
            "top_p": 0.5, "messages": [1], "n": 2, "stream": true, "stream_options": {"include_usage": true},
            "return_token_ids": true, "seed": -7, "consort": {"id": call.id, "created": call.created},
        });
        assert_eq!(sent(&call, &[]), expected);
        assert_eq!(sent(&call, &[&[1, 2], &[]])["consort"]["choices"], json!([[1, 2], []]));
        let call = read(r#"{"stream":true,"stream_options":{"x":1,"include_usage":false}}"#).unwrap();
        assert_eq!(sent(&call, &[])["stream_options"], json!({"include_usage": true, "x": 1}));
        assert!(call.seed >= 0, "one is drawn");
        assert_eq!(sent(&read("{}").unwrap(), &[])["stream"], true);
    }

    #[test]
    fn choices_are_counted_as_the_replica_counts_them() {
        let table = [
            (r#"{"prompt":"a"}"#, 1),
            (r#"{"prompt":["a","b"],"n":3}"#, 6),
            (r#"{"prompt":[1,2,3],"n":2}"#, 2),
            (r#"{"prompt":[[1],[2]]}"#, 2),
            (r#"{"prompt":[]}"#, 1),
        ];
        for (body, choices) in table {
            assert_eq!(read(body).unwrap().choices, choices, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let table = [
            ("", "empty"),
            ("[1]", "must be a JSON object, not an array"),
            ("{\"a\":}", "not valid JSON"),
            ("{} x", "not valid JSON: trailing"),
            (r#"{"stream":"yes"}"#, "stream must be true or false, not a string"),
            (r#"{"model":1}"#, "model must be a string, not a number"),
            (r#"{"seed":1.5}"#, "seed is 1.5; it must be a whole number"),
            (r#"{"stream_options":{}}"#, "stream_options is for stream: true"),
            (r#"{"stream":true,"stream_options":3}"#, "stream_options must be an object"),
            (r#"{"model":"a","mod\u0065l":"b"}"#, "model stands twice"),
            (r#"{"consort":{"id":"a\"b"}}"#, "consort.id must be"),
            (r#"{"consort":{"choices":[[1],[2]]}}"#, "consort continues 2 choices; this request has 1"),
        ];
        for (body, message) in table {
            let refusal = read(body).unwrap_err();
            assert_eq!(refusal.status, 400);
            assert!(refusal.message.contains(message), "{body}: {}", refusal.message);
        }
    }
}

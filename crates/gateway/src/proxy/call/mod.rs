//! A request for an answer, read once: what the gateway must know of it, and what it sends a replica instead.
//!
//! A replica is always asked for a stream with token ids and usage, under a seed, an id and a time of creation that
//! are the gateway's: whatever replica goes on with the answer then says the same. Everything else of the request
//! is passed on byte for byte, and it is the replica that judges it. Only the fields that are rewritten are judged
//! here, in the replica's words.

use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};

mod fields;

pub(crate) use fields::explain;
use fields::{Fields, Reason};

use super::random;
use crate::error::{Outcome, Refusal};
use crate::json::{List, Object};

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
/// Tokens that one answer is taken to need at most: longer than any model's context, so that a number that somebody made
/// up doesn't count as load.
const MOST_TOKENS: u64 = 1 << 20;
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
    /// Where that name lies in the body.
    model_value: Option<Range<usize>>,
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
            model_value,
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
            None => {
                let mut digits = [0; 24];
                crate::trace::put_hex(&mut digits, u128::from(random()) << 32 | u128::from(random() as u32));
                [prefix, "-", std::str::from_utf8(&digits).unwrap_or_default()].concat()
            }
        };
        Ok(Call {
            shape,
            kept,
            model,
            model_value,
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

    /// What somebody else's server is asked: what the client sent, under the name that the server knows the model by.
    /// Nothing is added, since a strict server refuses fields that it doesn't know.
    pub(crate) fn plain_body(&self, name: &str, literal: &str) -> Bytes {
        if self.model.as_deref() == Some(name) {
            return self.body.clone();
        }
        let mut out = BytesMut::with_capacity(self.body.len() + literal.len() + 16);
        match &self.model_value {
            Some(range) => {
                out.put_slice(&self.body[..range.start]);
                out.put_slice(literal.as_bytes());
                out.put_slice(&self.body[range.end..]);
            }
            None => {
                let open = self.body.iter().position(|b| *b == b'{').map_or(0, |at| at + 1);
                out.put_slice(&self.body[..open]);
                out.put_slice(b"\"model\":");
                out.put_slice(literal.as_bytes());
                if !self.body[open..].trim_ascii_start().starts_with(b"}") {
                    out.put_u8(b',');
                }
                out.put_slice(&self.body[open..]);
            }
        }
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
        let call = read(r#"{"max_tokens":18446744073709551615,"n":9}"#).unwrap();
        assert_eq!(call.answer_tokens(), 9 << 20, "nobody's number is added up unchecked");
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

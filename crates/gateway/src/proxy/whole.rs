//! A whole answer out of a stream's chunks, for clients that asked for one.
//!
//! Replicas are asked for streams either way: a replica that dies late in a long answer then costs a token, not the
//! answer. What comes out is what a replica would have sent, field for field: it is put together by the same types.
//!
//! Of a chunk only what is new is read, where it was found to lie: text goes from the replica's bytes into the answer's.
//! What is rare (calls, log-probabilities) is parsed into values.

use bytes::Bytes;
use consort_api::{
    ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, Completion, CompletionChoice, CompletionLogprobs,
    FunctionCall, ToolCall, ToolCallDelta, Usage,
};
use hyper::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::call::{Call, Shape};
use super::chunk::Chunk;
use super::session::{Next, Session};
use crate::error::{Outcome, Refusal};
use crate::json::{self, Cursor, Malformed};

/// Bytes of all answers of one request; more than any context holds.
const MAX_BYTES: usize = 256 << 20;

/// The chunks of an answer, put together.
pub(crate) struct Whole {
    shape: Shape,
    logprobs: bool,
    token_ids: bool,
    choices: Vec<Gathered>,
    usage: Usage,
    bytes: usize,
}

#[derive(Default)]
struct Gathered {
    text: String,
    calls: Vec<ToolCall>,
    chat_logprobs: ChatLogprobs,
    completion_logprobs: CompletionLogprobs,
    token_ids: Vec<u32>,
    finish_reason: Option<String>,
}

/// A chunk that can't be put together with the others.
#[derive(Debug)]
pub(crate) struct Unfit(pub(crate) String);

#[derive(Serialize)]
struct Marked<T> {
    #[serde(flatten)]
    answer: T,
    consort: serde_json::Value,
}

/// The whole answer of a session whose stream is open.
///
/// # Errors
/// Where it can't be completed.
pub(crate) async fn answer(mut session: Session) -> Outcome<Bytes> {
    let mut whole = Whole::new(&session.call);
    loop {
        match session.next().await {
            Next::Chunk(chunk) => whole.add(&chunk).map_err(|Unfit(reason)| {
                let message = format!("a replica's answer can't be put together: {reason}");
                Refusal::new(StatusCode::BAD_GATEWAY, "bad_gateway", message)
            })?,
            // Nobody has seen anything of it yet.
            Next::Anew => whole = Whole::new(&session.call),
            Next::Done => {
                let fingerprint = session.fingerprint();
                return Ok(whole.json(
                    &session.call,
                    &session.model.name,
                    fingerprint,
                    &session.progress.classes,
                ));
            }
            Next::Failed(refusal) => return Err(refusal),
        }
    }
}

impl Whole {
    pub(crate) fn new(call: &Call) -> Whole {
        let mut choices = Vec::new();
        choices.resize_with(call.choices, Gathered::default);
        Whole {
            shape: call.shape,
            logprobs: call.logprobs,
            token_ids: call.return_token_ids,
            choices,
            usage: Usage::default(),
            bytes: 0,
        }
    }

    /// Adds a chunk that is news.
    ///
    /// # Errors
    /// Where it doesn't have the shape of one.
    pub(crate) fn add(&mut self, chunk: &Chunk) -> Result<(), Unfit> {
        self.bytes += chunk.len();
        if self.bytes > MAX_BYTES {
            return Err(Unfit(format!("the answer has more than {MAX_BYTES} bytes")));
        }
        if let Some(usage) = chunk.usage() {
            self.usage = parsed("usage", usage)?;
        }
        let Some(choice) = &chunk.choice else { return Ok(()) };
        let missing = || Unfit(format!("there is no choice {}", choice.index));
        let own = self.choices.get_mut(choice.index).ok_or_else(missing)?;
        let content = chunk.content().ok_or_else(|| Unfit("a chunk without its text".to_owned()))?;
        match self.shape {
            Shape::Chat => own.add_delta(content)?,
            Shape::Completion => own.add_text(content)?,
        }
        match (self.shape, chunk.logprobs()) {
            (_, None) => {}
            (Shape::Chat, Some(text)) => {
                let more: ChatLogprobs = parsed("logprobs", text)?;
                own.chat_logprobs.content.extend(more.content);
            }
            (Shape::Completion, Some(text)) => {
                let more: CompletionLogprobs = parsed("logprobs", text)?;
                let lists = &mut own.completion_logprobs;
                lists.tokens.extend(more.tokens);
                lists.token_logprobs.extend(more.token_logprobs);
                lists.top_logprobs.extend(more.top_logprobs);
                lists.text_offset.extend(more.text_offset);
            }
        }
        if self.token_ids {
            own.token_ids.extend_from_slice(choice.token_ids.as_deref().unwrap_or_default());
        }
        if let Some(reason) = chunk.finish_reason() {
            own.finish_reason = Some(reason.to_owned());
        }
        Ok(())
    }

    /// The answer's JSON. `classes` are named in it where the answer is of more than one.
    pub(crate) fn json(
        self,
        call: &Call,
        model: &str,
        fingerprint: Option<&str>,
        classes: &[String],
    ) -> Bytes {
        let Whole { shape, logprobs, token_ids, choices, usage, .. } = self;
        let (id, created, model) = (call.id.clone(), call.created, model.to_owned());
        let system_fingerprint = fingerprint.map(str::to_owned);
        let choices = choices.into_iter().enumerate();
        match shape {
            Shape::Chat => {
                let object = "chat.completion".to_owned();
                let choices = choices.map(|(index, own)| own.chat(index, logprobs, token_ids)).collect();
                marked(
                    ChatCompletion { id, object, created, model, system_fingerprint, choices, usage },
                    classes,
                )
            }
            Shape::Completion => {
                let object = "text_completion".to_owned();
                let choices =
                    choices.map(|(index, own)| own.completion(index, logprobs, token_ids)).collect();
                let usage = Some(usage);
                marked(Completion { id, object, created, model, system_fingerprint, choices, usage }, classes)
            }
        }
    }
}

fn marked(answer: impl Serialize, classes: &[String]) -> Bytes {
    // Structs of strings and numbers always serialise.
    let json = if classes.len() > 1 {
        serde_json::to_vec(&Marked { answer, consort: serde_json::json!({"continued_across": classes}) })
    } else {
        serde_json::to_vec(&answer)
    };
    json.unwrap_or_default().into()
}

fn parsed<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, Unfit> {
    serde_json::from_str(text).map_err(|e| Unfit(format!("{what}: {e}")))
}

impl From<Malformed> for Unfit {
    fn from(wrong: Malformed) -> Unfit {
        Unfit(format!("its text is wrong at byte {}", wrong.at))
    }
}

impl Gathered {
    /// Adds a JSON string.
    fn add_text(&mut self, literal: &str) -> Result<(), Unfit> {
        let text = json::string(literal).ok_or_else(|| Unfit("the text is no string".to_owned()))?;
        self.text.push_str(&text);
        Ok(())
    }

    /// Adds a `delta`: text, or more of a call, or who speaks.
    fn add_delta(&mut self, delta: &str) -> Result<(), Unfit> {
        let (mut content, mut calls) = (None, None);
        Cursor::new(delta).object(|cursor, key, _| {
            let null = cursor.is_null();
            let value = &delta[cursor.skip()?];
            match key {
                "content" if !null => content = Some(value),
                "tool_calls" if !null => calls = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        content.map_or(Ok(()), |content| self.add_text(content))?;
        let Some(calls) = calls else { return Ok(()) };
        let calls: Vec<ToolCallDelta> = parsed("tool_calls", calls)?;
        calls.into_iter().try_for_each(|call| self.add_call(call))
    }

    fn add_call(&mut self, delta: ToolCallDelta) -> Result<(), Unfit> {
        if let Some(id) = delta.id {
            if delta.index != self.calls.len() {
                return Err(Unfit(format!("call {} comes after {} calls", delta.index, self.calls.len())));
            }
            let function = FunctionCall {
                name: delta.function.name.unwrap_or_default(),
                arguments: delta.function.arguments.unwrap_or_default(),
            };
            self.calls.push(ToolCall { id, kind: "function".to_owned(), function });
            return Ok(());
        }
        let missing = || Unfit(format!("call {} was never begun", delta.index));
        let call = self.calls.get_mut(delta.index).ok_or_else(missing)?;
        call.function.arguments.push_str(delta.function.arguments.as_deref().unwrap_or(""));
        Ok(())
    }

    fn chat(self, index: usize, logprobs: bool, token_ids: bool) -> ChatChoice {
        let content = if self.text.is_empty() && !self.calls.is_empty() { None } else { Some(self.text) };
        ChatChoice {
            index,
            message: ChatMessage {
                role: "assistant".to_owned(),
                content,
                tool_calls: (!self.calls.is_empty()).then_some(self.calls),
                tool_call_id: None,
            },
            logprobs: logprobs.then_some(self.chat_logprobs),
            finish_reason: self.finish_reason,
            token_ids: token_ids.then_some(self.token_ids),
        }
    }

    fn completion(self, index: usize, logprobs: bool, token_ids: bool) -> CompletionChoice {
        CompletionChoice {
            index,
            text: self.text,
            logprobs: logprobs.then_some(self.completion_logprobs),
            finish_reason: self.finish_reason,
            token_ids: token_ids.then_some(self.token_ids),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(shape: Shape, body: &str) -> Call {
        Call::read(shape, Bytes::copy_from_slice(body.as_bytes())).unwrap()
    }

    fn put_together(call: &Call, choices: &[&str]) -> Result<serde_json::Value, Unfit> {
        let mut whole = Whole::new(call);
        for choice in choices {
            let text = format!(r#"{{"id":"x","model":"m","choices":[{choice}],"usage":null}}"#);
            whole.add(&Chunk::read(text.into()).unwrap())?;
        }
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#;
        whole.add(&Chunk::read(Bytes::from_static(usage.as_bytes())).unwrap())?;
        Ok(serde_json::from_slice(&whole.json(call, "m", Some("fp"), &[])).unwrap())
    }

    #[test]
    fn text_calls_and_ids_come_together_in_order() {
        let chat = call(Shape::Chat, r#"{"messages":[],"return_token_ids":true,"logprobs":true}"#);
        let token =
            |text: &str| format!(r#"{{"token":{text},"logprob":-0.5,"bytes":null,"top_logprobs":[]}}"#);
        let answer = put_together(
            &chat,
            &[
                r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
                &format!(
                    r#"{{"index":0,"delta":{{"content":"a\"\u00e9"}},"logprobs":{{"content":[{}]}},"finish_reason":null,"token_ids":[7]}}"#,
                    token("\"a\"")
                ),
                r#"{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":"{"}}]},"finish_reason":null,"token_ids":[8]}"#,
                r#"{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}}],"content":null},"finish_reason":"tool_calls","token_ids":[9]}"#,
            ],
        )
        .unwrap();
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], "a\"é");
        assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], "{}");
        assert_eq!(choice["token_ids"], serde_json::json!([7, 8, 9]));
        assert_eq!(choice["logprobs"]["content"][0]["token"], "a");
        assert_eq!(
            (&choice["finish_reason"], &answer["usage"]["total_tokens"]),
            (&"tool_calls".into(), &5.into())
        );
        let plain = call(Shape::Completion, r#"{"prompt":"x","n":2}"#);
        let part = |index: usize, text: &str| {
            format!(r#"{{"index":{index},"text":"{text}","logprobs":null,"finish_reason":"length"}}"#)
        };
        let answer = put_together(&plain, &[&part(1, "b"), &part(0, "a"), &part(1, "c")]).unwrap();
        assert_eq!(
            (&answer["choices"][0]["text"], &answer["choices"][1]["text"]),
            (&"a".into(), &"bc".into())
        );
        assert_eq!(answer["choices"][0]["logprobs"], serde_json::Value::Null);
    }

    #[test]
    fn what_cannot_be_put_together_says_why() {
        let chat = call(Shape::Chat, r#"{"messages":[]}"#);
        for (choice, why) in [
            (r#"{"index":1,"delta":{}}"#, "no choice 1"),
            (r#"{"index":0}"#, "without its text"),
            (r#"{"index":0,"delta":{"content":7}}"#, "no string"),
            (r#"{"index":0,"delta":[]}"#, "wrong at byte 0"),
            (r#"{"index":0,"delta":{"tool_calls":{}}}"#, "tool_calls"),
            (r#"{"index":0,"delta":{"tool_calls":[{"index":0,"function":{}}]}}"#, "never begun"),
            (r#"{"index":0,"delta":{},"logprobs":3}"#, "logprobs"),
        ] {
            let Unfit(said) = put_together(&chat, &[choice]).unwrap_err();
            assert!(said.contains(why), "{choice}: {said}");
        }
    }
}

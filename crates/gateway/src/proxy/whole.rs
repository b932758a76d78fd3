//! A whole answer out of a stream's chunks, for clients that asked for one.
//!
//! Replicas are asked for streams either way: a replica that dies late in a long answer then costs a token, not the
//! answer. What comes out is what a replica would have sent, field for field: it is put together by the same types.

use bytes::Bytes;
use consort_api::{
    ChatChoice, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatMessage, Completion, CompletionChoice,
    CompletionLogprobs, FunctionCall, ToolCall, ToolCallDelta, Usage,
};
use hyper::StatusCode;
use serde::Serialize;

use super::call::{Call, Shape};
use super::session::{Next, Session};
use crate::error::{Outcome, Refusal};

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
            Next::Chunk(data) => {
                let added =
                    std::str::from_utf8(&data).map_err(|e| Unfit(e.to_string())).and_then(|t| whole.add(t));
                added.map_err(|Unfit(reason)| {
                    let message = format!("a replica's answer can't be put together: {reason}");
                    Refusal::new(StatusCode::BAD_GATEWAY, "bad_gateway", message)
                })?;
            }
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
    pub(crate) fn add(&mut self, text: &str) -> Result<(), Unfit> {
        self.bytes += text.len();
        if self.bytes > MAX_BYTES {
            return Err(Unfit(format!("the answer has more than {MAX_BYTES} bytes")));
        }
        let unfit = |e: serde_json::Error| Unfit(e.to_string());
        match self.shape {
            Shape::Chat => {
                let chunk: consort_api::ChatChunk = serde_json::from_str(text).map_err(unfit)?;
                self.usage = chunk.usage.unwrap_or(self.usage);
                chunk.choices.into_iter().try_for_each(|choice| self.add_chat(choice))
            }
            Shape::Completion => {
                let chunk: Completion = serde_json::from_str(text).map_err(unfit)?;
                self.usage = chunk.usage.unwrap_or(self.usage);
                chunk.choices.into_iter().try_for_each(|choice| self.add_completion(choice))
            }
        }
    }

    fn choice(&mut self, index: usize) -> Result<&mut Gathered, Unfit> {
        self.choices.get_mut(index).ok_or_else(|| Unfit(format!("there is no choice {index}")))
    }

    fn add_chat(&mut self, choice: ChatChunkChoice) -> Result<(), Unfit> {
        let own = self.choice(choice.index)?;
        own.text.push_str(choice.delta.content.as_deref().unwrap_or(""));
        choice.delta.tool_calls.unwrap_or_default().into_iter().try_for_each(|call| own.add_call(call))?;
        own.chat_logprobs.content.extend(choice.logprobs.unwrap_or_default().content);
        own.add_end(choice.token_ids, choice.finish_reason);
        Ok(())
    }

    fn add_completion(&mut self, choice: CompletionChoice) -> Result<(), Unfit> {
        let own = self.choice(choice.index)?;
        own.text.push_str(&choice.text);
        if let Some(more) = choice.logprobs {
            let lists = &mut own.completion_logprobs;
            lists.tokens.extend(more.tokens);
            lists.token_logprobs.extend(more.token_logprobs);
            lists.top_logprobs.extend(more.top_logprobs);
            lists.text_offset.extend(more.text_offset);
        }
        own.add_end(choice.token_ids, choice.finish_reason);
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

impl Gathered {
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

    fn add_end(&mut self, token_ids: Option<Vec<u32>>, finish_reason: Option<String>) {
        self.token_ids.extend(token_ids.unwrap_or_default());
        self.finish_reason = finish_reason.or(self.finish_reason.take());
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

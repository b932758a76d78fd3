//! A whole answer: the same pieces as a stream's, put together.

use std::future::poll_fn;

use consort_api::{
    ChatChoice, ChatCompletion, ChatMessage, Completion, CompletionChoice, CompletionLogprobs, FunctionCall,
    ToolCall,
};
use consort_inference::TokenEvent;
use serde::Serialize;

use super::{Envelope, Shape, UsageSum};
use crate::answer::{AnswerSet, Finish, Out, Piece};
use crate::error::{ApiError, ApiResult};
use crate::logprobs;
use crate::tools::ToolPiece;

/// One choice, complete.
#[derive(Default)]
struct Gathered {
    text: String,
    calls: Vec<FunctionCall>,
    tokens: Vec<TokenEvent>,
    prompt: Option<Vec<TokenEvent>>,
    finish: Option<Finish>,
}

impl Gathered {
    fn add(&mut self, piece: Piece) {
        for part in piece.parts {
            match part {
                ToolPiece::Text(text) => self.text.push_str(&text),
                ToolPiece::Call { name, .. } => {
                    self.calls.push(FunctionCall { name, arguments: String::new() })
                }
                ToolPiece::Arguments { index, text } => {
                    if let Some(call) = self.calls.get_mut(index) {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
        self.tokens.extend(piece.tokens);
    }
}

/// The body of either shape.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Whole {
    Chat(ChatCompletion),
    Completion(Completion),
}

/// Waits for all answers.
///
/// # Errors
/// The first failure of any.
pub(crate) async fn collect(envelope: Envelope, mut set: AnswerSet) -> ApiResult<Whole> {
    let mut gathered: Vec<Gathered> = Vec::with_capacity(envelope.choices);
    gathered.resize_with(envelope.choices, Gathered::default);
    let mut usage = UsageSum::default();
    while let Some((choice, out)) = poll_fn(|cx| set.poll_next(cx)).await {
        let own =
            gathered.get_mut(choice).ok_or_else(|| ApiError::internal("an answer to nobody's question"))?;
        match out {
            Out::Prompt(tokens) => own.prompt = Some(tokens),
            Out::Piece(piece) => own.add(piece),
            Out::Done { piece, finish, usage: part } => {
                own.add(piece);
                own.finish = Some(finish);
                usage.add(choice, envelope.n, part);
            }
            Out::Failed(error) => return Err(error),
        }
    }
    let choices = gathered.into_iter().enumerate();
    Ok(match envelope.shape {
        Shape::Chat => Whole::Chat(ChatCompletion {
            choices: choices.map(|(i, own)| chat_choice(&envelope, i, own)).collect(),
            object: envelope.object(false).to_owned(),
            id: envelope.id,
            created: envelope.created,
            model: envelope.model,
            system_fingerprint: Some(envelope.fingerprint),
            usage: usage.wire(),
        }),
        Shape::Completion => Whole::Completion(Completion {
            choices: choices.map(|(i, own)| completion_choice(&envelope, i, own)).collect(),
            object: envelope.object(false).to_owned(),
            id: envelope.id,
            created: envelope.created,
            model: envelope.model,
            system_fingerprint: Some(envelope.fingerprint),
            usage: Some(usage.wire()),
        }),
    })
}

fn ids(envelope: &Envelope, tokens: &[TokenEvent]) -> Option<Vec<u32>> {
    envelope.return_token_ids.then(|| tokens.iter().map(|t| t.id).collect())
}

fn chat_choice(envelope: &Envelope, index: usize, own: Gathered) -> ChatChoice {
    let calls: Vec<ToolCall> = own
        .calls
        .into_iter()
        .enumerate()
        .map(|(i, function)| ToolCall {
            id: envelope.call_id(index, i),
            kind: "function".to_owned(),
            function,
        })
        .collect();
    let content = if own.text.is_empty() && !calls.is_empty() { None } else { Some(own.text) };
    ChatChoice {
        index,
        logprobs: envelope.logprobs.then(|| logprobs::chat(&envelope.tokenizer, &own.tokens)),
        finish_reason: own.finish.map(|f| f.as_str().to_owned()),
        token_ids: ids(envelope, &own.tokens),
        message: ChatMessage {
            role: "assistant".to_owned(),
            content,
            tool_calls: (!calls.is_empty()).then_some(calls),
            tool_call_id: None,
        },
    }
}

fn completion_choice(envelope: &Envelope, index: usize, own: Gathered) -> CompletionChoice {
    let echo = envelope.echo.as_ref().filter(|_| !envelope.resumed[index]).map(|e| &e[index / envelope.n]);
    let mut lists: Option<CompletionLogprobs> = None;
    if envelope.logprobs {
        let mut tokens = echo.map(|echo| prompt_tokens(&echo.ids, own.prompt.as_deref())).unwrap_or_default();
        tokens.extend(own.tokens.iter().cloned());
        let mut offset = envelope.said[index];
        lists = Some(logprobs::completion(&envelope.tokenizer, &tokens, &mut offset));
    }
    let mut text = echo.map(|echo| echo.text.clone()).unwrap_or_default();
    text.push_str(&own.text);
    CompletionChoice {
        index,
        text,
        logprobs: lists,
        finish_reason: own.finish.map(|f| f.as_str().to_owned()),
        token_ids: ids(envelope, &own.tokens),
    }
}

/// A prompt's tokens with their ln p: the first has none, since nothing comes before it.
pub(crate) fn prompt_tokens(ids: &[u32], scored: Option<&[TokenEvent]>) -> Vec<TokenEvent> {
    let bare = |id: &u32| TokenEvent { id: *id, logprob: None, top: Vec::new() };
    match scored {
        Some(scored) => ids.iter().take(1).map(bare).chain(scored.iter().cloned()).collect(),
        None => ids.iter().map(bare).collect(),
    }
}

//! One answer as it grows: the engine's events in, what clients are told out.
//!
//! A token's text may not be tellable yet: it ends within a character, or begins what may become a stop string or a
//! call. Then the token waits, and goes out with the piece that releases its text, in streamed and whole answers
//! alike. So the ids a client has seen always lead to exactly the text it has seen, and an answer can be taken over
//! after any piece: replaying its ids through the same state gives the state that wrote it.

mod set;
mod text;

use std::sync::Arc;

use axum::http::StatusCode;
use consort_inference::{Event, FinishReason, TokenEvent, Usage};
use consort_model::Tokenizer;

use crate::error::ApiError;
use crate::tools::{Marks, ToolPiece, ToolStream};

pub(crate) use set::{AnswerSet, Job};
use text::AnswerText;

/// What is new in an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// Text and parts of calls, in order.
    pub(crate) parts: Vec<ToolPiece>,
    /// Tokens that are out with it.
    pub(crate) tokens: Vec<TokenEvent>,
}

/// Why an answer is complete, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
    ToolCalls,
}

impl Finish {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// What an event came to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Out {
    /// ln p of the prompt's tokens, from index 1 on.
    Prompt(Vec<TokenEvent>),
    /// More of the answer.
    Piece(Piece),
    /// The last of it.
    Done { piece: Piece, finish: Finish, usage: Usage },
    /// It broke.
    Failed(ApiError),
}

/// The state of one answer.
pub(crate) struct Answer {
    tokenizer: Arc<Tokenizer>,
    text: AnswerText,
    tools: Option<ToolStream>,
    /// Where the model has such.
    marks: Marks,
    end_tokens: Arc<[u32]>,
    /// Tokens whose text isn't out yet, with the byte of the answer's text at which each begins.
    pending: Vec<(TokenEvent, usize)>,
    usage: Usage,
    /// The answer is to have no token at all (an echo with `max_tokens` 0).
    empty: bool,
}

impl Answer {
    /// `end_tokens`: ids without text that end it; empty where they don't.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        stops: &[String],
        end_tokens: Arc<[u32]>,
        tools: Option<(ToolStream, Marks)>,
        prompt_tokens: usize,
        empty: bool,
    ) -> Answer {
        let (tools, marks) =
            tools.map_or_else(|| (None, Marks::default()), |(stream, marks)| (Some(stream), marks));
        Answer {
            tokenizer,
            text: AnswerText::new(stops),
            tools,
            marks,
            end_tokens,
            pending: Vec::new(),
            usage: Usage { prompt_tokens, ..Usage::default() },
            empty,
        }
    }

    /// Takes the ids of an answer begun elsewhere; whatever they say was said there. Some where they already end it.
    pub(crate) fn replay(&mut self, ids: &[u32], max_tokens: usize) -> Option<Out> {
        for id in ids {
            let out = self.event(Event::Token(TokenEvent { id: *id, logprob: None, top: Vec::new() }));
            if let Some(Out::Done { finish, usage, .. }) = out {
                return Some(Out::Done { piece: Piece::default(), finish, usage });
            }
            if self.end_tokens.contains(id) {
                return Some(self.done(Finish::Stop));
            }
        }
        self.pending.clear();
        (ids.len() >= max_tokens).then(|| self.done(Finish::Length))
    }

    /// Takes an event; none where there is nothing to tell yet.
    pub(crate) fn event(&mut self, event: Event) -> Option<Out> {
        match event {
            Event::Started { cached_tokens } => {
                self.usage.cached_tokens = cached_tokens;
                None
            }
            Event::Prompt(tokens) => Some(Out::Prompt(tokens)),
            Event::Token(_) if self.empty => Some(self.done(Finish::Length)),
            Event::Token(token) => self.token(token),
            Event::Finished { reason, usage } => {
                self.usage = usage;
                Some(match reason {
                    FinishReason::Stop => self.done(Finish::Stop),
                    FinishReason::Length => self.done(Finish::Length),
                    FinishReason::Deadline => Out::Failed(ApiError::deadline()),
                    FinishReason::HandedOver => Out::Failed(handed_over()),
                    FinishReason::Cancelled => {
                        Out::Failed(ApiError::internal("the engine dropped the request"))
                    }
                })
            }
            Event::Failed { reason } => Some(Out::Failed(ApiError::internal(reason))),
        }
    }

    fn token(&mut self, token: TokenEvent) -> Option<Out> {
        self.usage.completion_tokens += 1;
        let id = token.id;
        if self.end_tokens.contains(&id) {
            return None;
        }
        let mut parts = Vec::new();
        self.pending.push((token, self.text.taken()));
        if let Some(tools) = &mut self.tools
            && let Some((_, mark)) = self.marks.iter().find(|(mark, _)| *mark == id)
        {
            tools.push(mark, &mut parts);
        }
        let text = self.text.push(&self.tokenizer, id);
        if self.text.stopped() {
            // Tokens of the stop string itself are no part of the answer.
            let end = self.text.told();
            self.pending.retain(|(_, start)| *start < end);
            self.tell(text, &mut parts);
            return Some(self.done_with(parts, Finish::Stop));
        }
        self.tell(text, &mut parts);
        // A call's own characters may say nothing for a while (its tag, its name), yet nothing waits to be said.
        if parts.is_empty() {
            return None;
        }
        Some(Out::Piece(Piece { parts, tokens: self.release() }))
    }

    /// Text, through the reader of calls where there is one.
    fn tell(&mut self, text: String, parts: &mut Vec<ToolPiece>) {
        match &mut self.tools {
            Some(tools) => tools.push(&text, parts),
            None if text.is_empty() => {}
            None => parts.push(ToolPiece::Text(text)),
        }
    }

    fn release(&mut self) -> Vec<TokenEvent> {
        self.pending.drain(..).map(|(token, _)| token).collect()
    }

    fn done(&mut self, finish: Finish) -> Out {
        let mut parts = Vec::new();
        let text = self.text.finish();
        // A broken character at the very end can still complete a stop string.
        let finish = if self.text.stopped() { Finish::Stop } else { finish };
        self.tell(text, &mut parts);
        self.done_with(parts, finish)
    }

    fn done_with(&mut self, mut parts: Vec<ToolPiece>, finish: Finish) -> Out {
        let mut called = false;
        if let Some(tools) = &mut self.tools {
            tools.finish(&mut parts);
            called = tools.called();
        }
        let finish = if called && finish == Finish::Stop { Finish::ToolCalls } else { finish };
        Out::Done { piece: Piece { parts, tokens: self.release() }, finish, usage: self.usage }
    }
}

fn handed_over() -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "handed_over",
        "this replica is shutting down; the answer can be continued on another one from the token ids emitted so far",
    )
    .retry_after(1)
}

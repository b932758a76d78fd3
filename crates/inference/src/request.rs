//! What goes into the engine and what comes out.

use std::time::Instant;

/// How a token is picked. The pick is a function of the logits, these values and the position: see [`Sampling::seed`].
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all, 0 the likeliest token alone.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every token already in the answer.
    pub presence_penalty: f32,
    /// Subtracted for each time a token is already in the answer.
    pub frequency_penalty: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens in prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The noise of the token at position *p* is Philox(seed, p).
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A grammar the answer must follow.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that satisfies this schema.
    JsonSchema(serde_json::Value),
    /// A grammar in llguidance's Lark dialect (tool calls).
    Lark(String),
    /// A regular expression.
    Regex(String),
}

/// One answer to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's token ids; not empty.
    pub prompt: Vec<u32>,
    /// Ids of this same answer that were already emitted elsewhere; generation goes on after them, exactly as it
    /// would have there. They are not sent again but count as the answer's.
    pub emitted: Vec<u32>,
    /// How tokens are picked.
    pub sampling: Sampling,
    /// Tokens that end the answer (not part of its text).
    pub end_tokens: Vec<u32>,
    /// The answer's length limit in tokens, `emitted` included.
    pub max_tokens: usize,
    /// Goes on past end tokens.
    pub ignore_end: bool,
    /// Log-probabilities with each token: the chosen one's and this many of the likeliest.
    pub logprobs: Option<u8>,
    /// Log-probabilities of the prompt's own tokens too (`echo`).
    pub prompt_logprobs: Option<u8>,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
    /// Past this the request ends with [`FinishReason::Deadline`].
    pub deadline: Option<Instant>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub id: u32,
    /// ln p of it under the model (before temperature and filters), where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, where asked for, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token (or the grammar's end).
    Stop,
    /// `max_tokens`, or the model's context is full.
    Length,
    /// The deadline passed.
    Deadline,
    /// The engine is draining and handed the request back: continue it elsewhere from the ids emitted so far.
    HandedOver,
    /// The receiver went away.
    Cancelled,
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of the prompt, found in the prefix cache.
    pub cached_tokens: usize,
    /// Of the answer, those already emitted elsewhere included.
    pub completion_tokens: usize,
}

/// What a request's channel carries, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The first rows are computed; once, before everything else of an answer that computes anything.
    Started {
        /// Prompt tokens that came out of the prefix cache, as in [`Usage::cached_tokens`]: for who ends the answer
        /// itself and never sees `Finished`.
        cached_tokens: usize,
    },
    /// Log-probabilities of prompt tokens from index 1 on, where asked for; once, before the first token.
    Prompt(Vec<TokenEvent>),
    /// A generated token. An end token is sent too (with its id), as the last before `Finished`.
    Token(TokenEvent),
    /// The answer is complete; nothing follows.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens counted.
        usage: Usage,
    },
    /// The engine failed this request; nothing follows.
    Failed {
        /// What happened.
        reason: String,
    },
}

/// A request under way. Dropping it cancels: its rows and blocks are free within one step.
#[derive(Debug)]
pub struct Submission {
    /// What the engine sends.
    pub events: tokio::sync::mpsc::Receiver<Event>,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full.
    #[error("the queue is full ({queued} requests wait); try again in {retry_after_seconds} s")]
    Busy {
        /// Requests waiting.
        queued: usize,
        /// A guess from the recent rate, at least 1.
        retry_after_seconds: u64,
    },
    /// The engine is shutting down.
    #[error("this replica is draining and takes no new requests")]
    Draining,
    /// The request can never run here; the text names the field and the limit.
    #[error("{reason}")]
    Invalid {
        /// The field that is wrong, in the API's words (`max_tokens`, `prompt`, `response_format`).
        field: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The engine's thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

//! `/v1/completions`: goes on from a text or from token ids, without a chat template.
//!
//! A text prompt gets the token that starts every sequence, where the model has one, and is otherwise plain text: what
//! looks like a special token in it is not one. Who wants special tokens sends ids (`/tokenize` with `parse_special`
//! makes them).

use consort_model::tokenizer::Specials;
use serde_json::Value;

use crate::engine::Replica;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, kind, token_ids};
use crate::params::{Common, below_vocab};
use crate::plan::{self, Call, Plan, Prompt};
use crate::respond::Shape;

/// Prompts of one request.
const MAX_PROMPTS: usize = 128;
/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A prompt as it was sent.
enum Source {
    Text(String),
    Ids(Vec<u32>),
}

/// A request, read and checked, before its tokens are known.
pub(crate) struct CompletionCall {
    common: Common,
    sources: Vec<Source>,
    max_tokens: usize,
    logprobs: Option<u8>,
    echo: bool,
}

impl Call for CompletionCall {
    const SHAPE: Shape = Shape::Completion;

    fn read(value: Value, replica: &Replica) -> ApiResult<CompletionCall> {
        let mut fields = Fields::new(value, "")?;
        let vocab = replica.tokenizer.vocab();
        let common = Common::read(&mut fields, vocab)?;
        let prompt = fields.take("prompt").ok_or_else(|| ApiError::param("prompt", "prompt is missing"))?;
        let sources = sources(prompt)?;
        for source in &sources {
            if let Source::Ids(ids) = source {
                below_vocab(ids, "prompt", vocab)?;
            }
        }
        let echo = fields.bool("echo")?.unwrap_or(false);
        let max_tokens =
            fields.integer("max_tokens", 0..=i64::MAX)?.map_or(DEFAULT_MAX_TOKENS, |n| n as usize);
        if max_tokens == 0 && !echo {
            return Err(ApiError::param(
                "max_tokens",
                "max_tokens is 0; it must be at least 1 (0 is for echo: true)",
            ));
        }
        let logprobs = fields.integer("logprobs", 0..=20)?.map(|n| n as u8);
        if let Some(best_of) = fields.integer("best_of", 1..=i64::MAX)?
            && best_of as usize != common.n
        {
            let message = format!(
                "best_of is {best_of} and n is {}: answers aren't ranked here; use n alone",
                common.n
            );
            return Err(ApiError::unsupported("best_of", message));
        }
        if !common.resume.emitted_token_ids.is_empty() && sources.len() != 1 {
            return Err(ApiError::param(
                "prompt",
                "an answer that goes on with consort.emitted_token_ids has one prompt; send consort.choices for several",
            ));
        }
        let no_suffix = "this model writes what follows a prompt, not what fits between two texts";
        fields.refuse_unless("suffix", |v| v == "", no_suffix)?;
        let chat_only = "it is for /v1/chat/completions";
        for name in
            ["messages", "tools", "tool_choice", "response_format", "top_logprobs", "max_completion_tokens"]
        {
            fields.refuse_unless(name, |_| false, chat_only)?;
        }
        plan::refuse_for_all(&mut fields)?;
        fields.finish()?;
        Ok(CompletionCall { common, sources, max_tokens, logprobs, echo })
    }

    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn plan(self, replica: &Replica) -> ApiResult<Plan> {
        let tokenizer = &replica.tokenizer;
        let prompt = |source: Source| match source {
            Source::Ids(ids) => Prompt { ids, text: None },
            Source::Text(text) => {
                let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
                ids.extend(tokenizer.encode(&text, Specials::AsText));
                Prompt { ids, text: Some(text) }
            }
        };
        let prompts: Vec<Prompt> = self.sources.into_iter().map(prompt).collect();
        if prompts.iter().any(|prompt| prompt.ids.is_empty()) {
            return Err(ApiError::param("prompt", "the prompt is empty: there is nothing to go on from"));
        }
        Ok(Plan {
            common: self.common,
            prompts,
            max_tokens: Some(self.max_tokens),
            logprobs: self.logprobs,
            echo: self.echo,
            grammar: None,
            grammar_param: "response_format",
            reading: None,
        })
    }
}

fn sources(prompt: Value) -> ApiResult<Vec<Source>> {
    let ids = |values: &[Value]| token_ids(values, "prompt", usize::MAX);
    match prompt {
        Value::String(text) => Ok(vec![Source::Text(text)]),
        Value::Array(values) if values.first().is_some_and(Value::is_number) => {
            Ok(vec![Source::Ids(ids(&values)?)])
        }
        Value::Array(values) => {
            if values.is_empty() {
                return Err(ApiError::param("prompt", "prompt is an empty array"));
            }
            if values.len() > MAX_PROMPTS {
                let message = format!("prompt has {} entries; at most {MAX_PROMPTS} are taken", values.len());
                return Err(ApiError::param("prompt", message));
            }
            let source = |value: Value| match value {
                Value::String(text) => Ok(Source::Text(text)),
                Value::Array(values) => ids(&values).map(Source::Ids),
                other => Err(ApiError::param(
                    "prompt",
                    format!("prompt holds {}; see its four forms", kind(&other)),
                )),
            };
            values.into_iter().map(source).collect()
        }
        other => {
            let kind = kind(&other);
            Err(ApiError::param(
                "prompt",
                format!("prompt must be a string, token ids, or an array of either, not {kind}"),
            ))
        }
    }
}

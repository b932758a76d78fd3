//! A conversation with a loaded model: messages in, one answer at a time out.

use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use consort_inference::{Event, FinishReason, Request, Sampling, Submission, SubmitError, Usage};
use consort_model::chat::ChatOptions;
use consort_model::tokenizer::{Specials, StreamDecoder};
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use crate::cli::UsageError;
use crate::loading::Loaded;

/// How answers are picked and how long they get.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) seed: Option<u64>,
    pub(crate) max_tokens: Option<usize>,
}

/// A model and what was said so far.
pub(crate) struct Session {
    pub(crate) loaded: Loaded,
    limits: Limits,
    system: Option<String>,
    messages: Vec<Value>,
}

/// An answer under way.
pub(crate) struct Answer<'a> {
    session: &'a mut Session,
    submission: Submission,
    decoder: StreamDecoder,
    text: String,
    /// What is known of it before its end.
    usage: Usage,
    seed: u64,
    asked: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    ended: Option<FinishReason>,
}

/// A finished answer.
#[derive(Debug)]
pub(crate) struct Done {
    text: String,
    reason: FinishReason,
    /// It has as many tokens as `--max-tokens` allows.
    limited: bool,
    usage: Usage,
    seed: u64,
    asked: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Session {
    pub(crate) fn new(loaded: Loaded, system: Option<String>, limits: Limits) -> Session {
        Session { loaded, limits, system, messages: Vec::new() }
    }

    /// Forgets the conversation.
    pub(crate) fn reset(&mut self) {
        self.messages.clear();
    }

    /// Sets or clears the system prompt and starts over.
    pub(crate) fn set_system(&mut self, system: Option<String>) {
        self.system = system;
        self.reset();
    }

    /// Takes the last question back: it got no answer.
    fn unask(&mut self) {
        if self.messages.last().is_some_and(|m| m["role"] == "user") {
            self.messages.pop();
        }
    }

    /// Asks; the answer comes through [`Answer`].
    pub(crate) fn ask(&mut self, text: &str) -> Result<Answer<'_>> {
        let asked = Instant::now();
        self.messages.push(json!({ "role": "user", "content": text }));
        let submitted = self.prompt(text).and_then(|prompt| {
            let seed = match self.limits.seed {
                Some(seed) => seed,
                None => random_seed()?,
            };
            let prompt_tokens = prompt.len();
            Ok((self.submit(prompt, seed)?, seed, prompt_tokens))
        });
        let (submission, seed, prompt_tokens) = match submitted {
            Ok(both) => both,
            Err(error) => {
                self.unask();
                return Err(error);
            }
        };
        Ok(Answer {
            session: self,
            submission,
            decoder: StreamDecoder::new(),
            text: String::new(),
            usage: Usage { prompt_tokens, ..Usage::default() },
            seed,
            asked,
            first: None,
            last: None,
            ended: None,
        })
    }

    /// The conversation as token ids; a model without a template continues the text itself.
    fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = &self.loaded.tokenizer;
        let Some(template) = &self.loaded.template else {
            let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
            if let Some(system) = &self.system {
                ids.extend(tokenizer.encode(&format!("{system}\n\n"), Specials::AsText));
            }
            ids.extend(tokenizer.encode(text, Specials::AsText));
            return Ok(ids);
        };
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
        Ok(template.encode(tokenizer, &messages, &options)?)
    }

    fn submit(&self, prompt: Vec<u32>, seed: u64) -> Result<Submission> {
        let engine = &self.loaded.engine;
        let room = engine.max_context().saturating_sub(prompt.len());
        if room == 0 {
            return Err(UsageError(format!(
                "the conversation has {} tokens and the model takes {}; shorten it (in a chat: /reset)",
                prompt.len(),
                engine.max_context()
            ))
            .into());
        }
        let request = Request {
            prompt,
            emitted: Vec::new(),
            sampling: Sampling {
                temperature: self.limits.temperature,
                top_p: self.limits.top_p,
                seed,
                ..Sampling::default()
            },
            end_tokens: self.loaded.tokenizer.end_tokens().to_vec(),
            max_tokens: self.limits.max_tokens.map_or(room, |n| n.min(room)),
            ignore_end: false,
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
            deadline: None,
        };
        engine.submit(request).map_err(|e| match e {
            SubmitError::Invalid { reason, .. } => UsageError(reason).into(),
            other => anyhow!(other),
        })
    }
}

impl Answer<'_> {
    /// Where the engine's events arrive.
    pub(crate) fn events(&mut self) -> &mut Receiver<Event> {
        &mut self.submission.events
    }

    /// Takes an event; returns the text it completes.
    pub(crate) fn take(&mut self, event: Event) -> Result<String> {
        let tokenizer = &self.session.loaded.tokenizer;
        let text = match event {
            Event::Started { cached_tokens } => {
                self.usage.cached_tokens = cached_tokens;
                String::new()
            }
            Event::Prompt(_) => String::new(),
            Event::Token(token) => {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.last = Some(now);
                self.usage.completion_tokens += 1;
                if tokenizer.end_tokens().contains(&token.id) {
                    String::new()
                } else {
                    self.decoder.push(tokenizer, token.id)
                }
            }
            Event::Finished { reason, usage } => {
                self.ended = Some(reason);
                self.usage = usage;
                self.decoder.finish()
            }
            Event::Failed { reason } => bail!("the engine failed: {reason}"),
        };
        self.text.push_str(&text);
        Ok(text)
    }

    /// Ends the answer, whether it ran to its end or is stopped here; what was said becomes part of the conversation.
    pub(crate) fn finish(self) -> Result<Done> {
        let limits = &self.session.limits;
        let limited = limits.max_tokens.is_some_and(|most| self.usage.completion_tokens >= most);
        if self.text.is_empty() {
            self.session.unask();
        } else {
            self.session.messages.push(json!({ "role": "assistant", "content": self.text }));
        }
        Ok(Done {
            text: self.text,
            reason: self.ended.unwrap_or(FinishReason::Cancelled),
            limited,
            usage: self.usage,
            seed: self.seed,
            asked: self.asked,
            first: self.first,
            last: self.last,
        })
    }
}

impl Done {
    /// Why the answer ended before its end, and what allows more.
    pub(crate) fn cut_short(&self) -> Option<&'static str> {
        match self.reason {
            FinishReason::Length if self.limited => {
                Some("stopped at the longest answer; --max-tokens allows more")
            }
            FinishReason::Length => Some("the model's context is full; in a chat, /reset makes room"),
            _ => None,
        }
    }

    /// Tokens a second after the first one.
    fn rate(&self) -> Option<f64> {
        let (first, last) = (self.first?, self.last?);
        let seconds = (last - first).as_secs_f64();
        (self.usage.completion_tokens > 1 && seconds > 0.0)
            .then(|| (self.usage.completion_tokens - 1) as f64 / seconds)
    }

    /// One line of figures for a person.
    pub(crate) fn figures(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.rate().map(|r| format!("{r:.0} tok/s")));
        parts.extend(
            self.first.map(|f| format!("first token {:.0} ms", (f - self.asked).as_secs_f64() * 1e3)),
        );
        parts.push(format!("{} tokens after {}", self.usage.completion_tokens, self.usage.prompt_tokens));
        if self.usage.cached_tokens > 0 {
            parts.push(format!("{} from the cache", self.usage.cached_tokens));
        }
        parts.push(format!("seed {}", self.seed));
        parts.join(" · ")
    }

    /// Everything about it.
    pub(crate) fn json(&self, model: &str, started: Instant, session: &Session) -> Value {
        let ms = |from: Instant, to: Option<Instant>| to.map(|t| (t - from).as_secs_f64() * 1e3);
        json!({
            "model": model,
            "text": self.text,
            "finish_reason": match self.reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Deadline => "deadline",
                FinishReason::HandedOver => "handed_over",
                FinishReason::Cancelled => "cancelled",
            },
            "seed": self.seed,
            "system_fingerprint": session.loaded.engine.fingerprint(),
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "completion_tokens": self.usage.completion_tokens,
            },
            "timings": {
                "load_ms": session.loaded.load_time.as_secs_f64() * 1e3,
                "first_token_ms": ms(self.asked, self.first),
                "start_to_first_token_ms": ms(started, self.first),
                "tokens_per_second": self.rate(),
            },
        })
    }
}

/// A seed that fits every JSON reader (53 bits).
fn random_seed() -> Result<u64> {
    let seed = getrandom::u64().map_err(|e| anyhow!("the system gives no random numbers: {e}"))?;
    Ok(seed >> 11)
}

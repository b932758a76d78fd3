//! A candidate scores the incumbent's answer: how likely each finds it, token by token, in one prefill each.
//!
//! The question is not what the candidate would have said (that costs as much as serving, and two good answers differ),
//! but how surprised it is by what the incumbent said. The incumbent scores its answer too, because only the difference
//! says anything: a model is surprised by its own sampled answers as well. With the same weights the difference is 0,
//! bit for bit.
//!
//! It happens after the client has its answer, in a task of its own, under [`crate::policy::shadow`]'s pace, and not at
//! all while requests wait. Each replica tokenizes the prompt itself (its template may be the very change); the answer
//! is compared by token id, so a candidate with other token ids refuses or disagrees, which is what it should do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::{Value, json};

use super::call::{Call, Shape};
use super::upstream;
use crate::Gateway;
use crate::fleet::{Model, Replica, Work};
use crate::json::Object;
use crate::telemetry::Scored;

/// A question must be answered within this; the answer has no hurry, but nothing waits for ever.
const PATIENCE: Duration = Duration::from_secs(20);
/// Tokens of an answer that are scored.
const MOST_TOKENS: usize = 256;
/// A longer prompt, in bytes of JSON, isn't scored: its prefill would be felt.
const MOST_PROMPT: usize = 16 << 10;
/// Bytes of a replica's reply.
const MOST_REPLY: usize = 4 << 20;

/// An answer that is complete: has it scored where it is one of the sample.
pub(crate) fn consider(
    gateway: &Arc<Gateway>,
    model: &Arc<Model>,
    version: usize,
    call: &Call,
    said: &[u32],
    by: &Arc<Replica>,
) {
    let Some(shadow) = model.shadow.as_ref().filter(|s| s.incumbent == model.versions[version].name) else {
        return;
    };
    let Some(candidate) = model.versions.iter().position(|v| v.name == shadow.candidate) else { return };
    let now = Instant::now();
    let fit = model.versions[candidate].replicas.iter().find(|replica| replica.is_up(now));
    let (Some(replica), true) = (fit, !said.is_empty() && model.pending.is_empty()) else { return };
    let Some(question) = Question::of(call, said) else { return };
    if !gateway.shadow().take(now, shadow.percent, super::random()) {
        return;
    }
    let (gateway, stats) = (gateway.clone(), model.versions[candidate].stats.clone());
    let (incumbent, candidate) = (by.clone(), replica.clone());
    tokio::spawn(async move {
        // Given back also when this task is dropped with its runtime.
        let rest = Rest { gateway, began: now };
        let scored = question.scored(&incumbent, &candidate).await;
        tracing::debug!(candidate = candidate.id, ?scored, "an answer was scored");
        stats.scored(scored);
        drop(rest);
    });
}

struct Rest {
    gateway: Arc<Gateway>,
    began: Instant,
}

impl Drop for Rest {
    fn drop(&mut self) {
        let now = Instant::now();
        self.gateway.shadow().done(now, now - self.began);
    }
}

/// What is scored.
struct Question {
    prompt: Prompt,
    said: Vec<u32>,
}

enum Prompt {
    Ids(Vec<u32>),
    /// What `/tokenize` is asked.
    Text(Bytes),
}

/// Why there is no score.
#[derive(Debug)]
enum Unscored {
    Refused,
    Failed,
}

impl Question {
    /// None where it can't be asked: the prompt has parts that `/tokenize` doesn't know, or is long.
    fn of(call: &Call, said: &[u32]) -> Option<Question> {
        let prompt = std::str::from_utf8(call.prompt_text()).ok()?;
        if prompt.len() > MOST_PROMPT || call.choices != 1 || !call.emitted.is_empty() {
            return None;
        }
        let prompt = match call.shape {
            Shape::Chat => {
                let mut object = Object::new(std::str::from_utf8(call.body()).ok()?).ok()?;
                while let Some(member) = object.next().ok()? {
                    if matches!(member.key.as_ref(), "tools" | "tool_choice" | "chat_template_kwargs") {
                        return None;
                    }
                }
                Prompt::Text(format!("{{\"messages\":{prompt}}}").into())
            }
            Shape::Completion if prompt.starts_with('"') => {
                Prompt::Text(format!("{{\"prompt\":{prompt}}}").into())
            }
            Shape::Completion => Prompt::Ids(serde_json::from_str(prompt).ok()?),
        };
        Some(Question { prompt, said: said[..said.len().min(MOST_TOKENS)].to_vec() })
    }

    async fn scored(&self, incumbent: &Arc<Replica>, candidate: &Arc<Replica>) -> Scored {
        match self.likelihood(candidate).await {
            Err(Unscored::Refused) => Scored::Refused,
            Err(Unscored::Failed) => Scored::Failed,
            Ok(theirs) => match self.likelihood(incumbent).await {
                Ok(own) => Scored::Disagreement(own - theirs),
                Err(_) => Scored::Failed,
            },
        }
    }

    /// The mean logarithm of the probabilities that a replica gives the answer's tokens.
    async fn likelihood(&self, replica: &Arc<Replica>) -> Result<f64, Unscored> {
        let mut ids = match &self.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(body) => {
                let reply = ask(replica, "/tokenize", body.clone(), 0).await?;
                serde_json::from_value(reply["tokens"].clone()).map_err(|_| Unscored::Failed)?
            }
        };
        ids.extend_from_slice(&self.said);
        let tokens = ids.len() as u64;
        // Scored and nothing generated.
        let body = json!({ "prompt": ids, "echo": true, "logprobs": 0, "max_tokens": 0 });
        let reply = ask(replica, "/v1/completions", body.to_string().into(), tokens).await?;
        let all = reply["choices"][0]["logprobs"]["token_logprobs"].as_array().ok_or(Unscored::Failed)?;
        let own = all.get(all.len().saturating_sub(self.said.len())..).unwrap_or_default();
        let sum: Option<f64> = own.iter().map(Value::as_f64).sum();
        sum.filter(|_| own.len() == self.said.len())
            .map(|sum| sum / self.said.len() as f64)
            .filter(|mean| mean.is_finite())
            .ok_or(Unscored::Failed)
    }
}

async fn ask(
    replica: &Arc<Replica>,
    path: &'static str,
    body: Bytes,
    tokens: u64,
) -> Result<Value, Unscored> {
    // Its load is seen while it lasts; how it goes says nothing about the replica's health.
    let _ticket = replica.ticket(Work { prompt: tokens, answer: 0 });
    let asked = upstream::ask(&replica.upstream, path, body, PATIENCE, MOST_REPLY).await;
    let (status, body) = asked.map_err(|_| Unscored::Failed)?;
    match status {
        StatusCode::OK => serde_json::from_slice(&body).map_err(|_| Unscored::Failed),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY | StatusCode::PAYLOAD_TOO_LARGE => {
            Err(Unscored::Refused)
        }
        _ => Err(Unscored::Failed),
    }
}

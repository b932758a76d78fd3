//! What is wrong with a request, found before it queues.

use crate::grammar::{GrammarEngine, GrammarState};
use crate::request::{Event, FinishReason, Request, Sampling, SubmitError, Usage};

/// A request that can run, or that has nothing left to run.
pub(crate) enum Checked {
    Runs {
        request: Box<Request>,
        grammar: Option<Box<GrammarState>>,
        /// Prompt and answer never grow past this.
        limit: usize,
        /// Why the answer ends there.
        at_limit: FinishReason,
    },
    /// Its answer is what was emitted before.
    Complete {
        /// The (empty) scores of a one-token prompt are wanted.
        scored: bool,
        finished: Event,
    },
}

fn invalid(field: &'static str, reason: String) -> SubmitError {
    SubmitError::Invalid { field, reason }
}

/// Checks everything that can be wrong with a request and compiles its grammar.
pub(crate) fn check(
    request: Request,
    vocab: usize,
    max_context: usize,
    grammars: Option<&GrammarEngine>,
) -> Result<Checked, SubmitError> {
    let (prompt, emitted) = (request.prompt.len(), request.emitted.len());
    if prompt == 0 {
        return Err(invalid("prompt", "the prompt is empty; it needs one token at least".to_owned()));
    }
    let ids = [("prompt", &request.prompt), ("emitted", &request.emitted)];
    for (field, ids) in ids {
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(invalid(
                field,
                format!("token id {id} is outside the vocabulary (0 to {})", vocab - 1),
            ));
        }
    }
    if emitted > request.max_tokens {
        let reason = format!("{emitted} tokens were emitted already, max_tokens is {}", request.max_tokens);
        return Err(invalid("max_tokens", reason));
    }
    let room_for_answer = usize::from(request.max_tokens > emitted);
    if prompt + emitted + room_for_answer > max_context {
        let reason = format!(
            "the prompt has {} tokens; this replica takes {max_context}, the answer included: shorten the prompt",
            prompt + emitted
        );
        return Err(invalid("prompt", reason));
    }
    check_sampling(&request.sampling, vocab)?;

    let grammar = match (&request.grammar, grammars) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(invalid("response_format", "this engine runs without grammars".to_owned()));
        }
        (Some(grammar), Some(grammars)) => {
            let refused = |error: crate::grammar::GrammarError| invalid("response_format", error.to_string());
            let mut state = grammars.compile(grammar).map_err(refused)?;
            for &token in &request.emitted {
                state.accept(token).map_err(|error| invalid("emitted", error.to_string()))?;
            }
            Some(Box::new(state))
        }
    };

    let ended = grammar.as_ref().is_some_and(|state| state.is_finished())
        || !request.ignore_end
            && request.emitted.last().is_some_and(|last| request.end_tokens.contains(last));
    let (limit, at_limit) = if ended {
        (prompt + emitted, FinishReason::Stop)
    } else {
        (prompt.saturating_add(request.max_tokens).min(max_context), FinishReason::Length)
    };
    let scored = request.prompt_logprobs.is_some();
    if limit == prompt + emitted && !(scored && prompt > 1) {
        let usage = Usage { prompt_tokens: prompt, cached_tokens: 0, completion_tokens: emitted };
        return Ok(Checked::Complete { scored, finished: Event::Finished { reason: at_limit, usage } });
    }
    Ok(Checked::Runs { request: Box::new(request), grammar, limit, at_limit })
}

fn check_sampling(sampling: &Sampling, vocab: usize) -> Result<(), SubmitError> {
    let within = |field, value: f32, allowed: bool, range: &str| {
        if allowed && value.is_finite() {
            return Ok(());
        }
        Err(invalid(field, format!("{field} is {value}; it takes {range}")))
    };
    let Sampling { temperature, top_p, min_p, .. } = *sampling;
    within("temperature", temperature, temperature >= 0.0, "0 or more")?;
    within("top_p", top_p, (0.0..=1.0).contains(&top_p), "0 to 1")?;
    within("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
    within("presence_penalty", sampling.presence_penalty, true, "a finite number")?;
    within("frequency_penalty", sampling.frequency_penalty, true, "a finite number")?;
    let repetition = sampling.repetition_penalty;
    within("repetition_penalty", repetition, repetition > 0.0, "more than 0")?;
    for &(token, bias) in &sampling.logit_bias {
        if token as usize >= vocab {
            let reason = format!("token id {token} is outside the vocabulary (0 to {})", vocab - 1);
            return Err(invalid("logit_bias", reason));
        }
        if bias.is_nan() || bias == f32::INFINITY {
            return Err(invalid(
                "logit_bias",
                format!("the bias of token {token} is {bias}; it takes a number"),
            ));
        }
    }
    Ok(())
}

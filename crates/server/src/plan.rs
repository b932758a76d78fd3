//! From a request that was read to answers under way: what both endpoints do the same.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::{self, StatusCode};
use axum::response::Response;
use consort_inference::request::Grammar;
use consort_inference::{Request, SubmitError, TokenEvent};
use serde_json::Value;

use crate::answer::{Answer, AnswerSet, Job};
use crate::engine::Replica;
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::http::body::{Held, Parsed, read_json};
use crate::logprobs;
use crate::params::{Common, is_false};
use crate::respond::{self, Echo, Envelope, Shape};
use crate::serve::{App, Context};
use crate::tools::{Format, Marks, ToolStream};

/// A body longer than this is worked on off the thread that serves everyone.
pub(crate) const HEAVY_BYTES: usize = 16 << 10;
/// Answers of one request.
const MAX_CHOICES: usize = 256;
/// What the log-probabilities may take that a request makes the server keep: a prompt's until they are sent, an
/// answer's where it isn't streamed.
const MAX_LOGPROB_BYTES: usize = 32 << 20;

/// A prompt's tokens, and its text where the client sent text.
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: Option<String>,
}

/// How calls are read out of the answers.
pub(crate) struct Reading {
    pub(crate) format: Format,
    pub(crate) names: Vec<String>,
    pub(crate) max_calls: usize,
    /// Under a grammar of calls or JSON.
    pub(crate) calls_or_json: bool,
}

/// All that decides the answers.
pub(crate) struct Plan {
    pub(crate) common: Common,
    pub(crate) prompts: Vec<Prompt>,
    /// None: as much as the context holds.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) logprobs: Option<u8>,
    pub(crate) echo: bool,
    pub(crate) grammar: Option<Grammar>,
    /// The parameter to name where the grammar is refused.
    pub(crate) grammar_param: &'static str,
    pub(crate) reading: Option<Reading>,
}

/// A request for answers, read and checked, before its tokens are known.
pub(crate) trait Call: Sized + Send + 'static {
    /// What its answers look like.
    const SHAPE: Shape;

    /// Reads a body.
    fn read(value: Value, replica: &Replica) -> ApiResult<Self>;

    /// The model that it names.
    fn model(&self) -> Option<&str>;

    /// Whether it takes long to plan, however short it is.
    fn is_heavy(&self) -> bool {
        false
    }

    /// Makes tokens of it.
    fn plan(self, replica: &Replica) -> ApiResult<Plan>;
}

/// Answers a request of this kind.
pub(crate) async fn handle<C: Call>(
    State(app): State<App>,
    context: Context,
    request: http::Request<Body>,
) -> ApiResult<Response> {
    let replica = app.replica()?.clone();
    let Parsed { value, bytes, held } = read_json(request, &app.body_limits).await?;
    let call = C::read(value, &replica)?;
    check_model(call.model(), &replica)?;
    let heavy = bytes > HEAVY_BYTES || call.is_heavy();
    answer(&app, &context, replica, heavy, held, C::SHAPE, move |replica| call.plan(replica)).await
}

/// The model must be the one served here.
pub(crate) fn check_model(asked: Option<&str>, replica: &Replica) -> ApiResult<()> {
    match asked {
        Some(name) if *name != replica.model && !replica.aliases.iter().any(|alias| alias == name) => {
            let name: String = name.chars().take(128).collect();
            let message = format!("the model {name:?} is not served here; this is {:?}", replica.model);
            Err(ApiError {
                param: Some("model".to_owned()),
                ..ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message)
            })
        }
        _ => Ok(()),
    }
}

/// OpenAI's parameters that neither endpoint has: refused unless their value changes nothing.
pub(crate) fn refuse_for_all(fields: &mut Fields) -> ApiResult<()> {
    let default_tier = |v: &Value| v == "auto" || v == "default";
    fields.refuse_unless("store", is_false, "nothing is kept here; leave it out or send false")?;
    fields.refuse_unless("service_tier", default_tier, "there is one tier; leave it out or send auto")
}

/// Makes the plan, submits it and answers. `heavy` work (long texts, grammars) is done on a thread of its own; the
/// body counts as `held` until then.
async fn answer(
    app: &App,
    context: &Context,
    replica: Replica,
    heavy: bool,
    held: Held,
    shape: Shape,
    make: impl FnOnce(&Replica) -> ApiResult<Plan> + Send + 'static,
) -> ApiResult<Response> {
    let metrics = app.metrics.clone();
    let (arrived, deadline) = (context.arrived, context.deadline);
    let own = app.options.keep_alive;
    let keep_alive = context.keep_alive.map_or(own, |asked| asked.min(own));
    // From the moment that `/ready` says so: the engine hears of the drain a little later.
    let draining = app.draining().then_some(SubmitError::Draining);
    if let Some(refusal) = draining.or_else(|| replica.engine.refusal()) {
        return Err(refusal.into());
    }
    let begin = move || -> ApiResult<(Envelope, AnswerSet, bool)> {
        let _held = held;
        let plan = make(&replica)?;
        let stream = plan.common.stream;
        let jobs = jobs(&plan, &replica, shape, deadline)?;
        let choices = jobs.len();
        let set = AnswerSet::start(replica.engine.clone(), metrics, arrived, jobs).map_err(|error| {
            // The engine knows one name for every grammar.
            let named = error.param.as_deref() == Some("response_format");
            if named { ApiError { param: Some(plan.grammar_param.to_owned()), ..error } } else { error }
        })?;
        Ok((envelope(plan, &replica, shape, choices, keep_alive), set, stream))
    };
    let (envelope, set, stream) = if heavy { app.off_thread(deadline, begin).await?? } else { begin()? };
    respond::respond(envelope, set, stream).await
}

fn jobs(plan: &Plan, replica: &Replica, shape: Shape, deadline: Instant) -> ApiResult<Vec<Job>> {
    let context = replica.engine.max_context();
    let tokenizer = &replica.tokenizer;
    let common = &plan.common;
    // With `ignore_eos` only the tokens that the request named end the answer.
    let mut end_tokens: Vec<u32> =
        if common.ignore_end { Vec::new() } else { tokenizer.end_tokens().to_vec() };
    end_tokens.extend(&common.stop_token_ids);
    let ending: Arc<[u32]> = end_tokens.clone().into();
    let special = |mark| Some((tokenizer.token_id(mark).filter(|id| tokenizer.is_special(*id))?, mark));
    let marks: Marks =
        plan.reading.iter().flat_map(|reading| reading.format.marks().filter_map(special)).collect();
    let choices = plan.prompts.len() * common.n;
    if choices > MAX_CHOICES {
        let message = format!(
            "{} prompts with n = {} are {choices} answers; one request gets {MAX_CHOICES} at most",
            plan.prompts.len(),
            common.n
        );
        return Err(ApiError::param("n", message));
    }
    let mut logprob_bytes = 0usize;
    let resumed = common.resume.choices.len();
    if resumed != 0 && resumed != choices {
        let message = format!("consort.choices has {resumed} lists; this request has {choices} choices");
        return Err(ApiError::param("consort.choices", message));
    }
    let mut jobs = Vec::with_capacity(choices);
    for (p, prompt) in plan.prompts.iter().enumerate() {
        let length = prompt.ids.len();
        if length >= context {
            return Err(ApiError::param(
                if shape == Shape::Completion { "prompt" } else { "messages" },
                format!("the prompt has {length} tokens; this model's context holds {context}, the answer's included"),
            )
            .code("context_length_exceeded"));
        }
        let max_tokens = plan.max_tokens.unwrap_or(context - length);
        if max_tokens > context - length {
            return Err(ApiError::param(
                "max_tokens",
                format!(
                    "max_tokens is {max_tokens} and the prompt has {length} tokens; together that is more than the \
                     {context} tokens of this model's context. At most {} are left for the answer",
                    context - length
                ),
            )
            .code("context_length_exceeded"));
        }
        if let Some(top) = plan.logprobs {
            let scored = if plan.echo { length } else { 0 };
            let kept = if common.stream { 0 } else { max_tokens };
            let each = size_of::<TokenEvent>() + usize::from(top) * size_of::<(u32, f32)>();
            logprob_bytes = logprob_bytes.saturating_add((scored + kept) * common.n * each);
        }
        if logprob_bytes > MAX_LOGPROB_BYTES {
            return Err(ApiError::param(
                "logprobs",
                format!(
                    "the log-probabilities of up to this many tokens would take more than {} MiB; ask for fewer \
                     alternatives, answers, prompts or max_tokens, or for a stream",
                    MAX_LOGPROB_BYTES >> 20
                ),
            ));
        }
        for i in 0..common.n {
            let emitted = common.emitted(p * common.n + i);
            if emitted.len() > max_tokens {
                let name = if resumed == 0 { "consort.emitted_token_ids" } else { "consort.choices" };
                let message = format!("{name} has {} ids; max_tokens is {max_tokens}", emitted.len());
                return Err(ApiError::param(name, message));
            }
            let mut sampling = common.sampling.clone();
            sampling.seed = common.choice_seed(i);
            let tools = plan.reading.as_ref().map(|reading| {
                let stream = ToolStream::new(reading.format, reading.names.clone(), reading.max_calls);
                let stream = if reading.calls_or_json { stream.calls_or_json() } else { stream };
                (stream, Marks::clone(&marks))
            });
            jobs.push(Job {
                index: p * common.n + i,
                answer: Answer::new(
                    tokenizer.clone(),
                    &common.stops,
                    ending.clone(),
                    tools,
                    length,
                    max_tokens == 0,
                ),
                request: Request {
                    prompt: prompt.ids.clone(),
                    emitted: emitted.to_vec(),
                    sampling,
                    end_tokens: end_tokens.clone(),
                    max_tokens: max_tokens.max(1),
                    ignore_end: common.ignore_end && common.stop_token_ids.is_empty(),
                    logprobs: plan.logprobs,
                    prompt_logprobs: plan.logprobs.filter(|_| plan.echo),
                    grammar: plan.grammar.clone(),
                    deadline: Some(deadline),
                },
            });
        }
    }
    Ok(jobs)
}

fn envelope(
    plan: Plan,
    replica: &Replica,
    shape: Shape,
    choices: usize,
    keep_alive: std::time::Duration,
) -> Envelope {
    let common = plan.common;
    let (id, created) = Envelope::identity(shape, &common.resume);
    let said = (0..choices)
        .map(|choice| {
            let emitted = common.emitted(choice);
            let repeated: &[u32] =
                if plan.echo && !emitted.is_empty() { &plan.prompts[choice / common.n].ids } else { &[] };
            repeated.iter().chain(emitted).map(|id| logprobs::characters(&replica.tokenizer, *id)).sum()
        })
        .collect();
    let echo = plan.echo.then(|| {
        let echo = |prompt: Prompt| Echo {
            text: prompt.text.unwrap_or_else(|| replica.tokenizer.decode(&prompt.ids)),
            ids: prompt.ids,
        };
        plan.prompts.into_iter().map(echo).collect()
    });
    Envelope {
        shape,
        id,
        created,
        model: replica.model.clone(),
        fingerprint: replica.engine.fingerprint().to_owned(),
        tokenizer: replica.tokenizer.clone(),
        n: common.n,
        choices,
        logprobs: plan.logprobs.is_some(),
        return_token_ids: common.return_token_ids,
        include_usage: common.include_usage,
        resumed: (0..choices).map(|choice| !common.emitted(choice).is_empty()).collect(),
        said,
        echo,
        keep_alive,
        seed: common.sampling.seed,
    }
}

//! `/tokenize` and `/detokenize`.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use consort_api::{DetokenizeResponse, TokenizeResponse};
use consort_model::chat::ChatOptions;
use consort_model::tokenizer::Specials;

use crate::chat::read_messages;
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::http::body::{Parsed, read_json};
use crate::params::below_vocab;
use crate::plan;
use crate::respond::json;
use crate::serve::{App, Context};

pub(crate) async fn tokenize(
    State(app): State<App>,
    context: Context,
    request: Request<Body>,
) -> ApiResult<Response> {
    let replica = app.replica()?.clone();
    let Parsed { value, bytes, held } = read_json(request, &app.body_limits).await?;
    let mut fields = Fields::new(value, "")?;
    plan::check_model(fields.string("model")?.as_deref(), &replica)?;
    let prompt = fields.string("prompt")?;
    let messages = fields.array("messages")?;
    let bos = fields.bool("add_special_tokens")?.unwrap_or(true);
    let parse = fields.bool("parse_special")?.unwrap_or(false);
    let strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let generation = fields.bool("add_generation_prompt")?.unwrap_or(true);
    fields.finish()?;
    let work = move || {
        let _held = held;
        let tokenizer = &replica.tokenizer;
        let tokens = match (prompt, messages) {
            (Some(text), None) => {
                let mut ids: Vec<u32> = if bos { tokenizer.bos().into_iter().collect() } else { Vec::new() };
                ids.extend(tokenizer.encode(&text, if parse { Specials::Parse } else { Specials::AsText }));
                ids
            }
            (None, Some(messages)) => {
                let messages = read_messages(messages)?;
                let Some(template) = &replica.template else {
                    return Err(ApiError::param("messages", "this model has no chat template; send prompt"));
                };
                let options = ChatOptions { add_generation_prompt: generation, ..ChatOptions::default() };
                template
                    .encode(tokenizer, &messages, &options)
                    .map_err(|error| ApiError::param("messages", error.to_string()))?
            }
            _ => return Err(ApiError::param("prompt", "send either prompt or messages")),
        };
        let spell = |id: &u32| tokenizer.token_text(*id).unwrap_or_default().to_owned();
        Ok(TokenizeResponse {
            count: tokens.len(),
            max_model_len: replica.engine.max_context(),
            token_strs: strings.then(|| tokens.iter().map(spell).collect()),
            tokens,
        })
    };
    let heavy = bytes > plan::HEAVY_BYTES;
    let response = if heavy { app.off_thread(context.deadline, work).await?? } else { work()? };
    Ok(json(&response))
}

pub(crate) async fn detokenize(State(app): State<App>, request: Request<Body>) -> ApiResult<Response> {
    let replica = app.replica()?;
    let Parsed { value, held: _held, .. } = read_json(request, &app.body_limits).await?;
    let mut fields = Fields::new(value, "")?;
    plan::check_model(fields.string("model")?.as_deref(), replica)?;
    let tokens = fields
        .token_ids("tokens", 1 << 20)?
        .ok_or_else(|| ApiError::param("tokens", "tokens is missing; send an array of token ids"))?;
    fields.finish()?;
    below_vocab(&tokens, "tokens", replica.tokenizer.vocab())?;
    Ok(json(&DetokenizeResponse { prompt: replica.tokenizer.decode(&tokens) }))
}

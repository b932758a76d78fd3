//! `/v1/models`, `/health`, `/ready`, `/metrics` and the page.

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use consort_api::{ModelCard, ModelList, ReadyReport};
use consort_inference::SubmitError;

use crate::engine::Replica;
use crate::error::{ApiError, ApiResult};
use crate::respond::json;
use crate::serve::App;

fn card(app: &App, replica: &Replica, id: &str) -> ModelCard {
    ModelCard {
        id: id.to_owned(),
        object: "model".to_owned(),
        created: app.created,
        owned_by: "consort".to_owned(),
        max_model_len: replica.engine.max_context(),
        system_fingerprint: replica.engine.fingerprint().to_owned(),
    }
}

pub(crate) async fn list(State(app): State<App>) -> ApiResult<Response> {
    let replica = app.replica()?;
    Ok(json(&ModelList { object: "list".to_owned(), data: vec![card(&app, replica, &replica.model)] }))
}

pub(crate) async fn one(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> ApiResult<Response> {
    let replica = app.replica()?;
    let Path(id) = id.map_err(|_| ApiError::param("model", "the model's name in the path is not UTF-8"))?;
    crate::plan::check_model(Some(&id), replica)?;
    Ok(json(&card(&app, replica, &id)))
}

/// The process lives; it says nothing about the model.
pub(crate) async fn health() -> Response {
    json(&serde_json::json!({"status": "ok"}))
}

/// Whether requests would be taken, and how loaded the engine is.
pub(crate) async fn ready(State(app): State<App>) -> ApiResult<Response> {
    if app.draining() {
        let message = "this replica is draining";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message).retry_after(1));
    }
    let replica = app.replica()?;
    if let Some(stopped @ SubmitError::Stopped) = replica.engine.refusal() {
        return Err(stopped.into());
    }
    let stats = replica.engine.stats();
    Ok(json(&ReadyReport {
        status: "ready".to_owned(),
        model: replica.model.clone(),
        system_fingerprint: replica.engine.fingerprint().to_owned(),
        queued: stats.queued as u64,
        running: stats.running as u64,
        outstanding_tokens: stats.outstanding_tokens as u64,
        generated_tokens: stats.generated_tokens,
        steps: stats.step_rows.steps(),
        stalled_ms: stats.stalled_ms,
        kv_use: stats.kv_blocks_used as f64 / stats.kv_blocks.max(1) as f64,
    }))
}

pub(crate) async fn metrics(State(app): State<App>) -> Response {
    let mut response = Response::new(Body::from(app.metrics.text()));
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// What the page may do: run its own inline code and talk to this server, and be framed by nobody.
const PAGE_POLICY: &str = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; \
                           img-src 'self' data:; frame-ancestors 'none'";

pub(crate) async fn page(State(app): State<App>) -> ApiResult<Response> {
    let Some(page) = app.options.page else {
        let message = "there is no page here; the API is under /v1";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message));
    };
    let mut response = Response::new(Body::from(page));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    Ok(response)
}

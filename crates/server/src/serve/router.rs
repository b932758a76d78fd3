//! Which path is what, and what every request passes through.

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ALLOW, VARY,
};
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use consort_edge::ConnectionHandle;

use super::App;
use super::context::{Context, REQUEST_ID, Record, Recorded, fresh_id};
use crate::chat::ChatCall;
use crate::completions::CompletionCall;
use crate::error::ApiError;
use crate::http::guard::Access;
use crate::{models, plan, tokens};

/// Path, the methods it has, and who may ask.
const ROUTES: [(&str, &str, Access); 10] = [
    ("/", "GET", Access::Open),
    ("/health", "GET", Access::Open),
    ("/ready", "GET", Access::Open),
    ("/metrics", "GET", Access::Metrics),
    ("/v1/models", "GET", Access::Key),
    ("/v1/models/{*id}", "GET", Access::Key),
    ("/v1/chat/completions", "POST", Access::Key),
    ("/v1/completions", "POST", Access::Key),
    ("/tokenize", "POST", Access::Key),
    ("/detokenize", "POST", Access::Key),
];

pub(crate) fn router(app: App) -> Router {
    Router::new()
        .route("/", get(models::page))
        .route("/health", get(models::health))
        .route("/ready", get(models::ready))
        .route("/metrics", get(models::metrics))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(plan::handle::<ChatCall>))
        .route("/v1/completions", post(plan::handle::<CompletionCall>))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), pass))
        .with_state(app)
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {method} {path} here"))
}

async fn wrong_method(method: Method, path: MatchedPath) -> Response {
    let allowed =
        ROUTES.iter().find(|(route, ..)| *route == path.as_str()).map_or("GET", |(_, methods, _)| methods);
    let message = format!("{} takes {allowed}, not {method}", path.as_str());
    let mut response =
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response();
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

/// Every request: may it ask, what is its time, and how did it go.
async fn pass(State(app): State<App>, mut request: Request<Body>, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let known = ROUTES.iter().find(|(route, ..)| Some(*route) == matched.as_deref());
    // An unknown path asks for the key too: what exists is nobody's business who may not use it.
    let (route, access) = known.map_or(("other", Access::Key), |(route, _, access)| (*route, *access));
    let busy = request.extensions().get::<ConnectionHandle>().map(ConnectionHandle::busy);
    let context = Context::new(request.headers(), app.options.request_timeout);
    let mut record = Record {
        app: app.clone(),
        route,
        status: 0,
        id: context.as_ref().map_or_else(|_| fresh_id(), |c| c.id.clone()),
        arrived: std::time::Instant::now(),
        trace: context.as_ref().ok().map(|c| c.trace),
        _busy: busy,
        // Nobody reads the body of an answer to HEAD.
        complete: request.method() == Method::HEAD,
    };
    let origin = app.guard.cors_origin(request.headers()).and_then(|o| HeaderValue::from_str(o).ok());
    let preflight = origin.is_some() && request.method() == Method::OPTIONS;
    let checked = app.guard.check(request.headers(), if preflight { Access::Open } else { access });
    let mut response = match (checked, context) {
        (Err(error), _) | (Ok(()), Err(error)) => error.into_response(),
        (Ok(()), Ok(_)) if preflight => allow_preflight(),
        (Ok(()), Ok(context)) => {
            request.extensions_mut().insert(context);
            next.run(request).await
        }
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, record.id.clone());
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(
            ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, x-seed, retry-after"),
        );
        headers.insert(VARY, HeaderValue::from_static("origin"));
    }
    record.status = response.status().as_u16();
    response.map(|body| Body::new(Recorded::new(body, record)))
}

fn allow_preflight() -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    headers.insert(
        ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("authorization, content-type, x-request-id, x-request-timeout-ms"),
    );
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

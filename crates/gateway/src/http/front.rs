//! Which path is what, and what every request passes through.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Method, Request, Response, StatusCode};

use super::body::Body;
use crate::Gateway;
use crate::error::{Outcome, Refusal};
use crate::proxy::call::Shape;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// What all requests of one listener share.
pub(crate) struct Front {
    pub(crate) gateway: Arc<Gateway>,
    /// Bytes of bodies being read.
    pub(crate) in_flight: AtomicUsize,
}

/// One request's own.
pub(crate) struct Context {
    pub(crate) request_id: HeaderValue,
    /// Who asks.
    pub(crate) peer: SocketAddr,
    pub(crate) deadline: Instant,
}

impl Front {
    pub(crate) fn new(gateway: Arc<Gateway>) -> Front {
        Front { gateway, in_flight: AtomicUsize::new(0) }
    }

    /// Any request.
    pub(crate) async fn answer(
        self: Arc<Front>,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Response<Body> {
        let request_id = request_id(request.headers());
        let outcome = match Context::new(request.headers(), request_id.clone(), peer, &self.gateway) {
            Ok(context) => self.route(request, context).await,
            Err(refusal) => Err(refusal),
        };
        let mut response = outcome.unwrap_or_else(|refusal| refused(&refusal));
        response.headers_mut().insert(REQUEST_ID, request_id);
        response
    }

    async fn route(
        self: &Arc<Front>,
        request: Request<Incoming>,
        context: Context,
    ) -> Outcome<Response<Body>> {
        if let Some(extra) = self.gateway.extra.get()
            && extra.knows(request.method(), request.uri().path())
        {
            return Ok(extra.answer(request, context.peer).await);
        }
        let wanted = match request.uri().path() {
            "/v1/chat/completions" | "/v1/completions" => Method::POST,
            "/health" | "/ready" | "/v1/models" => Method::GET,
            path => {
                let path: String = path.chars().take(128).collect();
                let message = format!("there is no {} {path} here", request.method());
                return Err(Refusal::new(StatusCode::NOT_FOUND, "not_found", message));
            }
        };
        if *request.method() != wanted {
            return Ok(wrong_method(request.method(), request.uri().path(), &wanted));
        }
        match request.uri().path() {
            "/v1/chat/completions" => self.answers(request, Shape::Chat, context).await,
            "/v1/completions" => self.answers(request, Shape::Completion, context).await,
            "/health" => Ok(json(StatusCode::OK, Bytes::from_static(b"{\"status\":\"ok\"}"))),
            "/ready" => self.ready(),
            _ => Ok(self.models()),
        }
    }

    fn ready(&self) -> Outcome<Response<Body>> {
        if self.gateway.draining() {
            let message = "this gateway is draining";
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
                .retry_after(Duration::from_secs(1)));
        }
        let (models, now) = (self.gateway.registry.models(), Instant::now());
        if models.replicas().any(|replica| replica.share(now) > 0.0) {
            Ok(json(StatusCode::OK, Bytes::from_static(b"{\"status\":\"ready\"}")))
        } else {
            Err(Refusal::unavailable("no replica is ready"))
        }
    }

    fn models(&self) -> Response<Body> {
        let models = self.gateway.registry.models();
        let cards = models.list.iter().map(|model| {
            let replicas = model.versions.iter().flat_map(|version| &version.replicas);
            let first = replicas.clone().find(|replica| replica.fingerprint().is_some());
            consort_api::ModelCard {
                id: model.name.clone(),
                object: "model".to_owned(),
                created: 0,
                owned_by: "consort".to_owned(),
                max_model_len: replicas.filter_map(|r| r.core().max_model_len).min().unwrap_or(0),
                system_fingerprint: first.and_then(|r| r.fingerprint()).unwrap_or_default(),
            }
        });
        let list = consort_api::ModelList { object: "list".to_owned(), data: cards.collect() };
        // Structs of strings and numbers always serialise.
        json(StatusCode::OK, serde_json::to_vec(&list).unwrap_or_default().into())
    }
}

impl Context {
    fn new(
        headers: &HeaderMap,
        request_id: HeaderValue,
        peer: SocketAddr,
        gateway: &Gateway,
    ) -> Outcome<Context> {
        let longest = gateway.settings.clients.request_timeout;
        let timeout = match headers.get(&TIMEOUT) {
            None => longest,
            Some(value) => {
                let ms = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
                let ms = ms.filter(|ms| *ms > 0).ok_or_else(|| {
                    Refusal::param(
                        "X-Request-Timeout-Ms",
                        "X-Request-Timeout-Ms must be a whole number of milliseconds above 0",
                    )
                })?;
                Duration::from_millis(ms).min(longest)
            }
        };
        Ok(Context { request_id, peer, deadline: Instant::now() + timeout })
    }
}

/// The client's id for a request where it is a plain one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let plain = |id: &&HeaderValue| {
        id.len() <= 64 && !id.is_empty() && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers.get(&REQUEST_ID).filter(plain).cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&format!("req-{:016x}", crate::proxy::random()))
            .unwrap_or_else(|_| HeaderValue::from_static("req"))
    })
}

/// A JSON response.
pub(crate) fn json(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A refusal as a response.
pub(crate) fn refused(refusal: &Refusal) -> Response<Body> {
    let mut response = json(refusal.status, refusal.body());
    let headers = response.headers_mut();
    if let Some(delay) = refusal.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(delay.as_secs_f64().ceil().max(1.0) as u64));
    }
    if refusal.status == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn wrong_method(method: &Method, path: &str, wanted: &Method) -> Response<Body> {
    let message = format!("{path} takes {wanted}, not {method}");
    let mut response = refused(&Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
    if let Ok(allowed) = HeaderValue::from_str(wanted.as_str()) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

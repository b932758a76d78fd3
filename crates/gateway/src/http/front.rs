//! Which path is what, and what every request passes through.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_edge::{Busy, Origins, is_loopback};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::body::Body;
use super::respond::{self, json, preflight, refused, wrong_method};
use crate::Gateway;
use crate::error::{Outcome, Refusal};
use crate::proxy::call::Shape;
use crate::settings::ClientSettings;
use crate::telemetry::Record;
use consort_meter::trace::Trace;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// A response, or why there is none and whose.
pub(crate) type Recorded = Result<Response<Body>, (Refusal, Box<Record>)>;

/// What all requests of one listener share.
pub(crate) struct Front {
    pub(crate) gateway: Arc<Gateway>,
    /// Bytes of bodies being read.
    pub(crate) in_flight: AtomicUsize,
}

/// One request's own.
pub(crate) struct Context {
    pub(crate) record: Box<Record>,
    pub(crate) trace: Trace,
    /// Who asks.
    pub(crate) peer: SocketAddr,
    pub(crate) deadline: Instant,
}

impl Context {
    /// What a replica is told of the request: its id first.
    pub(crate) fn headers(&self) -> [(HeaderName, HeaderValue); 2] {
        let id = (REQUEST_ID, self.record.request_id.clone());
        [id, (crate::trace::TRACEPARENT, crate::trace::header(&self.trace))]
    }
}

/// How much a path gives away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Health: always.
    Open,
    /// Metrics: open to this machine.
    Metrics,
    /// The API: needs a key where keys are required.
    Key,
}

/// Path, method, who may ask.
const ROUTES: [(&str, Method, Access); 8] = [
    ("/v1/chat/completions", Method::POST, Access::Key),
    ("/v1/completions", Method::POST, Access::Key),
    ("/v1/models", Method::GET, Access::Key),
    ("/tokenize", Method::POST, Access::Key),
    ("/detokenize", Method::POST, Access::Key),
    ("/health", Method::GET, Access::Open),
    ("/ready", Method::GET, Access::Open),
    ("/metrics", Method::GET, Access::Metrics),
];

impl Front {
    pub(crate) fn new(gateway: Arc<Gateway>) -> Front {
        Front { gateway, in_flight: AtomicUsize::new(0) }
    }

    /// Any request.
    pub(crate) async fn answer(
        self: Arc<Front>,
        request: Request<Incoming>,
        peer: SocketAddr,
        busy: Busy,
    ) -> Response<Body> {
        let headers = request.headers();
        let settings = &self.gateway.settings().clients;
        let request_id = request_id(headers);
        let origin = origins(settings).cors(headers).and_then(|origin| HeaderValue::from_str(origin).ok());
        let trace = crate::trace::of(headers);
        let mut record = Box::new(Record::new(&self.gateway.telemetry, request_id.clone(), trace));
        record.busy = Some(busy);
        let outcome = match deadline(headers, settings.request_timeout) {
            Ok(_) if origin.is_some() && request.method() == Method::OPTIONS => Ok(preflight()),
            Ok(deadline) => self.route(request, Context { record, trace, peer, deadline }).await,
            Err(refusal) => Err((refusal, record)),
        };
        let mut response = outcome.unwrap_or_else(|(refusal, mut record)| {
            record.status = refusal.status.as_u16();
            let mut response = refused(&refusal);
            if let Some(key) = &record.key {
                key.headers(Instant::now(), response.headers_mut());
            }
            response
        });
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, request_id);
        if let Some(origin) = origin {
            respond::allow_origin(headers, origin);
        }
        response
    }

    async fn route(self: &Arc<Front>, request: Request<Incoming>, mut context: Context) -> Recorded {
        let path = request.uri().path();
        let Some((route, method, access)) = ROUTES.iter().find(|(route, ..)| *route == path) else {
            return self.other(request, context).await;
        };
        context.record.route(route);
        if request.method() != method {
            context.record.status = 405;
            return Ok(wrong_method(request.method(), route, method));
        }
        let headers = request.headers();
        let allowed = match access {
            Access::Open => Ok(None),
            Access::Metrics if is_loopback(context.peer.ip()) => Ok(None),
            Access::Metrics | Access::Key => self.gateway.keys.check(headers),
        };
        match allowed {
            // Without a key, a browser may be driven by anybody's page.
            Ok(None) if *access != Access::Open && !self.gateway.keys.required() => {
                if let Err(foreign) = origins(&self.gateway.settings().clients).check(headers) {
                    let refusal =
                        Refusal::new(StatusCode::FORBIDDEN, "forbidden_origin", foreign.to_string());
                    return Err((refusal, context.record));
                }
            }
            Ok(key) => context.record.key = key,
            Err(refusal) => return Err((refusal, context.record)),
        }
        let outcome = match *route {
            "/v1/chat/completions" => return self.answers(request, Shape::Chat, context).await,
            "/v1/completions" => return self.answers(request, Shape::Completion, context).await,
            "/health" => Ok(json(StatusCode::OK, Bytes::from_static(b"{\"status\":\"ok\"}"))),
            "/tokenize" | "/detokenize" => self.tokens(request, route, &mut context).await,
            "/ready" => self.ready(),
            "/metrics" => Ok(self.metrics()),
            _ => Ok(self.models()),
        };
        match outcome {
            Ok(response) => {
                context.record.status = response.status().as_u16();
                Ok(response)
            }
            Err(refusal) => Err((refusal, context.record)),
        }
    }

    /// A path that isn't the gateway's own: its owner's, or nobody's.
    async fn other(&self, request: Request<Incoming>, mut context: Context) -> Recorded {
        if let Some(extra) = self.gateway.extra.get()
            && extra.knows(request.method(), request.uri().path())
        {
            let response = extra.answer(request, context.peer).await;
            context.record.status = response.status().as_u16();
            return Ok(response.map(|body| body.recorded(context.record)));
        }
        // What exists is nobody's business who may not use it.
        if let Err(refusal) = self.gateway.keys.check(request.headers()) {
            return Err((refusal, context.record));
        }
        let path: String = request.uri().path().chars().take(128).collect();
        let message = format!("there is no {} {path} here", request.method());
        Err((Refusal::new(StatusCode::NOT_FOUND, "not_found", message), context.record))
    }

    fn metrics(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.gateway.telemetry.text(&self.gateway.snapshot())));
        let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    }

    fn ready(&self) -> Outcome<Response<Body>> {
        if self.gateway.draining() {
            let message = "this gateway is draining";
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
                .retry_after(Duration::from_secs(1)));
        }
        let (models, now) = (self.gateway.registry.models(), Instant::now());
        if models.replicas().any(|replica| replica.is_up(now)) {
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

fn origins(settings: &ClientSettings) -> Origins<'_> {
    Origins { hosts: &settings.allowed_hosts, origins: &settings.allowed_origins }
}

/// When a request's time is up.
fn deadline(headers: &HeaderMap, longest: Duration) -> Outcome<Instant> {
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
    Ok(Instant::now() + timeout)
}

/// The client's id for a request where it is a plain one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let plain = |id: &&HeaderValue| {
        id.len() <= 64 && !id.is_empty() && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers.get(&REQUEST_ID).filter(plain).cloned().unwrap_or_else(|| {
        let mut id = *b"req-0000000000000000";
        crate::trace::put_hex(&mut id[4..], u128::from(crate::proxy::random()));
        HeaderValue::from_bytes(&id).unwrap_or_else(|_| HeaderValue::from_static("req"))
    })
}

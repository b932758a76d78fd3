//! The two endpoints that give answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Request, Response, StatusCode};

use super::body::Body;
use super::front::{Context, Front, Recorded};
use super::read;
use super::repeats::{self, Repeat};
use super::respond::{json, refused};
use crate::Gateway;
use crate::error::{Outcome, Refusal};
use crate::fleet::Model;
use crate::keys::Key;
use crate::policy::canary;
use crate::policy::idempotency::Id;
use crate::proxy::call::{Call, Shape};
use crate::proxy::{
    self, Head, Opening, PlainAnswer, PlainBody, PlainStream, Recording, Refused, Session, Stream,
};

const SEED: HeaderName = HeaderName::from_static("x-seed");

impl Front {
    pub(crate) async fn answers(
        &self,
        request: Request<Incoming>,
        shape: Shape,
        mut context: Context,
    ) -> Recorded {
        context.record.count();
        match self.answered(request, shape, &mut context).await {
            Ok(response) => {
                let mut record = context.record;
                record.status = response.status().as_u16();
                Ok(response.map(|body| body.recorded(record)))
            }
            Err(refusal) => Err((refusal, context.record)),
        }
    }

    async fn answered(
        &self,
        request: Request<Incoming>,
        shape: Shape,
        context: &mut Context,
    ) -> Outcome<Response<Body>> {
        if self.gateway.draining() {
            let message = "this gateway is shutting down";
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
                .retry_after(Duration::from_secs(1)));
        }
        let (parts, body) = request.into_parts();
        let body =
            read::read(&parts.headers, body, &self.gateway.settings().clients, &self.in_flight).await?;
        let call = Arc::new(Call::read(shape, body)?);
        let key = context.record.key.clone();
        let model = self.model(call.model.as_deref(), key.as_deref())?;
        let (name, weight) = key.as_ref().map_or(("", 1), |key| (key.id.as_str(), key.limits.weight));
        // Who has no key is known by its address.
        let client = if name.is_empty() { context.peer.ip().to_string() } else { name.to_owned() };
        let shares = model.versions.iter().map(|version| (version.name.as_str(), version.weight));
        // Without a key, one address may be many people: they are told apart by how their conversations begin.
        let seed = if name.is_empty() && model.versions.len() > 1 { call.conversation() } else { 0 };
        let version = canary::choose(canary::mix(seed, &client), shares).ok_or_else(|| {
            Refusal::unavailable(format!("no version of {:?} has a weight above 0", model.name))
        })?;
        if call.stream
            && let Some(receiver) =
                repeats::take_up(&self.gateway, &parts.headers, &client, &call, context).await?
        {
            context.record.streaming();
            return Ok(events(Body::events(receiver)));
        }
        let repeat = repeats::repeat(&self.gateway, &parts.headers, &client, &call)?;
        if let Repeat::Again(recording) = &repeat {
            return repeats::replay(recording, &parts.headers, context, true).await;
        }
        let session = self.session(call, model, version, (client, weight), key.as_deref(), context);
        let mut response = match (session, repeat) {
            (Ok(session), Repeat::First(id, recording)) => {
                if session.call.stream {
                    context.record.streaming();
                }
                tokio::spawn(record(self.gateway.clone(), session, id, recording.clone()));
                repeats::replay(&recording, &parts.headers, context, false).await?
            }
            (Ok(session), _) => self.give(session, context).await?,
            (Err(refusal), repeat) => {
                if let Repeat::First(id, recording) = repeat {
                    self.gateway.idempotency().forget(&id);
                    recording.end();
                }
                return Err(refusal);
            }
        };
        if let Some(key) = key {
            key.headers(Instant::now(), response.headers_mut());
        }
        Ok(response)
    }

    /// A request whose key's limits allow it, ready to go.
    fn session(
        &self,
        call: Arc<Call>,
        model: Arc<Model>,
        version: usize,
        client: (String, u32),
        key: Option<&Key>,
        context: &mut Context,
    ) -> Outcome<Box<Session>> {
        if let Some(key) = key {
            let estimate = call.prompt_tokens() + call.answer_tokens();
            key.take(Instant::now(), estimate)?;
            context.record.charged = Some(estimate);
        }
        let headers = context.headers();
        let tally = context.record.tally.clone();
        let request =
            proxy::Request { call, model, version, headers, deadline: context.deadline, key: client, tally };
        Ok(Box::new(Session::new(self.gateway.clone(), request)))
    }

    /// The answer, as its client wants it.
    async fn give(&self, mut session: Box<Session>, context: &mut Context) -> Outcome<Response<Body>> {
        let opening = session.open().await?;
        let seed = session.seed.clone();
        let mut response = match opening {
            Opening::Refused(refused) => passed_on(*refused),
            Opening::Plain(answer) => {
                let PlainAnswer { kind, body, .. } = *answer;
                match body {
                    PlainBody::Whole(body) => plain(kind, body),
                    PlainBody::Stream(first, rest) => {
                        context.record.streaming();
                        events(Body::events(Box::new(PlainStream::new(*session, first, rest)).start()))
                    }
                }
            }
            Opening::Stream if session.call.stream => {
                context.record.streaming();
                let owner = (session.client().to_owned(), repeats::body_hash(&session.call));
                let stream = Box::new(Stream::new(*session, owner));
                let window = self.gateway.settings().clients.resume_window;
                events(Body::events(stream.start(self.gateway.held.clone(), Vec::new(), window)))
            }
            Opening::Stream => json(StatusCode::OK, proxy::whole(*session).await?),
        };
        if let Some(seed) = seed {
            response.headers_mut().insert(SEED, seed);
        }
        Ok(response)
    }

    /// The model that a request means.
    pub(crate) fn model(&self, name: Option<&str>, key: Option<&Key>) -> Outcome<Arc<Model>> {
        let models = self.gateway.registry.models();
        let allows = |model: &Arc<Model>| key.is_none_or(|key| key.allows(&model.name));
        let allowed = || models.list.iter().filter(|model| allows(model));
        let names = || {
            let names: Vec<&str> = allowed().map(|model| model.name.as_str()).take(20).collect();
            names.join(", ")
        };
        match name {
            Some(name) => models.get(name).filter(|model| allows(model)).cloned().ok_or_else(|| {
                let name: String = name.chars().take(128).collect();
                let message = format!("the model {name:?} is not served here; there is: {}", names());
                Refusal {
                    param: Some("model".to_owned()),
                    ..Refusal::new(StatusCode::NOT_FOUND, "model_not_found", message)
                }
            }),
            None => match (allowed().next(), allowed().nth(1)) {
                (Some(only), None) => Ok(Arc::clone(only)),
                (None, _) => Err(Refusal::unavailable("no model is served here yet")),
                (Some(_), Some(_)) => {
                    Err(Refusal::param("model", format!("model is missing; there is: {}", names())))
                }
            },
        }
    }
}

/// Gives an answer into a recording, whether its first client stays or not.
async fn record(gateway: Arc<Gateway>, mut session: Box<Session>, id: Id, recording: Arc<Recording>) {
    let refuse = |refusal: &Refusal| {
        let response = refused(refusal);
        recording.begin(Head { status: refusal.status, headers: response.headers().clone() });
        recording.push(refusal.body());
        false
    };
    let complete = match session.open().await {
        Err(refusal) => refuse(&refusal),
        Ok(Opening::Refused(refused)) => {
            let response = passed_on(Refused { body: Default::default(), ..(*refused).clone() });
            recording.begin(Head { status: refused.status, headers: response.headers().clone() });
            recording.push(refused.body);
            false
        }
        Ok(Opening::Plain(answer)) => {
            let PlainAnswer { kind, body, .. } = *answer;
            let head = |response: Response<Body>| Head {
                status: StatusCode::OK,
                headers: response.headers().clone(),
            };
            match body {
                PlainBody::Whole(body) => {
                    recording.begin(head(plain(kind, Bytes::new())));
                    recording.push(body);
                    true
                }
                PlainBody::Stream(first, rest) => {
                    recording.begin(head(events(Body::empty())));
                    let mut stream = PlainStream::new(*session, first, rest);
                    while let Some(events) = stream.next().await {
                        recording.push(events);
                    }
                    stream.is_complete()
                }
            }
        }
        Ok(Opening::Stream) => {
            let mut response = if session.call.stream {
                events(Body::empty())
            } else {
                json(StatusCode::OK, Default::default())
            };
            if let Some(seed) = session.seed.clone() {
                response.headers_mut().insert(SEED, seed);
            }
            let head = Head { status: StatusCode::OK, headers: response.headers().clone() };
            if session.call.stream {
                recording.begin(head);
                Box::new(Stream::new(*session, Default::default())).record(&recording).await
            } else {
                match proxy::whole(*session).await {
                    Ok(body) => {
                        recording.begin(head);
                        recording.push(body);
                        true
                    }
                    Err(refusal) => refuse(&refusal),
                }
            }
        }
    };
    match recording.end().filter(|_| complete) {
        Some(bytes) => gateway.idempotency().done(&id, bytes, &gateway.settings().idempotency),
        // What failed may be tried again under the same key.
        None => gateway.idempotency().forget(&id),
    }
}

/// A response of server-sent events.
fn events(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks proxies of nginx's kind not to collect the stream.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// A whole answer of a server that isn't ours.
fn plain(kind: Option<HeaderValue>, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let kind = kind.unwrap_or_else(|| HeaderValue::from_static("application/json"));
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A replica's refusal, as it came.
pub(super) fn passed_on(refused: Refused) -> Response<Body> {
    let mut response = Response::new(Body::from(refused.body));
    *response.status_mut() = refused.status;
    copy(&refused.headers, response.headers_mut(), &[CONTENT_TYPE, RETRY_AFTER]);
    response
}

fn copy(from: &HeaderMap, to: &mut HeaderMap, names: &[HeaderName]) {
    for name in names {
        if let Some(value) = from.get(name) {
            to.insert(name, value.clone());
        }
    }
}

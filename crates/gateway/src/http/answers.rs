//! The two endpoints that give answers.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
};
use hyper::{Request, Response, StatusCode};

use super::body::Body;
use super::front::{Context, Front, REQUEST_ID, json};
use super::read;
use crate::error::{Outcome, Refusal};
use crate::fleet::Model;
use crate::policy::canary;
use crate::proxy::call::{Call, Shape};
use crate::proxy::{self, Opening, Refused, Session};

const SEED: HeaderName = HeaderName::from_static("x-seed");

impl Front {
    pub(crate) async fn answers(
        &self,
        request: Request<Incoming>,
        shape: Shape,
        context: Context,
    ) -> Outcome<Response<Body>> {
        let (parts, body) = request.into_parts();
        let body = read::read(&parts.headers, body, &self.gateway.settings.clients, &self.in_flight).await?;
        let call = Arc::new(Call::read(shape, body)?);
        let model = self.model(call.model.as_deref())?;
        let client = canary::mix(0, &context.peer.ip().to_string());
        let shares = model.versions.iter().map(|version| (version.name.as_str(), version.weight));
        let version = canary::choose(client, shares).ok_or_else(|| {
            Refusal::unavailable(format!("no version of {:?} has a weight above 0", model.name))
        })?;
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, context.request_id);
        let mut session = Session::new(self.gateway.clone(), call, model, version, headers, context.deadline);
        match session.open().await? {
            Opening::Refused(refused) => Ok(passed_on(*refused)),
            Opening::Whole(foreign) => {
                let (head, body) = foreign.response.into_parts();
                let mut response = Response::new(Body::upstream(body, foreign.ticket, foreign.connection));
                copy(&head.headers, response.headers_mut(), &[CONTENT_TYPE, CONTENT_LENGTH, SEED]);
                Ok(response)
            }
            Opening::Stream => {
                let seed = session.seed.clone();
                let mut response = if session.call.stream {
                    let mut response = Response::new(Body::events(proxy::stream(session)));
                    let headers = response.headers_mut();
                    headers
                        .insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
                    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
                    // Asks proxies of nginx's kind not to collect the stream.
                    headers
                        .insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
                    response
                } else {
                    json(StatusCode::OK, proxy::whole(session).await?)
                };
                if let Some(seed) = seed {
                    response.headers_mut().insert(SEED, seed);
                }
                Ok(response)
            }
        }
    }

    /// The model that a request means.
    pub(crate) fn model(&self, name: Option<&str>) -> Outcome<Arc<Model>> {
        let models = self.gateway.registry.models();
        let names = || {
            let names: Vec<&str> = models.list.iter().map(|model| model.name.as_str()).take(20).collect();
            names.join(", ")
        };
        match name {
            Some(name) => models.get(name).cloned().ok_or_else(|| {
                let name: String = name.chars().take(128).collect();
                let message = format!("the model {name:?} is not served here; there is: {}", names());
                Refusal {
                    param: Some("model".to_owned()),
                    ..Refusal::new(StatusCode::NOT_FOUND, "model_not_found", message)
                }
            }),
            None => match models.list.as_slice() {
                [only] => Ok(only.clone()),
                [] => Err(Refusal::unavailable("no model is served here yet")),
                _ => Err(Refusal::param("model", format!("model is missing; there is: {}", names()))),
            },
        }
    }
}

/// A replica's refusal, as it came.
fn passed_on(refused: Refused) -> Response<Body> {
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

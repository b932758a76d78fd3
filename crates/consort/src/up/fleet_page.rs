//! What the front door answers beside the API: the page at `/`, the fleet's state at `/fleet`, and the button.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use consort_gateway::{Answering, Body, Extra};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};

use super::guard::{self, Refused};
use super::shared::Shared;
use crate::page;

/// Bytes of the button's request.
const BUTTON: usize = 1024;

/// The page, the fleet and the button.
pub(crate) struct FleetPage(pub(crate) Arc<Shared>);

impl Extra for FleetPage {
    fn knows(&self, method: &Method, path: &str) -> bool {
        match (method, path) {
            (&Method::GET, "/") => self.0.state().page,
            (&Method::GET, "/fleet") | (&Method::POST, "/fleet/kill") => true,
            _ => false,
        }
    }

    fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answering {
        let shared = self.0.clone();
        Box::pin(async move { answer(&shared, request, peer).await })
    }
}

async fn answer(shared: &Shared, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
    let outcome = match request.uri().path() {
        "/" => Ok(page()),
        "/fleet" => guard::look(shared, request.headers(), peer)
            .map(|()| json(StatusCode::OK, serde_json::to_vec(&shared.status()).unwrap_or_default())),
        _ => match guard::kill(shared, request.headers(), peer) {
            Ok(()) => kill(shared, request.into_body()).await,
            Err(refused) => Err(refused),
        },
    };
    outcome.unwrap_or_else(|Refused(status, message)| {
        let error = consort_api::ErrorObject {
            message,
            kind: "invalid_request_error".to_owned(),
            param: None,
            code: Some("refused".to_owned()),
        };
        let body = serde_json::to_vec(&consort_api::ErrorBody { error }).unwrap_or_default();
        json(StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN), body)
    })
}

fn page() -> Response<Body> {
    let mut response = Response::new(Body::from(Bytes::from_static(page::with_fleet().as_bytes())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // The page carries the rest of its policy itself; who may frame it can be said here only.
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("frame-ancestors 'none'"));
    response
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// SIGKILL to one of our children, by its id: what the supervisor does about it is the point.
async fn kill(shared: &Shared, body: Incoming) -> Result<Response<Body>, Refused> {
    let wrong = || Refused(400, "the body must be {\"id\": \"a replica's id\"}".into());
    let reading =
        tokio::time::timeout(std::time::Duration::from_secs(5), Limited::new(body, BUTTON).collect());
    let bytes = reading.await.map_err(|_| wrong())?.map_err(|_| wrong())?.to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
    let id = body["id"].as_str().ok_or_else(wrong)?;
    let keeper = shared.keeper().ok_or_else(|| Refused(503, "the fleet is just starting".into()))?;
    match keeper.kill(id).await {
        Some(pid) => {
            tracing::warn!(replica = id, pid, "killed from the page");
            let killed = serde_json::json!({ "killed": id, "pid": pid });
            Ok(json(StatusCode::OK, killed.to_string().into_bytes()))
        }
        None => Err(Refused(404, "no such replica runs".into())),
    }
}

//! An address where Prometheus reads what a job says of itself.
//!
//! One page of text that the launcher replaces twice a second; whoever asks gets the one that is there. Nothing that a
//! client does reaches the job: a thread and a runtime of its own, a bounded number of connections of which the longest idle
//! goes when a new one comes, a deadline for a request's head and for every write. Loopback needs no key, and refuses pages
//! from elsewhere; any other address demands one.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, StatusCode};
use bytes::Bytes;
use consort_edge::{Connection, Connections, Origins, Timed, is_loopback};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::listen::{self, Key, Origin};
use crate::terminal::note;

/// Connections at a time. One collector needs one.
const CONNECTIONS: usize = 32;
/// How long a request's head may take, and a write that makes no progress.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a request's head; hyper's least.
const HEAD: usize = 8 << 10;

/// Serves until the process ends.
pub(crate) struct Endpoint {
    page: Arc<Page>,
    address: SocketAddr,
}

/// The text, and who may read it.
struct Page {
    text: Mutex<String>,
    key: Option<Key>,
}

impl Endpoint {
    /// Listens on `address`.
    pub(crate) fn listen(address: SocketAddr) -> Result<Endpoint> {
        let key = listen::key(None, address.ip())?.filter(|_| !is_loopback(address.ip()));
        let listener = TcpListener::bind(address).with_context(|| {
            format!("can't listen on {address} for Prometheus; --metrics with port 0 takes a free one")
        })?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let page = Arc::new(Page { text: Mutex::default(), key });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::clone(&page);
        let serve = move || runtime.block_on(accept(listener, &shared));
        std::thread::Builder::new().name("metrics".into()).spawn(serve).context("can't start a thread")?;
        Ok(Endpoint { page, address })
    }

    /// What a person is told of it. A key that was made here is told this once.
    pub(crate) fn about(&self) -> String {
        let key = match &self.page.key {
            None => String::new(),
            Some(Key { secret, origin: Origin::Minted }) => {
                format!("; made for this run, the bearer token that it demands: {secret}")
            }
            Some(_) => "; it demands CONSORT_API_KEY as a bearer token".to_owned(),
        };
        format!("Prometheus metrics at http://{}/metrics{key}", self.address)
    }

    /// Replaces the page.
    pub(crate) fn show(&self, text: String) {
        *self.page.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

async fn accept(listener: TcpListener, page: &Arc<Page>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return note(&format!("no metrics for Prometheus: {error}")),
    };
    let connections = Arc::new(Connections::default());
    loop {
        connections.make_room(CONNECTIONS).await;
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, connections.open(), Arc::clone(page)));
            }
            Err(error) => {
                // Out of file descriptors, or a client that was gone already: neither ends the job.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, connection: Connection, page: Arc<Page>) {
    let handle = connection.handle();
    let answer = service_fn(move |request: Request<Incoming>| {
        let (page, busy) = (Arc::clone(&page), handle.busy());
        async move {
            let _busy = busy;
            Ok::<_, Infallible>(page.answer(request.method(), request.uri().path(), request.headers()))
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_headers(64).max_buf_size(HEAD);
    let served = builder.serve_connection(TokioIo::new(Timed::new(stream, PATIENCE)), answer);
    tokio::select! {
        ended = served => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection for metrics ended");
            }
        }
        () = connection.closed() => {}
    }
}

impl Page {
    fn answer(&self, method: &Method, path: &str, headers: &HeaderMap) -> Response<Full<Bytes>> {
        if let Err((status, why)) = self.check(headers) {
            return respond(status, format!("{why}\n"));
        }
        if path != "/metrics" {
            return respond(StatusCode::NOT_FOUND, "there is nothing but /metrics here\n".into());
        }
        if method != Method::GET && method != Method::HEAD {
            return respond(StatusCode::METHOD_NOT_ALLOWED, "read it with GET\n".into());
        }
        respond(StatusCode::OK, self.text.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), (StatusCode, String)> {
        let Some(key) = &self.key else {
            let own = Origins { hosts: &[], origins: &[] };
            return own.check(headers).map_err(|foreign| (StatusCode::FORBIDDEN, foreign.to_string()));
        };
        let given = headers.get(AUTHORIZATION).and_then(|header| header.to_str().ok());
        let given = given.and_then(|header| {
            let (scheme, token) = header.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        // Hashes compare in constant time.
        let right =
            given.is_some_and(|given| blake3::hash(given.as_bytes()) == blake3::hash(key.secret.as_bytes()));
        let why = "the job's key is needed: Authorization: Bearer KEY";
        if right { Ok(()) } else { Err((StatusCode::UNAUTHORIZED, why.into())) }
    }
}

fn respond(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = axum::http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(page: &Page, method: Method, path: &str, headers: &[(&'static str, &str)]) -> u16 {
        let headers = headers
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect();
        page.answer(&method, path, &headers).status().as_u16()
    }

    #[test]
    fn who_may_read_reads_and_nobody_else() {
        let open = Page { text: Mutex::new("x 1\n".into()), key: None };
        assert_eq!(status(&open, Method::GET, "/metrics", &[("host", "127.0.0.1:9464")]), 200);
        assert_eq!(status(&open, Method::GET, "/metrics", &[("host", "rebound.example")]), 403);
        assert_eq!(status(&open, Method::GET, "/", &[]), 404);
        assert_eq!(status(&open, Method::POST, "/metrics", &[]), 405);
        let key = Key { secret: "a-long-secret".into(), origin: Origin::Environment };
        let closed = Page { text: Mutex::default(), key: Some(key) };
        for (header, expected) in [
            ("Bearer a-long-secret", 200),
            ("bearer a-long-secret", 200),
            ("Bearer another-one", 401),
            ("Basic a-long-secret", 401),
            ("a-long-secret", 401),
        ] {
            let got = status(&closed, Method::GET, "/metrics", &[("authorization", header)]);
            assert_eq!(got, expected, "{header}");
        }
        assert_eq!(status(&closed, Method::GET, "/metrics", &[]), 401);
    }
}

//! Connections to one replica: kept alive, taken last in first out, so that those in excess age and are closed.
//!
//! A connection carries one request at a time (HTTP/1.1). Its task is owned by whoever has the connection: dropping a
//! response in the middle aborts the task, which closes the socket, which is how the replica learns that nobody wants
//! the rest.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::trust::Trust;

/// Connections kept open without a request.
const MAX_IDLE: usize = 64;
/// And for so long; servers close theirs after a while, and a request sent into a closing one is lost.
const IDLE: Duration = Duration::from_secs(15);

/// Why a replica's address can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is no replica's address: {reason}; write it like http://127.0.0.1:8081")]
pub struct AddressError {
    /// What was given.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A replica's address, and its open connections.
pub(crate) struct Upstream {
    host: String,
    port: u16,
    /// Where it is spoken to in TLS: by what, and whose certificate it must have.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    /// The `Host` header.
    authority: HeaderValue,
    /// The `Authorization` header, where the replica wants one.
    authorization: Option<HeaderValue>,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// A connection that carries no request, or one.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: JoinHandle<()>,
    /// It has carried a request before.
    pub(crate) used: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why no response came.
#[derive(Debug)]
pub(crate) enum SendError {
    /// No connection.
    Connect(io::Error),
    /// It broke before a response.
    Broken {
        error: hyper::Error,
        /// The connection had been open for an earlier request: the server may have closed it just then, so this says
        /// nothing about the replica.
        stale: bool,
    },
}

impl Upstream {
    /// Reads an address.
    ///
    /// # Errors
    /// [`AddressError`]
    pub(crate) fn new(url: &str, key: Option<&str>, trust: &Trust) -> Result<Upstream, AddressError> {
        let wrong = |reason: &str| AddressError { url: url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = url.parse().map_err(|_| wrong("it is no URL"))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong("its scheme must be http or https")),
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("it must have no path"));
        }
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("a key is given beside the address, not in it"));
        }
        let secret = |key: &str| {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
            value.set_sensitive(true);
            Some(value)
        };
        let authorization = match key {
            Some(key) => Some(secret(key).ok_or_else(|| wrong("its key holds characters no header may"))?),
            None => None,
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = if secure {
            let name = ServerName::try_from(host.clone())
                .map_err(|_| wrong("no certificate can be for its host"))?;
            Some((trust.connector().map_err(|error| wrong(&error.reason))?, name))
        } else {
            None
        };
        Ok(Upstream {
            host,
            port: authority.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            tls,
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| wrong("its host is odd"))?,
            authorization,
            idle: Mutex::new(Vec::new()),
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection: an idle one that still lives, or a new one.
    pub(crate) async fn connect(&self, timeout: Duration) -> Result<Connection, SendError> {
        loop {
            let idle = self.idle().pop();
            let Some(Idle { mut connection, since }) = idle else { break };
            if since.elapsed() < IDLE && connection.sender.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        self.connect_anew(timeout).await
    }

    /// A new connection.
    pub(crate) async fn connect_anew(&self, timeout: Duration) -> Result<Connection, SendError> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
        let connecting = async {
            let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
            // A request is one small write that must not wait for another.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
            match &self.tls {
                None => Ok(Err(stream)),
                Some((tls, name)) => tls.connect(name.clone(), stream).await.map(Ok),
            }
        };
        let stream = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(late)
            .and_then(|connected| connected)
            .map_err(SendError::Connect)?;
        match stream {
            Err(plain) => speak(plain).await,
            Ok(secure) => speak(secure).await,
        }
    }

    /// Sends a request over `connection` and waits for the response's head.
    pub(crate) async fn send(
        &self,
        connection: &mut Connection,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        let headers = request.headers_mut();
        headers.insert(hyper::header::HOST, self.authority.clone());
        if let Some(authorization) = &self.authorization {
            headers.insert(hyper::header::AUTHORIZATION, authorization.clone());
        }
        let stale = std::mem::replace(&mut connection.used, true);
        connection.sender.send_request(request).await.map_err(|error| SendError::Broken { error, stale })
    }

    /// Takes back a connection whose response was read to its end.
    pub(crate) fn put_back(&self, connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        let mut idle = self.idle();
        if idle.len() >= MAX_IDLE {
            idle.remove(0);
        }
        idle.push(Idle { connection, since: Instant::now() });
    }

    /// Closes what is idle: the replica is gone, or about to be.
    pub(crate) fn forget(&self) {
        self.idle().clear();
    }
}

/// Asks a replica something small: GET, or POST where there is a body. At most `most` bytes of the reply are read, and
/// all of it is there within `timeout`.
pub(crate) async fn ask(
    upstream: &Upstream,
    path: &str,
    body: Bytes,
    timeout: Duration,
    most: usize,
) -> Result<(StatusCode, Bytes), SendError> {
    let asking = async {
        let request = || {
            let mut request = Request::new(Full::new(body.clone()));
            *request.uri_mut() = path.parse().unwrap_or_default();
            if !body.is_empty() {
                *request.method_mut() = Method::POST;
                request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            request
        };
        let mut connection = upstream.connect(timeout).await?;
        let response = match upstream.send(&mut connection, request()).await {
            Err(SendError::Broken { stale: true, .. }) => {
                connection = upstream.connect_anew(timeout).await?;
                upstream.send(&mut connection, request()).await?
            }
            sent => sent?,
        };
        let status = response.status();
        match Limited::new(response.into_body(), most).collect().await {
            Ok(body) => {
                upstream.put_back(connection);
                Ok((status, body.to_bytes()))
            }
            Err(error) => Err(SendError::Connect(io::Error::other(error))),
        }
    };
    let late = || SendError::Connect(io::Error::new(io::ErrorKind::TimedOut, "no reply in time"));
    tokio::time::timeout(timeout, asking).await.unwrap_or_else(|_| Err(late()))
}

/// HTTP over a stream, driven by a task of its own.
async fn speak(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Connection, SendError> {
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(64 << 10)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| SendError::Broken { error, stale: false })?;
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a replica ended");
        }
    });
    Ok(Connection { sender, task, used: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_with_the_reason() {
        let made = rcgen::generate_simple_self_signed(vec!["host".to_owned()]).unwrap();
        let trust = Trust::pem(made.cert.pem().as_bytes()).unwrap();
        let new = |url: &str| Upstream::new(url, None, &trust);
        assert_eq!(new("https://host").map(|u| u.port).ok(), Some(443));
        for good in ["http://127.0.0.1:8081", "http://host", "http://[::1]:9/"] {
            assert!(new(good).is_ok(), "{good}");
        }
        assert_eq!(new("http://[::1]:9").map(|u| (u.host, u.port)).ok(), Some(("::1".into(), 9)));
        for (bad, reason) in [
            ("ftp://host", "scheme"),
            ("host:80", "scheme"),
            ("http://host/v1", "path"),
            ("http://user:secret@host", "key"),
            ("", "URL"),
        ] {
            let error = new(bad).err().map(|e| e.reason).unwrap_or_default();
            assert!(error.contains(reason), "{bad}: {error}");
        }
    }
}

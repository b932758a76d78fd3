//! Connections to one replica: kept alive, taken last in first out, so that those in excess age and are closed.
//!
//! A connection carries one request at a time ([`super::wire`]).

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::trust::Trust;
use super::wire::{Asked, Connection, Head, Stream};
use crate::alarm::Alarms;

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
    /// What its requests are waited for with.
    pub(super) alarms: Alarms,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// Why no response came.
#[derive(Debug)]
pub(crate) enum SendError {
    /// No connection.
    Connect(io::Error),
    /// It broke before a response.
    Broken {
        error: io::Error,
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
            alarms: Alarms::default(),
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
            if since.elapsed() < IDLE && connection.alive().await {
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
                None => Ok(Stream::Plain(stream)),
                Some((tls, name)) => Ok(Stream::Tls(Box::new(tls.connect(name.clone(), stream).await?))),
            }
        };
        let stream = tokio::time::timeout(timeout, connecting).await.map_err(late).and_then(|made| made);
        stream.map(Connection::new).map_err(SendError::Connect)
    }

    /// Sends a request over `connection` and waits for the response's head. Without a body it is a GET.
    pub(crate) async fn send(
        &self,
        connection: &mut Connection,
        path: &'static str,
        headers: &[(HeaderName, HeaderValue)],
        body: &Bytes,
    ) -> Result<Head, SendError> {
        let (host, authorization, body) = (&self.authority, self.authorization.as_ref(), body.clone());
        let stale = connection.used;
        let asked = Asked { path, host, authorization, headers, body };
        connection.exchange(&asked).await.map_err(|error| SendError::Broken { error, stale })
    }

    /// Asks over a connection that is there, and once more over a new one where that was closed under the request.
    pub(crate) async fn ask(
        &self,
        path: &'static str,
        headers: &[(HeaderName, HeaderValue)],
        body: &Bytes,
        timeout: Duration,
    ) -> Result<(Head, Connection), SendError> {
        let mut connection = self.connect(timeout).await?;
        let head = match self.send(&mut connection, path, headers, body).await {
            Err(SendError::Broken { stale: true, .. }) => {
                connection = self.connect_anew(timeout).await?;
                self.send(&mut connection, path, headers, body).await?
            }
            sent => sent?,
        };
        Ok((head, connection))
    }

    /// Takes back a connection whose response was read to its end.
    pub(crate) fn put_back(&self, connection: Connection) {
        if !connection.reusable() {
            return;
        }
        let mut idle = self.idle();
        // The longest at rest are first. What its server has closed goes no later than this.
        let old = idle.iter().take_while(|idle| idle.since.elapsed() >= IDLE).count();
        let excess = (idle.len() + 1).saturating_sub(MAX_IDLE);
        idle.drain(..old.max(excess));
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
    path: &'static str,
    body: Bytes,
    timeout: Duration,
    most: usize,
) -> Result<(StatusCode, Bytes), SendError> {
    let asking = async {
        let (head, mut connection) = upstream.ask(path, &[], &body, timeout).await?;
        let body = connection.collect(most).await.map_err(SendError::Connect)?;
        upstream.put_back(connection);
        Ok((head.status, body))
    };
    let late = || SendError::Connect(io::Error::new(io::ErrorKind::TimedOut, "no reply in time"));
    tokio::time::timeout(timeout, asking).await.unwrap_or_else(|_| Err(late()))
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

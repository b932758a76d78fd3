//! The HTTP client: TLS with the system's roots, and a deadline on every wait.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use ureq::http::Response;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body};

use crate::{Error, Options};

/// A client made from [`Options`].
pub(crate) struct Http {
    agent: Agent,
}

/// Why a request brought nothing, in words for a person, and whether another try may.
#[derive(Debug)]
pub(crate) struct HttpFailure {
    pub(crate) reason: String,
    pub(crate) retry: bool,
    /// What the server asked for, bounded.
    pub(crate) retry_after: Option<Duration>,
}

impl HttpFailure {
    pub(crate) fn lasting(reason: impl Into<String>) -> HttpFailure {
        HttpFailure { reason: reason.into(), retry: false, retry_after: None }
    }

    pub(crate) fn passing(reason: impl Into<String>) -> HttpFailure {
        HttpFailure { reason: reason.into(), retry: true, retry_after: None }
    }
}

impl Http {
    pub(crate) fn new(options: &Options) -> Result<Http, Error> {
        let loaded = rustls_native_certs::load_native_certs();
        if loaded.certs.is_empty() {
            let errors: Vec<_> = loaded.errors.iter().map(ToString::to_string).collect();
            tracing::warn!(?errors, "no root certificates found; https needs SSL_CERT_FILE to name some");
        }
        let roots: Vec<_> =
            loaded.certs.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()).collect();
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("consort/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(10)
            .timeout_resolve(Some(options.connect_timeout))
            .timeout_connect(Some(options.connect_timeout.saturating_mul(2)))
            .timeout_recv_response(Some(options.stall_timeout))
            .timeout_per_read(Some(options.stall_timeout))
            .timeout_per_write(Some(options.stall_timeout))
            .build();
        Ok(Http { agent: Agent::new_with_config(config) })
    }

    /// Sends a GET and returns the response of a successful status (2xx, with 206 among them).
    pub(crate) fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response<Body>, HttpFailure> {
        let mut request = self.agent.get(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.call().map_err(|e| failure(&e, url))?;
        let status = response.status().as_u16();
        match status {
            200 | 206 => Ok(response),
            401 | 403 => Err(HttpFailure::lasting(format!(
                "{} answered {status}: not allowed; a gated or private repository needs its terms accepted there and a token in HF_TOKEN",
                host(url)
            ))),
            404 | 410 => Err(HttpFailure::lasting(format!("{} answered {status}: not found", host(url)))),
            408 | 429 | 500..=599 => Err(HttpFailure {
                reason: format!("{} answered {status}", host(url)),
                retry: true,
                retry_after: header(&response, "retry-after")
                    .and_then(|v| v.parse().ok())
                    .map(|s: u64| Duration::from_secs(s.min(30))),
            }),
            416 => Err(HttpFailure::passing(RANGE_REFUSED)),
            _ => Err(HttpFailure::lasting(format!("{} answered {status}", host(url)))),
        }
    }

    /// A whole small body, at most `limit` bytes, with its content type.
    pub(crate) fn small(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        limit: u64,
    ) -> Result<(Vec<u8>, String), HttpFailure> {
        let response = self.get(url, headers)?;
        let kind = header(&response, "content-type").unwrap_or_default();
        let mut body = Vec::new();
        response
            .into_body()
            .into_reader()
            .take(limit + 1)
            .read_to_end(&mut body)
            .map_err(|e| HttpFailure::passing(format!("{}: {}", host(url), read_reason(&e))))?;
        if body.len() as u64 > limit {
            return Err(HttpFailure::lasting(format!(
                "{} sent more than {limit} bytes for a listing",
                host(url)
            )));
        }
        Ok((body, kind))
    }
}

/// The reason of the failure that asks for a start from zero.
pub(crate) const RANGE_REFUSED: &str = "the server refused to go on where the download stopped";

pub(crate) fn header(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_string)
}

/// Scheme and host of a URL, for messages: no path, and no user or password.
pub(crate) fn host(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or("");
    let host = authority.rsplit('@').next().unwrap_or("");
    if scheme == "http" { format!("http://{host}") } else { host.to_string() }
}

/// What an error while reading a body says to a person.
pub(crate) fn read_reason(error: &std::io::Error) -> String {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<ureq::Error>());
    match (error.kind(), inner) {
        (std::io::ErrorKind::TimedOut, _) | (_, Some(ureq::Error::Timeout(_))) => {
            "the server stopped sending".to_string()
        }
        (std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset, _) => {
            "the connection was cut".to_string()
        }
        _ => error.to_string(),
    }
}

fn failure(error: &ureq::Error, url: &str) -> HttpFailure {
    let host = host(url);
    match error {
        // A name that doesn't resolve now won't in a second: go on to the next source.
        ureq::Error::HostNotFound => HttpFailure::lasting(format!("{host} can't be resolved")),
        ureq::Error::Timeout(ureq::Timeout::Resolve) => {
            HttpFailure::lasting(format!("resolving {host} took too long"))
        }
        ureq::Error::Timeout(ureq::Timeout::Connect) => {
            HttpFailure::lasting(format!("{host} can't be reached: no answer in time"))
        }
        ureq::Error::Timeout(_) => HttpFailure::passing(format!("{host} didn't answer in time")),
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            HttpFailure::lasting(format!("{host} refuses connections"))
        }
        ureq::Error::Io(e) if dns(e) => HttpFailure::lasting(format!("{host} can't be resolved")),
        ureq::Error::Io(e) => HttpFailure::passing(format!("{host}: {}", read_reason(e))),
        ureq::Error::ConnectProxyFailed(reason) => {
            HttpFailure::lasting(format!("the proxy doesn't let through to {host}: {reason}"))
        }
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => HttpFailure::lasting(format!(
            "{host}: TLS failed ({error}); a private certificate authority can be named in SSL_CERT_FILE"
        )),
        other => HttpFailure::lasting(format!("{host}: {other}")),
    }
}

fn dns(error: &std::io::Error) -> bool {
    // std has no kind for getaddrinfo's failures; its text is stable.
    error.to_string().contains("failed to lookup address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_shown_without_credentials() {
        assert_eq!(host("https://user:secret@example.org/simple/x?y"), "example.org");
        assert_eq!(host("http://127.0.0.1:80/x"), "http://127.0.0.1:80");
    }
}

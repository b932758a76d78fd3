//! Where spans go: the collector's address, whose certificate it may have, and the headers it wants.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use ureq::Agent;
use ureq::http::{HeaderName, HeaderValue};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

/// A request to the collector is over within this.
const PATIENCE: Duration = Duration::from_secs(5);

/// An OpenTelemetry collector.
#[derive(Clone, Default)]
pub struct Collector {
    /// `http://host:4318` or `https://host`; `/v1/traces` is added.
    pub endpoint: String,
    /// The PEM text of the certificates (or authorities) that it may have, instead of the system's.
    pub certificates: Option<Vec<u8>>,
    /// Headers of each request, as `name=value,name=value`, values percent-encoded (W3C Baggage, as OpenTelemetry's
    /// `OTEL_EXPORTER_OTLP_HEADERS`). Secrets mostly: they are in no log and no error.
    pub headers: Option<String>,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// Why spans can't be exported.
#[derive(Debug, PartialEq, Eq)]
pub enum OtlpError {
    /// The address is no collector's.
    Endpoint {
        /// What was given.
        endpoint: String,
    },
    /// The certificates can't be used.
    Certificates {
        /// Why.
        reason: String,
    },
    /// The headers aren't.
    Headers {
        /// Which of them, from 1: they may be secrets.
        number: usize,
    },
    /// The process exports already, or no thread could be started.
    NotStarted,
}

impl std::fmt::Display for OtlpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OtlpError::Endpoint { endpoint } => write!(
                f,
                "{endpoint:?} is no collector's address; write it like http://127.0.0.1:4318 or https://collector:4318"
            ),
            OtlpError::Certificates { reason } => {
                write!(f, "the file of certificates that the collector may have {reason}")
            }
            OtlpError::Headers { number } => {
                write!(f, "header {number} for the collector is none; write them like name=value,other=value")
            }
            OtlpError::NotStarted => write!(f, "the export of traces could not be started"),
        }
    }
}

impl std::error::Error for OtlpError {}

/// The way to a collector.
pub(super) struct Door {
    agent: Agent,
    url: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Door {
    /// Checks everything that can be wrong before anything is sent.
    pub(super) fn open(collector: &Collector) -> Result<Door, OtlpError> {
        let endpoint = collector.endpoint.as_str();
        let wrong = || OtlpError::Endpoint { endpoint: endpoint.to_owned() };
        let secure = endpoint.starts_with("https://");
        let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        let rest = rest.ok_or_else(wrong)?;
        let host = rest.split('/').next().unwrap_or_default();
        if host.is_empty() || host.contains(['@', ' ', '?', '#']) || rest.contains(['?', '#', ' ']) {
            return Err(wrong());
        }
        let base = endpoint.trim_end_matches('/');
        let url = if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") };
        let mut config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .proxy(None)
            .max_redirects(0)
            .http_status_as_error(true);
        // The system's certificates are read only where they are needed: that takes milliseconds of a start.
        if secure || collector.certificates.is_some() {
            let tls = TlsConfig::builder()
                .provider(TlsProvider::Rustls)
                .root_certs(RootCerts::Specific(Arc::new(roots(collector.certificates.as_deref())?)))
                .unversioned_rustls_crypto_provider(Arc::new(aws_lc_rs::default_provider()));
            config = config.tls_config(tls.build());
        }
        let headers = headers(collector.headers.as_deref().unwrap_or_default())?;
        Ok(Door { agent: Agent::new_with_config(config.build()), url, headers })
    }

    /// Sends a batch; why it wasn't taken.
    pub(super) fn post(&mut self, body: &[u8]) -> Result<(), String> {
        let mut request = self.agent.post(&self.url).content_type("application/x-protobuf");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        request.send(body).map(|_| ()).map_err(|error| error.to_string())
    }
}

/// The certificates of a PEM text, or the system's.
fn roots(pem: Option<&[u8]>) -> Result<Vec<Certificate<'static>>, OtlpError> {
    let wrong = |reason: String| OtlpError::Certificates { reason };
    let Some(pem) = pem else {
        let loaded = rustls_native_certs::load_native_certs().certs;
        return Ok(loaded.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()).collect());
    };
    let mut roots = Vec::new();
    for item in parse_pem(pem) {
        if let PemItem::Certificate(certificate) =
            item.map_err(|error| wrong(format!("is no PEM: {error}")))?
        {
            roots.push(certificate);
        }
    }
    if roots.is_empty() { Err(wrong("holds none".to_owned())) } else { Ok(roots) }
}

fn headers(text: &str) -> Result<Vec<(HeaderName, HeaderValue)>, OtlpError> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .enumerate()
        .map(|(i, pair)| {
            let wrong = || OtlpError::Headers { number: i + 1 };
            let (name, value) = pair.split_once('=').ok_or_else(wrong)?;
            let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
            let value = decoded(value.trim()).ok_or_else(wrong)?;
            let mut value = HeaderValue::from_bytes(&value).map_err(|_| wrong())?;
            value.set_sensitive(true);
            Ok((name, value))
        })
        .collect()
}

/// A percent-encoded value.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut out) = (text.bytes(), Vec::new());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                u8::try_from(digit(bytes.next())? * 16 + digit(bytes.next())?).ok()?
            }
            byte => byte,
        });
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collector(endpoint: &str) -> Collector {
        Collector { endpoint: endpoint.to_owned(), ..Collector::default() }
    }

    #[test]
    fn only_a_plain_address_of_a_collector_is_taken() {
        for wrong in
            ["", "collector:4318", "grpc://c", "http://", "https://", "http://u@host", "http://h/?a=b"]
        {
            assert!(matches!(Door::open(&collector(wrong)), Err(OtlpError::Endpoint { .. })), "{wrong}");
        }
        let door = Door::open(&collector("https://collector:4318/")).ok().unwrap();
        assert_eq!(door.url, "https://collector:4318/v1/traces");
    }

    #[test]
    fn headers_are_read_as_opentelemetry_writes_them() {
        let read = headers("api-key=a%20b%3D, x-team = core ,").unwrap();
        assert_eq!(read[0].1.as_bytes(), b"a b=");
        assert_eq!((read[1].0.as_str(), read[1].1.as_bytes(), read.len()), ("x-team", &b"core"[..], 2));
        for wrong in ["secret", "a=1,b b=secret", "a=%zz", "a=%0a"] {
            let error = headers(wrong).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn certificates_must_be_some() {
        let of = |pem: &str| {
            let certificates = Some(pem.as_bytes().to_vec());
            Door::open(&Collector { certificates, ..collector("https://h") }).err().map(|e| e.to_string())
        };
        assert!(of("").unwrap().contains("holds none"));
        assert!(
            of("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n").unwrap().contains("no PEM")
        );
    }
}

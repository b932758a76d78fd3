//! Who may ask: the key, and against web pages from elsewhere the `Host` and `Origin` of a request.
//!
//! A server on loopback without a key trusts everyone on the machine, browsers included; so a page from elsewhere must
//! not be able to drive it. Two ways in are closed. *Cross-origin*: a browser says where a page came from (`Origin`),
//! and any origin but our own (or an allowed one) is refused. *DNS rebinding*: a page whose name was pointed at
//! 127.0.0.1 counts as our own origin, but its `Host` is that name; so only loopback's names (and allowed ones) pass.
//! With a key neither matters: no browser adds it by itself.

use std::net::IpAddr;

use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};

use crate::error::{ApiError, ApiResult};
use crate::options::{ApiKey, Options};

/// The rules of one listener.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    key: Option<ApiKey>,
    loopback: bool,
    hosts: Vec<String>,
    origins: Vec<String>,
}

/// How much a route gives away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Health and the page: always.
    Open,
    /// Metrics: open on loopback.
    Metrics,
    /// The API: needs the key where there is one.
    Key,
}

impl Guard {
    pub(crate) fn new(options: &Options, loopback: bool) -> Guard {
        Guard {
            key: options.api_key.clone(),
            loopback,
            hosts: options.allowed_hosts.iter().map(|h| h.to_ascii_lowercase()).collect(),
            origins: options
                .allowed_origins
                .iter()
                .map(|o| o.trim_end_matches('/').to_ascii_lowercase())
                .collect(),
        }
    }

    /// Refuses a request that may not ask this.
    pub(crate) fn check(&self, headers: &HeaderMap, access: Access) -> ApiResult<()> {
        match &self.key {
            Some(key) => {
                let needed = match access {
                    Access::Open => false,
                    Access::Metrics => !self.loopback,
                    Access::Key => true,
                };
                if needed { check_key(key, headers) } else { Ok(()) }
            }
            None => self.check_browser(headers),
        }
    }

    /// The origin that may read the answer, where the request has one that was allowed.
    pub(crate) fn cors_origin<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        let origin = headers.get(ORIGIN)?.to_str().ok()?;
        self.allows_origin(origin).then_some(origin)
    }

    fn allows_origin(&self, origin: &str) -> bool {
        self.origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin))
    }

    fn check_browser(&self, headers: &HeaderMap) -> ApiResult<()> {
        let refused =
            |message: String| Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden_origin", message));
        let host = match headers.get(HOST).map(|h| h.to_str()) {
            // HTTP/1.0 tools; a browser always says.
            None => None,
            Some(Ok(host)) => Some(host),
            Some(Err(_)) => return refused("the Host header is not text".to_owned()),
        };
        if let Some(host) = host {
            let name = host_name(host).to_ascii_lowercase();
            if !is_loopback_name(&name) && !self.hosts.contains(&name) {
                return refused(format!(
                    "this server answers as localhost only, not as {name:?}; allow the name, or set an API key"
                ));
            }
        }
        if let Some(origin) = headers.get(ORIGIN) {
            let origin = origin.to_str().unwrap_or("");
            let own = origin
                .split_once("://")
                .is_some_and(|(_, at)| host.is_some_and(|h| h.eq_ignore_ascii_case(at)));
            if !own && !self.allows_origin(origin) {
                return refused(format!(
                    "pages from {origin:?} may not call this server; allow the origin, or set an API key"
                ));
            }
        }
        Ok(())
    }
}

fn check_key(key: &ApiKey, headers: &HeaderMap) -> ApiResult<()> {
    let unauthorized = |message: &str| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    let header = headers
        .get(AUTHORIZATION)
        .ok_or_else(|| unauthorized("an API key is needed: send the header Authorization: Bearer KEY"))?;
    let presented = header.to_str().ok().and_then(|h| {
        let (scheme, token) = h.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    match presented {
        Some(token) if key.matches(token) => Ok(()),
        Some(_) => Err(unauthorized("the API key is wrong")),
        None => Err(unauthorized("the Authorization header must read Bearer KEY")),
    }
}

/// `host:port` without the port, brackets off an IPv6 address.
fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or("");
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

fn is_loopback_name(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok_and(is_loopback)
}

/// Loopback, also where it is an IPv4 address in IPv6's clothes.
pub(crate) fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (axum::http::HeaderName::from_static(k), v.parse().unwrap())).collect()
    }

    #[test]
    fn without_a_key_only_local_names_and_own_pages_pass() {
        let options = Options {
            allowed_hosts: vec!["models.example.org".to_owned()],
            allowed_origins: vec!["https://app.example.org".to_owned()],
            ..Options::default()
        };
        let guard = Guard::new(&options, true);
        let table: &[(&[(&'static str, &str)], bool)] = &[
            (&[("host", "127.0.0.1:8080")], true),
            (&[("host", "localhost:8080")], true),
            (&[("host", "LocalHost")], true),
            (&[("host", "[::1]:8080")], true),
            (&[("host", "models.example.org")], true),
            (&[], true),
            (&[("host", "evil.example:8080")], false),
            (&[("host", "127.0.0.1.evil.example")], false),
            (&[("host", "localhost.evil.example")], false),
            (&[("host", "localhost:8080"), ("origin", "http://localhost:8080")], true),
            (&[("host", "localhost:8080"), ("origin", "http://localhost:9999")], false),
            (&[("host", "localhost:8080"), ("origin", "https://evil.example")], false),
            (&[("host", "localhost:8080"), ("origin", "null")], false),
            (&[("host", "localhost:8080"), ("origin", "https://app.example.org")], true),
        ];
        for (pairs, passes) in table {
            for access in [Access::Open, Access::Key] {
                assert_eq!(guard.check(&headers(pairs), access).is_ok(), *passes, "{pairs:?}");
            }
        }
    }

    #[test]
    fn with_a_key_the_api_needs_it_and_health_does_not() {
        let options = Options { api_key: Some(ApiKey::new("sk-1")), ..Options::default() };
        for loopback in [true, false] {
            let guard = Guard::new(&options, loopback);
            let with = |value: &str| guard.check(&headers(&[("authorization", value)]), Access::Key);
            assert!(with("Bearer sk-1").is_ok());
            assert!(with("bearer sk-1").is_ok());
            for wrong in ["Bearer sk-2", "Bearer", "Basic sk-1", "sk-1", "Bearer "] {
                assert_eq!(with(wrong).unwrap_err().status, StatusCode::UNAUTHORIZED, "{wrong}");
            }
            assert!(guard.check(&headers(&[]), Access::Open).is_ok());
            assert_eq!(guard.check(&headers(&[]), Access::Metrics).is_ok(), loopback);
        }
    }
}

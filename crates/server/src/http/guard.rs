//! Who may ask: the key; without one, whoever is no web page from elsewhere ([`Origins`]).

use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};

use consort_edge::{Foreign, Origins};

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
            hosts: options.allowed_hosts.clone(),
            origins: options.allowed_origins.clone(),
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
            None => {
                let refused = |foreign: Foreign| {
                    ApiError::new(StatusCode::FORBIDDEN, "forbidden_origin", foreign.to_string())
                };
                self.origins().check(headers).map_err(refused)
            }
        }
    }

    /// The origin that may read the answer, where the request has one that was allowed.
    pub(crate) fn cors_origin<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        self.origins().cors(headers)
    }

    fn origins(&self) -> Origins<'_> {
        Origins { hosts: &self.hosts, origins: &self.origins }
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

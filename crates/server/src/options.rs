//! How a server runs.

use std::time::Duration;

/// A secret that requests must bear. Only its hash is kept, and hashes are compared in constant time.
#[derive(Clone, PartialEq)]
pub struct ApiKey {
    hash: blake3::Hash,
}

impl ApiKey {
    /// From the secret's text.
    pub fn new(secret: &str) -> ApiKey {
        ApiKey { hash: blake3::hash(secret.as_bytes()) }
    }

    /// Whether `presented` is the secret. `blake3::Hash` compares in constant time; the hash itself takes time by
    /// length only.
    pub fn matches(&self, presented: &str) -> bool {
        self.hash == blake3::hash(presented.as_bytes())
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// How a server runs. The defaults are safe on a loopback address.
#[derive(Clone, Debug)]
pub struct Options {
    /// Requests must bear it as `Authorization: Bearer …`. Required where the address isn't loopback.
    pub api_key: Option<ApiKey>,
    /// The chat page at `/`.
    pub page: Option<&'static str>,
    /// Host names, beside loopback's, under which a loopback server without a key may be reached (behind a proxy).
    /// Any other `Host` is refused, so that a page whose name was pointed at this machine can't drive it.
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://example.org`) whose pages may call the API (CORS). None by default.
    pub allowed_origins: Vec<String>,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Bytes of all bodies being read at one time; past it, 429.
    pub max_body_bytes_in_flight: usize,
    /// Bytes of a request's line and headers (at least 8 KiB); past it, 431.
    pub max_header_bytes: usize,
    /// Headers of a request; past it, 431.
    pub max_headers: usize,
    /// Connections at one time; one more closes the one that idled longest, or waits.
    pub max_connections: usize,
    /// A request's headers must be in within this; an idle connection is closed after it.
    pub header_timeout: Duration,
    /// And its body within this.
    pub body_timeout: Duration,
    /// A client that takes nothing of an answer for this long is cut off.
    pub write_timeout: Duration,
    /// The longest a request may take, queueing included. `X-Request-Timeout-Ms` asks for less.
    pub request_timeout: Duration,
    /// A comment on a stream that has been silent for this long, so that proxies keep it open.
    pub keep_alive: Duration,
    /// What running requests get to finish when the server shuts down; what is left is handed over.
    pub drain_budget: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            api_key: None,
            page: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            max_body_bytes: 4 << 20,
            max_body_bytes_in_flight: 64 << 20,
            max_header_bytes: 64 << 10,
            max_headers: 100,
            max_connections: 512,
            header_timeout: Duration::from_secs(20),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(600),
            keep_alive: Duration::from_secs(15),
            drain_budget: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_matches_itself_alone_and_never_shows() {
        let key = ApiKey::new("sk-one");
        assert!(key.matches("sk-one"));
        for other in ["", "sk-on", "sk-one ", "sk-two", "SK-ONE"] {
            assert!(!key.matches(other), "{other:?}");
        }
        assert!(!format!("{key:?}").contains("one"));
    }
}

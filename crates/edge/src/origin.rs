//! Against web pages from elsewhere: the `Host` and `Origin` of a request that bears no key.
//!
//! A server on loopback without a key trusts everyone on the machine, browsers included; so a page from elsewhere must
//! not be able to drive it. Two ways in are closed. *Cross-origin*: a browser says where a page came from (`Origin`),
//! and any origin but our own (or an allowed one) is refused. *DNS rebinding*: a page whose name was pointed at
//! 127.0.0.1 counts as our own origin, but its `Host` is that name; so only loopback's names (and allowed ones) pass.
//! With a key neither matters: no browser adds it by itself.

use std::net::IpAddr;

use http::HeaderMap;
use http::header::{HOST, ORIGIN};

/// What is allowed beside this machine's own names and pages.
#[derive(Clone, Copy, Debug)]
pub struct Origins<'a> {
    /// Host names, without a port.
    pub hosts: &'a [String],
    /// Origins (`https://example.org`), or `*` for all.
    pub origins: &'a [String],
}

/// Why a request may come from a page from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// A header that can't be read.
    #[error("the Host header is not text")]
    HostNotText,
    /// It asks for another name than this machine's.
    #[error("this server answers as localhost only, not as {0:?}; allow the name, or demand an API key")]
    Host(String),
    /// Its page is another's.
    #[error("pages from {0:?} may not call this server; allow the origin, or demand an API key")]
    Page(String),
}

impl Origins<'_> {
    /// Refuses a request that a page from elsewhere may have sent.
    ///
    /// # Errors
    /// [`Foreign`]
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Foreign> {
        let host = match headers.get(HOST).map(|host| host.to_str()) {
            // HTTP/1.0 tools; a browser always says.
            None => None,
            Some(Ok(host)) => Some(host),
            Some(Err(_)) => return Err(Foreign::HostNotText),
        };
        if let Some(host) = host {
            let name = host_name(host);
            if !is_loopback_name(name) && !self.hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
            {
                return Err(Foreign::Host(name.to_owned()));
            }
        }
        if let Some(origin) = headers.get(ORIGIN) {
            let origin = origin.to_str().unwrap_or("");
            let own = origin
                .split_once("://")
                .is_some_and(|(_, at)| host.is_some_and(|host| host.eq_ignore_ascii_case(at)));
            if !own && !self.allow(origin) {
                return Err(Foreign::Page(origin.to_owned()));
            }
        }
        Ok(())
    }

    /// The origin that may read the answer, where the request has one that was allowed.
    pub fn cors<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        headers.get(ORIGIN)?.to_str().ok().filter(|origin| self.allow(origin))
    }

    fn allow(&self, origin: &str) -> bool {
        let same =
            |allowed: &String| allowed == "*" || allowed.trim_end_matches('/').eq_ignore_ascii_case(origin);
        self.origins.iter().any(same)
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
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok_and(is_loopback)
}

/// Loopback, also where it is an IPv4 address in IPv6's clothes.
pub fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_names_and_own_pages_pass() {
        let (hosts, origins) = (["models.example.org".to_owned()], ["https://app.example.org/".to_owned()]);
        let allowed = Origins { hosts: &hosts, origins: &origins };
        let table: &[(&[(&'static str, &str)], bool)] = &[
            (&[], true),
            (&[("host", "127.0.0.1:8080")], true),
            (&[("host", "LocalHost:1")], true),
            (&[("host", "[::1]:8080")], true),
            (&[("host", "models.example.org")], true),
            (&[("host", "evil.example:8080")], false),
            (&[("host", "localhost.evil.example")], false),
            (&[("host", "127.0.0.1.evil.example")], false),
            (&[("host", "localhost:80"), ("origin", "http://localhost:80")], true),
            (&[("host", "localhost:80"), ("origin", "http://localhost:81")], false),
            (&[("host", "localhost:80"), ("origin", "null")], false),
            (&[("host", "localhost:80"), ("origin", "https://app.example.org")], true),
        ];
        for (pairs, passes) in table {
            let headers: HeaderMap = pairs
                .iter()
                .map(|(k, v)| (http::header::HeaderName::from_static(k), v.parse().unwrap()))
                .collect();
            assert_eq!(allowed.check(&headers).is_ok(), *passes, "{pairs:?}");
        }
    }
}

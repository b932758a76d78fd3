//! Against web pages from elsewhere: the `Host` and `Origin` of a request that bears no key.
//!
//! A gateway on loopback without keys trusts everyone on the machine, browsers included; so a page from elsewhere must
//! not be able to drive it, neither across origins (`Origin`) nor under a name that was pointed at this machine
//! (DNS rebinding; `Host`). With a key neither matters: no browser adds it by itself.

use std::net::IpAddr;

use hyper::StatusCode;
use hyper::header::{HOST, HeaderMap, ORIGIN};

use crate::error::{Outcome, Refusal};
use crate::settings::ClientSettings;

/// Refuses a request that a page from elsewhere may have sent.
pub(crate) fn check(headers: &HeaderMap, settings: &ClientSettings) -> Outcome<()> {
    let refused = |message: String| Err(Refusal::new(StatusCode::FORBIDDEN, "forbidden_origin", message));
    let host = match headers.get(HOST).map(|host| host.to_str()) {
        // HTTP/1.0 tools; a browser always says.
        None => None,
        Some(Ok(host)) => Some(host),
        Some(Err(_)) => return refused("the Host header is not text".to_owned()),
    };
    if let Some(host) = host {
        let name = host_name(host);
        if !is_loopback_name(name)
            && !settings.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
        {
            return refused(format!(
                "this gateway answers as localhost only, not as {name:?}; allow the name, or demand an API key"
            ));
        }
    }
    if let Some(origin) = headers.get(ORIGIN) {
        let origin = origin.to_str().unwrap_or("");
        let own = origin
            .split_once("://")
            .is_some_and(|(_, at)| host.is_some_and(|host| host.eq_ignore_ascii_case(at)));
        if !own && !allows(origin, settings) {
            return refused(format!(
                "pages from {origin:?} may not call this gateway; allow the origin, or demand an API key"
            ));
        }
    }
    Ok(())
}

/// The origin that may read the answer, where the request has one that was allowed.
pub(crate) fn cors_origin<'a>(headers: &'a HeaderMap, settings: &ClientSettings) -> Option<&'a str> {
    headers.get(ORIGIN)?.to_str().ok().filter(|origin| allows(origin, settings))
}

fn allows(origin: &str, settings: &ClientSettings) -> bool {
    let same =
        |allowed: &String| allowed == "*" || allowed.trim_end_matches('/').eq_ignore_ascii_case(origin);
    settings.allowed_origins.iter().any(same)
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
pub(crate) fn is_loopback(ip: IpAddr) -> bool {
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
        let settings = ClientSettings {
            allowed_hosts: vec!["models.example.org".to_owned()],
            allowed_origins: vec!["https://app.example.org/".to_owned()],
            ..ClientSettings::default()
        };
        let table: &[(&[(&'static str, &str)], bool)] = &[
            (&[], true),
            (&[("host", "127.0.0.1:8080")], true),
            (&[("host", "LocalHost:1")], true),
            (&[("host", "[::1]:8080")], true),
            (&[("host", "models.example.org")], true),
            (&[("host", "evil.example:8080")], false),
            (&[("host", "localhost.evil.example")], false),
            (&[("host", "localhost:80"), ("origin", "http://localhost:80")], true),
            (&[("host", "localhost:80"), ("origin", "http://localhost:81")], false),
            (&[("host", "localhost:80"), ("origin", "null")], false),
            (&[("host", "localhost:80"), ("origin", "https://app.example.org")], true),
        ];
        for (pairs, passes) in table {
            let headers: HeaderMap = pairs
                .iter()
                .map(|(k, v)| (hyper::header::HeaderName::from_static(k), v.parse().unwrap()))
                .collect();
            assert_eq!(check(&headers, &settings).is_ok(), *passes, "{pairs:?}");
        }
    }
}

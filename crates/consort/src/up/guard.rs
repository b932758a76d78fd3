//! Who may look at the fleet, and who may kill a replica.
//!
//! To look: anyone on this machine where the front door has no keys; else a bearer of a key. To kill: the page alone,
//! from this machine. A web page from elsewhere must not be able to, in whatever browser runs here: it can't set the
//! header without asking first (CORS), its `Origin` is not our `Host`, and a name pointed at this machine (DNS
//! rebinding) is no loopback name.

use std::net::{IpAddr, SocketAddr};

use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST, ORIGIN};

use super::shared::Shared;

/// A page of ours sends it with what changes something; no form and no image can.
pub(crate) const MARK: &str = "x-consort-page";

/// Why a request is refused.
pub(crate) struct Refused(pub(crate) u16, pub(crate) String);

/// Whether this may see the fleet.
pub(crate) fn look(shared: &Shared, headers: &HeaderMap, peer: SocketAddr) -> Result<(), Refused> {
    if shared.state().keys_required {
        return bearer(shared, headers);
    }
    if !loopback(peer.ip()) {
        return Err(Refused(403, "only this machine may look at the fleet".into()));
    }
    browser(shared, headers, false)
}

/// Whether this may kill a replica.
pub(crate) fn kill(shared: &Shared, headers: &HeaderMap, peer: SocketAddr) -> Result<(), Refused> {
    if !loopback(peer.ip()) {
        return Err(Refused(403, "replicas can be killed from this machine only".into()));
    }
    if shared.state().keys_required {
        bearer(shared, headers)?;
    }
    if !headers.contains_key(MARK) {
        return Err(Refused(403, format!("a page that kills sends the header {MARK}")));
    }
    browser(shared, headers, true)
}

fn bearer(shared: &Shared, headers: &HeaderMap) -> Result<(), Refused> {
    let presented = headers.get(AUTHORIZATION).and_then(|h| h.to_str().ok()).and_then(|h| {
        let (scheme, token) = h.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    let Some(presented) = presented else {
        return Err(Refused(401, "an API key is needed: send the header Authorization: Bearer KEY".into()));
    };
    let hash = blake3::hash(presented.as_bytes());
    let known =
        shared.keys().iter().filter_map(|key| blake3::Hash::from_hex(&key.hash).ok()).any(|key| key == hash);
    if known { Ok(()) } else { Err(Refused(401, "the API key is wrong".into())) }
}

/// `Host` must be a name of this machine, `Origin` our own.
fn browser(shared: &Shared, headers: &HeaderMap, strict: bool) -> Result<(), Refused> {
    let host = match headers.get(HOST).map(|h| h.to_str()) {
        Some(Ok(host)) => host.to_ascii_lowercase(),
        _ => return Err(Refused(403, "a Host header is needed".into())),
    };
    let name = host_name(&host);
    let settings = shared.door.settings();
    let allowed = || settings.clients.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
    if !(loopback_name(name) || !strict && allowed()) {
        return Err(Refused(403, format!("the fleet is shown as localhost only, not as {name:?}")));
    }
    match headers.get(ORIGIN).map(|o| o.to_str().unwrap_or_default().to_ascii_lowercase()) {
        None if !strict => Ok(()),
        Some(origin) if origin.split_once("://").is_some_and(|(_, at)| at == host) => Ok(()),
        origin => Err(Refused(403, format!("a page from {:?} may not do this", origin.unwrap_or_default()))),
    }
}

fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or("");
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

fn loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

fn loopback_name(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok_and(loopback)
}

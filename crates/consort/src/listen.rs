//! Where a server listens, and who may ask.
//!
//! Loopback needs no key. Any other address demands one: minted and shown once where none was given.

use std::net::{IpAddr, SocketAddr, TcpListener};

use anyhow::{Context, Result, bail};
use clap::Args;
use consort_edge::is_loopback;

use crate::cli::UsageError;

/// The address where none is asked for.
const DEFAULT_HOST: &str = "127.0.0.1";
/// The port where none is asked for.
pub(crate) const DEFAULT_PORT: u16 = 8080;
/// How many ports after it are tried.
const PORTS_TRIED: u16 = 64;

/// Where to listen.
#[derive(Args, Clone, Debug)]
pub(crate) struct Listen {
    /// Address to listen on; any but this machine's own (loopback) demands an API key
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_HOST)]
    pub(crate) host: String,
    /// Port to listen on; 0 takes any free one [default: 8080, or the next free one]
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// Key that requests must bear [default: CONSORT_API_KEY; beyond loopback one is made where none is given]
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
}

/// Whose browsers may ask a server without keys.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Allowed {
    /// Host name under which a server without a key may be reached beside loopback's (behind a proxy); repeatable
    #[arg(long = "allow-host", value_name = "HOST")]
    pub(crate) allowed_hosts: Vec<String>,
    /// Origin like `https://example.org` whose pages may call the API; repeatable
    #[arg(long = "allow-origin", value_name = "ORIGIN")]
    pub(crate) allowed_origins: Vec<String>,
}

/// A bound socket and the rules that go with it.
pub(crate) struct Bound {
    pub(crate) listener: TcpListener,
    pub(crate) address: SocketAddr,
    /// Another port than the usual one was taken.
    pub(crate) moved: bool,
    pub(crate) key: Option<Key>,
}

/// The key requests must bear.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) secret: String,
    pub(crate) origin: Origin,
}

/// Where a key came from, which decides how it may be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Made here: shown once, since nobody else knows it.
    Minted,
    /// From the command line.
    Argument,
    /// From `CONSORT_API_KEY`.
    Environment,
}

impl Listen {
    /// Takes a file's address for what the command line leaves open.
    pub(crate) fn unless_given(&mut self, address: SocketAddr) {
        if self.host == DEFAULT_HOST {
            self.host = address.ip().to_string();
        }
        self.port = self.port.or(Some(address.port()));
    }

    /// Binds. A port that was asked for is taken or refused; the default gives way to the next free one.
    pub(crate) fn bind(&self) -> Result<Bound> {
        let host = self.address()?;
        let key = key(self.api_key.as_deref(), host)?;
        let wanted = self.port.unwrap_or(DEFAULT_PORT);
        let last = if self.port.is_some() { wanted } else { wanted + PORTS_TRIED };
        for port in wanted..=last {
            match TcpListener::bind(SocketAddr::new(host, port)) {
                Ok(listener) => {
                    listener.set_nonblocking(true).context("can't set up the listening socket")?;
                    let address =
                        listener.local_addr().context("can't read the listening socket's address")?;
                    return Ok(Bound { listener, address, moved: port != wanted, key });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && port < last => {}
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                    let cure = if self.port.is_some() {
                        "end the program that listens there, choose another with --port, or leave --port out to get a free one".to_string()
                    } else {
                        format!("all ports from {wanted} to {last} are; choose one with --port")
                    };
                    bail!("port {port} on {host} is taken; {cure}");
                }
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    bail!("this user may not listen on port {port}; choose one above 1023 with --port");
                }
                Err(e) => return Err(e).with_context(|| format!("can't listen on {host} port {port}")),
            }
        }
        bail!("no port could be taken")
    }

    fn address(&self) -> Result<IpAddr> {
        if self.host == "localhost" {
            return Ok(IpAddr::from([127, 0, 0, 1]));
        }
        let plain = self.host.trim_start_matches('[').trim_end_matches(']');
        plain.parse().map_err(|_| {
            UsageError(format!(
                "--host {:?} is no IP address; 127.0.0.1 serves this machine, 0.0.0.0 every network it is on",
                self.host
            ))
            .into()
        })
    }
}

/// The key that requests to a listener on `host` must bear: the one that was given, or `CONSORT_API_KEY`; beyond loopback
/// one is made where there is none.
pub(crate) fn key(given: Option<&str>, host: IpAddr) -> Result<Option<Key>> {
    let given = match given {
        Some(secret) => Some((secret.to_owned(), Origin::Argument)),
        None => crate::environment::api_key().map(|secret| (secret, Origin::Environment)),
    };
    match given {
        Some((secret, _)) if secret.len() < 8 || !secret.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(UsageError(
                "the API key must have at least 8 characters, all printable ASCII and no spaces".into(),
            )
            .into())
        }
        Some((secret, origin)) => Ok(Some(Key { secret, origin })),
        None if is_loopback(host) => Ok(None),
        None => Ok(Some(Key { secret: mint()?, origin: Origin::Minted })),
    }
}

impl Bound {
    /// The address a browser on this machine opens.
    pub(crate) fn url(&self) -> String {
        let ip = match self.address.ip() {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(_) => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
        };
        format!("http://{}", SocketAddr::new(ip, self.address.port()))
    }
}

/// 192 random bits from the system.
fn mint() -> Result<String> {
    let mut bytes = [0u8; 24];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("the system gives no random numbers: {e}"))?;
    Ok(bytes.iter().fold(String::from("sk-consort-"), |key, b| format!("{key}{b:02x}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(host: &str, port: Option<u16>, key: Option<&str>) -> Listen {
        Listen { host: host.into(), port, api_key: key.map(str::to_string) }
    }

    #[test]
    fn beyond_loopback_a_key_is_made() {
        let bound = listen("0.0.0.0", Some(0), None).bind().unwrap();
        let key = bound.key.as_ref().unwrap();
        assert!(key.origin == Origin::Minted && key.secret.len() > 50);
        assert!(bound.url().starts_with("http://127.0.0.1:"));
        assert!(listen("127.0.0.1", Some(0), None).bind().unwrap().key.is_none());
        let given = listen("0.0.0.0", Some(0), Some("a-long-secret")).bind().unwrap().key.unwrap();
        assert_eq!(given.origin, Origin::Argument);
    }

    #[test]
    fn a_port_that_was_asked_for_is_taken_or_refused() {
        let first = listen("127.0.0.1", Some(0), None).bind().unwrap();
        let error = listen("127.0.0.1", Some(first.address.port()), None).bind().err().unwrap().to_string();
        assert!(error.contains("--port"), "{error}");
    }

    #[test]
    fn hosts_and_keys_that_cannot_be_meant_are_refused() {
        assert!(listen("example.org", None, None).bind().is_err());
        assert!(listen("127.0.0.1", Some(0), Some("short")).bind().is_err());
        assert!(listen("127.0.0.1", Some(0), Some("with a space")).bind().is_err());
    }
}

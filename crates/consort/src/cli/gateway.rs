//! `consort gateway`: the front door alone, before replicas that somebody else runs.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use consort_api::deployment::Balancing;
use consort_api::{ApiKeyRecord, FleetReplica, KeyLimits, Numerics, Protocol};
use consort_gateway::{Discovery, Gateway as Door, Settings, Tls, Trust};

use crate::cli::UsageError;
use crate::listen::{Allowed, Bound, Listen, Origin};
use crate::signals;
use crate::terminal::{Style, line, note};

/// Stand before replicas that run elsewhere, as one
///
/// Clients speak OpenAI's API to the gateway. An answer whose replica dies, hangs or is shut down goes on at the next
/// token on another one.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort gateway --upstream http://127.0.0.1:8081 --upstream http://127.0.0.1:8082\n  consort gateway --upstream http://10.0.0.5:8080 --upstream-key \"$REPLICA_KEY\" --port 9000"
)]
pub(crate) struct Gateway {
    /// Address of a replica (`consort serve`), or of another server of OpenAI's API; repeatable
    ///
    /// Another server gets requests as they come, by the models that it lists at /v1/models. Its answers can't be
    /// continued when it is lost.
    #[arg(long = "upstream", value_name = "URL", required = true)]
    upstreams: Vec<String>,
    /// PEM file of the certificates (or authorities) that https:// upstreams may have, instead of the system's
    #[arg(long, value_name = "FILE")]
    upstream_ca: Option<std::path::PathBuf>,
    /// Key that the replicas demand [default: CONSORT_UPSTREAM_KEY]
    #[arg(long, value_name = "KEY")]
    upstream_key: Option<String>,
    #[command(flatten)]
    listen: Listen,
    /// Which replica gets a request: affinity (the one that has had the prompt's beginning), two_choices (of two drawn at
    /// random the one with fewer tokens to compute), least_requests or round_robin
    #[arg(long, value_name = "WAY", default_value = "affinity", value_parser = balancing)]
    balancing: Balancing,
    /// Where no replica of the same numerics class is left, continue an answer on another, and say so in its last event
    #[arg(long)]
    any_class: bool,
    /// A stream without a byte for this long is continued on another replica
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(50..=3_600_000))]
    silence_timeout: u64,
    /// PEM file with the TLS certificate chain; needs --tls-key
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<std::path::PathBuf>,
    /// PEM file with the certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<std::path::PathBuf>,
    /// TLS with a certificate made at this start, for trying out
    #[arg(long, conflicts_with = "tls_cert")]
    tls_self_signed: bool,
    /// Ask a second replica where the first token takes longer than this (at most 5 in 100 requests)
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    hedge_after: Option<u64>,
    #[command(flatten)]
    allowed: Allowed,
    /// Print one line of JSON once listening, instead of the summary
    #[arg(long)]
    json: bool,
}

impl Gateway {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        super::traces("consort-gateway")?;
        let trust = self.trust()?;
        let discovery = self.discovery(&trust)?;
        let mut settings = Settings::default();
        settings.replicas.trust = trust;
        settings.replicas.balancing = self.balancing;
        settings.replicas.silence_timeout = Duration::from_millis(self.silence_timeout);
        settings.clients.allowed_hosts = self.allowed.allowed_hosts.clone();
        settings.clients.allowed_origins = self.allowed.allowed_origins.clone();
        if let Some(after) = self.hedge_after {
            settings.hedging.enabled = true;
            settings.hedging.after = Duration::from_millis(after);
        }
        let tls = self.tls()?;
        let bound = self.listen.bind()?;
        if bound.moved {
            let port = bound.address.port();
            note(&format!("port {} is taken; using {port}", crate::listen::DEFAULT_PORT));
        }
        let door = Door::new(settings);
        let secure = tls.is_some();
        if let Some(tls) = tls {
            door.set_tls(tls);
        }
        if let Some(key) = &bound.key {
            let record = ApiKeyRecord {
                id: "default".to_owned(),
                name: String::new(),
                hash: blake3::hash(key.secret.as_bytes()).to_hex().to_string(),
                limits: KeyLimits::default(),
                created: 0,
            };
            door.set_keys(&[record], true).context("the API key is unusable")?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(4)
            .thread_name("consort-gateway")
            .build()
            .context("can't start the HTTP runtime")?;
        let mut ended = Ok(());
        runtime.block_on(async {
            let stop = async { ended = signals::stop().await.context("can't listen for signals") };
            self.print(&bound, secure)?;
            let listener = tokio::net::TcpListener::from_std(bound.listener)
                .context("can't watch the listening socket")?;
            tokio::spawn(discovery.run(door.clone()));
            anyhow::Ok(door.serve(listener, stop).await?)
        })?;
        ended
    }

    fn trust(&self) -> Result<Trust> {
        let Some(path) = &self.upstream_ca else { return Ok(Trust::default()) };
        let text = std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        Ok(Trust::pem(&text)?)
    }

    fn discovery(&self, trust: &Trust) -> Result<Discovery> {
        let key = self.upstream_key.clone().or_else(crate::environment::upstream_key);
        let replica = |url: &String| FleetReplica {
            id: url
                .trim_end_matches('/')
                .trim_start_matches("http://")
                .trim_start_matches("https://")
                .to_owned(),
            url: url.clone(),
            key: key.clone(),
            slow_start_ms: 0,
            draining: false,
            protocol: Protocol::Consort,
        };
        let numerics = if self.any_class { Numerics::AnyClass } else { Numerics::SameClass };
        Discovery::new(self.upstreams.iter().map(replica).collect(), numerics, trust)
            .map_err(|e| UsageError(format!("--upstream: {e}")).into())
    }

    fn tls(&self) -> Result<Option<Tls>> {
        let read = |path: &std::path::Path| {
            std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
        };
        Ok(match (&self.tls_cert, &self.tls_key) {
            (Some(chain), Some(key)) => Some(Tls::new(&read(chain)?, &read(key)?)?),
            _ if self.tls_self_signed => {
                let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
                names.extend(self.allowed.allowed_hosts.iter().cloned());
                Some(Tls::self_signed(&names)?)
            }
            _ => None,
        })
    }

    fn print(&self, bound: &Bound, secure: bool) -> Result<()> {
        let url = bound.url();
        let url = if secure { url.replacen("http://", "https://", 1) } else { url };
        if self.json {
            return Ok(line(serde_json::json!({
                "url": url, "address": bound.address.to_string(), "upstreams": self.upstreams,
                "api_key": bound.key.as_ref().filter(|key| key.origin == Origin::Minted).map(|key| &key.secret),
            }))?);
        }
        let style = Style::stdout();
        let count = self.upstreams.len();
        line("")?;
        line(format_args!(
            "  {}",
            style.bold(&format!("A gateway before {count} replica{}", if count == 1 { "" } else { "s" }))
        ))?;
        line("")?;
        line(format_args!("  {}  {url}/v1", style.dim("OpenAI API ")))?;
        if let Some(key) = bound.key.as_ref().filter(|key| key.origin == Origin::Minted) {
            line(format_args!(
                "  {}  {}   (made just now, shown once)",
                style.dim("API key    "),
                key.secret
            ))?;
        }
        line(format_args!("  {}  Ctrl-C", style.dim("Stop       ")))?;
        line("")?;
        Ok(())
    }
}

fn balancing(name: &str) -> Result<Balancing, String> {
    let names = || Balancing::ALL.map(Balancing::name).join(", ");
    Balancing::from_name(name).ok_or_else(|| format!("it may be {}", names()))
}

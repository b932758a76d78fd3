//! `consort key create|list|revoke`: API keys of the front door.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use consort_api::{ApiKeyRecord, KeyLimits};
use consort_control::keys::{self, KeyError};
use consort_control::store::Store;
use hyper::Method;
use serde::Deserialize;

use super::UsageError;
use crate::terminal::{Style, line, table};
use crate::up::NewKey;
use crate::{admin_client, environment};

/// API keys: make, list and revoke them
#[derive(Args, Debug)]
pub(crate) struct Key {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Create(Create),
    List(List),
    Revoke(Revoke),
}

/// Make a key; it is shown once and kept as a hash
///
/// A running `consort up` knows it at once.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort key create --name alice\n  consort key create --name batch --requests-per-minute 60 --tokens-per-minute 20000 --models chat,code"
)]
struct Create {
    /// Whose it is
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Requests in any minute [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Tokens in any minute, prompts and answers together [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tokens_per_minute: Option<u64>,
    /// Requests at one time [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: Option<u32>,
    /// Its share where requests have to wait: 2 gets twice what 1 gets
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    weight: u32,
    /// Models that it may ask, separated by commas [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    models: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List the keys, without their secrets
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  consort key list")]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Revoke a key: requests that bear it are refused from now on
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  consort key revoke key-0123456789ab")]
struct Revoke {
    /// The key's id, as `consort key list` shows it
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Made {
    secret: String,
    key: ApiKeyRecord,
}

#[derive(Deserialize)]
struct Revoked {
    revoked: bool,
}

impl Key {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        match self.command {
            Command::Create(create) => create.run(),
            Command::List(list) => list.run(),
            Command::Revoke(revoke) => revoke.run(),
        }
    }
}

impl Create {
    fn run(self) -> Result<()> {
        let limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            concurrency: self.concurrency,
            weight: self.weight,
            models: self.models,
        };
        let folder = environment::state_folder()?;
        let made = match admin_client::find(&folder)? {
            Some(up) => {
                let body = serde_json::to_vec(&NewKey { name: self.name, limits })?;
                up.send(Method::POST, "/keys", body.into())?
            }
            None => {
                let minted = keys::mint(&self.name, limits).map_err(|error| match error {
                    KeyError::Random(_) => anyhow::Error::from(error),
                    other => UsageError(other.to_string()).into(),
                })?;
                Store::open(&folder)?.add_key(&minted.record)?;
                Made { secret: minted.secret, key: minted.record }
            }
        };
        if self.json {
            return Ok(line(serde_json::json!({ "secret": made.secret, "key": made.key }))?);
        }
        line(&made.secret)?;
        crate::terminal::note(&format!(
            "{} for {}: shown this once, kept as a hash; consort key revoke {} ends it",
            made.key.id, made.key.name, made.key.id
        ));
        Ok(())
    }
}

impl List {
    fn run(self) -> Result<()> {
        let folder = environment::state_folder()?;
        let keys: Vec<ApiKeyRecord> = match admin_client::find(&folder)? {
            Some(up) => up.get("/keys")?,
            None => Store::open(&folder)?.keys()?,
        };
        if self.json {
            return Ok(line(serde_json::to_string_pretty(&keys)?)?);
        }
        if keys.is_empty() {
            return Ok(line("there are no keys; consort key create --name NAME makes one")?);
        }
        let limit = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
        let mut rows = vec![
            ["ID", "NAME", "REQUESTS/MIN", "TOKENS/MIN", "AT ONCE", "WEIGHT", "MODELS"].map(str::to_owned),
        ];
        rows.extend(keys.iter().map(|key| {
            [
                key.id.clone(),
                key.name.clone(),
                limit(key.limits.requests_per_minute.map(u64::from)),
                limit(key.limits.tokens_per_minute),
                limit(key.limits.concurrency.map(u64::from)),
                key.limits.weight.to_string(),
                if key.limits.models.is_empty() { "all".to_owned() } else { key.limits.models.join(",") },
            ]
        }));
        let style = Style::stdout();
        for (i, row) in table(&rows).iter().enumerate() {
            line(if i == 0 { style.bold(row) } else { row.clone() })?;
        }
        Ok(())
    }
}

impl Revoke {
    fn run(self) -> Result<()> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if self.id.is_empty() || self.id.len() > 64 || !self.id.bytes().all(plain) {
            return Err(
                UsageError(format!("{:?} is no key's id; consort key list shows them", self.id)).into()
            );
        }
        let folder = environment::state_folder()?;
        let revoked = match admin_client::find(&folder)? {
            Some(up) => {
                let answer: Revoked =
                    up.send(Method::DELETE, &format!("/keys/{}", self.id), bytes::Bytes::new())?;
                answer.revoked
            }
            None => Store::open(&folder)?.revoke_key(&self.id)?,
        };
        if !revoked {
            bail!("there is no key {}; consort key list shows them", self.id);
        }
        if self.json {
            return Ok(line(serde_json::json!({ "revoked": self.id }))?);
        }
        Ok(line(format_args!("{} is revoked", self.id))?)
    }
}

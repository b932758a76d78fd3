//! `consort up`: everything on this machine: the front door, the replicas and the page.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use consort_api::deployment::{Deployment, Version};

use super::UsageError;
use crate::listen::{Allowed, Listen};
use crate::terminal::{line, note};
use crate::up::{self, Plan, Source};
use crate::{environment, loading};

/// The model where none is named: small enough to fetch and answer at once anywhere.
const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Everything on this machine: a front door, replicas that heal, a page to chat and to watch them
///
/// Without a file: two replicas of a small model (one on a machine with one core). The first start fetches the model
/// (98 MB for the default one). With a file, everything that it says; edits to it are applied while it runs.
///
/// SIGINT or SIGTERM drains and ends with status 0; SIGHUP restarts every replica, one after the other, without losing
/// a request.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort up\n  consort up --model gemma-3-270m --replicas 4 --port 9000\n  consort up consort.toml\n  consort up consort.toml --check"
)]
pub(crate) struct Up {
    /// A deployment (docs/fleet.md lists its keys); without one, the options below describe it
    #[arg(value_name = "FILE", conflicts_with_all = ["model", "name", "replicas", "threads", "ctx", "kv_bytes", "max_running", "max_queued", "no_prefix_cache", "allowed_hosts", "allowed_origins"])]
    file: Option<PathBuf>,
    /// Only say whether the file is right
    #[arg(long, requires = "file")]
    check: bool,
    /// A name from `consort models`, `hf:org/repo[/file]`, a .gguf file or a Hugging Face folder
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    model: String,
    /// Name in requests and answers [default: the model's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replicas [default: 2, or 1 on a machine with one core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    replicas: Option<u32>,
    /// Compute threads of each replica [default: the cores divided among the replicas]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    listen: Listen,
    /// Longest sequence in tokens, prompt and answer together [default: the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(16..))]
    ctx: Option<u32>,
    /// Memory for keys and values of each replica, like 512M or 2G [default: fits the machine]
    #[arg(long, value_name = "BYTES", value_parser = crate::settings::byte_count)]
    kv_bytes: Option<usize>,
    /// Requests that each replica runs at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_running: u32,
    /// Requests that may wait at each replica
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    max_queued: u32,
    /// Compute every prompt anew instead of reusing what an earlier one had in common
    #[arg(long)]
    no_prefix_cache: bool,
    #[command(flatten)]
    allowed: Allowed,
    /// Print one line of JSON once ready, instead of the summary
    #[arg(long)]
    json: bool,
}

impl Up {
    pub(crate) fn run(mut self, started: Instant) -> Result<()> {
        super::log("warn")?;
        super::traces("consort-gateway")?;
        let (source, mut deployment) = match &self.file {
            Some(file) => (Source::File(file.clone()), up::read(file).map_err(wrong)?),
            None => (Source::Arguments, self.deployment()?),
        };
        if self.check {
            return self.checked(&deployment);
        }
        if self.file.is_some() {
            self.listen.unless_given(deployment.listen);
        }
        let bound = self.listen.bind()?;
        if bound.moved {
            let port = bound.address.port();
            note(&format!("port {} is taken; using {port}", crate::listen::DEFAULT_PORT));
        }
        deployment.keys_required |= bound.key.is_some();
        up::run(Plan { source, deployment, bound, json: self.json, started })
    }

    fn deployment(&self) -> Result<Deployment> {
        let hub = environment::hub()?;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => loading::reference(&hub, &self.model)?.short_name(),
        };
        let replicas = self.replicas.unwrap_or_else(|| u32::from(up::cores().min(2)));
        let mut deployment = Deployment::of(&name, &self.model, replicas);
        deployment.allowed_hosts = self.allowed.allowed_hosts.clone();
        deployment.allowed_origins = self.allowed.allowed_origins.clone();
        if let Some(model) = deployment.models.first_mut() {
            model.stable = Version {
                threads: self.threads,
                context: self.ctx,
                kv_bytes: self.kv_bytes.map(|n| n as u64),
                max_running: self.max_running,
                max_queued: self.max_queued,
                prefix_cache: !self.no_prefix_cache,
                ..model.stable.clone()
            };
        }
        Ok(deployment)
    }

    /// What a right file asks for.
    fn checked(&self, deployment: &Deployment) -> Result<()> {
        let models: Vec<_> =
            deployment
                .models
                .iter()
                .map(|model| {
                    let versions =
                        std::iter::once((&model.stable, 100 - model.canary.as_ref().map_or(0, |c| c.weight)))
                            .chain(model.canary.iter().map(|c| (&c.version, c.weight)));
                    let versions: Vec<_> = versions
                .map(|(v, weight)| serde_json::json!({
                    "name": v.name, "source": v.source, "min": v.min, "max": v.max, "weight": weight,
                }))
                .collect();
                    serde_json::json!({ "name": model.name, "versions": versions })
                })
                .collect();
        if self.json {
            return Ok(line(
                serde_json::json!({ "ok": true, "listen": deployment.listen.to_string(), "models": models }),
            )?);
        }
        let file = self.file.as_deref().unwrap_or(std::path::Path::new(""));
        let replicas: u32 = deployment
            .models
            .iter()
            .map(|m| m.stable.max + m.canary.as_ref().map_or(0, |c| c.version.max))
            .sum();
        line(format_args!(
            "{} is right: {} model{}, at most {replicas} replica{}, at {}",
            file.display(),
            deployment.models.len(),
            if deployment.models.len() == 1 { "" } else { "s" },
            if replicas == 1 { "" } else { "s" },
            deployment.listen,
        ))?;
        Ok(())
    }
}

/// A file that isn't right is the caller's to mend: exit code 2.
fn wrong(error: anyhow::Error) -> anyhow::Error {
    UsageError(format!("{error:#}")).into()
}

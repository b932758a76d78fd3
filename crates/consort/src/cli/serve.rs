//! `consort serve MODEL`: one replica over the OpenAI API.

use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use consort_control::Said;
use consort_server::{ApiKey, Options, Replica, Slot};

use crate::listen::{Allowed, Bound, Listen, Origin};
use crate::loading::{self, Loaded};
use crate::settings::{Compute, Engine};
use crate::terminal::{Style, bytes, line, note};
use crate::{environment, page, signals, supervised};

/// Serve a model over the OpenAI API
///
/// SIGINT or SIGTERM lets running requests finish, then ends with status 0; a second Ctrl-C ends at once.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort serve smollm2-135m-instruct\n  consort serve model.gguf --port 9000 --ctx 4096 --max-running 64\n  consort serve model.gguf --host 0.0.0.0        # prints the API key it made"
)]
pub(crate) struct Serve {
    /// A name from `consort models`, `hf:org/repo[/file]`, a .gguf file or a Hugging Face folder
    model: String,
    #[command(flatten)]
    options: ServeOptions,
}

/// How a replica is served.
#[derive(Args, Debug)]
pub(crate) struct ServeOptions {
    #[command(flatten)]
    listen: Listen,
    /// Name in answers and in /v1/models [default: the model's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    compute: Compute,
    #[command(flatten)]
    engine: Engine,
    #[command(flatten)]
    allowed: Allowed,
    /// Print one line of JSON once ready, instead of the summary
    #[arg(long)]
    json: bool,
    /// Seconds that running answers get to finish when the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=86_400))]
    drain_seconds: u64,
    /// Run as the child of `consort up`: end when standard input does, and say where it listens as lines of JSON
    #[arg(long, hide = true)]
    supervised: bool,
}

impl Serve {
    pub(crate) fn run(self) -> Result<()> {
        self.options.serve(&self.model)
    }
}

impl ServeOptions {
    /// Fetches, binds, loads and serves until told to stop.
    pub(crate) fn serve(self, model: &str) -> Result<()> {
        super::log("warn")?;
        super::traces("consort-replica")?;
        let hub = environment::hub()?;
        let model = loading::reference(&hub, model)?;
        let name = self.name.clone().unwrap_or_else(|| model.short_name());
        let fetched = loading::fetch(&hub, &model, false, self.json)?;
        // Everything that can be refused is, before the weights are read.
        let pool = self.compute.pool()?;
        let bound = self.listen.bind()?;
        if bound.moved {
            let port = bound.address.port();
            note(&format!("port {} is taken; using {port}", crate::listen::DEFAULT_PORT));
        }
        let options = Options {
            api_key: bound.key.as_ref().map(|key| ApiKey::new(&key.secret)),
            page: Some(page::chat()),
            allowed_hosts: self.allowed.allowed_hosts.clone(),
            allowed_origins: self.allowed.allowed_origins.clone(),
            drain_budget: std::time::Duration::from_secs(self.drain_seconds),
            ..Options::default()
        };
        if self.supervised {
            supervised::end_with_parent().context("can't watch standard input")?;
            supervised::say(&Said::Listening { address: bound.address })?;
        }
        let listener = bound.listener.try_clone().context("can't share the listening socket")?;
        let slot = Slot::empty();
        let runtime = consort_server::runtime().context("can't start the HTTP runtime")?;
        // The socket answers while the weights are read: live, not yet ready.
        let (failed, failure) = tokio::sync::oneshot::channel::<anyhow::Error>();
        let loader = {
            let slot = slot.clone();
            let summary = Summary {
                bound,
                name: name.clone(),
                json: self.json,
                supervised: self.supervised,
                started: Instant::now(),
            };
            let engine = self.engine.options();
            std::thread::Builder::new().name("loader".into()).spawn(move || {
                let outcome = loading::load(&fetched.path, pool, engine).and_then(|loaded| {
                    slot.fill(Replica {
                        engine: std::sync::Arc::new(loaded.engine.clone()),
                        tokenizer: loaded.tokenizer.clone(),
                        template: loaded.template.clone(),
                        model: summary.name.clone(),
                        aliases: Vec::new(),
                    });
                    summary.print(&loaded)
                });
                if let Err(error) = outcome {
                    // The receiver is gone only where the server is stopping anyway.
                    let _ = failed.send(error);
                }
            })
        }
        .context("can't start the loader's thread")?;
        let mut ended = Ok(());
        runtime.block_on(async {
            let stop = async {
                tokio::select! {
                    stopped = signals::stop() => ended = stopped.context("can't listen for signals"),
                    Ok(error) = failure => ended = Err(error),
                }
            };
            let listener =
                tokio::net::TcpListener::from_std(listener).context("can't watch the listening socket")?;
            anyhow::Ok(consort_server::serve(listener, slot, options, stop).await?)
        })?;
        loader.join().map_err(|_| anyhow!("the loader's thread panicked"))?;
        ended
    }
}

/// What is printed once the model answers.
struct Summary {
    bound: Bound,
    name: String,
    json: bool,
    supervised: bool,
    started: Instant,
}

impl Summary {
    fn print(&self, loaded: &Loaded) -> Result<()> {
        if self.supervised {
            return supervised::say(&Said::Ready);
        }
        let url = self.bound.url();
        let fingerprint = loaded.engine.fingerprint();
        if self.json {
            // The key is part of the result where it was made here: nobody else knows it.
            let key = self.bound.key.as_ref().filter(|k| k.origin == Origin::Minted).map(|k| &k.secret);
            return Ok(line(serde_json::json!({
                "url": url,
                "address": self.bound.address.to_string(),
                "model": self.name,
                "threads": loaded.threads,
                "kernels": loaded.kernels,
                "fingerprint": fingerprint,
                "max_context": loaded.engine.max_context(),
                "load_ms": self.started.elapsed().as_millis() as u64,
                "api_key": key,
            }))?);
        }
        let style = Style::stdout();
        let field =
            |name: &str, value: &str| line(format_args!("  {}  {value}", style.dim(&format!("{name:<11}"))));
        line("")?;
        line(format_args!(
            "  {}",
            style.bold(&format!("{} is ready ({:.2} s)", self.name, self.started.elapsed().as_secs_f64()))
        ))?;
        line("")?;
        field("Chat page", &format!("{url}/"))?;
        field("OpenAI API", &format!("{url}/v1"))?;
        if let Some(key) = self.bound.key.as_ref().filter(|k| k.origin == Origin::Minted) {
            field("API key", &format!("{}   (made just now, shown once)", key.secret))?;
        }
        field(
            "Engine",
            &format!(
                "{} thread{}, {} kernels, {} of weights, {} tokens of context",
                loaded.threads,
                if loaded.threads == 1 { "" } else { "s" },
                loaded.kernels,
                bytes(loaded.weight_bytes as u64),
                loaded.engine.max_context()
            ),
        )?;
        field("Fingerprint", fingerprint)?;
        field("Stop", "Ctrl-C")?;
        line("")?;
        line(format_args!("  {}", style.dim("Try it:")))?;
        line(self.curl(&url, loaded.template.is_some()))?;
        line("")?;
        Ok(())
    }

    /// A request that works as pasted.
    fn curl(&self, url: &str, chat: bool) -> String {
        let key = match &self.bound.key {
            Some(key) if key.origin == Origin::Environment => {
                " -H \"authorization: Bearer $CONSORT_API_KEY\"".to_string()
            }
            Some(key) => format!(" -H 'authorization: Bearer {}'", shell(&key.secret)),
            None => String::new(),
        };
        let model = serde_json::Value::from(self.name.as_str());
        let (path, body) = if chat {
            (
                "chat/completions",
                format!(
                    r#"{{"model":{model},"messages":[{{"role":"user","content":"Say hello."}}],"max_tokens":64}}"#
                ),
            )
        } else {
            ("completions", format!(r#"{{"model":{model},"prompt":"Once upon a time","max_tokens":32}}"#))
        };
        format!("  curl {url}/v1/{path}{key} -H 'content-type: application/json' -d '{}'", shell(&body))
    }
}

/// Text inside single quotes for a POSIX shell.
fn shell(text: &str) -> String {
    text.replace('\'', r"'\''")
}

//! `consort rollout`: a second version of a model behind its name, judged step by step, taken back by itself.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use consort_control::rollout::{self, Spec, Stage, Thresholds};
use consort_control::store::Store;
use hyper::Method;

use super::UsageError;
use crate::terminal::{Style, line, note, piece, table};
use crate::up::{Numbers, RolloutView};
use crate::{admin_client, environment};

/// A new version of a model beside the old one, given more and more of its requests while it does as well
#[derive(Args, Debug)]
pub(crate) struct Rollout {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Start(Start),
    Status(Status),
    Promote(Promote),
    Abort(Abort),
}

/// Start a candidate beside what runs under a model's name
///
/// It gets the first step's share of the requests, then the next one's, each for the bake time at least and until enough
/// was seen. Where it fails more often, is slower, disagrees with the incumbent's answers or loses its replicas, it gets
/// nothing more at once, by itself; what runs there may finish. After the last step it becomes the model, also after a
/// restart of `consort up`, until the file names another one.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort rollout start chat --source smollm2-360m-instruct\n  consort rollout start chat --source ./tuned.gguf --steps 0,5,50 --bake 10m\n  consort rollout start chat --max-running 16 --no-shadow"
)]
struct Start {
    /// The name that requests use
    model: String,
    /// What the candidate runs [default: what the incumbent runs, with the settings below]
    #[arg(long)]
    source: Option<String>,
    /// Name of the candidate [default: v1, v2, …]
    #[arg(long = "version", value_name = "NAME", default_value = "", hide_default_value = true)]
    version: String,
    /// Its share of the requests in each step, in percent; 0 for scoring answers alone
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',', default_value = "5,25,50")]
    steps: Vec<u32>,
    /// How long each step lasts at least
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = crate::settings::time)]
    bake: Duration,
    /// Replicas of the candidate until it is promoted
    #[arg(long, value_name = "N", default_value_t = 1)]
    replicas: u32,
    /// Compute threads of its replicas [default: as the incumbent's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Longest sequence in tokens [default: as the incumbent's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(16..))]
    ctx: Option<u32>,
    /// Requests that each of its replicas runs at once [default: as the incumbent's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_running: Option<u32>,
    /// Of the incumbent's answers, so many in a hundred are scored by the candidate (a tenth of the time at most)
    #[arg(long, value_name = "PERCENT", default_value_t = 10, conflicts_with = "no_shadow")]
    shadow: u32,
    /// Don't compare answers: for models that are meant to say other things, or have another tokenizer
    #[arg(long)]
    no_shadow: bool,
    /// Requests that the candidate must have had in a step
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().requests)]
    requests: u64,
    /// Answers that it must have scored
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().scored)]
    scored: u64,
    /// By how much its share of failed requests may be higher, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = Thresholds::default().errors * 100.0)]
    errors: f64,
    /// By how much it may be slower, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = Thresholds::default().slowdown * 100.0)]
    slowdown: f64,
    /// How much less likely, in nats a token, it may find the incumbent's answers
    #[arg(long, value_name = "NATS", default_value_t = Thresholds::default().disagreement)]
    disagreement: f64,
    /// Losses of its replicas that are put up with
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().lost)]
    lost: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How far rollouts are, and why
///
/// With --watch until all have ended; the exit code is then 1 where one was taken back.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  consort rollout status\n  consort rollout status chat --watch")]
struct Status {
    /// One model's alone
    model: Option<String>,
    /// Show it whenever it changes, until it has ended
    #[arg(long)]
    watch: bool,
    /// Print JSON; with --watch one line a change
    #[arg(long)]
    json: bool,
}

/// Make the candidate the model now, whatever the judge would say
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  consort rollout promote chat")]
struct Promote {
    /// The name that requests use
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take the candidate back: it gets nothing more at once, and what runs there may finish
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  consort rollout abort chat")]
struct Abort {
    /// The name that requests use
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Rollout {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        match self.command {
            Command::Start(start) => start.run(),
            Command::Status(status) => status.run(),
            Command::Promote(promote) => act(&promote.model, "promote", promote.json),
            Command::Abort(abort) => act(&abort.model, "abort", abort.json),
        }
    }
}

/// The running `consort up`.
fn up() -> Result<admin_client::Client> {
    let folder = environment::state_folder()?;
    admin_client::find(&folder)?.with_context(|| {
        format!("no consort up runs here (looked in {}); start one with: consort up", folder.display())
    })
}

impl Start {
    fn run(self) -> Result<()> {
        let json = self.json;
        let spec = self.spec()?;
        // The name is chosen over there where none is given.
        let named = if spec.version.is_empty() {
            Spec { version: "v1".into(), ..spec.clone() }
        } else {
            spec.clone()
        };
        named.check().map_err(|error| UsageError(error.to_string()))?;
        let started: rollout::Rollout =
            up()?.send(Method::POST, "/rollouts", serde_json::to_vec(&spec)?.into())?;
        if json {
            return Ok(line(serde_json::to_string(&started)?)?);
        }
        line(format_args!("{} is rolled out beside {}", started.spec.version, started.incumbent))?;
        note(&format!("watch it with: consort rollout status {} --watch", started.spec.model));
        Ok(())
    }

    fn spec(self) -> Result<Spec> {
        // A file is named from here, and looked for by another process elsewhere.
        let source = match self.source {
            Some(source) if Path::new(&source).exists() => {
                let path = std::fs::canonicalize(&source).with_context(|| format!("can't find {source}"))?;
                Some(path.to_str().context("the path is not UTF-8")?.to_owned())
            }
            other => other,
        };
        let thresholds = Thresholds {
            requests: self.requests,
            scored: self.scored,
            errors: self.errors / 100.0,
            slowdown: self.slowdown / 100.0,
            disagreement: self.disagreement,
            lost: self.lost,
        };
        Ok(Spec {
            model: self.model,
            version: self.version,
            source,
            threads: self.threads,
            context: self.ctx,
            max_running: self.max_running,
            replicas: self.replicas,
            steps: self.steps,
            bake: self.bake,
            shadow: if self.no_shadow { 0 } else { self.shadow },
            thresholds,
        })
    }
}

fn act(model: &str, what: &str, json: bool) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    if model.is_empty() || !model.bytes().all(plain) {
        return Err(
            UsageError(format!("{model:?} is no model's name; consort rollout status shows them")).into()
        );
    }
    let folder = environment::state_folder()?;
    let rollout: rollout::Rollout = match admin_client::find(&folder)? {
        Some(up) => up.send(Method::POST, &format!("/rollouts/{model}/{what}"), Bytes::new())?,
        None if what == "abort" => crate::up::abort_at_rest(&Store::open(&folder)?, model)?
            .with_context(|| format!("no rollout of {model:?} is under way"))?,
        None => bail!("no consort up runs here (looked in {}); start one with: consort up", folder.display()),
    };
    if json {
        return Ok(line(serde_json::to_string(&rollout)?)?);
    }
    Ok(line(format_args!("{} is {}: {}", rollout.spec.version, rollout.stage.text(), rollout.reason))?)
}

impl Status {
    fn run(self) -> Result<()> {
        let mut shown = None;
        loop {
            let views = self.views()?;
            if views.is_empty() && self.model.is_some() {
                bail!("there was no rollout of {:?}", self.model.unwrap_or_default());
            }
            let lines = if self.json {
                vec![if self.watch {
                    serde_json::to_string(&views)?
                } else {
                    serde_json::to_string_pretty(&views)?
                }]
            } else if views.is_empty() {
                vec![
                    "there was no rollout; consort rollout start MODEL --source SOURCE begins one".to_owned(),
                ]
            } else {
                views.iter().flat_map(|view| show(view, Style::stdout())).collect()
            };
            if shown.as_ref() != Some(&lines) {
                if self.watch && !self.json && std::io::stdout().is_terminal() {
                    // Home, then the rest of each line and of the screen, as `consort status --watch` does.
                    let rows: Vec<_> = lines.iter().map(|line| format!("{line}\u{1b}[K")).collect();
                    piece(&format!("\u{1b}[H{}\n\u{1b}[J", rows.join("\n")))?;
                } else {
                    lines.iter().try_for_each(line)?;
                }
                shown = Some(lines);
            }
            if !self.watch {
                return Ok(());
            }
            if views.iter().all(|view| view.rollout.stage.ended()) {
                let back = views.iter().find(|view| view.rollout.stage == Stage::Withdrawn);
                return match back {
                    Some(view) => {
                        bail!("{} of {} was taken back", view.rollout.spec.version, view.rollout.spec.model)
                    }
                    None => Ok(()),
                };
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn views(&self) -> Result<Vec<RolloutView>> {
        let folder = environment::state_folder()?;
        let mut views: Vec<RolloutView> = match admin_client::find(&folder)? {
            Some(up) => up.get("/rollouts")?,
            None if self.watch => {
                up()?;
                Vec::new()
            }
            None => crate::up::records(&Store::open(&folder)?)?
                .into_iter()
                .filter_map(|(_, record)| record.rollout)
                .map(RolloutView::at_rest)
                .collect(),
        };
        views.retain(|view| self.model.as_ref().is_none_or(|model| *model == view.rollout.spec.model));
        Ok(views)
    }
}

/// A rollout for people.
pub(crate) fn show(view: &RolloutView, style: Style) -> Vec<String> {
    let (rollout, spec) = (&view.rollout, &view.rollout.spec);
    let mut lines = vec![
        style.bold(&format!(
            "{}: {} beside {}: {}",
            spec.model,
            spec.version,
            rollout.incumbent,
            rollout.stage.text()
        )),
        format!("  {}", rollout.reason),
    ];
    let ms = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
    let row = |name: &str, share: u32, did: &Numbers| {
        [
            format!("  {name}"),
            format!("{share} %"),
            did.requests.to_string(),
            did.errors.to_string(),
            ms(did.first_token_ms),
            ms(did.inter_token_ms),
            did.disagreement.map_or("-".to_owned(), |nats| format!("{nats:.3} nats over {}", did.scored)),
        ]
    };
    if !rollout.stage.ended() {
        let head = ["  VERSION", "SHARE", "REQUESTS", "ERRORS", "FIRST TOKEN", "BETWEEN", "DISAGREEMENT"];
        let rows = [
            head.map(str::to_owned),
            row(&rollout.incumbent, view.weights.0, &view.incumbent_did),
            row(&spec.version, view.weights.1, &view.candidate_did),
        ];
        for (i, row) in table(&rows).into_iter().enumerate() {
            lines.push(if i == 0 { style.dim(&row) } else { row });
        }
    }
    if view.over_the_file {
        lines.push(
            "  the file names another version; write this one into it to keep it in one place".to_owned(),
        );
    }
    lines
}

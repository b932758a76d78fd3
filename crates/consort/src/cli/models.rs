//! `consort models`: what can be had by name, what is here, and whether it is sound.

use anyhow::{Result, bail};
use clap::Args;
use consort_hub::{Error, Hub, ModelRef, Status};
use serde::Serialize;

use crate::terminal::{Style, bytes, line, note};
use crate::{environment, loading};

/// List, verify and remove models
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort models\n  consort models --verify\n  consort models --remove gemma-3-270m"
)]
pub(crate) struct Models {
    /// Read every byte of every model that is here and compare checksums
    #[arg(long, conflicts_with = "remove")]
    verify: bool,
    /// Remove a model from this machine
    #[arg(long, value_name = "NAME")]
    remove: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    name: String,
    bytes: Option<u64>,
    licence: Option<String>,
    source: Option<String>,
    path: Option<std::path::PathBuf>,
    cached: bool,
    /// `ok`, or what is wrong; absent where nothing was checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<String>,
    #[serde(skip)]
    about: Option<String>,
}

impl Models {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        let hub = environment::hub()?;
        if let Some(name) = &self.remove {
            let model = loading::reference(&hub, name)?;
            let freed = hub.remove(&model)?;
            if self.json {
                line(serde_json::json!({ "removed": model.to_string(), "bytes": freed }))?;
            } else {
                line(format_args!("removed {model} ({})", bytes(freed)))?;
            }
            return Ok(());
        }
        let mut rows = rows(&hub)?;
        let mut damaged: Vec<String> =
            rows.iter().filter(|r| r.state.is_some()).map(|r| r.name.clone()).collect();
        if self.verify {
            rows.retain(|r| r.cached);
            for row in rows.iter_mut().filter(|r| r.state.is_none()) {
                if !self.json {
                    note(&format!("reading {}", row.name));
                }
                row.state = Some(match hub.parse(&row.name).and_then(|model| hub.verify(&model)) {
                    Ok(()) => "ok".into(),
                    Err(Error::Damaged { reason, .. }) => {
                        damaged.push(row.name.clone());
                        reason
                    }
                    Err(other) => return Err(other.into()),
                });
            }
        }
        if self.json {
            line(serde_json::to_string_pretty(&rows)?)?;
        } else {
            table(&rows, self.verify)?;
        }
        if damaged.is_empty() {
            return Ok(());
        }
        let cures: Vec<_> = damaged.iter().map(|name| format!("consort pull --force {name}")).collect();
        bail!("damaged: {}; fetch again with: {}", damaged.join(", "), cures.join("; "))
    }
}

/// The catalog first, then what else is here.
fn rows(hub: &Hub) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for entry in hub.catalog().entries() {
        let mut row = Row {
            name: entry.name.clone(),
            bytes: Some(entry.bytes),
            licence: Some(entry.licence.name.clone()),
            source: entry.sources.first().map(consort_hub::Source::label),
            path: None,
            cached: false,
            state: None,
            about: Some(entry.about.clone()),
        };
        fill(&mut row, hub.status(&ModelRef::Catalog(entry.name.clone())));
        rows.push(row);
    }
    for status in hub.list()? {
        let Status::Here(cached) = status else { continue };
        if hub.catalog().find(&cached.manifest.name).is_none() {
            let mut row = Row {
                name: cached.manifest.name.clone(),
                bytes: None,
                licence: None,
                source: None,
                path: None,
                cached: false,
                state: None,
                about: None,
            };
            fill(&mut row, Status::Here(cached));
            rows.push(row);
        }
    }
    Ok(rows)
}

fn fill(row: &mut Row, status: Status) {
    match status {
        Status::Here(cached) => {
            row.cached = true;
            row.bytes = Some(cached.manifest.bytes());
            row.licence = cached.manifest.licence.clone().or(row.licence.take());
            row.source = Some(cached.manifest.source.clone());
            row.path = Some(cached.path);
        }
        Status::Missing => {}
        Status::Damaged(reason) => {
            row.cached = true;
            row.state = Some(reason);
        }
    }
}

fn table(rows: &[Row], verified: bool) -> Result<()> {
    let style = Style::stdout();
    if rows.is_empty() {
        return Ok(line("no model is here; `consort pull NAME` fetches one, `consort models` lists names")?);
    }
    let width = rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).max(4);
    let head = format!(
        "{:width$}  {:>9}  {:20}  {}",
        "NAME",
        "SIZE",
        "LICENCE",
        if verified { "STATE" } else { "WHERE" }
    );
    line(style.bold(&head))?;
    for row in rows {
        let place = match (&row.state, &row.path) {
            (Some(state), _) => state.clone(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "not fetched".to_owned(),
        };
        let size = row.bytes.map(bytes).unwrap_or_default();
        let licence = row.licence.as_deref().unwrap_or("not stated");
        line(format_args!("{:width$}  {size:>9}  {licence:20}  {place}", row.name))?;
        if let (Some(about), false) = (&row.about, verified) {
            line(style.dim(&format!("  {about}")))?;
        }
    }
    Ok(())
}

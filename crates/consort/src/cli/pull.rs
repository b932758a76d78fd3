//! `consort pull MODEL`: fetch a model.

use anyhow::Result;
use clap::Args;

use crate::terminal::{bytes, line};
use crate::{environment, loading};

/// Fetch a model
///
/// Sources are tried in order; the size and SHA-256 of what comes are checked whichever serves. A download that was
/// cut goes on where it stopped.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort pull smollm2-135m-instruct\n  consort pull hf:Qwen/Qwen3-0.6B\n  consort pull hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf"
)]
pub(crate) struct Pull {
    /// A name from `consort models`, or `hf:org/repo[@revision][/file]`
    model: String,
    /// Fetch it again even where it is here
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Pull {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        let hub = environment::hub()?;
        let model = loading::reference(&hub, &self.model)?;
        let fetched = loading::fetch(&hub, &model, self.force, self.json)?;
        if self.json {
            let tried: Vec<_> = fetched
                .tried
                .iter()
                .map(|t| serde_json::json!({ "source": t.source, "reason": t.reason }))
                .collect();
            let manifest = fetched.manifest.as_ref();
            return Ok(line(serde_json::json!({
                "name": model.to_string(),
                "path": fetched.path,
                "bytes": manifest.map(consort_hub::Manifest::bytes),
                "source": manifest.map(|m| &m.source),
                "licence": manifest.and_then(|m| m.licence.as_ref()),
                "fetched": fetched.fresh,
                "tried": tried,
            }))?);
        }
        match &fetched.manifest {
            Some(m) if fetched.fresh => {
                let licence = m.licence.as_deref().unwrap_or("no licence stated");
                line(format_args!("{} ({}, {licence}) from the {}", m.name, bytes(m.bytes()), m.source))?;
                if let Some(notice) = hub.catalog().find(&m.name).and_then(|e| e.licence.notice.as_ref()) {
                    line(notice)?;
                }
            }
            Some(m) => line(format_args!("{} is here already ({})", m.name, bytes(m.bytes())))?,
            None => line("a path needs no fetching")?,
        }
        Ok(line(fetched.path.display())?)
    }
}

//! `consort up`: everything on this machine. Today that is one replica with its page; the gateway and further replicas
//! will start here.

use anyhow::Result;
use clap::Args;

use super::serve::ServeOptions;

/// The model where none is named: small enough to fetch and answer at once anywhere.
const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Everything on this machine: fetch a model, serve it, open a chat page
///
/// The first start fetches the model (98 MB for the default one) and checks it; later starts take a moment.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  consort up\n  consort up --model gemma-3-270m --port 9000")]
pub(crate) struct Up {
    /// A name from `consort models`, `hf:org/repo[/file]`, a .gguf file or a Hugging Face folder
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    model: String,
    #[command(flatten)]
    options: ServeOptions,
}

impl Up {
    pub(crate) fn run(self) -> Result<()> {
        self.options.serve(&self.model)
    }
}

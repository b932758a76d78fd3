//! `consort train JOB.toml`: a training job; `status` says what one is doing.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use consort_training::job::GgufType;

use super::UsageError;
use crate::environment;
use crate::terminal::line;
use crate::train::{self, launch, status, worker};

/// Train a language model on several processes, or fine-tune one
///
/// Starts the workers, watches them and replaces those that die; the weights at the end are the same. Ctrl-C stops behind a
/// step, with a checkpoint. Under srun, mpirun or torchrun each process is one worker.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  consort train examples/train/tiny.toml --workers 4\n  consort train examples/train/finetune.toml\n  consort train examples/train/servers.toml\n  consort train job.toml --resume --workers 2\n  consort train job.toml --check\n  consort train status out/tiny\n  srun -n 4 consort train job.toml"
)]
pub(crate) struct Train {
    /// The job's file
    job: Option<PathBuf>,
    /// Processes that train, whatever the file says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Compute threads of all workers together [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Go on from the newest good checkpoint, on any number of workers
    #[arg(long, conflicts_with = "restart")]
    resume: bool,
    /// Remove the checkpoints of an earlier run and begin anew
    #[arg(long)]
    restart: bool,
    /// Prepare the data, say what the job takes, and start nothing
    #[arg(long, visible_alias = "plan")]
    check: bool,
    /// Serve metrics for Prometheus there, like 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand, Debug)]
enum What {
    /// What a job is doing: who waits for whom, in which operation, since when
    Status(Status),
    /// Write a trained model as a GGUF file
    Export(Export),
    /// A worker of a launcher
    #[command(hide = true, after_help = "Example: started by consort train")]
    Worker {
        /// The file that says where the workers meet
        meeting: PathBuf,
        /// Its number among those of its kind
        #[arg(long, value_name = "N", default_value_t = 0)]
        place: usize,
        /// Go on from the newest checkpoint
        #[arg(long)]
        resume: bool,
    },
    /// A parameter server of a launcher
    #[command(hide = true, after_help = "Example: started by consort train")]
    Server {
        /// The file that says where the workers meet
        meeting: PathBuf,
        /// Its number among those of its kind
        #[arg(long, value_name = "N", default_value_t = 0)]
        place: usize,
    },
}

/// What a job is doing: who waits for whom, in which operation, since when
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  consort train status out/tiny")]
struct Status {
    /// The job's file, or the folder of its result
    job: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Write a trained model as a GGUF file
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  consort train export out/tiny --gguf q8_0\n  consort run out/tiny/model.gguf"
)]
struct Export {
    /// A Hugging Face folder, such as a job's result
    model: PathBuf,
    /// How matrices are stored
    #[arg(long, value_enum, value_name = "TYPE", default_value = "bf16")]
    gguf: Gguf,
    /// The file to write [default: model.gguf in the folder]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Gguf {
    F32,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl Train {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        match self.what {
            Some(What::Status(status)) => return status.run(),
            Some(What::Export(export)) => return export.run(),
            Some(What::Worker { meeting, place, resume }) => return worker::child(&meeting, place, resume),
            Some(What::Server { meeting, place }) => return train::served::server(&meeting, place),
            None => {}
        }
        let Some(path) = self.job else {
            let why =
                "name a job's file, such as examples/train/tiny.toml; docs/training.md explains its keys";
            return Err(UsageError(why.into()).into());
        };
        let mut source = train::read(&path)?;
        let rank = environment::rank()?;
        if let Some(rank) = &rank {
            if self.workers.is_some_and(|workers| usize::from(workers) != rank.world_size) {
                let why = format!(
                    "{} started {} processes, each a worker; leave --workers out",
                    rank.starter, rank.world_size
                );
                return Err(UsageError(why).into());
            }
            source.job.workers = rank.world_size;
        }
        if let Some(workers) = self.workers {
            source.job.workers = workers.into();
        }
        if let Some(threads) = self.threads {
            source.job.threads = Some(threads.into());
        }
        let wishes = launch::Wishes {
            resume: self.resume,
            restart: self.restart,
            check: self.check,
            metrics: self.metrics,
            json: self.json,
        };
        launch::run(&source, &wishes, rank.as_ref())
    }
}

impl Status {
    fn run(self) -> Result<()> {
        let out = status::folder(&self.job)?;
        let path = status::file(&out);
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => anyhow!(
                "no job has run in {}: there is no {}; a job writes it from its first second, started with consort train JOB.toml",
                out.display(),
                path.display()
            ),
            _ => anyhow!("can't read {}: {error}", path.display()),
        })?;
        let report: status::Report = serde_json::from_str(&text).map_err(|error| {
            anyhow!(
                "{} is not what this version of consort writes ({error}); ask with the one that runs the job",
                path.display()
            )
        })?;
        if self.json {
            return Ok(line(text.trim_end())?);
        }
        Ok(line(status::explain(&report, train::unix_ms()).trim_end())?)
    }
}

impl Export {
    fn run(self) -> Result<()> {
        let kind = match self.gguf {
            Gguf::F32 => GgufType::F32,
            Gguf::Bf16 => GgufType::Bf16,
            Gguf::Q8_0 => GgufType::Q8_0,
        };
        if !self.model.exists() {
            let what = format!(
                "there is no folder {}; name a Hugging Face folder, such as a job's result",
                self.model.display()
            );
            return Err(UsageError(what).into());
        }
        let output = self.output.unwrap_or_else(|| self.model.join("model.gguf"));
        train::export::export(&self.model, &output, kind)?;
        Ok(line(output.display())?)
    }
}

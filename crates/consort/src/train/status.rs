//! What a job is doing right now, for `consort train status`: a file that the launcher keeps fresh ([`published`]), and an
//! explanation of it ([`explain()`]; around servers, [`served`]).
//!
//! Workers say four times a second what they compute and which call of the group is under way. Of those who wait, the
//! calls have numbers; who hasn't come as far as the others is who they wait for. A worker that says nothing any more is
//! stopped, swapped out, or on a machine that is gone; the system knows of the first.

mod explain;
mod published;
mod served;

use std::path::{Path, PathBuf};

use consort_training::parallel::Status;
use consort_training::server::View;
use serde::{Deserialize, Serialize};

pub(crate) use self::explain::explain;
pub(crate) use self::published::Published;
use super::unix_ms;

/// A worker that has said nothing for so long is silent.
const SILENT_MS: u64 = 1500;

/// A worker's place, as the file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The place's number, from 0; ranks change, places don't.
    pub(crate) number: usize,
    /// What it is called: `worker 1`, `server 0`.
    pub(crate) name: String,
    /// Its process; `None` while there is none.
    pub(crate) pid: Option<u32>,
    /// When it last said something, in milliseconds since 1970.
    pub(crate) heard_unix_ms: u64,
    /// Processes that were started for it.
    pub(crate) starts: u32,
    /// What it said last of what it is doing.
    pub(crate) status: Option<Status>,
    /// It has ended as it should.
    pub(crate) done: bool,
    /// The system says that it is stopped (SIGSTOP, a debugger).
    #[serde(default)]
    pub(crate) stopped: bool,
}

impl Place {
    pub(crate) fn new(number: usize, name: &str) -> Place {
        Place {
            number,
            name: name.to_owned(),
            pid: None,
            heard_unix_ms: 0,
            starts: 0,
            status: None,
            done: false,
            stopped: false,
        }
    }

    /// Whether it keeps weights and computes nothing.
    fn is_server(&self) -> bool {
        self.name.starts_with("server")
    }

    /// A process was started for it.
    pub(crate) fn started(&mut self, pid: u32) {
        *self = Place {
            pid: Some(pid),
            heard_unix_ms: unix_ms(),
            starts: self.starts + 1,
            ..Place::new(self.number, &self.name)
        };
    }

    /// It said something.
    pub(crate) fn heard(&mut self) {
        self.heard_unix_ms = unix_ms();
    }
}

/// The file's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The launcher's process.
    pub(crate) launcher: u32,
    /// When it was written.
    pub(crate) unix_ms: u64,
    /// Steps taken.
    pub(crate) step: u64,
    /// Steps in all.
    pub(crate) steps: u64,
    /// Workers that take steps together.
    pub(crate) members: usize,
    /// Mean loss of the last step.
    pub(crate) loss: Option<f64>,
    /// Tokens a second of the last step.
    pub(crate) tokens_per_second: Option<f64>,
    /// The launcher has ended, and whether the job is complete.
    pub(crate) ended: Option<bool>,
    /// Workers that this launcher started, and servers behind them.
    pub(crate) places: Vec<Place>,
    /// Of a job around servers: who waits for whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) servers: Option<View>,
}

/// The file of a job whose result goes to `out`.
pub(crate) fn file(out: &Path) -> PathBuf {
    out.join("job").join("status.json")
}

/// The folder of a job's file, or the folder itself.
pub(crate) fn folder(of: &Path) -> anyhow::Result<PathBuf> {
    if of.is_dir() {
        return Ok(of.to_owned());
    }
    if !of.exists() {
        let what = format!(
            "there is neither a job's folder nor its file at {}; name the job's file, or the folder that it calls `out`",
            of.display()
        );
        return Err(crate::cli::UsageError(what).into());
    }
    Ok(super::read(of)?.job.out)
}

fn seconds(ms: u64) -> String {
    if ms < 10_000 { format!("{:.1} s", ms as f64 / 1e3) } else { super::show::duration(ms as f64 / 1e3) }
}

//! Where a job's workers meet: a file in the job's folder that only its user can read.
//!
//! It holds the address of the store and the token that lets a worker in, and all that a worker needs to do the same as the
//! others: the job as the launcher read it, and what was prepared for it. Processes that Slurm, Open MPI or torchrun
//! started on other machines read the same file, on the file system that they share. It is removed when the job ends.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::prepare::Prepared;
use crate::terminal::note;

/// How often a process that waits for the first one looks for the file.
const LOOK: Duration = Duration::from_millis(200);
/// A wait of this length is told of.
const QUIET: Duration = Duration::from_secs(5);
/// No such file is longer.
const MOST_BYTES: u64 = 4 << 20;

/// What a worker needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Meeting {
    /// The store's `host:port`, or the coordinator's.
    pub(crate) store: String,
    /// What lets a worker in.
    pub(crate) token: String,
    /// The job's file, and its text as the launcher read it.
    pub(crate) file: PathBuf,
    pub(crate) text: String,
    /// Workers at the beginning, whatever the file says.
    pub(crate) workers: usize,
    /// Steps in all.
    pub(crate) steps: u64,
    /// Compute threads of a worker on the launcher's machine.
    pub(crate) threads: usize,
    /// How long a worker may say nothing before the others go on without it.
    pub(crate) silence: Duration,
    /// Go on from the newest checkpoint.
    pub(crate) resume: bool,
    /// The weights are in servers, and the address is their coordinator's.
    pub(crate) served: bool,
    /// The host by which processes on other machines reach those beside the launcher; `None` where there are no others.
    pub(crate) advertise: Option<String>,
    /// What was prepared.
    pub(crate) prepared: Prepared,
}

/// The file, which is removed with this.
pub(crate) struct Published(PathBuf);

impl Published {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // Whoever removed the job's folder was faster.
        let _ = fs::remove_file(&self.0);
    }
}

impl Meeting {
    /// Writes it for nobody else to read.
    pub(crate) fn publish(&self, path: &Path) -> Result<Published> {
        let part = path.with_extension("part");
        let written = (|| {
            let _ = fs::remove_file(&part);
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let mut file = options.open(&part)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&part, path)
        })();
        written.with_context(|| format!("can't write {}", path.display()))?;
        Ok(Published(path.to_owned()))
    }

    /// Reads it.
    pub(crate) fn read(path: &Path) -> Result<Meeting> {
        let what = || format!("can't read where the job's workers meet ({})", path.display());
        if fs::metadata(path).with_context(what)?.len() > MOST_BYTES {
            bail!("{}: longer than such a file ever is", path.display());
        }
        serde_json::from_slice(&fs::read(path).with_context(what)?).with_context(what)
    }

    /// Waits until it is there, and for one that isn't `but`, whose store turned out to be gone.
    pub(crate) fn wait(path: &Path, but: Option<&str>, limit: Duration) -> Result<Meeting> {
        let (begun, mut said) = (Instant::now(), false);
        let until = begun + limit;
        loop {
            if !said && begun.elapsed() > QUIET {
                said = true;
                note(&format!("waiting for the first process, which will write {}", path.display()));
            }
            let found = path.exists().then(|| Meeting::read(path)).transpose()?;
            match found {
                Some(meeting) if but != Some(meeting.token.as_str()) => return Ok(meeting),
                _ if Instant::now() >= until => bail!(
                    "the first process said nothing within {} s: {} isn't there. All processes need the same folder; \
                     is it on a file system that they share?",
                    limit.as_secs(),
                    path.display()
                ),
                // The file system tells nobody of a file on another machine.
                _ => std::thread::sleep(LOOK),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_for_its_user_alone_and_goes_when_the_job_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("meeting.json");
        let prepared = Prepared { model: None, vocabulary: None, data: vec!["a".into()] };
        let meeting = Meeting {
            store: "127.0.0.1:1".into(),
            token: "secret".into(),
            file: "job.toml".into(),
            text: "out = \"x\"".into(),
            workers: 2,
            steps: 3,
            threads: 1,
            silence: Duration::from_secs(5),
            resume: false,
            served: false,
            advertise: None,
            prepared,
        };
        let published = meeting.publish(&path).unwrap();
        let read = Meeting::wait(published.path(), None, Duration::ZERO).unwrap();
        assert_eq!((read.token.as_str(), read.steps), ("secret", 3));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let stale = Meeting::wait(&path, Some("secret"), Duration::ZERO).unwrap_err().to_string();
        assert!(stale.contains("file system that they share"), "{stale}");
        drop(published);
        assert!(!path.exists());
    }
}

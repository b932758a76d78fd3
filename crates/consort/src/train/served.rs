//! A job around parameter servers: the coordinator in the launcher, and the lives of its workers and servers.
//!
//! The launcher starts the same number of workers as without servers, and as many servers as the file says. One thread beside
//! its main loop ([`leading`]) keeps the coordinator, which all of them ask; what happens there reaches the main loop as
//! [`Told`]. Workers and servers end when the coordinator says so, or when it is gone.

mod leading;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use consort_training::checkpoint;
use consort_training::job::{Job, Servers};
use consort_training::parallel::{Finished, Holding, StepEvent};
use consort_training::report::What;
use consort_training::server::{Connect, HostOptions, Learner, Spec, View, host, work};
use consort_training::{Error, Layout};

use super::meeting::Meeting;
use super::{prepare, worker};

/// How long a worker or a server of one machine may be silent. A process that ends is noticed at once; this is for one that
/// hangs. Longer than among workers without servers: what a server holds takes a copy to replace.
pub(super) const HOST_SILENCE: Duration = Duration::from_secs(2);

/// What the coordinator tells the launcher.
#[derive(Debug)]
pub(super) enum Told {
    /// The job goes on from a checkpoint.
    Resumed {
        /// Steps taken.
        step: u64,
        /// Newer checkpoints that are no good.
        refused: Vec<String>,
    },
    /// So many workers are there; every change has another epoch.
    Members { workers: usize, epoch: u64 },
    /// Somebody is gone; the launcher may know it already. `silent`: it is there and says nothing.
    Left { name: String, silent: bool },
    /// A step is done.
    Step(Box<StepEvent>),
    /// What became of a checkpoint.
    Checkpoint(checkpoint::Event),
    /// The last checkpoint can't be written: its weights are kept for now.
    Holding(Holding),
    /// Something that people may want to know.
    Note(What, String),
    /// Who waits for whom.
    View(Box<View>),
    /// It has ended; `None`: it was stopped before it began.
    Finished(Option<Finished>),
    /// It can't go on.
    Failed(String),
}

/// The coordinator's thread.
pub(super) struct Served {
    /// The port where workers and servers find it.
    pub(super) port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    /// Starts it. `tell` gets what it says: at last that it has finished, or why it can't go on.
    pub(super) fn start(
        meeting: Meeting,
        servers: Servers,
        listen: String,
        tell: impl Fn(Told) + Send + 'static,
    ) -> Result<Served> {
        let (listening, listens) = mpsc::sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let run = move || match leading::lead(&meeting, &servers, &listen, &asked, &listening, &tell) {
            Ok(finished) => tell(Told::Finished(finished)),
            Err(error) => {
                let said = crate::terminal::said(&error);
                // Whoever waits for the port hears of it there.
                let _ = listening.try_send(Err(error));
                tell(Told::Failed(said));
            }
        };
        let thread = std::thread::Builder::new().name("coordinator".into()).spawn(run);
        let thread = Some(thread.context("can't start the coordinator's thread")?);
        let port = listens.recv().map_err(|_| anyhow!("the coordinator's thread ended"))??;
        Ok(Served { port, stop, thread })
    }

    /// Behind the step under way, with a checkpoint; weights that can't be written are given up.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic was reported as it happened.
            let _ = thread.join();
        }
    }
}

/// The job as its servers see it.
fn spec(job: &Job, servers: &Servers, meeting: &Meeting, layout: &Layout) -> Result<Spec> {
    let (buckets, shards) = Spec::buckets(layout, servers.count);
    let (groups, micro_batches) =
        servers.groups(&job.train, meeting.workers).map_err(|why| anyhow!(crate::cli::UsageError(why)))?;
    Ok(Spec {
        buckets,
        shards,
        optimizer: job.optimizer,
        schedule: job.schedule.over(meeting.steps),
        clip_norm: job.train.clip,
        mode: servers.mode,
        aggregate: servers.aggregate,
        replication: servers.replication,
        groups,
        micro_batches,
        steps: meeting.steps,
        workers: meeting.workers as u64,
        lease_ms: meeting.silence.as_millis() as u64,
        speculate_ms: servers.speculate.as_millis() as u64,
    })
}

fn connect(job: &Job, meeting: &Meeting, name: String) -> Connect {
    let patience = job.train.deadline;
    Connect { patience, ..Connect::new(&meeting.store, meeting.token.as_bytes()).named(name) }
}

/// The life of a server's process.
pub(crate) fn server(meeting: &std::path::Path, place: usize) -> Result<()> {
    let meeting = Meeting::read(meeting)?;
    let job = super::parse(&meeting.file, meeting.text.clone())?.job;
    let connect = connect(&job, &meeting, format!("server {place}"));
    Ok(host(&HostOptions { connect, threads: meeting.threads, advertise: meeting.advertise })?)
}

/// The life of a worker's process in such a job; `threads` where not as many as the meeting says. What it can't do and another
/// one couldn't either goes to `failed`.
pub(super) fn learn(
    meeting: &Meeting,
    place: usize,
    threads: Option<usize>,
    failed: impl FnOnce(String),
) -> Result<()> {
    let learn = || -> Result<()> {
        let job = super::parse(&meeting.file, meeting.text.clone())?.job;
        let begun = prepare::begin(&job, &meeting.prepared)?;
        let threads = threads.unwrap_or(meeting.threads);
        let dataset = prepare::samples(&job, &meeting.prepared, &begun, threads, &mut |_| ())?;
        let trainer = worker::trainer(&job, &begun, meeting.steps, threads)?;
        let connect = connect(&job, meeting, format!("worker {place}"));
        let plan = job.plan(meeting.steps);
        work(&connect, &mut Learner::of_plan(trainer, &dataset, &plan))?;
        Ok(())
    };
    learn().inspect_err(|error| {
        // What connections and servers did to this worker may not happen to the next one.
        if !matches!(error.downcast_ref::<Error>(), Some(Error::Group(_) | Error::Server(_))) {
            failed(crate::terminal::said(error));
        }
    })
}

//! The launcher's main loop: who runs, who is due, and when it is over.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use consort_collectives::Store;
use consort_training::parallel::{Activity, Finished, Reason};
use consort_training::report::What;

use super::child::{self, Worker, how, reap};
use crate::train::Source;
use crate::train::holding::Teller;
use crate::train::metrics::Metrics;
use crate::train::replace::{Decision, Replacements};
use crate::train::said::Said;
use crate::train::served::{Served, Told};
use crate::train::show::Show;
use crate::train::status::{Place, Published as Status};
use crate::train::worker::STOP;

/// How often the launcher looks around when nobody says anything.
const TICK: Duration = Duration::from_millis(100);
/// How long workers that were told to stop may take for their step and its checkpoint.
const STOPPING: Duration = Duration::from_secs(300);
/// How long a worker of a job that is done may wait for others to form a group with it.
const LATE: Duration = Duration::from_secs(2);
/// How long workers and servers whose coordinator has ended may take to follow it; they have nothing left to keep.
const LEAVING: Duration = Duration::from_secs(5);

/// What reaches the main loop.
pub(super) enum News {
    /// A line of a worker's standard output.
    Said(usize, u32, Box<Said>),
    /// The coordinator of a job around servers.
    Served(Told),
    /// A line of its standard error.
    Noted(usize, String),
    /// Its standard output has ended.
    Gone(usize, u32),
    /// The user wants it to end.
    Stop,
}

/// What the main loop begins with.
pub(super) struct Begin<'a> {
    pub(super) source: &'a Source,
    /// The file in which workers find each other.
    pub(super) meeting: &'a Path,
    /// Workers that this launcher starts.
    pub(super) workers: usize,
    /// Others than this launcher start most workers.
    pub(super) external: bool,
    pub(super) served: Option<Served>,
    /// Where workers meet who have no servers.
    pub(super) store: Option<&'a Store>,
    pub(super) news: SyncSender<News>,
    pub(super) metrics: Metrics,
    pub(super) show: Show,
    pub(super) status: Status,
}

/// The main loop's state.
pub(super) struct Watch<'a> {
    pub(super) source: &'a Source,
    pub(super) news: SyncSender<News>,
    pub(super) begun: Instant,
    pub(super) meeting: PathBuf,
    /// Trainers, then servers.
    pub(super) workers: Vec<Worker>,
    pub(super) trainers: usize,
    /// The coordinator of a job around servers, until it has ended.
    pub(super) served: Option<Served>,
    store: Option<&'a Store>,
    /// Places that get a new worker, and when.
    pub(super) due: VecDeque<(Duration, usize)>,
    pub(super) replacements: Replacements,
    pub(super) stopping: Option<Instant>,
    /// Since when the coordinator of a job around servers has ended.
    pub(super) leaving: Option<Instant>,
    pub(super) epoch: u64,
    pub(super) members: usize,
    /// Processes that ended since the last epoch began.
    pub(super) unaccounted: usize,
    pub(super) step: u64,
    pub(super) finished: Option<Finished>,
    /// The newest checkpoint that is complete.
    pub(super) saved: Option<u64>,
    /// Who kept weights that couldn't be written keeps them no more.
    pub(super) given_up: bool,
    pub(super) failed: Option<String>,
    /// Of weights that can't be written.
    pub(super) held: Teller,
    pub(super) metrics: Metrics,
    pub(super) show: Show,
    pub(super) status: Status,
    /// Others than this launcher started most workers.
    pub(super) external: bool,
}

impl<'a> Watch<'a> {
    pub(super) fn new(begin: Begin<'a>) -> Watch<'a> {
        let Begin {
            source,
            meeting,
            workers: trainers,
            external,
            served,
            store,
            news,
            metrics,
            show,
            status,
        } = begin;
        let all = trainers + source.job.servers.map_or(0, |servers| servers.count);
        Watch {
            source,
            news,
            begun: Instant::now(),
            meeting: meeting.to_owned(),
            workers: (0..all).map(|number| Worker::new(number, trainers)).collect(),
            trainers,
            served,
            store,
            due: VecDeque::new(),
            replacements: Replacements::default(),
            stopping: None,
            leaving: None,
            epoch: 0,
            members: 0,
            unaccounted: 0,
            step: 0,
            finished: None,
            saved: None,
            given_up: false,
            failed: None,
            held: Teller::default(),
            metrics,
            show,
            status,
            external,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Starts the process of a place.
    fn start(&mut self, number: usize) -> Result<()> {
        let itself = std::env::current_exe().context("can't find this program to start a worker")?;
        let mut command = Command::new(itself);
        let what = if number < self.trainers { "worker" } else { "server" };
        let place = if number < self.trainers { number } else { number - self.trainers };
        command.args(["train", what]).arg(&self.meeting).args(["--place", &place.to_string()]);
        // One who comes while others run gets the state from them. Where all are gone, the last checkpoint has it.
        let others =
            self.external || self.workers.iter().any(|worker| worker.child.is_some() && worker.member);
        let around_servers = self.workers.len() > self.trainers;
        if self.workers[number].shown.starts > 0 && !others && !around_servers {
            command.arg("--resume");
        }
        let (child, input) = child::spawn(command, number, &self.news)?;
        let pid = child.id();
        let worker = &mut self.workers[number];
        worker.shown.started(pid);
        (worker.child, worker.failed) = (Some((child, input)), false);
        (worker.member, worker.holds, worker.strayed) = (false, false, false);
        self.show.say(&format!("{} is process {pid}", self.name(number)));
        Ok(())
    }

    /// Starts every process, and goes on until all have ended and none is due.
    pub(super) fn watch(&mut self, inbox: &Receiver<News>) -> Result<()> {
        for number in 0..self.workers.len() {
            self.start(number)?;
        }
        loop {
            match inbox.recv_timeout(TICK) {
                Ok(News::Said(number, pid, said)) => self.heard(number, pid, *said)?,
                // Whose coordinator has ended may say so.
                Ok(News::Noted(..)) if self.leaving.is_some() && self.finished.is_some() => {}
                Ok(News::Noted(number, line)) => self.show.say(&format!("{}: {line}", self.name(number))),
                Ok(News::Served(words)) => self.coordinated(words)?,
                Ok(News::Gone(number, pid)) => self.gone(number, pid)?,
                Ok(News::Stop) => self.stop(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.tick()?;
            let over = self.due.is_empty() && self.served.is_none();
            if over && self.workers.iter().all(|worker| worker.child.is_none()) {
                if self.again() {
                    continue;
                }
                let complete = self.finished.as_ref().is_some_and(|finished| finished.reason == Reason::Done);
                self.status.end(self.step, 0, complete, &self.places(), &self.metrics);
                return Ok(());
            }
        }
    }

    /// The steps are taken, and whoever was writing the last checkpoint died with it: what is missing behind the newest one is
    /// done again by new workers.
    fn again(&mut self) -> bool {
        let Some(finished) = &self.finished else { return false };
        let whole = finished.reason != Reason::Done || self.saved == Some(finished.steps);
        let other = self.external || self.workers.len() > self.trainers;
        if whole || other || self.given_up || self.stopping.is_some() {
            return false;
        }
        let Decision::At(when) = self.replacements.gone(self.begun.elapsed(), self.step) else {
            return false;
        };
        let text = format!(
            "the last checkpoint, of step {}, was lost with its writer; the steps behind the newest one are taken again",
            finished.steps
        );
        self.record(What::CheckpointFailed, text);
        if let Some(store) = self.store {
            store.reopen();
        }
        (self.finished, self.members, self.unaccounted) = (None, 0, 0);
        self.due = (0..self.trainers).map(|number| (when, number)).collect();
        true
    }

    /// Whoever waits for a group when the job is done waits in vain: nobody would let it in.
    fn send_late_home(&mut self) {
        if self.finished.as_ref().is_none_or(|finished| finished.reason != Reason::Done) {
            return;
        }
        for worker in &mut self.workers {
            let late = worker.shown.status.as_ref().is_some_and(|status| {
                status.activity == Activity::Joining && Duration::from_millis(status.since_ms) > LATE
            });
            if let Some((child, _)) = &mut worker.child
                && late
            {
                worker.shown.done = true;
                // It may have ended by itself.
                let _ = child.kill();
            }
        }
    }

    fn tick(&mut self) -> Result<()> {
        self.send_late_home();
        let now = self.now();
        while self.due.front().is_some_and(|(when, _)| *when <= now) {
            if let Some((_, number)) = self.due.pop_front() {
                self.start(number)?;
            }
        }
        let leaving = self.leaving.is_some_and(|since| since.elapsed() > LEAVING);
        if leaving || self.stopping.is_some_and(|since| since.elapsed() > STOPPING) {
            for worker in &mut self.workers {
                if let Some((child, _)) = &mut worker.child {
                    if !leaving {
                        self.show.say(&format!("worker {} doesn't stop; it is ended", worker.number));
                    }
                    // It may have ended by itself.
                    let _ = child.kill();
                }
            }
        }
        let places = self.places();
        self.status.update(self.step, self.members, &places, &self.metrics);
        Ok(())
    }

    fn places(&self) -> Vec<Place> {
        self.workers.iter().map(|worker| worker.shown.clone()).collect()
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Instant::now());
        self.due.clear();
        self.show.say(match self.held.has_told() {
            false => "stopping behind this step, with a checkpoint (Ctrl-C again ends at once)",
            true => "giving up the weights that can't be written",
        });
        self.record(What::Stopped, "the user asked for it".into());
        if let Some(served) = &self.served {
            // Its workers and servers end with it.
            served.stop();
            return;
        }
        for worker in &mut self.workers {
            if let Some((_, input)) = &mut worker.child {
                // One that has just ended needs no word.
                let _ = writeln!(input, "{STOP}").and_then(|()| input.flush());
            }
        }
    }

    /// What a place is called.
    pub(super) fn name(&self, number: usize) -> String {
        self.workers[number].shown.name.clone()
    }

    /// The job is over but for processes that end.
    fn over(&self) -> bool {
        self.finished.is_some()
            || self.stopping.is_some()
            || (self.workers.len() > self.trainers && self.served.is_none())
    }

    /// A job around servers that has no worker left, or no server, and gets no other one, ends with what there is.
    fn deserted(&mut self) {
        let Some(served) = &self.served else { return };
        let nobody = |mut places: std::ops::Range<usize>| {
            places.all(|n| self.workers[n].child.is_none() && self.due.iter().all(|(_, due)| *due != n))
        };
        if (nobody(0..self.trainers) && !self.external) || nobody(self.trainers..self.workers.len()) {
            served.stop();
        }
    }

    /// A worker's process is ending.
    fn gone(&mut self, number: usize, pid: u32) -> Result<()> {
        let worker = &mut self.workers[number];
        if worker.shown.pid != Some(pid) {
            return Ok(());
        }
        let Some((mut child, input)) = worker.child.take() else { return Ok(()) };
        drop(input);
        let status = reap(&mut child)?;
        worker.shown.pid = None;
        if worker.shown.done || (status.success() && !worker.strayed) {
            return Ok(());
        }
        let how = if worker.strayed { "strayed".to_owned() } else { how(status) };
        self.unaccounted += usize::from(number < self.trainers);
        let name = self.name(number);
        if self.leaving.is_none() {
            let what = if number < self.trainers { What::Lost } else { What::Note };
            self.record(what, format!("{name} (process {pid}) {how}"));
        }
        if self.workers[number].failed || self.over() {
            self.deserted();
            return Ok(());
        }
        match self.replacements.gone(self.begun.elapsed(), self.step) {
            Decision::At(when) => self.due.push_back((when, number)),
            Decision::Enough => {
                let others = self.workers.iter().any(|worker| worker.child.is_some()) || self.external;
                let rest = if others { "; the others go on" } else { "" };
                self.show.say(&format!(
                    "{name} is not replaced any more: too many in a row died without a step in between{rest}"
                ));
                self.failed.get_or_insert(format!("{name} {how}, again and again"));
                self.deserted();
            }
        }
        let file = self.source.path.display();
        tracing::debug!(%file, number, "a worker is gone");
        Ok(())
    }
}

//! The coordinator at work in a job: what the shards begin with, checkpoints of what they hold, and the end.
//!
//! A checkpoint is of one moment: nothing of a later step is handed out until what came before is done and fetched. That
//! costs the workers, every so many steps, the time of the last micro-batch and of the fetching; in all modes every
//! micro-batch then counts exactly once, over a resumption too. What is said of it all is in [`telling`].

mod telling;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use consort_tensor::buffer::Buffer;
use consort_training::checkpoint::{self, CheckpointConfig, Writer};
use consort_training::job::Servers;
use consort_training::parallel::{
    Control, Finished, Holding, JobRecord, Keeper, Membership, Reason, Worker, keep, weights_hash,
};
use consort_training::server::{Holdings, Lead, Mode, Replication};
use consort_training::{Error, Layout};

use super::{Told, spec};
use crate::train::meeting::Meeting;
use crate::train::{prepare, worker};

/// How long a checkpoint that is being written is waited for at the end, and what is under way when the job is stopped.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the thread looks around when nothing happens.
const TICK: Duration = Duration::from_millis(50);
/// How long servers may take for what they have, before the thread looks around meanwhile.
const FETCHING: Duration = Duration::from_millis(200);
/// How often it says who waits for whom.
const VIEW: Duration = Duration::from_millis(250);

/// Leads a job to its end. `listening` gets the port.
pub(super) fn lead(
    meeting: &Meeting,
    servers: &Servers,
    listen: &str,
    stop: &AtomicBool,
    listening: &SyncSender<Result<u16>>,
    tell: &dyn Fn(Told),
) -> Result<Option<Finished>> {
    let job = crate::train::parse(&meeting.file, meeting.text.clone())?.job;
    let begun = prepare::begin(&job, &meeting.prepared)?;
    let dataset = prepare::samples(&job, &meeting.prepared, &begun, meeting.threads, &mut |_| ())?;
    let trainer = worker::trainer(&job, &begun, meeting.steps, meeting.threads)?;
    let layout = trainer.decoder().layout().clone();
    let checkpoints = worker::checkpoints(&job, worker::files(&begun, &meeting.prepared)?);
    let plan = job.plan(meeting.steps);
    // A worker for itself reads the checkpoint, and knows what must be equal for it to be this job's.
    let mut alone = Worker::new(trainer, &dataset, plan, Membership::Alone, Some(checkpoints.clone()))?;
    let mut begin = Holdings::default();
    if meeting.resume
        && let Some(resumed) = alone.resume()?
    {
        tell(Told::Resumed { step: resumed.step, refused: resumed.refused });
        begin.steps = resumed.step;
    }
    let (trainer, exponents, record) = alone.into_parts();
    begin.updates = trainer.steps();
    begin.exponents = exponents;
    begin.weights = trainer.weights().to_vec();
    begin.state = trainer.optimizer().state().iter().map(|buffer| buffer.to_vec()).collect();
    drop(trainer);
    let spec = spec(&job, servers, meeting, &layout)?;
    let lead = Lead::listen(listen, meeting.token.as_bytes(), spec, servers.count, &begin)?;
    // Nobody may be waiting any more.
    let _ = listening.send(Ok(lead.address().port()));
    let mut leading = Leading {
        writer: Some(Writer::new(checkpoints.clone(), &layout)?),
        checkpoints,
        saved: None,
        every: job.checkpoints.every,
        deadline: job.train.deadline,
        servers: *servers,
        members: BTreeSet::new(),
        expected: meeting.workers,
        met: false,
        protected: BTreeSet::new(),
        epoch: 0,
        step: begin.steps,
        since: Instant::now(),
        viewed: None,
        lost: 0,
        lead: Arc::new(lead),
        layout,
        record,
        tell,
    };
    while !leading.lead.look(|coordinator| coordinator.cluster().formed()) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        leading.listen();
    }
    let mut watch = |_| {
        tell(Told::View(Box::new(leading.lead.view())));
        if stop.load(Ordering::Relaxed) { Control::Stop } else { Control::Go }
    };
    match leading.lead.load_watched(&begin, &mut watch) {
        Err(Error::Ended) => return Ok(None),
        loaded => loaded?,
    }
    drop(begin);
    if servers.count == 1 {
        leading.note(
            "1 server, without a backup: if it dies, the job stops and goes on from its last checkpoint"
                .into(),
        );
    }
    leading.run(stop).map(Some)
}

struct Leading<'a> {
    lead: Arc<Lead>,
    checkpoints: CheckpointConfig,
    /// Until the end.
    writer: Option<Writer>,
    /// The last step that was given to it.
    saved: Option<u64>,
    every: u64,
    /// How long servers that don't answer are waited for at the end.
    deadline: Duration,
    servers: Servers,
    layout: Layout,
    record: JobRecord,
    members: BTreeSet<u64>,
    /// Workers that the beginning waits for, and whether they were there.
    expected: usize,
    met: bool,
    /// Shards that had a backup once.
    protected: BTreeSet<usize>,
    epoch: u64,
    step: u64,
    /// When the last step was over.
    since: Instant,
    viewed: Option<Instant>,
    /// Pushes that were lost with servers.
    lost: u64,
    tell: &'a dyn Fn(Told),
}

impl Leading<'_> {
    fn run(&mut self, stop: &AtomicBool) -> Result<Finished> {
        let mut due = (self.step / self.every + 1) * self.every;
        let mut asked: Option<Instant> = None;
        self.lead.hold(Some(due));
        loop {
            self.listen();
            if self.lead.finished()? {
                if let Some(finished) = self.end(Reason::Done, stop)? {
                    return Ok(finished);
                }
                continue;
            }
            if asked.is_none() && stop.load(Ordering::Relaxed) {
                self.lead.pause();
                asked = Some(Instant::now());
            }
            let held = self.lead.held();
            match asked {
                Some(since) => {
                    let nobody = self.lead.look(|coordinator| coordinator.progress().workers() == 0);
                    if (held || nobody || since.elapsed() > PATIENCE)
                        && let Some(finished) = self.end(Reason::Asked, stop)?
                    {
                        return Ok(finished);
                    }
                }
                None if held => {
                    self.save()?;
                    due += self.every;
                    self.lead.hold(Some(due));
                }
                None => {}
            }
        }
    }

    /// Passes on what happened, waiting for it a moment.
    fn listen(&mut self) {
        let events = self.lead.events(TICK);
        events.into_iter().for_each(|event| self.event(event));
        for event in self.writer.iter().flat_map(Writer::events) {
            if let checkpoint::Event::Failed { step, .. } = event {
                self.saved = self.saved.filter(|saved| *saved != step);
            }
            (self.tell)(Told::Checkpoint(event));
        }
        if self.viewed.is_none_or(|viewed| viewed.elapsed() >= VIEW) {
            self.viewed = Some(Instant::now());
            (self.tell)(Told::View(Box::new(self.lead.view())));
        }
    }

    /// Fetches what the servers have, and has it written.
    fn save(&mut self) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if writer.is_busy() {
            writer.skip(self.step);
            return Ok(());
        }
        match self.fetch() {
            Ok(all) => self.write(&all),
            // Servers that don't answer for a while cost a checkpoint; that they never do again is the coordinator's to say.
            Err(error) => {
                let (step, reason) = (self.step, crate::terminal::said(&error));
                (self.tell)(Told::Checkpoint(checkpoint::Event::Failed { step, reason }));
                Ok(())
            }
        }
    }

    /// What the servers have. Where they take their time, what happens meanwhile is told all the same.
    fn fetch(&mut self) -> Result<Holdings> {
        let (done, fetched) = mpsc::sync_channel(1);
        let lead = Arc::clone(&self.lead);
        let fetch = move || {
            // The thread that waits for it doesn't go away.
            let _ = done.send(lead.fetch());
        };
        let thread = std::thread::Builder::new().name("coordinator-fetches".into()).spawn(fetch)?;
        let mut patience = FETCHING;
        let all = loop {
            match fetched.recv_timeout(patience) {
                Ok(all) => break all?,
                Err(RecvTimeoutError::Timeout) => {
                    self.listen();
                    patience = Duration::from_millis(1);
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the thread that asks the servers has ended"),
            }
        };
        // It has sent what it had.
        let _ = thread.join();
        Ok(all)
    }

    fn write(&mut self, all: &Holdings) -> Result<()> {
        let mut state = Vec::with_capacity(all.state.len());
        for values in &all.state {
            let mut buffer = Buffer::zeroed(values.len())?;
            buffer.copy_from_slice(values);
            state.push(buffer);
        }
        let job = self.record.state(all.steps, all.updates, &all.exponents);
        if let Some(writer) = &mut self.writer {
            writer.save(all.steps, &self.layout, &all.weights, &state, job);
        }
        self.saved = Some(all.steps);
        Ok(())
    }

    /// Waits until what was saved is written; why that of `step` is not.
    fn finish_writing(&mut self, step: u64) -> Option<String> {
        let mut failed = None;
        for event in self.writer.take().map(Writer::finish).unwrap_or_default() {
            match &event {
                checkpoint::Event::Failed { step: of, reason } if *of == step => {
                    failed = Some(reason.clone())
                }
                _ => {}
            }
            (self.tell)(Told::Checkpoint(event));
        }
        failed
    }

    /// The last checkpoint. `None` where a server died with what only it had: that is computed again first. One that finds
    /// no place is kept here, where all of it is by now: no server and no worker is needed for it any more.
    fn end(&mut self, reason: Reason, stop: &AtomicBool) -> Result<Option<Finished>> {
        // The last one must not be left out because the one before is still being written.
        if let Some(writer) = &mut self.writer {
            writer.settle(PATIENCE);
        }
        let until = Instant::now() + self.deadline;
        let all = loop {
            match self.fetch() {
                Ok(all) => break all,
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => {
                    self.lead.finished()?;
                    self.listen();
                }
            }
        };
        if reason == Reason::Done && !self.lead.finished()? {
            return Ok(None);
        }
        self.listen();
        if self.saved != Some(all.steps) {
            self.write(&all)?;
        }
        if let Some(failed) = self.finish_writing(all.steps)
            && reason == Reason::Done
        {
            let bytes = 4 * (all.weights.len() * (1 + all.state.len())) as u64;
            keep(&mut Kept { leading: self, all: &all, stop }, all.steps, bytes, failed);
        }
        if let Replication::Async { max_lag } = self.servers.replication {
            let largest = self.lead.look(|coordinator| coordinator.largest_lag());
            self.note(format!(
                "backups were behind their primaries by at most {largest} changes (max_lag {max_lag}); {} acknowledged \
                 pushes were lost with servers and computed again",
                self.lost
            ));
        }
        if let Mode::Bounded { staleness } = self.servers.mode {
            let spread = self.lead.look(|coordinator| coordinator.progress().spread());
            self.note(format!(
                "no worker was ever more than {spread} groups ahead of another (staleness {staleness})"
            ));
        }
        Ok(Some(Finished {
            steps: all.steps,
            reason,
            weights_hash: weights_hash(&all.weights),
            samples: self.record.cursor(all.steps),
        }))
    }
}

/// Weights that are trained and not written.
struct Kept<'k, 'l> {
    leading: &'k mut Leading<'l>,
    all: &'k Holdings,
    stop: &'k AtomicBool,
}

impl Keeper for Kept<'_, '_> {
    fn tell(&mut self, told: Holding) -> Control {
        self.leading.listen();
        (self.leading.tell)(Told::Holding(told));
        if self.stop.load(Ordering::Relaxed) { Control::Stop } else { Control::Go }
    }

    fn attempt(&mut self) -> Option<String> {
        let Kept { leading, all, .. } = self;
        match Writer::new(leading.checkpoints.clone(), &leading.layout) {
            Ok(writer) => leading.writer = Some(writer),
            Err(error) => return Some(error.to_string()),
        }
        match leading.write(all) {
            Ok(()) => leading.finish_writing(all.steps),
            Err(error) => Some(crate::terminal::said(&error)),
        }
    }
}

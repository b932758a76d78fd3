//! A process that trains, beside others that do.
//!
//! It opens what the launcher prepared, joins the others at the store, and works until the job is done. It stops at the end of a
//! step, with a checkpoint, when it is told to, and when its launcher is gone: its standard input ends then.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result};
use consort_collectives::JoinOptions;
use consort_tensor::{Cpu, Pool};
use consort_training::checkpoint::CheckpointConfig;
use consort_training::job::{Job, ModelSource};
use consort_training::parallel::{Board, Control, Event, Finished, Membership, Reason, Worker};
use consort_training::{Error, Normal, SavedType, Trainer, config_file};

use super::holding::Teller;
use super::meeting::Meeting;
use super::prepare::{self, Prepared};
use super::said::Said;
use crate::cli::Told;
use crate::environment;
use crate::terminal::note;

/// How often a worker says what it is doing.
const STATUS: Duration = Duration::from_millis(250);
/// How long a share of a checkpoint is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// The word that asks for a stop.
pub(crate) const STOP: &str = "stop";

/// How a worker is attached to its launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attached {
    /// It is the launcher's child: words come on standard input and go on standard output.
    Child,
    /// A cluster's starter started it; signals tell it to stop.
    Alone,
}

/// Works. `threads` are this machine's for this worker, where not as many as the meeting says.
pub(crate) fn work(meeting: &Meeting, attached: Attached, threads: Option<usize>) -> Result<Finished> {
    let told = Arc::new(Orders::default());
    match attached {
        Attached::Child => obey(Arc::clone(&told))?,
        Attached::Alone => crate::signals::on_stop({
            let told = Arc::clone(&told);
            move || {
                if !told.stop() {
                    note("stopped before it met the other workers");
                    std::process::exit(1);
                }
                note("stopping behind this step, with a checkpoint");
            }
        })?,
    }
    match run(meeting, attached, threads, &told) {
        Ok(finished) => {
            say(attached, &Said::Finished(finished.clone()));
            Ok(finished)
        }
        Err(error) => {
            // What the group did to this worker may not happen to the next one.
            let shared = !matches!(error.downcast_ref::<Error>(), Some(Error::Group(_)));
            if shared {
                say(attached, &Said::Failed(crate::terminal::said(&error)));
                if attached == Attached::Child {
                    return Err(Told.into());
                }
            }
            Err(error)
        }
    }
}

fn run(meeting: &Meeting, attached: Attached, threads: Option<usize>, told: &Orders) -> Result<Finished> {
    let job = super::parse(&meeting.file, meeting.text.clone())?.job;
    let begun = prepare::begin(&job, &meeting.prepared)?;
    let threads = threads.unwrap_or(meeting.threads);
    let dataset = prepare::samples(&job, &meeting.prepared, &begun, threads, &mut |_| ())?;
    let trainer = trainer(&job, &begun, meeting.steps, threads)?;
    let checkpoints = checkpoints(&job, files(&begun, &meeting.prepared)?);
    let mut join = JoinOptions::new(&meeting.store, meeting.token.as_bytes());
    join.deadline = job.train.deadline;
    // A newcomer is let in at a step's end, so it waits for as long as a step may take.
    join.join_deadline = join.join_deadline.max(job.train.deadline);
    join.silence = meeting.silence;
    let mut worker =
        Worker::new(trainer, &dataset, job.plan(meeting.steps), Membership::Group(join), Some(checkpoints))?;
    if meeting.resume
        && let Some(resumed) = worker.resume()?
    {
        say(attached, &Said::Resumed { step: resumed.step, refused: resumed.refused });
    }
    let publisher = Publisher::start(worker.board(), attached)?;
    let (mut teller, location) = (Teller::default(), job.checkpoint_location());
    let finished = worker.run(&mut |event| {
        say(attached, &Said::Event(event.clone()));
        if let (Attached::Alone, Event::Holding(told)) = (attached, event)
            && let Some(text) = teller.news(told, &location)
        {
            note(&text);
        }
        told.member.fetch_or(matches!(event, Event::Started { .. }), Ordering::Relaxed);
        if told.stop.load(Ordering::Relaxed) { Control::Stop } else { Control::Go }
    });
    drop(publisher);
    let finished = finished?;
    if let Reason::StoreGone { message } = &finished.reason {
        note(message);
    }
    Ok(finished)
}

/// A trainer whose weights are the job's first ones.
pub(super) fn trainer(job: &Job, begun: &prepare::Begun, steps: u64, threads: usize) -> Result<Trainer> {
    let cpu = Cpu::detect();
    let mut trainer = Trainer::new(Pool::new(threads, cpu), &begun.config, job.trainer(steps))?;
    let layout = trainer.decoder().layout().clone();
    match (&begun.opened, &job.model) {
        (Some(opened), ModelSource::From(_)) => opened.read_weights(&layout, trainer.weights_mut())?,
        _ => layout.initialize(&Pool::new(threads, cpu), Normal::new(job.seed), trainer.weights_mut()),
    }
    Ok(trainer)
}

/// Where checkpoints go, with the model's other `files` in each; of one writer, until a job says otherwise.
pub(super) fn checkpoints(job: &Job, files: BTreeMap<String, Vec<u8>>) -> CheckpointConfig {
    CheckpointConfig {
        location: job.checkpoint_location(),
        options: environment::s3_options(),
        keep: job.checkpoints.keep,
        worker: 0,
        workers: 1,
        patience: PATIENCE,
        files,
    }
}

/// What every checkpoint has beside the weights, so that it is a model.
pub(super) fn files(begun: &prepare::Begun, prepared: &Prepared) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        prepare::tokenizer_files(begun, prepared)?.into_iter().collect();
    files.insert("config.json".into(), config_file(&begun.config, SavedType::F32));
    Ok(files)
}

/// What a worker was told, and whether it may have something to lose.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    /// It has been in a group.
    member: AtomicBool,
}

impl Orders {
    /// Asks for a stop behind this step; false for a worker that takes none, as it still waits for the others. It may go as it
    /// is: what it has, a checkpoint or another worker has too.
    fn stop(&self) -> bool {
        self.stop.store(true, Ordering::Relaxed);
        self.member.load(Ordering::Relaxed)
    }
}

/// Does what the launcher says, for as long as there is one.
fn obey(told: Arc<Orders>) -> Result<()> {
    let stop = move || {
        if !told.stop() {
            std::process::exit(0);
        }
    };
    let listen = move || {
        for line in io::stdin().lock().lines() {
            match line {
                Ok(line) if line.trim() == STOP => stop(),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        // The end of standard input is the end of the launcher, which is told to the others with this step.
        stop();
    };
    std::thread::Builder::new().name("launcher".into()).spawn(listen).context("can't start a thread")?;
    Ok(())
}

fn say(attached: Attached, said: &Said) {
    if attached == Attached::Child
        && let Ok(line) = serde_json::to_string(said)
    {
        // A launcher that is gone hears nothing; standard input has told.
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// Says what the board shows until it is dropped.
struct Publisher {
    end: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Publisher {
    fn start(board: Board, attached: Attached) -> Result<Publisher> {
        let (end, ended) = mpsc::channel();
        let publish = move || {
            loop {
                say(attached, &Said::Status(board.status()));
                if ended.recv_timeout(STATUS) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("status".into()).spawn(publish);
        Ok(Publisher { end: Some(end), thread: Some(thread.context("can't start a thread")?) })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported as it happened.
            let _ = thread.join();
        }
    }
}

/// The hidden mode: a worker of the launcher that wrote `meeting`, at this place. With `resume` it goes on from the newest
/// checkpoint, where the others that had the job's state are gone.
pub(crate) fn child(meeting: &Path, place: usize, resume: bool) -> Result<()> {
    let mut meeting = Meeting::read(meeting)?;
    if meeting.served {
        let failed = |reason| say(Attached::Child, &Said::Failed(reason));
        return super::served::learn(&meeting, place, None, failed);
    }
    meeting.resume |= resume;
    work(&meeting, Attached::Child, None).map(|_| ())
}

//! Checkpoints of a job whose workers come and go.
//!
//! Every worker writes its share under its rank. When members change, shares change: a new writer begins, and the old
//! one finishes behind the job's back what it had been given.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::checkpoint::{CheckpointConfig, Event, JobState, Writer};
use crate::{Error, Trainer};

/// How long the end of a job waits for writers of earlier members: a share that is missing never comes.
const RETIRED: Duration = Duration::from_secs(2);

/// A worker's checkpoints.
pub(super) struct Saver {
    config: CheckpointConfig,
    writer: Option<Writer>,
    retired: Vec<JoinHandle<()>>,
    told: Sender<Event>,
    events: Receiver<Event>,
    /// The last step that was given to a writer, and whether members have changed since.
    last: Option<u64>,
    /// A checkpoint that members left before it was complete.
    unfinished: bool,
    pending: bool,
}

impl Saver {
    /// Checks the place.
    pub(super) fn new(config: CheckpointConfig, trainer: &Trainer) -> Result<Saver, Error> {
        let alone = CheckpointConfig { worker: 0, workers: 1, ..config };
        drop(Writer::new(alone.clone(), trainer.decoder().layout())?);
        let (told, events) = mpsc::channel();
        Ok(Saver {
            config: alone,
            writer: None,
            retired: Vec::new(),
            told,
            events,
            last: None,
            unfinished: false,
            pending: false,
        })
    }

    pub(super) fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// This worker is one of others now.
    pub(super) fn members(&mut self, worker: usize, workers: usize) {
        // Of a checkpoint that was begun with those who are gone, a share may be missing for ever.
        if self.pending || (self.config.worker, self.config.workers) != (worker, workers) {
            self.retire();
            (self.config.worker, self.config.workers) = (worker, workers);
        }
    }

    fn retire(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        self.unfinished |= self.pending;
        self.pending = false;
        let told = self.told.clone();
        let finish = move || {
            for event in writer.finish() {
                // The job may have ended.
                let _ = told.send(event);
            }
        };
        match std::thread::Builder::new().name("checkpoint-retired".into()).spawn(finish) {
            Ok(thread) => self.retired.push(thread),
            Err(error) => tracing::warn!(%error, "no thread to finish a checkpoint behind the job's back"),
        }
    }

    /// Whether a checkpoint is due that members left before it was complete.
    pub(super) fn owes(&self) -> bool {
        self.unfinished
    }

    /// Whether this worker is still writing the last one.
    pub(super) fn is_busy(&mut self) -> bool {
        self.writer.as_mut().is_some_and(Writer::is_busy)
    }

    /// A checkpoint is left out, as some worker is still writing the one before: a share without the others is nothing.
    pub(super) fn skip(&mut self, step: u64) {
        if let Some(writer) = &mut self.writer {
            writer.skip(step);
        }
    }

    /// Whether `step` was given to the writer of these members.
    pub(super) fn has(&self, step: u64) -> bool {
        self.last == Some(step) && !self.unfinished
    }

    /// Waits for the checkpoint before: the last one of a job must not be left out because that one is slow.
    pub(super) fn settle(&mut self) {
        let limit = self.config.patience;
        if let Some(writer) = &mut self.writer {
            writer.settle(limit);
        }
    }

    /// Copies this worker's share; returns when it is copied.
    pub(super) fn save(&mut self, step: u64, trainer: &Trainer, job: JobState) {
        let layout = trainer.decoder().layout();
        if self.writer.is_none() {
            match Writer::new(self.config.clone(), layout) {
                Ok(writer) => self.writer = Some(writer),
                Err(error) => {
                    let _ = self.told.send(Event::Failed { step, reason: error.to_string() });
                    return;
                }
            }
        }
        if let Some(writer) = &mut self.writer {
            writer.save(step, layout, trainer.weights(), trainer.optimizer().state(), job);
            (self.last, self.unfinished, self.pending) = (Some(step), false, true);
        }
    }

    /// Bytes that a whole checkpoint takes.
    pub(super) fn bytes(&self, trainer: &Trainer) -> u64 {
        let values = trainer.decoder().layout().parameter_count() * (1 + trainer.optimizer().state().len());
        let small: usize = self.config.files.values().map(Vec::len).sum();
        (4 * values + small) as u64
    }

    /// What became of checkpoints since the last call.
    pub(super) fn events(&mut self) -> Vec<Event> {
        let mut events: Vec<Event> = self.events.try_iter().collect();
        let own: Vec<Event> = self.writer.iter().flat_map(|writer| writer.events()).collect();
        if own.iter().any(|event| !matches!(event, Event::Skipped { .. })) {
            self.pending = false;
        }
        events.extend(own);
        self.retired.retain(|thread| !thread.is_finished());
        events
    }

    /// Waits until what was saved is written, or has failed, and returns the last events.
    pub(super) fn finish(&mut self) -> Vec<Event> {
        let mut events: Vec<Event> = self.writer.take().map(Writer::finish).unwrap_or_default();
        let until = Instant::now() + RETIRED;
        while self.retired.iter().any(|thread| !thread.is_finished()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        events.extend(self.events.try_iter());
        events
    }
}

//! What workers, servers and their coordinator say, and what the launcher makes of it: the bar, the records, the end.

use std::time::Instant;

use anyhow::{Result, bail};
use consort_training::checkpoint;
use consort_training::parallel::{Event, Finished, Reason};
use consort_training::report::What;

use super::watch::Watch;
use crate::train::said::Said;
use crate::train::served::Told;
use crate::train::show;

impl Watch<'_> {
    pub(super) fn heard(&mut self, number: usize, pid: u32, words: Said) -> Result<()> {
        let worker = &mut self.workers[number];
        if worker.shown.pid != Some(pid) {
            // Of the process before.
            return Ok(());
        }
        worker.shown.heard();
        match words {
            Said::Status(status) => worker.shown.status = Some(status),
            Said::Failed(reason) => {
                worker.failed = true;
                self.show.say(&format!("worker {number} can't go on: {reason}"));
                self.failed.get_or_insert(reason);
            }
            Said::Resumed { step, refused } => self.resumed(step, refused),
            Said::Finished(finished) => self.ended(number, finished)?,
            Said::Event(event) => {
                worker.member |= matches!(event, Event::Started { .. });
                worker.holds |= matches!(event, Event::Holding(_));
                self.event(event)?;
            }
        }
        Ok(())
    }

    fn ended(&mut self, number: usize, finished: Finished) -> Result<()> {
        let worker = &mut self.workers[number];
        if let Reason::StoreGone { message } = &finished.reason {
            // Our store is there, so this worker has lost its way to it and not the job its end.
            worker.strayed = true;
            self.show.say(&format!("worker {number} found no way back to the others: {message}"));
            return Ok(());
        }
        worker.shown.done = true;
        self.given_up |= worker.holds && self.saved != Some(finished.steps);
        if let Some(other) = &self.finished
            && (other.steps, &other.reason) == (finished.steps, &finished.reason)
            && other.weights_hash != finished.weights_hash
        {
            bail!(
                "two workers ended step {} with different weights ({} and {}): that is a bug of ours or of this machine's \
                 memory; don't use the result",
                finished.steps,
                other.weights_hash,
                finished.weights_hash
            );
        }
        let better = |other: &Finished| finished.reason == Reason::Done && other.reason != Reason::Done;
        if self.finished.as_ref().is_none_or(better) {
            self.finished = Some(finished);
        }
        self.send_home();
        Ok(())
    }

    /// Newcomers come too late for a job that is over: nobody would let them in.
    fn send_home(&mut self) {
        self.due.clear();
        for worker in self.workers.iter_mut().filter(|worker| !worker.member) {
            if let Some((child, _)) = &mut worker.child {
                worker.shown.done = true;
                // It may have ended by itself.
                let _ = child.kill();
            }
        }
    }

    fn resumed(&mut self, step: u64, refused: Vec<String>) {
        for reason in refused {
            self.show.once(&format!("a checkpoint is no good and is left out: {reason}"));
        }
        self.step = self.step.max(step);
        self.metrics.resumed(step);
        self.show.once(&format!("going on behind step {step}"));
    }

    /// What the coordinator of a job around servers says. With its last word its workers and servers end.
    pub(super) fn coordinated(&mut self, words: Told) -> Result<()> {
        match words {
            Told::Resumed { step, refused } => self.resumed(step, refused),
            Told::Members { workers, epoch } => {
                if self.members == 0 {
                    self.show.say(&show::workers_met(workers));
                }
                (self.members, self.epoch) = (workers.max(1), epoch);
                self.show.members(workers);
            }
            // A process of this launcher that ended is told of by its end.
            Told::Left { name, silent: false } if self.workers.iter().any(|w| w.shown.name == name) => {}
            Told::Left { name, silent: true } => {
                self.record(What::Lost, format!("{name} has fallen silent and the others go on"));
            }
            Told::Left { name, .. } => {
                self.record(What::Lost, format!("{name} is gone and the others go on"))
            }
            Told::Note(what, text) => self.record(what, text),
            Told::Step(step) => self.event(Event::Step(*step))?,
            Told::Checkpoint(event) => self.checkpoint(event),
            Told::Holding(told) => self.event(Event::Holding(told))?,
            Told::View(view) => self.status.view(*view),
            Told::Finished(finished) => {
                // Where nobody asked for the end, it is a failure that has a checkpoint.
                let whole = self.stopping.is_some() || self.failed.is_none();
                self.finished = finished.filter(|finished| whole || finished.reason == Reason::Done);
                self.let_go();
            }
            Told::Failed(reason) => {
                self.failed.get_or_insert(reason);
                self.let_go();
            }
        }
        Ok(())
    }

    /// The coordinator has ended, so its workers and servers do; one that is stopped or hangs is ended.
    fn let_go(&mut self) {
        self.served = None;
        self.due.clear();
        self.leaving = Some(Instant::now());
    }

    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Started { workers, epoch, took_us, step, .. }
                if epoch > self.epoch || self.members == 0 =>
            {
                self.stood(workers, epoch, took_us, step);
            }
            Event::Step(step) if step.step + 1 > self.step => {
                self.step = step.step + 1;
                let record = self.metrics.step(&step, self.now())?;
                self.show.step(&record);
            }
            Event::Checkpoint(event) => self.checkpoint(event),
            Event::Holding(told) => {
                if let Some(text) = self.held.news(&told, &self.source.job.checkpoint_location()) {
                    self.show.say(&text);
                }
            }
            Event::Lost { reason, operation, .. } => {
                tracing::debug!(%reason, %operation, "a worker left its epoch")
            }
            _ => {}
        }
        Ok(())
    }

    /// A new epoch began with so many workers.
    fn stood(&mut self, workers: usize, epoch: u64, took_us: u64, step: u64) {
        let first = self.members == 0;
        let left = self.members.saturating_sub(self.unaccounted);
        if !first && workers < left {
            let silent = left - workers;
            let who = if silent == 1 { "a worker".to_owned() } else { format!("{silent} workers") };
            self.record(What::Lost, format!("{who} fell silent and the others go on"));
        }
        if !first && workers > left.min(workers) {
            let text =
                format!("{workers} workers again behind step {step}, after {:.0} ms", took_us as f64 / 1e3);
            self.record(What::Joined, text);
        }
        if first {
            self.show.say(&show::workers_met(workers));
        }
        (self.members, self.epoch, self.unaccounted) = (workers, epoch, 0);
        self.show.members(workers);
    }

    fn checkpoint(&mut self, event: checkpoint::Event) {
        match event {
            checkpoint::Event::Complete { step, bytes, took } => {
                self.saved = self.saved.max(Some(step));
                let text = format!(
                    "step {step} ({} by the process that completed it, in {:.1} s, behind the job's back)",
                    crate::terminal::bytes(bytes),
                    took.as_secs_f64()
                );
                self.metrics.event(What::Checkpoint, text, step, self.begun.elapsed());
            }
            checkpoint::Event::Failed { step, reason } => {
                let on = if step < self.metrics.steps() { ", the job goes on" } else { "" };
                let text = format!("step {step} was not written{on}: {reason}");
                self.record_once(What::CheckpointFailed, text);
            }
            checkpoint::Event::Skipped { step } => {
                let text = format!("step {step} was left out: the one before it was still being written");
                self.record_once(What::CheckpointFailed, text);
            }
            checkpoint::Event::Written { .. } => {}
        }
    }

    /// Notes an event that several workers tell of.
    fn record_once(&mut self, what: What, text: String) {
        if self.show.once(&text) {
            self.metrics.event(what, text, self.step, self.begun.elapsed());
        }
    }

    /// Notes an event and shows it.
    pub(super) fn record(&mut self, what: What, text: String) {
        self.show.say(&text);
        self.metrics.event(what, text, self.step, self.begun.elapsed());
    }
}

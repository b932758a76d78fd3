//! What happens in a job around servers, in the launcher's words: steps, members, servers that come and go.

use std::time::Instant;

use consort_training::Loss;
use consort_training::parallel::{Span, StepEvent};
use consort_training::report::What;
use consort_training::server::{Change, Event, Happened, Spent};

use super::Leading;
use crate::train::served::Told;

/// `1 group`, `2 groups`.
fn plural(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

impl Leading<'_> {
    pub(super) fn note(&self, text: String) {
        (self.tell)(Told::Note(What::Note, text));
    }

    /// Workers came or went.
    fn count(&mut self) {
        if !self.met {
            if self.members.len() < self.expected {
                return;
            }
            self.met = true;
            // What came before was no step's time.
            self.since = Instant::now();
        }
        self.epoch += 1;
        (self.tell)(Told::Members { workers: self.members.len(), epoch: self.epoch });
    }

    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Joined { worker, name } => {
                if self.met {
                    (self.tell)(Told::Note(
                        What::Joined,
                        format!("{name} has joined behind step {}", self.step),
                    ));
                }
                self.members.insert(worker);
                self.count();
            }
            Event::WorkerLost { worker, name, silent } => {
                (self.tell)(Told::Left { name, silent });
                self.members.remove(&worker);
                self.count();
            }
            Event::Refused { by, who, reason, times } => {
                let by = by.unwrap_or_else(|| "the launcher".into());
                let again = if times > 1 { format!(" ({times} times by now)") } else { String::new() };
                self.note(format!("{by} refused {who}: {reason}{again}; the job goes on"));
            }
            Event::Work(happened) => self.happened(happened),
            Event::Servers(change) => self.changed(&change),
        }
    }

    fn happened(&mut self, happened: Happened) {
        match happened {
            Happened::Step { step, loss, gradient_norm, learning_rate, spent } => {
                self.done(step, loss, (gradient_norm, learning_rate), &spent);
            }
            Happened::Round { step, loss, learning_rate, spent } => {
                // Of no gradient of its own: the mean of its groups'.
                let norm = spent.norms / spent.groups.max(1) as f64;
                self.done(step, loss, (norm, learning_rate), &spent);
            }
            Happened::LostPushes { pushes, groups } => {
                self.lost += pushes;
                let (were, whose) =
                    (if pushes == 1 { "push was" } else { "pushes were" }, plural(groups, "group"));
                self.note(format!(
                    "{pushes} acknowledged {were} lost with a server; {whose} of micro-batches computed again"
                ));
            }
            // A step that is done again on other grids is no news; the loop ends with a failure.
            Happened::Redone { .. } | Happened::Failed(_) => {}
        }
    }

    fn changed(&mut self, change: &Change) {
        let name = |server| self.lead.look(|coordinator| coordinator.server_name(server));
        match *change {
            Change::FailedOver { shard, epoch, from, to } => self.note(format!(
                "{} has taken over shard {shard} from {} (epoch {epoch}, behind step {})",
                name(to),
                name(from),
                self.step
            )),
            Change::Unprotected { shard, .. } => {
                self.note(format!("shard {shard} has no backup for the moment"));
            }
            Change::Protected { shard, backup, .. } => {
                let shards = self.lead.look(|coordinator| coordinator.cluster().placements().len());
                match self.protected.insert(shard) {
                    // The beginning: said once, of all.
                    true if self.protected.len() == shards => {
                        let servers = self.servers.count;
                        self.note(format!(
                            "{} on {}, each with a backup",
                            plural(shards as u64, "shard"),
                            plural(servers as u64, "server")
                        ));
                    }
                    true => {}
                    false => self.note(format!("shard {shard} has a backup again: {}", name(backup))),
                }
            }
            Change::Emptied { shard, from, .. } => self.note(format!(
                "{} is gone before the job began; shard {shard} gets its first weights again",
                name(from)
            )),
            Change::Lost { shard } => self.note(format!("shard {shard} is lost")),
        }
    }

    /// A step is done, in whichever mode. Times are those of a worker, on average.
    fn done(&mut self, step: u64, loss: Loss, (gradient_norm, learning_rate): (f64, f64), spent: &Spent) {
        self.step = step + 1;
        let took = std::mem::replace(&mut self.since, Instant::now()).elapsed();
        let us = |seconds: f64| (seconds / spent.workers.len().max(1) as f64 * 1e6) as u64;
        let carried = Span { end_us: us(spent.carried_s), ..Span::default() };
        (self.tell)(Told::Step(Box::new(StepEvent {
            step,
            loss: loss.mean(),
            learning_rate,
            gradient_norm,
            rows: loss.rows as u64,
            samples: self.record.cursor(step + 1) - self.record.cursor(step),
            cursor: self.record.cursor(step + 1),
            workers: self.members.len(),
            epoch: self.epoch,
            took_us: took.as_micros() as u64,
            computed_us: us(spent.computed_s),
            waited_us: us(spent.exposed_s),
            overlapped_us: us(spent.carried_s - spent.exposed_s),
            spans: vec![carried],
            ..StepEvent::default()
        })));
    }
}

//! The thread that feeds one shard's backup: a copy first, then every entry of the log in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use consort_collectives::link::Link;

use super::{Host, Hosted, lock, wait};
use crate::Error;
use crate::server::replica::{Entry, copy_hash};
use crate::server::wire::{Answer, Order, head, said};

/// How long a part of a copy may take.
const COPYING: Duration = Duration::from_secs(60);

/// Feeds one shard's backup.
pub(super) struct Replicator {
    host: Arc<Host>,
    hosted: Arc<Hosted>,
    shard: usize,
    link: Option<(String, Link)>,
}

enum Need {
    Over,
    Copy { epoch: u64, backup: String },
    Entry { epoch: u64, backup: String, entry: Entry },
}

impl Replicator {
    pub(super) fn new(host: Arc<Host>, hosted: Arc<Hosted>, shard: usize) -> Replicator {
        Replicator { host, hosted, shard, link: None }
    }

    pub(super) fn run(mut self) {
        // The epoch whose backup has its copy, and since when the backup doesn't answer.
        let (mut copied, mut silent): (u64, Option<(u64, Instant)>) = (0, None);
        loop {
            let (epoch, done) = match self.need(copied) {
                Need::Over => return,
                Need::Copy { epoch, backup } => (epoch, self.copy(epoch, &backup)),
                Need::Entry { epoch, backup, entry } => {
                    let Entry { log, op, body } = entry;
                    let order = Order::Replicate { shard: self.shard, epoch, log, op };
                    (epoch, self.ask(&backup, &order, &body))
                }
            };
            match done {
                Ok(Answer::Held { log }) => {
                    (copied, silent) = (epoch, None);
                    let mut state = lock(&self.hosted.state);
                    if state.replica.held(epoch, log) {
                        let shard = self.shard;
                        tracing::info!(shard, epoch, log, "the backup is in sync");
                    }
                    drop(state);
                    self.hosted.changed.notify_all();
                    self.host.tell();
                    continue;
                }
                Ok(Answer::Gap) => copied = 0,
                // Behind: it hears of its duty soon. Ahead: so does this one.
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(shard = self.shard, epoch, %error, "the backup does not answer");
                    self.link = None;
                }
            }
            let since = silent.filter(|(of, _)| *of == epoch).map_or_else(Instant::now, |(_, since)| since);
            silent = Some((epoch, since));
            if since.elapsed() > self.host.spec.lease() {
                let mut state = lock(&self.hosted.state);
                if state.suspect != epoch && state.replica.epoch() == epoch {
                    tracing::warn!(shard = self.shard, epoch, "the backup has not answered for a lease");
                    state.suspect = epoch;
                }
                drop(state);
                self.host.tell();
            }
            // Nothing tells when the other process gets there.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the backup needs something.
    fn need(&self, copied: u64) -> Need {
        let mut state = lock(&self.hosted.state);
        loop {
            if state.over {
                return Need::Over;
            }
            let epoch = state.replica.epoch();
            if let Some(backup) = state.replica.backup().map(str::to_owned) {
                if copied != epoch {
                    return Need::Copy { epoch, backup };
                }
                if let Some(entry) = state.replica.next() {
                    return Need::Entry { epoch, backup, entry };
                }
            }
            state = wait(&self.hosted.changed, state, self.host.spec.lease());
        }
    }

    fn ask(&mut self, backup: &str, order: &Order, body: &[u8]) -> Result<Answer, Error> {
        let limit = match order {
            Order::Copy { .. } => COPYING,
            _ => self.host.spec.lease(),
        };
        let until = Instant::now() + limit;
        let mut link = match self.link.take().filter(|(address, _)| address == backup) {
            Some((_, link)) => link,
            None => Link::connect(backup, &self.host.connect.token, 0, until)?,
        };
        let message = link.ask(&head(order), &[body], until)?;
        self.link = Some((backup.to_owned(), link));
        said(&message.head)
    }

    /// Gives the backup everything. What comes meanwhile waits in line.
    fn copy(&mut self, epoch: u64, backup: &str) -> Result<Answer, Error> {
        // A backup that hasn't heard of its duty would refuse a copy that was made for nothing.
        match self.ask(backup, &Order::Probe { shard: self.shard, epoch }, &[])? {
            Answer::Gap | Answer::Held { .. } => {}
            other => return Ok(other),
        }
        let parts = {
            let mut state = lock(&self.hosted.state);
            if state.replica.epoch() != epoch {
                return Ok(Answer::Elsewhere { epoch });
            }
            let parts = state.replica.copy();
            if parts.is_none() {
                // It was in sync, and lacks something now: only another epoch can begin with a copy again.
                state.suspect = epoch;
            }
            parts
        };
        let Some(parts) = parts else { return Ok(Answer::Elsewhere { epoch }) };
        let hash = copy_hash(&parts);
        let last = parts.len().saturating_sub(1);
        let mut answer = Answer::Gap;
        for (part, message) in parts.into_iter().enumerate() {
            let hash = (part == last).then(|| hash.clone());
            let order = Order::Copy { shard: self.shard, epoch, part, head: message.head, hash };
            answer = self.ask(backup, &order, &message.body)?;
            if !matches!(answer, Answer::Held { .. }) {
                return Ok(answer);
            }
        }
        Ok(answer)
    }
}

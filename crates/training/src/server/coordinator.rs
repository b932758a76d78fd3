//! The coordinator: which server holds what ([`Cluster`]) and who computes what ([`Progress`]), and where the two touch.
//!
//! Pure: questions come with the time, answers go back, and [`Coordinator::version`] says when servers' duties
//! have changed. It keeps no gradients and no weights.

#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use consort_model::train::Loss;

use super::cluster::{Change, Cluster, ServerId};
use super::op::Ready;
use super::progress::{Grant, Happened, Progress, Verdict, WorkerId};
use super::seen::Seen;
use super::spec::Spec;
use super::wire::{Duties, Effort, Report};

pub use view::{ShardView, View, Waits, WorkerView};

/// Happenings that wait to be read, at most; the oldest go first.
const UNREAD: usize = 1 << 16;
/// Names that are remembered, of workers and of servers. Numbers only grow, and old ones have long gone.
const NAMES: usize = 4096;
/// Characters of a name, at most.
const NAME_CHARS: usize = 64;
/// Characters of a reason, at most: it may hold what somebody sent.
const REASON_CHARS: usize = 300;

/// Something to tell the person who runs the job.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Of the servers.
    Servers(Change),
    /// Of the work.
    Work(Happened),
    /// A worker came.
    Joined {
        /// Its number.
        worker: WorkerId,
        /// What people call it.
        name: String,
    },
    /// A worker is lost.
    WorkerLost {
        /// Its number.
        worker: WorkerId,
        /// What people call it.
        name: String,
        /// It gave no sign of life for the lease; else its connection closed.
        silent: bool,
    },
    /// Somebody sent what makes no sense, and was refused. Of one that does so again and again, every tenfold is told.
    Refused {
        /// Which server it was that refused; `None`: the coordinator itself.
        by: Option<String>,
        /// Who: a worker's name, or an address.
        who: String,
        /// Why.
        reason: String,
        /// How often by now.
        times: u64,
    },
}

/// Whether a job begins whose shards were loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It does.
    Begun,
    /// A shard has no backup yet that holds everything.
    Wait,
    /// A server died meanwhile with what it had: the shards are to be loaded again.
    Reload,
}

/// A job's coordinator. Times are since any fixed beginning.
pub struct Coordinator {
    spec: Arc<Spec>,
    cluster: Cluster,
    progress: Progress,
    events: Vec<Event>,
    version: u64,
    failed: Option<String>,
    /// How far each shard's backup lags, as its primary last said.
    lags: BTreeMap<usize, u64>,
    largest_lag: u64,
    /// Shards whose new primary has not said yet what it holds.
    unheard: BTreeMap<usize, u64>,
    /// When time passed last.
    ticked: Option<Duration>,
    workers: BTreeMap<WorkerId, String>,
    servers: BTreeMap<ServerId, String>,
    /// By whom was refused who (its name, or its host), and how often.
    refused: BTreeMap<(Option<ServerId>, String), u64>,
}

/// Keeps a name, shortened to what one can read.
fn keep(names: &mut BTreeMap<u64, String>, id: u64, name: &str) {
    let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_CHARS).collect();
    names.insert(id, name);
    if names.len() > NAMES {
        names.pop_first();
    }
}

/// The name, or else a number.
fn called(names: &BTreeMap<u64, String>, id: u64, kind: &str) -> String {
    names.get(&id).filter(|name| !name.is_empty()).cloned().unwrap_or_else(|| format!("{kind} no. {id}"))
}

impl Coordinator {
    /// A job that begins when `servers` servers are there. See [`Progress::new`].
    ///
    /// # Errors
    /// [`crate::Error::Setting`].
    pub fn new(
        spec: Arc<Spec>,
        servers: usize,
        steps: u64,
        updates: u64,
        exponents: Option<Vec<i32>>,
    ) -> Result<Coordinator, crate::Error> {
        spec.check()?;
        Ok(Coordinator {
            cluster: Cluster::new(spec.shards.len(), servers, spec.lease()),
            progress: Progress::new(Arc::clone(&spec), steps, updates, exponents),
            spec,
            events: Vec::new(),
            version: 0,
            failed: None,
            lags: BTreeMap::new(),
            largest_lag: 0,
            unheard: BTreeMap::new(),
            ticked: None,
            workers: BTreeMap::new(),
            servers: BTreeMap::new(),
            refused: BTreeMap::new(),
        })
    }

    /// The job.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// Where the shards are.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// How far the work is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether the shards have their first weights. Until then nothing is handed out.
    pub fn begun(&self) -> bool {
        self.cluster.begun()
    }

    /// Changes whenever a server's duties do.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Holds the job back behind so many steps, until it is told another number; `None` lets it go on.
    pub fn hold(&mut self, steps: Option<u64>) {
        self.progress.hold(steps);
    }

    /// Lets what has begun come to its end and nothing more. Behind so many steps ([`Progress::pause`]).
    pub fn pause(&mut self) -> u64 {
        self.progress.pause()
    }

    /// Whether the job has come to where it is held ([`Progress::held`]), and every shard has said what it has.
    pub fn held(&self) -> bool {
        self.unheard.is_empty() && self.progress.held()
    }

    /// What people call a worker.
    pub fn worker_name(&self, id: WorkerId) -> String {
        called(&self.workers, id, "worker")
    }

    /// What people call a server.
    pub fn server_name(&self, id: ServerId) -> String {
        called(&self.servers, id, "server")
    }

    /// Why the job can't go on, if it can't.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// The largest lag of a backup behind its primary that was reported, in changes.
    pub fn largest_lag(&self) -> u64 {
        self.largest_lag
    }

    /// What happened since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    fn note(&mut self, event: Event) {
        if let Event::Work(Happened::Failed(reason)) = &event {
            self.failed.get_or_insert_with(|| reason.clone());
        }
        if let Event::Servers(Change::Lost { shard }) = &event {
            let reason = format!(
                "shard {shard} is lost: no server is left that holds a complete copy of it. Start the job again from \
                 its last checkpoint"
            );
            self.failed.get_or_insert(reason);
        }
        // Before the beginning it doesn't matter what a new primary holds: it is loaded anew.
        if let Event::Servers(Change::FailedOver { shard, epoch, .. }) = &event
            && self.cluster.begun()
        {
            self.unheard.insert(*shard, *epoch);
        }
        if self.events.len() >= UNREAD {
            self.events.remove(0);
        }
        self.events.push(event);
    }

    fn lost(&mut self, worker: WorkerId, silent: bool) {
        self.version += 1;
        self.note(Event::WorkerLost { worker, name: self.worker_name(worker), silent });
    }

    fn changed(&mut self, changes: Vec<Change>) {
        self.version += 1;
        changes.into_iter().for_each(|change| self.note(Event::Servers(change)));
    }

    fn work(&mut self, happened: Vec<Happened>) {
        // Servers wait for decisions, and for nothing else of the work.
        self.version += u64::from(happened.iter().any(|h| matches!(h, Happened::Step { .. })));
        happened.into_iter().for_each(|happened| self.note(Event::Work(happened)));
    }

    /// Time passed. It should be called several times a lease: where far more than that has passed, this process itself was
    /// stopped or starved, and who could not be heard is not given up for it. Leases of the other side are shorter than
    /// that only: no server answers longer than it may.
    pub fn tick(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.ticked.replace(now).unwrap_or(now));
        if passed > self.spec.lease() / 2 {
            self.cluster.excuse(now, passed);
            self.progress.excuse(now, passed);
        }
        let changes = self.cluster.tick(now);
        if !changes.is_empty() {
            self.changed(changes);
        }
        for id in self.progress.tick(now) {
            self.lost(id, true);
        }
    }

    /// A server that listens at `address` came.
    pub fn register(&mut self, now: Duration, address: &str, name: &str) -> ServerId {
        self.version += 1;
        let id = self.cluster.register(now, address);
        keep(&mut self.servers, id, name);
        id
    }

    /// A server's connection is closed.
    pub fn server_gone(&mut self, id: ServerId) {
        let changes = self.cluster.gone(id);
        self.changed(changes);
    }

    /// What a server is to do; `None`: it was given up.
    pub fn duties(&mut self, now: Duration, id: ServerId) -> Option<Duties> {
        if !self.cluster.heard(now, id) {
            return None;
        }
        let duties = self.cluster.duties(id);
        let primary = duties.iter().filter(|duty| duty.primary);
        let fences = primary.map(|duty| (duty.shard, self.progress.fences(duty.shard)));
        Some(Duties {
            version: self.version,
            fences: fences.filter(|(_, workers)| !workers.is_empty()).collect(),
            decision: self.progress.decision(),
            duties,
        })
    }

    /// A server reports on a shard; `false`: it was given up.
    pub fn report(&mut self, now: Duration, id: ServerId, shard: usize, epoch: u64, report: Report) -> bool {
        if !self.cluster.heard(now, id) {
            return false;
        }
        if let Report::Refused { worker, peer, reason } = report {
            let who = worker.map_or(peer, |worker| self.worker_name(worker));
            self.refused(Some(id), &who, &reason);
            return true;
        }
        if !self.cluster.is_primary(id, shard, epoch) {
            return true;
        }
        match report {
            Report::Ready(ready) => ready.into_iter().for_each(|ready| self.ready(shard, ready)),
            Report::Fenced(workers) => {
                workers.into_iter().for_each(|worker| self.progress.fenced(shard, worker));
            }
            Report::Promoted(seen) => {
                // One that nobody waits for is of a shard that was loaded since, or says what is known.
                if self.unheard.get(&shard).is_none_or(|since| *since > epoch) {
                    return true;
                }
                self.unheard.remove(&shard);
                let own = &self.spec.shards[shard];
                let seen: Vec<(usize, u32, Seen)> =
                    seen.into_iter().filter(|(bucket, ..)| own.contains(bucket)).collect();
                let happened = self.progress.promoted(&seen);
                self.work(happened);
            }
            Report::InSync => {
                let changes = self.cluster.in_sync(id, shard, epoch);
                self.changed(changes);
            }
            Report::Suspect => {
                let changes = self.cluster.suspect(id, shard, epoch);
                self.changed(changes);
            }
            Report::Refused { .. } => {}
            Report::Lag(lag) => {
                self.lags.insert(shard, lag);
                self.largest_lag = self.largest_lag.max(lag);
            }
        }
        true
    }

    /// Somebody sent what makes no sense to the coordinator, or to the server `by`: `who` is a name, or an address.
    pub fn refused(&mut self, by: Option<ServerId>, who: &str, reason: &str) {
        // Each connection has another port.
        let host = who.rsplit_once(':').map_or(who, |(host, _)| host);
        let key = (by, host.chars().take(NAME_CHARS).collect());
        if self.refused.len() >= NAMES && !self.refused.contains_key(&key) {
            return;
        }
        let times = self.refused.entry(key).or_default();
        *times += 1;
        let times = *times;
        if times.ilog10() == (times - 1).checked_ilog10().unwrap_or(u32::MAX) {
            return;
        }
        let short =
            |text: &str| -> String { text.chars().filter(|c| !c.is_control()).take(REASON_CHARS).collect() };
        let by = by.map(|server| self.server_name(server));
        self.note(Event::Refused { by, who: short(who), reason: short(reason), times });
    }

    fn ready(&mut self, shard: usize, ready: Ready) {
        if self.spec.shards[shard].contains(&ready.bucket) {
            let happened = self.progress.ready(ready);
            if !happened.is_empty() {
                self.work(happened);
            }
        }
    }

    /// A worker comes.
    pub fn join(&mut self, now: Duration, name: &str) -> WorkerId {
        let id = self.progress.join(now);
        keep(&mut self.workers, id, name);
        self.note(Event::Joined { worker: id, name: self.worker_name(id) });
        id
    }

    /// A worker gave a sign of life; `false`: it was given up.
    pub fn heard(&mut self, now: Duration, id: WorkerId) -> bool {
        self.progress.heard(now, id)
    }

    /// A worker's connection is closed. One that leaves because all is done is not lost.
    pub fn worker_gone(&mut self, id: WorkerId) {
        if self.progress.finished() {
            self.progress.leave(id);
        } else if self.progress.heard(Duration::ZERO, id) {
            self.progress.lose(id);
            self.lost(id, false);
        }
    }

    /// A worker has nothing to do; `None`: it was given up.
    pub fn claim(&mut self, now: Duration, id: WorkerId) -> Option<Grant> {
        if !self.progress.heard(now, id) {
            return None;
        }
        if self.failed.is_some() {
            return Some(Grant::Finished);
        }
        // Until a new primary has said what it holds, nobody knows what is left to do.
        if !self.cluster.begun() || !self.unheard.is_empty() {
            return Some(self.progress.wait(now, id));
        }
        Some(self.progress.claim(now, id))
    }

    /// What a worker computed of a group is no number, and its servers left it out; `false`: it was given up.
    pub fn not_finite(&mut self, now: Duration, id: WorkerId, group: u64, attempt: u32) -> bool {
        if !self.progress.heard(now, id) {
            return false;
        }
        if let Some(happened) = self.progress.not_finite(id, group, attempt) {
            let name = self.worker_name(id);
            self.refused(None, &name, "its gradient is no number; another worker computes it");
            self.work(happened);
        }
        true
    }

    /// Whether what the servers of these epochs, one a shard, have acknowledged is still there. An acknowledgement of a primary
    /// that was replaced meanwhile is none. Changes of the backup alone take nothing away.
    fn stands(&self, epochs: &[u64]) -> bool {
        let mut primaries = self.cluster.placements().iter().zip(epochs);
        primaries.len() == self.cluster.placements().len()
            && primaries.all(|(placement, epoch)| *epoch >= placement.since && placement.primary.is_some())
    }

    /// The servers of these epochs, one a shard, have acknowledged the first weights: the job begins, if they are still there
    /// and every shard has a backup too. `bare`: it begins without backups.
    pub fn begin(&mut self, epochs: &[u64], bare: bool) -> Start {
        if !self.stands(epochs) {
            Start::Reload
        } else if !bare && !self.cluster.protected() {
            Start::Wait
        } else {
            self.cluster.begin();
            Start::Begun
        }
    }

    /// A worker says that the servers of these epochs, one a shard, have acknowledged its pushes; `None`: it was given up.
    pub fn finish(
        &mut self,
        now: Duration,
        id: WorkerId,
        (group, attempt): (u64, u32),
        epochs: &[u64],
        losses: Vec<Loss>,
        effort: Effort,
    ) -> Option<Verdict> {
        if !self.progress.heard(now, id) {
            return None;
        }
        if !self.stands(epochs) || !self.unheard.is_empty() {
            return Some(Verdict::Again);
        }
        let (verdict, happened) = self.progress.finish(id, group, attempt, losses, effort);
        self.work(happened);
        Some(verdict)
    }
}

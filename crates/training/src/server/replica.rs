//! One server's copy of one shard, as primary or backup: who may acknowledge what. A pure state machine.
//!
//! The primary takes changes, and hands them to its backup in the order of its log; the backup takes them in that order
//! from the primary of its own epoch alone. A new backup gets a copy first. Until it has it the
//! primary acknowledges alone; from then on as follows, and once the backup has caught up with what was acknowledged
//! before, it counts as in sync ([`Replica::safe`]):
//!
//! - replication `sync`: nothing that the backup lacks is acknowledged, or read;
//! - replication `async`: changes are acknowledged at once, and the primary takes no more of them ([`Replica::room`])
//!   while the backup lacks `max_lag`. What more hangs on than one push (a bucket's first weights, that a synchronous
//!   step's bucket is complete, the weights after it, that a worker is fenced) still waits for the backup: shards can't fall
//!   behind each other.
//!
//! Cost: a backup is a second copy in memory and every push travels twice.

use std::collections::VecDeque;
use std::sync::Arc;

use consort_collectives::link::Message;
use consort_tensor::Pool;

use super::cluster::Duty;
use super::op::{Decision, Op, Outcome, Ready};
use super::seen::Seen;
use super::shard::Shard;
use super::spec::{Replication, Spec};
use super::transfer::hash;
use crate::Error;

/// Changes on their way to a backup, at most; a primary with more takes no others.
const QUEUE: usize = 64;

/// An entry of the log on its way to the backup.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The log's length with it.
    pub log: u64,
    /// The change.
    pub op: Op,
    /// Its numbers.
    pub body: Arc<Vec<u8>>,
}

#[derive(Debug)]
enum Role {
    Primary {
        /// Where the backup is.
        backup: Option<String>,
        /// The log that it holds.
        held: u64,
        /// The log when the copy was there: what came before was acknowledged without the backup, what comes since is not.
        mark: Option<u64>,
        /// It holds all up to the mark, so all that was acknowledged.
        in_sync: bool,
        /// Entries that it lacks; while it gets its copy, those behind the copy.
        queue: VecDeque<Entry>,
        /// Has not told the coordinator what it holds.
        untold: bool,
    },
    Backup {
        /// Has its copy.
        whole: bool,
        /// The copy so far.
        parts: Vec<Message>,
    },
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let log = self.shard.log();
        write!(
            f,
            "epoch {}, log {log}, seen {:?}, ready {:?}, ",
            self.epoch,
            self.shard.seen(),
            self.ready()
        )?;
        match &self.role {
            Role::Primary { backup, held, mark, in_sync, queue, untold } => {
                let queue = queue.len();
                write!(
                    f,
                    "primary, backup {backup:?} held {held} mark {mark:?} in_sync {in_sync} queue {queue} untold {untold}"
                )
            }
            Role::Backup { whole, parts } => write!(f, "backup, whole {whole}, {} parts", parts.len()),
        }
    }
}

/// What became of a copy's part, or of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The log up to here.
    Log(u64),
    /// Not of this epoch; the epoch here.
    Elsewhere(u64),
    /// It does not follow what is here: a copy is needed.
    Gap,
}

/// One server's copy of one shard.
pub struct Replica {
    spec: Arc<Spec>,
    index: usize,
    shard: Shard,
    epoch: u64,
    role: Role,
}

impl Replica {
    /// The beginning of a duty.
    ///
    /// # Errors
    /// [`Error::Tensor`] where memory is refused.
    pub fn new(spec: Arc<Spec>, duty: &Duty) -> Result<Replica, Error> {
        let shard = Shard::new(Arc::clone(&spec), duty.shard)?;
        let role = Role::Backup { whole: true, parts: Vec::new() };
        let mut replica = Replica { spec, index: duty.shard, shard, epoch: 0, role };
        replica.duty(duty);
        // A primary from the beginning has nothing to tell.
        if let Role::Primary { untold, .. } = &mut replica.role {
            *untold = false;
        }
        Ok(replica)
    }

    /// Takes a duty; `true` if it is another one than before.
    pub fn duty(&mut self, duty: &Duty) -> bool {
        if duty.epoch <= self.epoch {
            return false;
        }
        self.epoch = duty.epoch;
        let promoted = matches!(self.role, Role::Backup { .. });
        let told = matches!(self.role, Role::Primary { untold: false, .. });
        self.role = match duty.primary {
            true => Role::Primary {
                backup: duty.backup.clone(),
                held: 0,
                mark: None,
                in_sync: false,
                queue: VecDeque::new(),
                untold: promoted || !told,
            },
            false => Role::Backup { whole: false, parts: Vec::new() },
        };
        true
    }

    /// Its epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What it holds.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Whether it is the primary.
    pub fn is_primary(&self) -> bool {
        matches!(self.role, Role::Primary { .. })
    }

    /// Where a primary's backup is.
    pub fn backup(&self) -> Option<&str> {
        match &self.role {
            Role::Primary { backup, .. } => backup.as_deref(),
            Role::Backup { .. } => None,
        }
    }

    /// Changes that a backup in sync lacks.
    pub fn lag(&self) -> u64 {
        match &self.role {
            Role::Primary { in_sync: true, held, .. } => self.shard.log() - held,
            _ => 0,
        }
    }

    /// Whether a primary takes another change now.
    pub fn room(&self) -> bool {
        let Role::Primary { queue, mark, held, .. } = &self.role else { return true };
        let bound = match self.spec.replication {
            Replication::Async { max_lag } if mark.is_some() => self.shard.log() - held < max_lag,
            _ => true,
        };
        bound && queue.len() < QUEUE
    }

    /// A change from a worker, the launcher or the coordinator. What comes back may be acknowledged when the log's length
    /// that comes with it is [`Replica::safe`]. `None`: not the primary.
    pub fn change(&mut self, pool: &Pool, op: &Op, body: &Arc<Vec<u8>>) -> Option<(Outcome, u64)> {
        let Role::Primary { backup, queue, .. } = &mut self.role else { return None };
        let outcome = self.shard.apply(pool, op, body);
        let log = self.shard.log();
        if outcome == Outcome::Taken && backup.is_some() {
            queue.push_back(Entry { log, op: op.clone(), body: Arc::clone(body) });
        }
        Some((outcome, log))
    }

    /// The coordinator's decision, where it is new here.
    pub fn decide(&mut self, pool: &Pool, decision: Decision) -> bool {
        let due = self.shard.ready().any(|r| (r.step, r.attempt) == (decision.step, decision.attempt));
        due && matches!(self.change(pool, &Op::Apply(decision), &Arc::default()), Some((Outcome::Taken, _)))
    }

    /// Whether the log up to `log` may be acknowledged; `None`: not the primary any more. `firm`: more hangs on it than a
    /// push that can be computed again, so it waits for the backup with either replication.
    pub fn safe(&self, log: u64, firm: bool) -> Option<bool> {
        let Role::Primary { backup, held, mark, .. } = &self.role else { return None };
        let waits = firm || self.spec.replication == Replication::Sync;
        Some(backup.is_none() || mark.is_none() || !waits || *held >= log)
    }

    /// Complete buckets that the coordinator may hear of.
    pub fn ready(&self) -> Vec<Ready> {
        match self.safe(self.shard.log(), true) {
            Some(true) => self.shard.ready().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// What a new primary has seen, until it is told ([`Replica::told`]).
    pub fn untold(&self) -> Option<Vec<(usize, u32, Seen)>> {
        matches!(self.role, Role::Primary { untold: true, .. }).then(|| self.shard.seen())
    }

    /// The coordinator knows what this primary has seen.
    pub fn told(&mut self, in_epoch: u64) {
        if let Role::Primary { untold, .. } = &mut self.role
            && in_epoch == self.epoch
        {
            *untold = false;
        }
    }

    /// Everything, for the backup to begin with. What changes from now on waits for it in line. `None` where the backup of
    /// this epoch was in sync before: the coordinator may have promoted it, so this epoch can't begin with it again.
    pub fn copy(&mut self) -> Option<Vec<Message>> {
        let Role::Primary { queue, mark, in_sync: false, .. } = &mut self.role else { return None };
        queue.clear();
        *mark = None;
        Some(self.shard.export())
    }

    /// The first entry that the backup lacks.
    pub fn next(&self) -> Option<Entry> {
        match &self.role {
            Role::Primary { queue, .. } => queue.front().cloned(),
            Role::Backup { .. } => None,
        }
    }

    /// The backup of this epoch holds the log up to here. `true` when it is in sync from now on.
    pub fn held(&mut self, in_epoch: u64, log: u64) -> bool {
        let Role::Primary { held, mark, in_sync, queue, backup, .. } = &mut self.role else { return false };
        if in_epoch != self.epoch || backup.is_none() {
            return false;
        }
        *held = (*held).max(log);
        while queue.front().is_some_and(|entry| entry.log <= *held) {
            queue.pop_front();
        }
        // From here on nothing is acknowledged that the backup lacks, however fast pushes come.
        let mark = *mark.get_or_insert(self.shard.log());
        let first = !*in_sync && *held >= mark;
        *in_sync |= first;
        first
    }

    /// Whether the backup is in sync.
    pub fn in_sync(&self) -> bool {
        matches!(self.role, Role::Primary { in_sync: true, .. })
    }

    /// As the backup: a part of the copy. The last one brings the hash of all.
    pub fn receive(
        &mut self,
        pool: &Pool,
        epoch: u64,
        part: usize,
        message: Message,
        last: Option<&str>,
    ) -> Held {
        let Role::Backup { whole, parts } = &mut self.role else { return Held::Elsewhere(self.epoch) };
        if epoch != self.epoch {
            return Held::Elsewhere(self.epoch);
        }
        if part == 0 {
            (*whole, *parts) = (false, Vec::new());
        }
        if *whole || part != parts.len() || part > self.spec.buckets.len() {
            return Held::Gap;
        }
        parts.push(message);
        let Some(expected) = last else { return Held::Log(0) };
        let parts = std::mem::take(parts);
        if hash(&parts) != expected {
            tracing::warn!(shard = self.index, "a copy arrived with another hash than it left with");
            return Held::Gap;
        }
        match Shard::import(Arc::clone(&self.spec), self.index, pool, &parts) {
            Ok(shard) => {
                self.shard = shard;
                *whole = true;
                Held::Log(self.shard.log())
            }
            Err(error) => {
                tracing::warn!(shard = self.index, %error, "cannot take a copy");
                Held::Gap
            }
        }
    }

    /// As the backup: where it stands.
    pub fn stands(&self, epoch: u64) -> Held {
        match &self.role {
            Role::Backup { .. } if epoch != self.epoch => Held::Elsewhere(self.epoch),
            Role::Backup { whole: true, .. } => Held::Log(self.shard.log()),
            Role::Backup { .. } => Held::Gap,
            Role::Primary { .. } => Held::Elsewhere(self.epoch),
        }
    }

    /// As the backup: the next entry of the primary's log.
    pub fn follow(&mut self, pool: &Pool, epoch: u64, entry: &Entry) -> Held {
        let Role::Backup { whole, .. } = &mut self.role else { return Held::Elsewhere(self.epoch) };
        if epoch != self.epoch {
            return Held::Elsewhere(self.epoch);
        }
        let log = self.shard.log();
        if !*whole || entry.log > log + 1 {
            return Held::Gap;
        }
        if entry.log <= log {
            return Held::Log(log);
        }
        match self.shard.apply(pool, &entry.op, &entry.body) {
            Outcome::Taken => Held::Log(self.shard.log()),
            outcome => {
                tracing::error!(
                    shard = self.index,
                    ?outcome,
                    "a backup differs from its primary; it gets a new copy"
                );
                *whole = false;
                Held::Gap
            }
        }
    }
}

/// The hash that goes with the last part of a copy.
pub(super) fn copy_hash(parts: &[Message]) -> String {
    hash(parts)
}

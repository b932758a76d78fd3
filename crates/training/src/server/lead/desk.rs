//! What the coordinator answers: to servers, to workers, and to the launcher that asks for routes.
//!
//! One thread a connection asks the pure [`Coordinator`] under a lock; who has to wait, waits for the lock's condition, and
//! not longer than a fifth of a lease: then it hears that there is nothing yet, and has given a sign of life by asking again.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use consort_collectives::link::{Message, Service};

use crate::Error;
use crate::server::client::Directory;
use crate::server::cluster::{Route, ServerId};
use crate::server::coordinator::Coordinator;
use crate::server::progress::{Grant, WorkerId};
use crate::server::spec::Spec;
use crate::server::wire::{Ask, Told, head, said};

/// Whose a connection is.
#[derive(Clone, Copy)]
pub(super) enum Who {
    Server(ServerId),
    Worker(WorkerId),
}

pub(super) struct Inner {
    pub(super) coordinator: Coordinator,
    pub(super) guests: HashMap<u64, Who>,
    pub(super) ended: bool,
    pub(super) stop: bool,
}

pub(super) struct Shared {
    pub(super) start: Instant,
    pub(super) spec: Arc<Spec>,
    pub(super) inner: Mutex<Inner>,
    /// Of what waits for something to change.
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, limit: Duration) -> MutexGuard<'a, Inner> {
        self.changed.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// How long a question may wait for a better answer.
    fn patience(&self) -> Duration {
        self.spec.lease() / 5
    }

    /// How often a worker that waits looks for somebody slow.
    fn look(&self) -> Duration {
        match self.spec.speculate_ms {
            0 => self.patience(),
            ms => Duration::from_millis((ms / 8).max(1)),
        }
    }

    fn answer(&self, connection: u64, ask: Ask) -> Told {
        let now = self.start.elapsed();
        let mut inner = self.lock();
        if inner.ended {
            return Told::Ended;
        }
        let who = match &ask {
            Ask::Duty { server, .. } | Ask::Report { server, .. } => Some(Who::Server(*server)),
            Ask::Beat { worker }
            | Ask::Claim { worker }
            | Ask::Finish { worker, .. }
            | Ask::NotFinite { worker, .. } => Some(Who::Worker(*worker)),
            Ask::Job | Ask::Register { .. } | Ask::Join { .. } | Ask::Routes => None,
        };
        if let Some(who) = who {
            inner.guests.insert(connection, who);
        }
        let told = match ask {
            Ask::Job => Told::Job { spec: (*self.spec).clone() },
            Ask::Register { address, name } => {
                let server = inner.coordinator.register(now, &address, &name);
                inner.guests.insert(connection, Who::Server(server));
                Told::Registered { server }
            }
            Ask::Duty { server, version } => return self.duty(inner, server, version),
            Ask::Report { server, shard, epoch, report } if shard < self.spec.shards.len() => {
                match inner.coordinator.report(now, server, shard, epoch, report) {
                    true => Told::Fine,
                    false => Told::Unknown,
                }
            }
            Ask::Report { .. } => Told::Unknown,
            Ask::Join { name } => {
                let worker = inner.coordinator.join(now, &name);
                inner.guests.insert(connection, Who::Worker(worker));
                Told::Joined { worker }
            }
            Ask::Beat { worker } => match inner.coordinator.heard(now, worker) {
                true => Told::Fine,
                false => Told::Unknown,
            },
            Ask::Claim { worker } => return self.claim(inner, worker),
            Ask::Finish { worker, group, attempt, epochs, losses, effort } => {
                let losses = losses.into_iter().map(Into::into).collect();
                match inner.coordinator.finish(now, worker, (group, attempt), &epochs, losses, effort) {
                    Some(verdict) => Told::Verdict(verdict),
                    None => Told::Unknown,
                }
            }
            Ask::NotFinite { worker, group, attempt } => {
                match inner.coordinator.not_finite(now, worker, group, attempt) {
                    true => Told::Fine,
                    false => Told::Unknown,
                }
            }
            Ask::Routes => match inner.coordinator.failed() {
                Some(reason) => Told::Failed { reason: reason.to_owned() },
                None => Told::Routes(inner.coordinator.cluster().routes()),
            },
        };
        drop(inner);
        self.changed.notify_all();
        told
    }

    fn duty(&self, mut inner: MutexGuard<'_, Inner>, server: ServerId, version: u64) -> Told {
        let until = Instant::now() + self.patience();
        loop {
            if inner.ended {
                return Told::Ended;
            }
            let left = until.saturating_duration_since(Instant::now());
            if inner.coordinator.version() != version || left.is_zero() {
                return match inner.coordinator.duties(self.start.elapsed(), server) {
                    Some(duties) => Told::Duties(duties),
                    None => Told::Unknown,
                };
            }
            inner = self.wait(inner, left);
        }
    }

    fn claim(&self, mut inner: MutexGuard<'_, Inner>, worker: WorkerId) -> Told {
        let until = Instant::now() + self.patience();
        loop {
            if inner.ended {
                return Told::Ended;
            }
            if let Some(reason) = inner.coordinator.failed() {
                return Told::Failed { reason: reason.to_owned() };
            }
            let left = until.saturating_duration_since(Instant::now());
            match inner.coordinator.claim(self.start.elapsed(), worker) {
                None => return Told::Unknown,
                // That somebody else has become slow is told by time alone.
                Some(Grant::Wait) if !left.is_zero() => inner = self.wait(inner, left.min(self.look())),
                Some(grant) => return Told::Grant(grant),
            }
        }
    }
}

impl Service for Shared {
    fn answer(&self, connection: u64, question: Message) -> Result<Message, String> {
        let ask = said(&question.head).map_err(|error| error.to_string())?;
        let told = Shared::answer(self, connection, ask);
        Ok(Message { head: head(&told), body: Vec::new() })
    }

    fn refused(&self, peer: &str, reason: &str) {
        self.lock().coordinator.refused(None, peer, reason);
        self.changed.notify_all();
    }

    fn closed(&self, connection: u64) {
        let mut inner = self.lock();
        match inner.guests.remove(&connection) {
            Some(Who::Server(id)) => inner.coordinator.server_gone(id),
            Some(Who::Worker(id)) => inner.coordinator.worker_gone(id),
            None => {}
        }
        drop(inner);
        self.changed.notify_all();
    }
}

impl Directory for Shared {
    fn routes(&self) -> Result<Vec<Route>, Error> {
        let inner = self.lock();
        match inner.coordinator.failed() {
            Some(reason) => Err(Error::Server(reason.to_owned())),
            None => Ok(inner.coordinator.cluster().routes()),
        }
    }
}

//! The coordinator at work: it listens in the launcher, and outlives every worker and server but not the launcher.
//!
//! One thread a connection asks the pure [`Coordinator`] under a lock; who has to wait, waits for the lock's condition.
//! If this process ends, workers and servers find their connections closed and end too, saying so. (A coordinator that
//! outlives it would keep the same state machine in a replicated store.)

mod holdings;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use consort_collectives::link::{Answering, Limits, Message, Service};

use super::client::{Connect, Directory, Shards};
use super::cluster::{Route, ServerId};
use super::coordinator::{Coordinator, Event, View};
use super::progress::{Grant, WorkerId};
use super::spec::Spec;
use super::wire::{Ask, Told, head, said};
use crate::Error;

pub use holdings::{Holdings, Loading};

/// How long processes are given to hear that the job is over.
const FAREWELL: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
enum Who {
    Server(ServerId),
    Worker(WorkerId),
}

struct Inner {
    coordinator: Coordinator,
    guests: HashMap<u64, Who>,
    ended: bool,
    stop: bool,
}

struct Shared {
    start: Instant,
    spec: Arc<Spec>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, limit: Duration) -> MutexGuard<'a, Inner> {
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

/// A job's coordinator, listening. Dropping it ends the job.
pub struct Lead {
    shared: Arc<Shared>,
    answering: Option<Answering>,
    ticker: Option<JoinHandle<()>>,
    connect: Connect,
}

impl Lead {
    /// Listens on `address` for `servers` servers, and then for workers. `begin` says what the shards begin with: it goes
    /// to them with [`Lead::load`].
    ///
    /// # Errors
    /// [`Error::Setting`] for a job that makes no sense, [`Error::Group`] where the address cannot be bound.
    pub fn listen(
        address: &str,
        token: &[u8],
        spec: Spec,
        servers: usize,
        begin: &Holdings,
    ) -> Result<Lead, Error> {
        let spec = Arc::new(spec);
        let exponents = Some(begin.exponents.clone()).filter(|exponents| !exponents.is_empty());
        let coordinator =
            Coordinator::new(Arc::clone(&spec), servers, begin.steps, begin.updates, exponents)?;
        let inner = Inner { coordinator, guests: HashMap::new(), ended: false, stop: false };
        let shared = Arc::new(Shared {
            start: Instant::now(),
            spec,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        });
        let limits = Limits::new(1 << 20);
        let answering = Answering::listen(address, token, limits, Arc::clone(&shared) as Arc<dyn Service>)?;
        let ticking = Arc::clone(&shared);
        let tick = move || {
            let mut inner = ticking.lock();
            while !inner.stop {
                inner.coordinator.tick(ticking.start.elapsed());
                ticking.changed.notify_all();
                inner = ticking.wait(inner, ticking.spec.lease() / 10);
            }
        };
        let ticker = std::thread::Builder::new()
            .name("coordinator".into())
            .spawn(tick)
            .map_err(|e| Error::Server(format!("cannot start the coordinator's thread: {e}")))?;
        let connect = Connect::new(answering.address().to_string(), token);
        Ok(Lead { shared, answering: Some(answering), ticker: Some(ticker), connect })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.answering.as_ref().map_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)), Answering::address)
    }

    fn shards(&self) -> Shards<'_> {
        Shards::new(&*self.shared, &self.connect, &self.shared.spec)
    }

    /// Lets the job hand out nothing from this step on, until it is told another number; `None`: no end.
    pub fn hold(&self, steps: Option<u64>) {
        self.shared.lock().coordinator.hold(steps);
        self.shared.changed.notify_all();
    }

    /// Lets what has begun come to its end and nothing more; behind how many steps that is.
    pub fn pause(&self) -> u64 {
        let steps = self.shared.lock().coordinator.pause();
        self.shared.changed.notify_all();
        steps
    }

    /// Whether the job has come to where it is held, so that what is fetched now is of one moment.
    pub fn held(&self) -> bool {
        self.shared.lock().coordinator.held()
    }

    /// Who does what, and who waits for whom, right now.
    pub fn view(&self) -> View {
        self.shared.lock().coordinator.view(self.shared.start.elapsed())
    }

    /// What happened since the last call; waits for it, at most so long.
    pub fn events(&self, limit: Duration) -> Vec<Event> {
        let until = Instant::now() + limit;
        let mut inner = self.shared.lock();
        loop {
            let events = inner.coordinator.events();
            let left = until.saturating_duration_since(Instant::now());
            if !events.is_empty() || left.is_zero() {
                return events;
            }
            inner = self.shared.wait(inner, left);
        }
    }

    /// Reads the coordinator's state.
    pub fn look<T>(&self, of: impl FnOnce(&Coordinator) -> T) -> T {
        of(&self.shared.lock().coordinator)
    }

    /// Whether all is done, or why it can't be.
    ///
    /// # Errors
    /// [`Error::Server`].
    pub fn finished(&self) -> Result<bool, Error> {
        let inner = self.shared.lock();
        match inner.coordinator.failed() {
            Some(reason) => Err(Error::Server(reason.to_owned())),
            None => Ok(inner.coordinator.progress().finished()),
        }
    }

    /// Waits until all is done; `watch` hears of everything.
    ///
    /// # Errors
    /// [`Error::Server`] where the job can't go on.
    pub fn run(&self, watch: &mut dyn FnMut(&Event)) -> Result<(), Error> {
        loop {
            self.events(Duration::from_millis(200)).iter().for_each(&mut *watch);
            if self.finished()? {
                self.events(Duration::ZERO).iter().for_each(&mut *watch);
                return Ok(());
            }
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let until = Instant::now() + FAREWELL;
        let mut inner = self.shared.lock();
        inner.ended = true;
        self.shared.changed.notify_all();
        while !inner.guests.is_empty() && Instant::now() < until {
            inner = self.shared.wait(inner, Duration::from_millis(20));
        }
        inner.stop = true;
        drop(inner);
        self.shared.changed.notify_all();
        self.answering = None;
        if let Some(ticker) = self.ticker.take() {
            // A panic was reported as it happened.
            let _ = ticker.join();
        }
    }
}

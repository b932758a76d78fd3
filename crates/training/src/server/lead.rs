//! The coordinator at work: it listens in the launcher, and outlives every worker and server but not the launcher.
//!
//! [`Lead`] is the launcher's end of it; what it answers to others is in `desk`, what the shards hold in `holdings`. If this
//! process ends, workers and servers find their connections closed and end too, saying so. (A coordinator that
//! outlives it would keep the same state machine in a replicated store.)

mod desk;
mod holdings;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use consort_collectives::link::{Answering, Limits, Service};

use self::desk::{Inner, Shared};
use super::client::{Connect, Shards};
use super::coordinator::{Coordinator, Event, View};
use super::spec::Spec;
use crate::Error;

pub use holdings::{Holdings, Loading};

/// How long processes are given to hear that the job is over.
const FAREWELL: Duration = Duration::from_secs(2);

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

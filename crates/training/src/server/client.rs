//! Asking the coordinator, and the servers that it names, until they answer or patience is over.
//!
//! A server may die with a question unanswered. Whether it took the change nobody knows, so the question is asked again,
//! of whoever is the primary by then; a change that was taken counts once.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use consort_collectives::link::{Link, Message};

use super::cluster::Route;
use super::spec::Spec;
use super::wire::{Answer, Ask, Order, Told, head, said};
use crate::Error;

/// How to reach a job's coordinator.
#[derive(Clone, Debug)]
pub struct Connect {
    /// Its `host:port`.
    pub coordinator: String,
    /// The job's secret. At least 16 random bytes, since a stranger can test guesses.
    pub token: Vec<u8>,
    /// What people call this process: `worker 3`. Empty: it gets a number.
    pub name: String,
    /// How long to wait for a coordinator or a shard that doesn't answer.
    pub patience: Duration,
}

impl Connect {
    /// With the patience of half a minute.
    pub fn new(coordinator: impl Into<String>, token: &[u8]) -> Connect {
        let patience = Duration::from_secs(30);
        Connect { coordinator: coordinator.into(), token: token.to_vec(), name: String::new(), patience }
    }

    /// The same under a name.
    #[must_use]
    pub fn named(self, name: impl Into<String>) -> Connect {
        Connect { name: name.into(), ..self }
    }

    /// A connection to the coordinator, which may not listen yet.
    pub(super) fn coordinator(&self) -> Result<Office, Error> {
        let until = Instant::now() + self.patience;
        let mut pause = Duration::from_millis(5);
        loop {
            match Link::connect(&self.coordinator, &self.token, 0, until) {
                Ok(link) => return Ok(Office { link: Mutex::new(link), patience: self.patience }),
                Err(error @ consort_collectives::Error::Refused { .. }) => return Err(error.into()),
                Err(error) if Instant::now() + pause >= until => return Err(error.into()),
                Err(_) => {
                    // Nothing tells when a port opens; the pause doubles up to a fifth of a second.
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(200));
                }
            }
        }
    }
}

/// A connection to the coordinator.
pub(super) struct Office {
    link: Mutex<Link>,
    patience: Duration,
}

impl Office {
    /// Asks.
    ///
    /// # Errors
    /// [`Error::Group`] where the coordinator is gone, [`Error::Server`] where it says that the job can't go on.
    pub(super) fn ask(&self, question: &Ask) -> Result<Told, Error> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = link.ask(&head(question), &[], Instant::now() + self.patience)?;
        match said(&answer.head)? {
            Told::Failed { reason } => Err(Error::Server(reason)),
            told => Ok(told),
        }
    }

    /// This machine's address on the way to the coordinator.
    pub(super) fn local_ip(&self) -> Result<std::net::IpAddr, Error> {
        Ok(self.link.lock().unwrap_or_else(PoisonError::into_inner).local_ip()?)
    }
}

/// Who knows where the shards are.
pub(super) trait Directory {
    /// All routes; empty while a shard is nowhere.
    fn routes(&self) -> Result<Vec<Route>, Error>;
}

impl Directory for Office {
    fn routes(&self) -> Result<Vec<Route>, Error> {
        match self.ask(&Ask::Routes)? {
            Told::Routes(routes) => Ok(routes),
            Told::Ended => Err(Error::Ended),
            told => Err(unexpected(&told)),
        }
    }
}

/// An answer to another question.
pub(super) fn unexpected(told: &Told) -> Error {
    Error::Server(format!("the coordinator answers something else: {told:?}"))
}

/// Connections to servers.
pub(super) struct Shards<'d> {
    directory: &'d dyn Directory,
    token: Vec<u8>,
    body_bytes: usize,
    patience: Duration,
    /// How long one server may take: one that is stopped keeps its connections, and another has its place by then.
    attempt: Duration,
    routes: Vec<Route>,
    links: BTreeMap<String, Link>,
}

impl<'d> Shards<'d> {
    pub(super) fn new(directory: &'d dyn Directory, connect: &Connect, spec: &Spec) -> Shards<'d> {
        Shards {
            directory,
            token: connect.token.clone(),
            body_bytes: spec.body_bytes(),
            patience: connect.patience,
            // A server says something within a lease; the rest is for the bytes, at 16 MiB a second.
            attempt: 2 * spec.lease() + Duration::from_secs(1 + (spec.body_bytes() >> 24) as u64),
            routes: Vec::new(),
            links: BTreeMap::new(),
        }
    }

    /// Asks a shard's primary, whoever that is by the time it answers. `order` gets the epoch to name.
    pub(super) fn ask(
        &mut self,
        shard: usize,
        order: impl Fn(u64) -> Order,
        body: &[u8],
    ) -> Result<(Answer, Message), Error> {
        let until = Instant::now() + self.patience;
        let mut reason = "no server has it yet".to_owned();
        let mut pause = Duration::from_millis(2);
        loop {
            if let Some(route) = self.routes.get(shard).cloned() {
                match self.once(&route, &order(route.epoch), body, until.min(Instant::now() + self.attempt)) {
                    Ok((Answer::Wait, _)) => reason = "it does not get on".to_owned(),
                    Ok((Answer::Elsewhere { .. }, _)) => {
                        reason = format!("{} is not its primary", route.address);
                        self.routes.clear();
                    }
                    Ok(answered) => return Ok(answered),
                    Err(error @ consort_collectives::Error::Refused { .. }) => return Err(error.into()),
                    Err(error) => {
                        self.links.remove(&route.address);
                        reason = error.to_string();
                        self.routes.clear();
                    }
                }
            }
            if Instant::now() >= until {
                let patience = self.patience.as_secs_f64();
                return Err(Error::Server(format!(
                    "shard {shard} did not answer for {patience:.1} s: {reason}"
                )));
            }
            if self.routes.get(shard).is_none() {
                // Failing over takes the coordinator a lease at most; the pause doubles up to a twentieth of a second.
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
                self.routes = self.directory.routes()?;
            }
        }
    }

    fn once(
        &mut self,
        route: &Route,
        order: &Order,
        body: &[u8],
        until: Instant,
    ) -> Result<(Answer, Message), consort_collectives::Error> {
        let link = match self.links.entry(route.address.clone()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(Link::connect(&route.address, &self.token, self.body_bytes, until)?)
            }
        };
        let message = link.ask(&head(order), &[body], until)?;
        match said(&message.head) {
            Ok(answer) => Ok((answer, message)),
            Err(error) => Err(consort_collectives::Error::System {
                what: format!("understand {}", route.address),
                reason: error.to_string(),
            }),
        }
    }
}

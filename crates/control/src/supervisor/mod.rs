//! Keeps the replicas that are wanted running: a state machine without a clock, a process or a random number of its
//! own. [`Supervisor::step`] takes what happened and returns what to do; [`crate::keeper`] does it.
//!
//! The design is Erlang's one-for-one supervisor with four additions. *A replica is an incarnation in a slot*: its id
//! (`chat-0.3`) is never reused, so that nothing remembered of a dead one sticks to its successor. *A hang is a death*:
//! a replica that answers no health check in time, or has work and takes no step, is killed and replaced at once,
//! before its process is even gone. *A replacement is warm before its predecessor drains*: settings, files and
//! restarts roll through the fleet one slot at a time; where the new one can't start, the old one stays. *A crash loop
//! slows down and is said*: delays double with full jitter, and a slot that failed too often is reported once.
//!
//! Sources: Erlang/OTP design principles (supervision), Kubernetes' CrashLoopBackOff and rolling update
//! (`maxSurge = 1, maxUnavailable = 0`), Brooker on jitter.

mod replica;
#[cfg(test)]
mod simulation;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use consort_api::ReadyReport;
use consort_base::{Backoff, Philox};

use crate::launch::{Launch, Slot};
use replica::{Phase, Replica};
pub use view::{ReplicaView, SlotState, SlotView};

/// Names one incarnation of a replica: `chat-0.3`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(String);

impl std::fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl ReplicaId {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The supervisor's deadlines and rates.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Delays between failures of one slot.
    pub backoff: Backoff,
    /// A replica that ran this long has not failed at starting: the delays begin anew.
    pub stable_after: Duration,
    /// So many failures in a row are a crash loop.
    pub loop_after: u32,
    /// From start to ready.
    pub start: Duration,
    /// Without an answer to a health check.
    pub probe: Duration,
    /// With work and without a step.
    pub stalled: Duration,
    /// From being told to stop to being stopped.
    pub drain: Duration,
    /// Replicas that may be starting at one time: a machine that just lost all of them should not thrash.
    pub starting_at_once: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            backoff: Backoff { base: Duration::from_millis(200), cap: Duration::from_secs(30) },
            stable_after: Duration::from_secs(10),
            loop_after: 5,
            start: Duration::from_secs(300),
            probe: Duration::from_secs(5),
            stalled: Duration::from_secs(30),
            drain: Duration::from_secs(660),
            starting_at_once: 4,
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// These replicas, started in this way, should run. Replaces what was wanted before.
    Want(BTreeMap<Slot, Launch>),
    /// A process was started.
    Spawned(ReplicaId, u32),
    /// It listens here, and loads its model.
    Listening(ReplicaId, SocketAddr),
    /// It can answer.
    Ready(ReplicaId),
    /// It answered a health check: the engine last stepped so many milliseconds ago while it had work (0: no work).
    Alive(ReplicaId, u64),
    /// What it said of itself, for whoever looks.
    Report(ReplicaId, Box<ReadyReport>),
    /// The process is gone, or could not be started.
    Exited(ReplicaId, String),
    /// Time passed.
    Tick,
    /// Stop everything.
    Stop,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Start a process and report [`Event::Spawned`] or [`Event::Exited`].
    Spawn(ReplicaId, Launch),
    /// Tell it to drain and end (SIGTERM).
    Drain(ReplicaId),
    /// End it now (SIGKILL).
    Kill(ReplicaId),
    /// The set that requests may be sent to changed; see [`Supervisor::routes`].
    Publish,
    /// Something a person should know.
    Say(Notice),
    /// Everything has stopped.
    Stopped,
}

/// Something a person should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether something is wrong.
    pub bad: bool,
    /// What, in a sentence.
    pub text: String,
}

/// A replica that may get requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its id.
    pub id: ReplicaId,
    /// Whose replica it is.
    pub slot: Slot,
    /// Where it listens.
    pub address: SocketAddr,
    /// It gets no new requests; what runs there may finish.
    pub draining: bool,
}

#[derive(Debug)]
struct Place {
    /// `None` where the slot is wanted no more.
    launch: Option<Launch>,
    /// Gets requests, or would if it were ready.
    current: Option<Replica>,
    /// Starts, to replace `current`.
    next: Option<Replica>,
    /// Draining or killed, waited for.
    leaving: Vec<Replica>,
    incarnation: u64,
    /// Failures in a row.
    failures: u32,
    restarts: u64,
    retry_at: Option<Instant>,
    last_failure: Option<String>,
}

/// The supervisor's state.
#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    random: Philox,
    places: BTreeMap<Slot, Place>,
    last_step: Option<Instant>,
    stopping: bool,
    said_stopped: bool,
}

/// A longer time between two steps is our own absence (this process was stopped, or starved): silence that we could
/// not have heard broken is nobody's hang.
const ABSENT: Duration = Duration::from_secs(2);

impl Supervisor {
    /// Nothing runs and nothing is wanted. `seed` sets the jitter.
    pub fn new(options: Options, seed: u64) -> Supervisor {
        let random = Philox::new(seed, 0);
        let places = BTreeMap::new();
        Supervisor { options, random, places, last_step: None, stopping: false, said_stopped: false }
    }

    /// New deadlines, from now on.
    pub fn set_options(&mut self, options: Options) {
        self.options = options;
    }

    /// Takes what happened at `now`; returns what to do, in this order.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Command> {
        let before = self.routes();
        let mut todo = Vec::new();
        let absent =
            self.last_step.replace(now).map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        if absent > ABSENT {
            for replica in self.places.values_mut().flat_map(Place::all_mut) {
                replica.last_answer += absent;
            }
        }
        match event {
            Event::Want(wanted) => self.want(wanted),
            Event::Spawned(id, pid) => self.with(&id, |r| r.pid = Some(pid)),
            Event::Listening(id, address) => self.with(&id, |r| r.address = Some(address)),
            Event::Ready(id) => self.ready(now, &id, &mut todo),
            Event::Alive(id, stalled_ms) => self.with(&id, |r| {
                r.last_answer = now;
                r.stalled = Duration::from_millis(stalled_ms);
            }),
            Event::Report(id, report) => self.with(&id, |r| r.report = Some(*report)),
            Event::Exited(id, how) => self.exited(now, &id, &how, &mut todo),
            Event::Tick => {}
            Event::Stop => self.stopping = true,
        }
        self.watch(now, &mut todo);
        self.converge(now, &mut todo);
        let all_gone = self.places.is_empty();
        if self.stopping && all_gone && !self.said_stopped {
            self.said_stopped = true;
            todo.push(Command::Stopped);
        }
        if self.routes() != before {
            // Before a drain: a replica that is told to stop should already get nothing new.
            todo.insert(0, Command::Publish);
        }
        todo
    }

    fn want(&mut self, wanted: BTreeMap<Slot, Launch>) {
        for (slot, place) in &mut self.places {
            let launch = wanted.get(slot).cloned();
            if launch.is_some() && launch != place.launch {
                // What failed may be mended: try at once.
                place.failures = 0;
                place.retry_at = None;
            }
            place.launch = launch;
        }
        for (slot, launch) in wanted {
            self.places.entry(slot).or_insert_with(|| Place::new(launch));
        }
    }

    fn with(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Replica)) {
        if let Some(replica) = self.places.values_mut().flat_map(Place::all_mut).find(|r| r.id == *id) {
            change(replica);
        }
    }

    fn ready(&mut self, now: Instant, id: &ReplicaId, todo: &mut Vec<Command>) {
        for (slot, place) in &mut self.places {
            let replica = place.next.as_mut().or(place.current.as_mut()).filter(|r| r.id == *id);
            let Some(replica) = replica.filter(|r| matches!(r.phase, Phase::Starting)) else { continue };
            replica.phase = Phase::Ready { since: now };
            replica.last_answer = now;
            replica.stalled = Duration::ZERO;
            let took = now.saturating_duration_since(replica.started).as_secs_f64();
            if place.failures > 0 {
                let text = format!("{slot} is back as {id}, ready in {took:.2} s");
                todo.push(Command::Say(Notice { bad: false, text }));
            }
            if let Some(next) = place.next.take() {
                let old = place.current.replace(next);
                place.leave(old, now, todo);
            }
            return;
        }
    }

    fn exited(&mut self, now: Instant, id: &ReplicaId, how: &str, todo: &mut Vec<Command>) {
        let Some(place) = self.places.values_mut().find(|p| p.all().any(|r| r.id == *id)) else { return };
        if let Some(at) = place.leaving.iter().position(|r| r.id == *id) {
            place.leaving.remove(at);
            return;
        }
        let is_current = place.current.as_ref().is_some_and(|r| r.id == *id);
        let gone = if is_current { place.current.take() } else { place.next.take() };
        if let Some(gone) = gone {
            self.failed(now, gone, how, todo);
        }
    }

    /// A replica died on its own, or was killed for hanging.
    fn failed(&mut self, now: Instant, gone: Replica, how: &str, todo: &mut Vec<Command>) {
        let random = self.random.next_u64();
        let Some((slot, place)) = self.places.iter_mut().find(|(slot, _)| **slot == gone.slot) else {
            return;
        };
        let ran = gone.ready_for(now);
        if ran.is_some_and(|ran| ran >= self.options.stable_after) {
            place.failures = 0;
        }
        let delay = self.options.backoff.delay(place.failures, random);
        place.failures += 1;
        place.restarts += 1;
        place.retry_at = Some(now + delay);
        place.last_failure = Some(how.to_owned());
        if self.stopping || place.launch.is_none() {
            return;
        }
        let text = if place.failures == self.options.loop_after {
            format!(
                "{slot} fails again and again ({} times in a row); it is tried at longer intervals, up to {} s: {how}",
                place.failures,
                self.options.backoff.cap.as_secs()
            )
        } else if place.current.is_some() {
            format!("{} was to replace {slot} and failed; the old one stays: {how}", gone.id)
        } else {
            format!("{} is lost ({how}); another starts in {} ms", gone.id, delay.as_millis())
        };
        todo.push(Command::Say(Notice { bad: true, text }));
    }

    /// Finds replicas whose time is up.
    fn watch(&mut self, now: Instant, todo: &mut Vec<Command>) {
        let options = self.options;
        let mut hung = Vec::new();
        for place in self.places.values_mut() {
            for replica in &mut place.leaving {
                if let Some(why) = replica.overdue(now, &options) {
                    let text = format!("{} is killed while it drains: {why}", replica.id);
                    todo.push(Command::Say(Notice { bad: true, text }));
                    todo.push(Command::Kill(replica.id.clone()));
                    replica.phase = Phase::Killed;
                }
            }
            for which in [&mut place.current, &mut place.next] {
                let Some(why) = which.as_ref().and_then(|replica| replica.overdue(now, &options)) else {
                    continue;
                };
                if let Some(mut replica) = which.take() {
                    todo.push(Command::Kill(replica.id.clone()));
                    let gone = replica.clone();
                    replica.phase = Phase::Killed;
                    place.leaving.push(replica);
                    hung.push((gone, why));
                }
            }
        }
        for (gone, why) in hung {
            self.failed(now, gone, &why, todo);
        }
    }

    /// Moves every slot towards what is wanted of it.
    fn converge(&mut self, now: Instant, todo: &mut Vec<Command>) {
        let stopping = self.stopping;
        for place in self.places.values_mut() {
            if stopping || place.launch.is_none() {
                let (current, next) = (place.current.take(), place.next.take());
                place.leave(current, now, todo);
                place.leave(next, now, todo);
            } else if place.next.as_ref().is_some_and(|next| Some(&next.launch) != place.launch.as_ref()) {
                // It was overtaken while it started.
                let next = place.next.take();
                place.leave(next, now, todo);
            } else if let Some(current) = &place.current
                && Some(&current.launch) != place.launch.as_ref()
                && matches!(current.phase, Phase::Starting)
            {
                let current = place.current.take();
                place.leave(current, now, todo);
            }
        }
        self.places.retain(|_, place| !place.is_over(stopping));
        if stopping {
            return;
        }
        let starting = |place: &Place| place.all().filter(|r| matches!(r.phase, Phase::Starting)).count();
        let mut free = self.options.starting_at_once.saturating_sub(self.places.values().map(starting).sum());
        for (slot, place) in &mut self.places {
            let due = place.retry_at.is_none_or(|at| at <= now);
            if free > 0 && due && place.current.is_none() && place.launch.is_some() {
                place.current = place.spawn(slot, now, todo);
                free -= 1;
            }
        }
        // One slot at a time, and only while the model's other replicas stand.
        if free == 0 || self.places.values().any(|p| p.next.is_some() || !p.leaving.is_empty()) {
            return;
        }
        let limping: BTreeSet<String> =
            self.places.iter().filter(|(_, p)| !p.is_ready()).map(|(slot, _)| slot.model.clone()).collect();
        let outdated = self.places.iter_mut().find(|(slot, place)| {
            let current = place.current.as_ref().map(|r| &r.launch);
            !limping.contains(&slot.model)
                && current != place.launch.as_ref()
                && place.retry_at.is_none_or(|at| at <= now)
        });
        if let Some((slot, place)) = outdated {
            place.next = place.spawn(slot, now, todo);
        }
    }

    /// Replicas that requests may be sent to, in the slots' order; those that drain come last in their slot.
    pub fn routes(&self) -> Vec<Route> {
        let route = |replica: &Replica, draining| {
            let address = replica.address?;
            Some(Route { id: replica.id.clone(), slot: replica.slot.clone(), address, draining })
        };
        let mut routes = Vec::new();
        for place in self.places.values() {
            let current = place.current.iter().filter(|r| matches!(r.phase, Phase::Ready { .. }));
            routes.extend(current.filter_map(|r| route(r, false)));
            let leaving = place.leaving.iter().filter(|r| matches!(r.phase, Phase::Draining { .. }));
            routes.extend(leaving.filter_map(|r| route(r, true)));
        }
        routes
    }
}

impl Place {
    fn new(launch: Launch) -> Place {
        Place {
            launch: Some(launch),
            current: None,
            next: None,
            leaving: Vec::new(),
            incarnation: 0,
            failures: 0,
            restarts: 0,
            retry_at: None,
            last_failure: None,
        }
    }

    fn all(&self) -> impl Iterator<Item = &Replica> {
        self.current.iter().chain(&self.next).chain(&self.leaving)
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Replica> {
        self.current.iter_mut().chain(&mut self.next).chain(&mut self.leaving)
    }

    fn is_ready(&self) -> bool {
        self.current.as_ref().is_some_and(|r| matches!(r.phase, Phase::Ready { .. }))
    }

    fn is_over(&self, stopping: bool) -> bool {
        (stopping || self.launch.is_none()) && self.all().next().is_none()
    }

    fn spawn(&mut self, slot: &Slot, now: Instant, todo: &mut Vec<Command>) -> Option<Replica> {
        let launch = self.launch.clone()?;
        self.incarnation += 1;
        self.retry_at = None;
        let id = ReplicaId(format!("{slot}.{}", self.incarnation));
        todo.push(Command::Spawn(id.clone(), launch.clone()));
        Some(Replica::new(id, slot.clone(), launch, now))
    }

    /// Lets a replica drain; one that never was ready has nothing to drain.
    fn leave(&mut self, replica: Option<Replica>, now: Instant, todo: &mut Vec<Command>) {
        let Some(mut replica) = replica else { return };
        if matches!(replica.phase, Phase::Ready { .. }) {
            replica.phase = Phase::Draining { since: now };
            todo.push(Command::Drain(replica.id.clone()));
        } else {
            replica.phase = Phase::Killed;
            todo.push(Command::Kill(replica.id.clone()));
        }
        self.leaving.push(replica);
    }
}

#[cfg(test)]
mod tests;

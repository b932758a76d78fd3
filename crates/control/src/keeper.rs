//! Does what the supervisor says: the thin driver between [`Supervisor`] and processes.
//!
//! One task owns the supervisor; everything reaches it through one bounded channel. It wakes for events and ten times
//! a second while something changes, twice a second otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use crate::child::{self, Running};
use crate::launch::{Launch, Slot};
use crate::process::{self, Signal};
use crate::store::{Child, Store};
use crate::supervisor::{Command, Event, Notice, Options, ReplicaId, Route, SlotState, SlotView, Supervisor};

/// Events that may wait for the keeper.
const EVENTS: usize = 256;
/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(100);
/// Of these ticks, one in so many is used while nothing changes.
const TICKS_AT_REST: u32 = 5;
/// Health checks of one replica are this far apart, or a fifth of their deadline where that is less.
const PROBE_EVERY: Duration = Duration::from_millis(500);

/// What is asked of the keeper.
enum Ask {
    Want(BTreeMap<Slot, Launch>, Box<Options>),
    Kill(String, oneshot::Sender<Option<u32>>),
    Stop,
}

/// The handle of a keeper; clones share it. The keeper ends when it was told to stop and nothing runs.
#[derive(Clone)]
pub struct Keeper {
    asks: mpsc::Sender<Ask>,
    routes: watch::Receiver<Vec<Route>>,
    view: watch::Receiver<Vec<SlotView>>,
}

/// How children are started: the command of a launch.
pub type Start = Box<dyn Fn(&ReplicaId, &Launch) -> std::process::Command + Send>;

impl Keeper {
    /// Starts a keeper on the current runtime. `say` gets what a person should know.
    pub fn start(
        options: Options,
        seed: u64,
        store: Arc<Store>,
        start: Start,
        say: impl Fn(Notice) + Send + 'static,
    ) -> (Keeper, tokio::task::JoinHandle<()>) {
        let (ask, asks) = mpsc::channel(EVENTS);
        let (events, happened) = mpsc::channel(EVENTS);
        let (routes, routes_seen) = watch::channel(Vec::new());
        let (view, view_seen) = watch::channel(Vec::new());
        let driver = Driver {
            supervisor: Supervisor::new(options, seed),
            options,
            children: BTreeMap::new(),
            probed: BTreeMap::new(),
            store,
            start,
            say: Box::new(say),
            events,
            routes,
            view,
            stopped: false,
        };
        let task = tokio::spawn(driver.run(asks, happened));
        (Keeper { asks: ask, routes: routes_seen, view: view_seen }, task)
    }

    /// These replicas should run, with these deadlines.
    pub async fn want(&self, wanted: BTreeMap<Slot, Launch>, options: Options) {
        // A keeper that has ended wants nothing.
        let _ = self.asks.send(Ask::Want(wanted, Box::new(options))).await;
    }

    /// Kills a replica's process (SIGKILL), as a crash would; its pid where it runs.
    pub async fn kill(&self, id: &str) -> Option<u32> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask::Kill(id.to_owned(), answer)).await.ok()?;
        answered.await.ok().flatten()
    }

    /// Drains and ends everything.
    pub async fn stop(&self) {
        let _ = self.asks.send(Ask::Stop).await;
    }

    /// Replicas that may get requests, whenever they change.
    pub fn routes(&self) -> watch::Receiver<Vec<Route>> {
        self.routes.clone()
    }

    /// Every slot, as it was a moment ago.
    pub fn view(&self) -> Vec<SlotView> {
        self.view.borrow().clone()
    }

    /// Every slot, whenever something changes.
    pub fn watch(&self) -> watch::Receiver<Vec<SlotView>> {
        self.view.clone()
    }
}

struct Driver {
    supervisor: Supervisor,
    options: Options,
    children: BTreeMap<ReplicaId, Running>,
    /// When each replica was last asked how it is.
    probed: BTreeMap<ReplicaId, Instant>,
    store: Arc<Store>,
    start: Start,
    say: Box<dyn Fn(Notice) + Send>,
    events: mpsc::Sender<Event>,
    routes: watch::Sender<Vec<Route>>,
    view: watch::Sender<Vec<SlotView>>,
    stopped: bool,
}

impl Driver {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>, mut happened: mpsc::Receiver<Event>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut idle_ticks = 0u32;
        while !self.stopped {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(Ask::Want(wanted, options)) => {
                        self.options = *options;
                        self.supervisor.set_options(*options);
                        self.give(Event::Want(wanted));
                    }
                    Some(Ask::Kill(id, answer)) => {
                        let child = self.children.iter().find(|(known, _)| known.as_str() == id);
                        let pid = child.map(|(_, child)| child.pid).filter(|pid| process::signal(*pid, Signal::Kill));
                        let _ = answer.send(pid);
                    }
                    // Without anyone to ask for more, what runs is ended.
                    Some(Ask::Stop) | None => self.give(Event::Stop),
                },
                Some(event) = happened.recv() => self.give(event),
                _ = ticks.tick() => {
                    idle_ticks += 1;
                    let settled = self.view.borrow().iter().all(|slot| slot.state == SlotState::Ready);
                    if settled && !idle_ticks.is_multiple_of(TICKS_AT_REST) {
                        continue;
                    }
                    self.give(Event::Tick);
                    self.probe();
                }
            }
        }
    }

    fn give(&mut self, event: Event) {
        if let Event::Exited(id, _) = &event {
            self.children.remove(id);
            self.probed.remove(id);
            if let Err(error) = self.store.forget_child(id.as_str()) {
                tracing::warn!(%error, "a replica's end could not be noted");
            }
        }
        let mut waiting = vec![event];
        while let Some(event) = waiting.pop() {
            for command in self.supervisor.step(Instant::now(), event) {
                waiting.extend(self.act(command));
            }
        }
        let view = self.supervisor.view(Instant::now());
        self.view.send_if_modified(|old| {
            let changed = shape(old) != shape(&view);
            *old = view;
            changed
        });
    }

    fn act(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::Spawn(id, launch) => return Some(self.spawn(id, &launch)),
            Command::Drain(id) => self.signal(&id, Signal::Terminate),
            Command::Kill(id) => self.signal(&id, Signal::Kill),
            Command::Publish => {
                self.routes.send_replace(self.supervisor.routes());
            }
            Command::Say(notice) => (self.say)(notice),
            Command::Stopped => self.stopped = true,
        }
        None
    }

    fn spawn(&mut self, id: ReplicaId, launch: &Launch) -> Event {
        let command = (self.start)(&id, launch);
        match child::start(&id, command, self.events.clone()) {
            Ok(running) => {
                let pid = running.pid;
                let noted = process::identity(pid)
                    .map(|began| self.store.note_child(id.as_str(), &Child { pid, began }))
                    .unwrap_or(Ok(()));
                if let Err(error) = noted {
                    tracing::warn!(%error, replica = id.as_str(), "a replica's start could not be noted");
                }
                self.children.insert(id.clone(), running);
                Event::Spawned(id, pid)
            }
            Err(error) => Event::Exited(id, format!("it could not be started: {error}")),
        }
    }

    fn signal(&self, id: &ReplicaId, signal: Signal) {
        if let Some(child) = self.children.get(id) {
            // It may be gone already; its end is told by whoever waits for it.
            process::signal(child.pid, signal);
        }
    }

    /// Asks the replicas whose turn it is how they are.
    fn probe(&mut self) {
        let (now, patience) = (Instant::now(), self.options.probe);
        let every = PROBE_EVERY.min(patience / 5);
        for route in self.supervisor.routes() {
            let last = self.probed.entry(route.id.clone()).or_insert(now - every);
            if now.saturating_duration_since(*last) >= every {
                *last = now;
                tokio::spawn(child::probe(route.id, route.address, patience, self.events.clone()));
            }
        }
    }
}

/// What of a view is worth telling: everything but the clock.
fn shape(view: &[SlotView]) -> Vec<SlotView> {
    let mut view = view.to_vec();
    for slot in &mut view {
        slot.retry_in_ms = None;
        for replica in &mut slot.replicas {
            (replica.age_ms, replica.report) = (0, None);
        }
    }
    view
}

#[cfg(test)]
mod tests;

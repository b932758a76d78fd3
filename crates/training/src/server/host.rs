//! A server process: it holds copies of shards, as the coordinator says, and answers for those whose primary it is.
//!
//! Threads, beside one for each connection: *duty* waits for the coordinator's word, *report* tells it what it waits for,
//! and one *replicator* a shard feeds the backup. All decisions are [`Replica`]'s, under the shard's lock; who has to wait
//! for something waits for the lock's condition, and not longer than a lease.
//!
//! A primary that hears nothing from the coordinator for a lease answers nobody: by then the coordinator may have given
//! its place away. A server that was given up drops what it holds and comes back as new.

mod answers;
mod replicator;
mod reports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use consort_collectives::link::{Answering, Limits, Service};
use consort_tensor::{Cpu, Pool};

use self::replicator::Replicator;
use super::client::{Connect, Office, unexpected};
use super::cluster::{Duty, ServerId};
use super::op::Op;
use super::replica::Replica;
use super::spec::Spec;
use super::wire::{Ask, Duties, Report, Told};
use crate::Error;

/// Refusals that wait to be told, at most.
const REFUSALS: usize = 64;

/// How to be a server.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The coordinator.
    pub connect: Connect,
    /// Threads that move weights, for each shard.
    pub threads: usize,
    /// The host by which workers on other machines reach this server; `None`: where it reaches the coordinator from.
    pub advertise: Option<String>,
}

impl HostOptions {
    /// A server that workers reach where it reaches the coordinator from.
    pub fn new(connect: Connect, threads: usize) -> HostOptions {
        HostOptions { connect, threads, advertise: None }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>, limit: Duration) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner).0
}

/// Serves until the job is over.
///
/// # Errors
/// [`Error::Group`] where the coordinator is gone, [`Error::Server`] where the job can't go on.
pub fn host(options: &HostOptions) -> Result<(), Error> {
    while life(options)? == Ending::GivenUp {
        tracing::info!("the coordinator gave this server up; it comes back as new, with nothing");
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    JobOver,
    GivenUp,
}

/// From coming to being given up.
fn life(options: &HostOptions) -> Result<Ending, Error> {
    let office = options.connect.coordinator()?;
    let spec = match office.ask(&Ask::Job)? {
        Told::Job { spec } => spec,
        Told::Ended => return Ok(Ending::JobOver),
        told => return Err(unexpected(&told)),
    };
    spec.check()?;
    let host = Arc::new(Host {
        spec: Arc::new(spec),
        threads: options.threads.max(1),
        connect: options.connect.clone(),
        shards: Mutex::new(BTreeMap::new()),
        heard: Mutex::new(Instant::now()),
        news: (Mutex::new(0), Condvar::new()),
        refusals: Mutex::default(),
        over: AtomicBool::new(false),
    });
    let limits = Limits::new(host.spec.body_bytes());
    let listen = match &options.advertise {
        Some(_) => "0.0.0.0:0".to_owned(),
        None => std::net::SocketAddr::new(office.local_ip()?, 0).to_string(),
    };
    let answering =
        Answering::listen(&listen, &options.connect.token, limits, Arc::clone(&host) as Arc<dyn Service>)?;
    let bound = answering.address();
    let address = match &options.advertise {
        Some(host) => format!("{host}:{}", bound.port()),
        None => bound.to_string(),
    };
    let server = match office.ask(&Ask::Register { address, name: options.connect.name.clone() })? {
        Told::Registered { server } => server,
        Told::Ended => return Ok(Ending::JobOver),
        told => return Err(unexpected(&told)),
    };
    tracing::info!(server, address = %answering.address(), "serves");
    let ending = std::thread::scope(|scope| {
        let reporter = options.connect.coordinator().and_then(|office| {
            let host = Arc::clone(&host);
            std::thread::Builder::new()
                .name("server-reports".into())
                .spawn_scoped(scope, move || host.report(&office, server))
                .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))
        });
        let ending = reporter.and_then(|_| host.attend(&office, server));
        host.end();
        ending
    });
    drop(answering);
    ending
}

struct Host {
    spec: Arc<Spec>,
    threads: usize,
    connect: Connect,
    shards: Mutex<BTreeMap<usize, Arc<Hosted>>>,
    /// When the question was asked whose answer came last.
    heard: Mutex<Instant>,
    /// Counts what the reporter may have to tell.
    news: (Mutex<u64>, Condvar),
    /// What the reporter has to tell of those who were refused.
    refusals: Mutex<Vec<Report>>,
    over: AtomicBool,
}

/// A copy of a shard.
struct Hosted {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    replica: Replica,
    pool: Pool,
    /// The epoch whose backup can't be reached.
    suspect: u64,
    /// Workers to be fenced.
    fencing: BTreeSet<u64>,
    over: bool,
}

impl Host {
    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        for hosted in lock(&self.shards).values() {
            lock(&hosted.state).over = true;
            hosted.changed.notify_all();
        }
        self.tell();
    }

    /// Wakes the reporter.
    fn tell(&self) {
        *lock(&self.news.0) += 1;
        self.news.1.notify_all();
    }

    /// Somebody was refused: the coordinator hears of it, and of the first ones where there are very many.
    fn refuse(&self, worker: Option<u64>, peer: &str, reason: &str) {
        let mut refusals = lock(&self.refusals);
        if refusals.len() < REFUSALS {
            refusals.push(Report::Refused { worker, peer: peer.to_owned(), reason: reason.to_owned() });
            drop(refusals);
            self.tell();
        }
    }

    fn hosted(&self, shard: usize) -> Option<Arc<Hosted>> {
        lock(&self.shards).get(&shard).cloned()
    }

    /// Whether the coordinator can't have given this server's place away.
    fn leased(&self) -> bool {
        lock(&self.heard).elapsed() < self.spec.lease() && !self.over.load(Ordering::SeqCst)
    }

    /// Takes the coordinator's word, again and again.
    fn attend(self: &Arc<Self>, office: &Office, server: ServerId) -> Result<Ending, Error> {
        let mut version = 0;
        loop {
            let asked = Instant::now();
            match office.ask(&Ask::Duty { server, version })? {
                Told::Duties(duties) => {
                    *lock(&self.heard) = asked;
                    version = if self.take(&duties)? { duties.version } else { 0 };
                }
                Told::Unknown => return Ok(Ending::GivenUp),
                Told::Ended => return Ok(Ending::JobOver),
                told => return Err(unexpected(&told)),
            }
        }
    }

    /// `false`: something has to wait for a backup, and is tried again.
    fn take(self: &Arc<Self>, duties: &Duties) -> Result<bool, Error> {
        let mut all = true;
        let gone: Vec<Arc<Hosted>> = {
            let mut shards = lock(&self.shards);
            let stays = |shard: usize| duties.duties.iter().any(|duty| duty.shard == shard);
            let gone: Vec<usize> = shards.keys().copied().filter(|&shard| !stays(shard)).collect();
            gone.into_iter().filter_map(|shard| shards.remove(&shard)).collect()
        };
        for hosted in gone {
            lock(&hosted.state).over = true;
            hosted.changed.notify_all();
        }
        for duty in &duties.duties {
            let hosted = match self.hosted(duty.shard) {
                Some(hosted) => hosted,
                None => self.begin(duty)?,
            };
            let mut state = lock(&hosted.state);
            if state.replica.duty(duty) {
                state.suspect = 0;
                let (shard, epoch, primary) = (duty.shard, duty.epoch, duty.primary);
                tracing::info!(shard, epoch, primary, backup = ?duty.backup, "has a duty");
            }
            let State { replica, pool, fencing, .. } = &mut *state;
            if let Some(decision) = duties.decision.filter(|_| replica.is_primary()) {
                match replica.room() {
                    true => {
                        replica.decide(pool, decision);
                    }
                    false => all = false,
                }
            }
            let fences = duties.fences.iter().filter(|(shard, _)| *shard == duty.shard);
            for &worker in fences.flat_map(|(_, workers)| workers) {
                if replica.room() {
                    replica.change(pool, &Op::Fence { worker }, &Arc::default());
                    fencing.insert(worker);
                } else {
                    all = false;
                }
            }
            drop(state);
            hosted.changed.notify_all();
        }
        self.tell();
        if !all {
            // A full queue empties as the backup answers, which wakes nobody here.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(all)
    }

    fn begin(self: &Arc<Self>, duty: &Duty) -> Result<Arc<Hosted>, Error> {
        let replica = Replica::new(Arc::clone(&self.spec), duty)?;
        let pool = Pool::new(self.threads, Cpu::detect());
        let state = State { replica, pool, suspect: 0, fencing: BTreeSet::new(), over: false };
        let hosted = Arc::new(Hosted { state: Mutex::new(state), changed: Condvar::new() });
        let replicator = Replicator::new(Arc::clone(self), Arc::clone(&hosted), duty.shard);
        std::thread::Builder::new()
            .name("server-replicates".into())
            .spawn(move || replicator.run())
            .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))?;
        lock(&self.shards).insert(duty.shard, Arc::clone(&hosted));
        Ok(hosted)
    }
}

//! A server process: it holds copies of shards, as the coordinator says, and answers for those whose primary it is.
//!
//! Threads, beside one for each connection: *duty* waits for the coordinator's word, *report* tells it what it waits for,
//! and one *replicator* a shard feeds the backup. All decisions are [`Replica`]'s, under the shard's lock; who has to wait
//! for something waits for the lock's condition, and not longer than a lease.
//!
//! A primary that hears nothing from the coordinator for a lease answers nobody: by then the coordinator may have given
//! its place away. A server that was given up drops what it holds and comes back as new.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use consort_collectives::link::{self, Answering, Limits, Link, Message, Service};
use consort_tensor::{Cpu, Pool};

use super::client::{Connect, Office, unexpected};
use super::cluster::{Duty, ServerId};
use super::op::{Op, Outcome};
use super::replica::{Entry, Held, Replica, copy_hash};
use super::spec::{Mode, Spec};
use super::wire::{Answer, Ask, Duties, Order, Report, Told, head, said};
use crate::Error;

/// How long a part of a copy may take.
const COPYING: Duration = Duration::from_secs(60);

/// How to be a server.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The coordinator.
    pub connect: Connect,
    /// Threads that move weights, for each shard.
    pub threads: usize,
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
        tracing::warn!("the coordinator gave this server up; it comes back as new, with nothing");
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
        over: AtomicBool::new(false),
    });
    let limits = Limits::new(host.spec.body_bytes());
    let listen = std::net::SocketAddr::new(office.local_ip()?, 0).to_string();
    let answering =
        Answering::listen(&listen, &options.connect.token, limits, Arc::clone(&host) as Arc<dyn Service>)?;
    let server = match office.ask(&Ask::Register { address: answering.address().to_string() })? {
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
        let replicator =
            Replicator { host: Arc::clone(self), hosted: Arc::clone(&hosted), shard: duty.shard, link: None };
        std::thread::Builder::new()
            .name("server-replicates".into())
            .spawn(move || replicator.run())
            .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))?;
        lock(&self.shards).insert(duty.shard, Arc::clone(&hosted));
        Ok(hosted)
    }

    /// Tells the coordinator what it waits for.
    fn report(&self, office: &Office, server: ServerId) {
        // What was told already, of which epoch.
        let mut told: BTreeSet<(usize, u64, String)> = BTreeSet::new();
        let mut largest_lag = 0;
        let mut seen = 0;
        while !self.over.load(Ordering::SeqCst) {
            {
                let mut news = lock(&self.news.0);
                if *news == seen {
                    news = wait(&self.news.1, news, self.spec.lease() / 5);
                }
                seen = *news;
            }
            let shards: Vec<(usize, Arc<Hosted>)> =
                lock(&self.shards).iter().map(|(shard, hosted)| (*shard, Arc::clone(hosted))).collect();
            for (shard, hosted) in shards {
                let (epoch, reports) = hosted.reports();
                told.retain(|(of, in_epoch, _)| *of != shard || *in_epoch == epoch);
                for report in reports {
                    if let Report::Lag(lag) = report {
                        // With every push it changes; the largest is what counts.
                        if lag <= largest_lag {
                            continue;
                        }
                        largest_lag = lag;
                    }
                    let key = (shard, epoch, key(&report));
                    if told.contains(&key) {
                        continue;
                    }
                    let promoted = matches!(report, Report::Promoted(_));
                    match office.ask(&Ask::Report { server, shard, epoch, report }) {
                        Ok(Told::Fine) => {
                            if promoted {
                                lock(&hosted.state).replica.told(epoch);
                            }
                            told.insert(key);
                        }
                        // The duty thread hears the same, and ends this life.
                        Ok(_) | Err(_) => {
                            std::thread::sleep(Duration::from_millis(5));
                            break;
                        }
                    }
                }
            }
            // Complete buckets of steps long over.
            if told.len() > 1 << 16 {
                told.clear();
            }
        }
    }

    /// An answer that says where to look instead.
    fn elsewhere(&self, shard: usize) -> Answer {
        let epoch = self.hosted(shard).map_or(0, |hosted| lock(&hosted.state).replica.epoch());
        Answer::Elsewhere { epoch }
    }

    fn change(&self, shard: usize, epoch: u64, op: &Op, body: Vec<u8>) -> Answer {
        let Some(hosted) = self.hosted(shard) else { return Answer::Elsewhere { epoch: 0 } };
        let until = Instant::now() + self.spec.lease();
        let body = Arc::new(body);
        let mut state = lock(&hosted.state);
        loop {
            if !state.replica.is_primary() || state.replica.epoch() < epoch || state.over {
                return Answer::Elsewhere { epoch: state.replica.epoch() };
            }
            if state.replica.room() {
                break;
            }
            let Some(left) = left(until) else { return Answer::Wait };
            state = wait(&hosted.changed, state, left);
        }
        let State { replica, pool, .. } = &mut *state;
        let Some((outcome, log)) = replica.change(pool, op, &body) else {
            return Answer::Elsewhere { epoch: replica.epoch() };
        };
        if outcome == Outcome::Taken {
            hosted.changed.notify_all();
            self.tell();
        }
        if matches!(outcome, Outcome::Refused(_)) {
            return Answer::Outcome { epoch: state.replica.epoch(), outcome };
        }
        let firm = matches!(op, Op::Load { .. });
        loop {
            match state.replica.safe(log, firm) {
                Some(true) => break,
                None => return Answer::Elsewhere { epoch: state.replica.epoch() },
                Some(false) => {}
            }
            let Some(left) = left(until) else { return Answer::Wait };
            state = wait(&hosted.changed, state, left);
        }
        let epoch = state.replica.epoch();
        drop(state);
        match self.leased() {
            true => Answer::Outcome { epoch, outcome },
            false => self.elsewhere(shard),
        }
    }

    /// A bucket's values; with the optimizer's if `all`.
    fn pull(&self, shard: usize, epoch: u64, bucket: usize, step: u64, all: bool) -> (Answer, Vec<u8>) {
        let Some(hosted) = self.hosted(shard) else { return (Answer::Elsewhere { epoch: 0 }, Vec::new()) };
        let until = Instant::now() + self.spec.lease() / 2;
        let step = if self.spec.mode == Mode::Synchronous { step } else { 0 };
        let mut state = lock(&hosted.state);
        loop {
            let replica = &state.replica;
            let here = replica.epoch();
            if !replica.is_primary() || here < epoch || state.over || !self.leased() {
                return (Answer::Elsewhere { epoch: here }, Vec::new());
            }
            let firm = self.spec.mode == Mode::Synchronous;
            let safe = replica.safe(replica.shard().log(), firm) == Some(true);
            let shard = replica.shard();
            if let (Some((at, weights)), Some((updates, own))) = (shard.weights(bucket), shard.state(bucket))
                && safe
                && at >= step
            {
                let mut body = link::bytes(weights).to_vec();
                if all {
                    own.iter().for_each(|buffer| body.extend_from_slice(link::bytes(&buffer[..])));
                }
                return (Answer::Values { epoch: here, step: at, updates }, body);
            }
            let Some(left) = left(until) else { return (Answer::Wait, Vec::new()) };
            state = wait(&hosted.changed, state, left);
        }
    }

    /// The backup's side.
    fn follow(&self, shard: usize, epoch: u64, of: impl FnOnce(&mut Replica, &Pool) -> Held) -> Answer {
        // A primary may hear of its backup before the backup does.
        let Some(hosted) = self.hosted(shard) else { return Answer::Elsewhere { epoch: 0 } };
        let mut state = lock(&hosted.state);
        let State { replica, pool, .. } = &mut *state;
        let held = of(replica, pool);
        drop(state);
        hosted.changed.notify_all();
        match held {
            Held::Log(log) => Answer::Held { log },
            Held::Elsewhere(here) => {
                if here > epoch {
                    tracing::warn!(shard, epoch, here, "refused a primary of an epoch that is over");
                }
                Answer::Elsewhere { epoch: here }
            }
            Held::Gap => Answer::Gap,
        }
    }
}

/// The time left.
fn left(until: Instant) -> Option<Duration> {
    Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

/// What makes one report another than the last.
fn key(report: &Report) -> String {
    match report {
        Report::Ready(ready) => {
            ready.iter().map(|r| format!("ready {} {} {};", r.bucket, r.step, r.attempt)).collect()
        }
        Report::Fenced(workers) => format!("fenced {workers:?}"),
        Report::Promoted(_) => "promoted".into(),
        Report::InSync => "in sync".into(),
        Report::Suspect => "suspect".into(),
        Report::Lag(lag) => format!("lag {lag}"),
    }
}

impl Hosted {
    /// What the coordinator should know, and in which epoch that is so.
    fn reports(&self) -> (u64, Vec<Report>) {
        let state = lock(&self.state);
        let replica = &state.replica;
        let epoch = replica.epoch();
        let mut reports = Vec::new();
        if !replica.is_primary() {
            return (epoch, reports);
        }
        if let Some(seen) = replica.untold() {
            reports.push(Report::Promoted(seen));
        }
        if replica.in_sync() {
            reports.push(Report::InSync);
        }
        if state.suspect == epoch {
            reports.push(Report::Suspect);
        }
        let fenced: Vec<u64> = state.fencing.iter().copied().filter(|w| replica.shard().fences(*w)).collect();
        if !fenced.is_empty() && replica.safe(replica.shard().log(), true) == Some(true) {
            reports.push(Report::Fenced(fenced));
        }
        reports.extend(replica.ready().into_iter().map(|ready| Report::Ready(vec![ready])));
        reports.push(Report::Lag(replica.lag()));
        (epoch, reports)
    }
}

impl Service for Host {
    fn answer(&self, _: u64, question: Message) -> Option<Message> {
        let Message { head: order, body } = question;
        let order = match said(&order) {
            Ok(order) => order,
            Err(error) => {
                tracing::warn!(%error, "hung up");
                return None;
            }
        };
        let (answer, body) = match order {
            Order::Change { shard, epoch, op } => match op {
                // Decisions and fences come from the coordinator alone.
                Op::Apply(_) | Op::Fence { .. } => return None,
                op => (self.change(shard, epoch, &op, body), Vec::new()),
            },
            Order::Pull { shard, epoch, bucket, step } => self.pull(shard, epoch, bucket, step, false),
            Order::State { shard, epoch, bucket, step } => self.pull(shard, epoch, bucket, step, true),
            Order::Probe { shard, epoch } => {
                (self.follow(shard, epoch, |replica, _| replica.stands(epoch)), Vec::new())
            }
            Order::Replicate { shard, epoch, log, op } => {
                let entry = Entry { log, op, body: Arc::new(body) };
                (self.follow(shard, epoch, |replica, pool| replica.follow(pool, epoch, &entry)), Vec::new())
            }
            Order::Copy { shard, epoch, part, head, hash } => {
                let message = Message { head, body };
                let held = |replica: &mut Replica, pool: &Pool| {
                    replica.receive(pool, epoch, part, message, hash.as_deref())
                };
                (self.follow(shard, epoch, held), Vec::new())
            }
        };
        Some(Message { head: head(&answer), body })
    }
}

/// Feeds one shard's backup.
struct Replicator {
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
    fn run(mut self) {
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

//! One replica, as the gateway knows it: where it is, whether it lives, what it has to do.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{FleetReplica, Protocol, ReadyReport, ReplicaSnapshot, ReplicaState};
use tokio::sync::{Notify, watch};

use crate::policy::balance::Candidate;
use crate::policy::breaker::Breaker;
use crate::policy::liveness::{Change, Life, Liveness, Probe};
use crate::policy::outlier::Outlier;
use crate::proxy::random;
use crate::proxy::upstream::Upstream;
use crate::settings::ReplicaSettings;
use crate::stats::{Latencies, Rate};

/// One replica.
pub(crate) struct Replica {
    pub(crate) id: String,
    pub(crate) url: String,
    /// What it understands.
    pub(crate) protocol: Protocol,
    /// Its id's hash.
    pub(crate) home: u64,
    key: Option<String>,
    slow_start_ms: u64,
    pub(crate) upstream: Upstream,
    core: Mutex<Core>,
    draining: AtomicBool,
    outstanding_requests: AtomicU64,
    outstanding_tokens: AtomicU64,
    /// When it last gave any sign of life.
    origin: Instant,
    alive_ms: AtomicU64,
    /// Grows when what runs there is lost.
    lost: watch::Sender<u64>,
    /// Somebody wants to know whether it lives.
    pub(crate) suspected: Notify,
    /// Told when a request has left it.
    room: Arc<Notify>,
}

/// What is known of it, under one lock.
pub(crate) struct Core {
    pub(crate) liveness: Liveness,
    pub(crate) report: Option<(ReadyReport, Instant)>,
    /// The longest sequence it takes, once it said so.
    pub(crate) max_model_len: Option<usize>,
    outlier: Outlier,
    breaker: Breaker,
    /// It said 429: others first, until then.
    degraded: Option<Instant>,
    tokens: Rate,
    first_token: Latencies,
    inter_token: Latencies,
    requests: u64,
    errors: u64,
    lost: u64,
    ejections: u64,
}

/// How a request went there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Went {
    /// Well, or wrong by the client's fault.
    Well,
    /// It answered badly, or broke off.
    Badly {
        /// It had begun an answer, which goes on elsewhere.
        lost: bool,
    },
    /// It couldn't be talked to.
    Unreachable,
    /// It is full; others first for this long.
    Full(Duration),
    /// Nothing can be said: the client left, or the replica is going.
    Unknown,
}

/// What may be sent to a replica now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fitness {
    /// 0 where nothing.
    pub(crate) share: f64,
    /// Only where no other can take it.
    pub(crate) degraded: bool,
}

impl Replica {
    pub(crate) fn new(
        replica: &FleetReplica,
        upstream: Upstream,
        settings: &ReplicaSettings,
        room: Arc<Notify>,
    ) -> Replica {
        let (now, slow_start) = (Instant::now(), Duration::from_millis(replica.slow_start_ms));
        Replica {
            id: replica.id.clone(),
            url: replica.url.clone(),
            protocol: replica.protocol,
            key: replica.key.clone(),
            slow_start_ms: replica.slow_start_ms,
            upstream,
            core: Mutex::new(Core {
                liveness: Liveness::new(slow_start, settings.stalled_after),
                report: None,
                max_model_len: None,
                outlier: Outlier::new(now, settings.outlier),
                breaker: Breaker::new(settings.breaker),
                degraded: None,
                tokens: Rate::new(now),
                first_token: Latencies::new(now),
                inter_token: Latencies::new(now),
                requests: 0,
                errors: 0,
                lost: 0,
                ejections: 0,
            }),
            draining: AtomicBool::new(replica.draining),
            outstanding_requests: AtomicU64::new(0),
            outstanding_tokens: AtomicU64::new(0),
            origin: now,
            home: Candidate::hash(&replica.id),
            alive_ms: AtomicU64::new(0),
            lost: watch::channel(0).0,
            suspected: Notify::new(),
            room,
        }
    }

    /// From now on it is judged by these settings.
    pub(crate) fn obey(&self, settings: &ReplicaSettings) {
        let mut core = self.core();
        core.liveness.stalled_after = settings.stalled_after;
        core.outlier.settings = settings.outlier;
        core.breaker.settings = settings.breaker;
    }

    /// Whether `wanted` is this replica still.
    pub(crate) fn is(&self, wanted: &FleetReplica) -> bool {
        self.url == wanted.url
            && self.key == wanted.key
            && self.slow_start_ms == wanted.slow_start_ms
            && self.protocol == wanted.protocol
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// Its numerics class, once it is known.
    pub(crate) fn fingerprint(&self) -> Option<String> {
        let core = self.core();
        let report = core.report.as_ref().map(|(report, _)| &report.system_fingerprint)?;
        Some(report.clone()).filter(|class| !class.is_empty())
    }

    /// What may be sent to it now.
    pub(crate) fn fitness(&self, now: Instant) -> Fitness {
        let core = self.core();
        let out = self.draining.load(Ordering::Relaxed)
            || core.outlier.ejected(now).is_some()
            || !core.breaker.passes(now);
        let share = if out { 0.0 } else { core.liveness.share(now) };
        Fitness { share, degraded: core.degraded.is_some_and(|until| now < until) }
    }

    /// Whether it takes requests, full or not.
    pub(crate) fn is_up(&self, now: Instant) -> bool {
        self.fitness(now).share > 0.0
    }

    /// Takes note of how a request went; true where that takes the replica out. `others`: there is another one.
    pub(crate) fn went(&self, now: Instant, went: Went, others: bool) -> bool {
        let mut core = self.core();
        let mut ejected = None;
        match went {
            Went::Well => {
                core.breaker.success();
                core.outlier.record(now, true, others);
            }
            Went::Badly { lost } => {
                core.errors += 1;
                core.lost += u64::from(lost);
                core.breaker.success();
                ejected = core.outlier.record(now, false, others);
            }
            Went::Unreachable => {
                core.errors += 1;
                if core.breaker.failure(now, random()) {
                    tracing::warn!(replica = self.id, "breaker opened");
                }
            }
            Went::Full(pause) => {
                core.breaker.success();
                core.degraded = Some(now + pause);
            }
            Went::Unknown => core.breaker.unknown(now),
        }
        if let Some(length) = ejected {
            core.ejections += 1;
            tracing::warn!(replica = self.id, seconds = length.as_secs_f64(), "replica is ejected");
        }
        ejected.is_some()
    }

    /// Tokens came from it, so long after what came before (or after the request, for the first).
    pub(crate) fn gave(&self, now: Instant, tokens: u64, first: bool, latency: Duration) {
        let mut core = self.core();
        core.tokens.add(now, tokens);
        if first { core.first_token.add(now, latency) } else { core.inter_token.add(now, latency) }
    }

    /// What the owner of the gateway sees of it.
    pub(crate) fn snapshot(&self, now: Instant) -> ReplicaSnapshot {
        let mut core = self.core();
        let ejected = core.outlier.ejected(now);
        let (state, reason) = match &core.liveness.life {
            _ if self.draining.load(Ordering::Relaxed) => (ReplicaState::Draining, None),
            Life::Starting => (ReplicaState::Starting, Some("it has not been ready yet".to_owned())),
            Life::Draining => (ReplicaState::Draining, Some("it is shutting down".to_owned())),
            Life::Down(reason) => (ReplicaState::Down, Some(reason.clone())),
            Life::Ready if ejected.is_some() => {
                (ReplicaState::Ejected, Some("it failed too often".to_owned()))
            }
            Life::Ready if core.degraded.is_some_and(|until| now < until) => {
                (ReplicaState::Degraded, Some("its queue is full".to_owned()))
            }
            Life::Ready => (ReplicaState::Ready, None),
        };
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let class = core.report.as_ref().map(|(report, _)| report.system_fingerprint.clone());
        ReplicaSnapshot {
            id: self.id.clone(),
            url: self.url.clone(),
            state,
            reason,
            breaker: core.breaker.state(),
            fingerprint: class.filter(|class| !class.is_empty()),
            outstanding_requests: self.outstanding_requests(),
            outstanding_tokens: self.outstanding_tokens(),
            tokens_per_second: core.tokens.per_second(now),
            first_token: core.first_token.wire(now),
            inter_token: core.inter_token.wire(now),
            requests: core.requests,
            errors: core.errors,
            lost: core.lost,
            ejections: core.ejections,
            ejected_for_ms: ejected.map(milliseconds),
            share: core.liveness.share(now),
            report: core.report.as_ref().map(|(report, _)| report.clone()),
            report_age_ms: core
                .report
                .as_ref()
                .map(|(_, at)| milliseconds(now.saturating_duration_since(*at))),
        }
    }

    pub(crate) fn outstanding_requests(&self) -> u64 {
        self.outstanding_requests.load(Ordering::Relaxed)
    }

    pub(crate) fn outstanding_tokens(&self) -> u64 {
        self.outstanding_tokens.load(Ordering::Relaxed)
    }

    /// A sign of life.
    pub(crate) fn seen_alive(&self) {
        let ms = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.alive_ms.store(ms, Ordering::Relaxed);
    }

    /// How long ago the last one was.
    pub(crate) fn silent_for(&self) -> Duration {
        let alive = Duration::from_millis(self.alive_ms.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(alive)
    }

    /// Takes a probe's outcome.
    pub(crate) fn probed(&self, now: Instant, probe: &Probe, urgent: bool) -> Change {
        let change = {
            let mut core = self.core();
            if let Probe::Report(report) = probe {
                core.report = Some((report.clone(), now));
            }
            let change = core.liveness.step(now, probe, urgent);
            if change == Change::Up {
                // It may be another process than before.
                core.breaker.success();
                core.outlier.forget();
                core.degraded = None;
            }
            change
        };
        if matches!(probe, Probe::Report(_) | Probe::NotReady { .. }) {
            self.seen_alive();
        }
        match change {
            Change::None => {}
            Change::Up => tracing::info!(replica = self.id, url = self.url, "replica is ready"),
            Change::Out => tracing::info!(replica = self.id, "replica takes no more requests"),
            Change::Lost => {
                if let Life::Down(reason) = &self.core().liveness.life {
                    tracing::warn!(replica = self.id, reason, "replica is down");
                }
                self.upstream.forget();
                self.lost.send_modify(|times| *times += 1);
            }
        }
        change
    }

    /// Changes when what runs there is lost.
    pub(crate) fn lost(&self) -> watch::Receiver<u64> {
        self.lost.subscribe()
    }

    /// It, as one of those that may get a request.
    pub(crate) fn candidate(&self, share: f64) -> Candidate {
        let (requests, tokens) = (self.outstanding_requests(), self.outstanding_tokens());
        Candidate { id: self.home, requests, tokens, share }
    }

    /// Notes a request as sent there, until the ticket is dropped.
    pub(crate) fn ticket(self: &Arc<Replica>, work: Work) -> Ticket {
        {
            let mut core = self.core();
            core.requests += 1;
            core.breaker.sent(Instant::now());
        }
        self.outstanding_requests.fetch_add(1, Ordering::Relaxed);
        self.outstanding_tokens.fetch_add(work.tokens(), Ordering::Relaxed);
        Ticket { replica: Arc::clone(self), work, settled: false }
    }
}

/// What a request needs, in tokens, about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// To be read, in a few large steps.
    pub(crate) prompt: u64,
    /// To be said, one by one.
    pub(crate) answer: u64,
}

impl Work {
    /// All of them.
    pub(crate) fn tokens(self) -> u64 {
        self.prompt.saturating_add(self.answer)
    }
}

/// Tokens of its answer that a request is taken to need while it isn't over: how long it gets is a guess, and one that
/// goes on past it is work still.
const UNDER_WAY: u64 = 16;

/// A request's place at a replica.
pub(crate) struct Ticket {
    pub(crate) replica: Arc<Replica>,
    /// Estimated to be computed yet.
    work: Work,
    /// How it went is known, and noted by whoever knows it.
    pub(crate) settled: bool,
}

impl Ticket {
    /// `count` tokens of its answer are there: so is its prompt.
    pub(crate) fn done(&mut self, count: u64) {
        let count = count.min(self.work.answer.saturating_sub(UNDER_WAY));
        self.work.answer -= count;
        let computed = count + std::mem::take(&mut self.work.prompt);
        self.replica.outstanding_tokens.fetch_sub(computed, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.replica.outstanding_requests.fetch_sub(1, Ordering::Relaxed);
        self.replica.outstanding_tokens.fetch_sub(self.work.tokens(), Ordering::Relaxed);
        if !self.settled {
            self.replica.core().breaker.unknown(Instant::now());
        }
        self.replica.room.notify_waiters();
    }
}

//! One replica, as the gateway knows it: where it is, whether it lives, what it has to do.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{FleetReplica, ReadyReport};
use tokio::sync::{Notify, watch};

use crate::policy::liveness::{Change, Life, Liveness, Probe};
use crate::proxy::upstream::Upstream;
use crate::settings::ReplicaSettings;

/// One replica.
pub(crate) struct Replica {
    pub(crate) id: String,
    pub(crate) url: String,
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
}

/// What is known of it, under one lock.
pub(crate) struct Core {
    pub(crate) liveness: Liveness,
    pub(crate) report: Option<(ReadyReport, Instant)>,
    /// The longest sequence it takes, once it said so.
    pub(crate) max_model_len: Option<usize>,
}

impl Replica {
    pub(crate) fn new(replica: &FleetReplica, upstream: Upstream, settings: &ReplicaSettings) -> Replica {
        let slow_start = Duration::from_millis(replica.slow_start_ms);
        Replica {
            id: replica.id.clone(),
            url: replica.url.clone(),
            key: replica.key.clone(),
            slow_start_ms: replica.slow_start_ms,
            upstream,
            core: Mutex::new(Core {
                liveness: Liveness::new(slow_start, settings.stalled_after),
                report: None,
                max_model_len: None,
            }),
            draining: AtomicBool::new(replica.draining),
            outstanding_requests: AtomicU64::new(0),
            outstanding_tokens: AtomicU64::new(0),
            origin: Instant::now(),
            alive_ms: AtomicU64::new(0),
            lost: watch::channel(0).0,
            suspected: Notify::new(),
        }
    }

    /// Whether `wanted` is this replica still.
    pub(crate) fn is(&self, wanted: &FleetReplica) -> bool {
        self.url == wanted.url && self.key == wanted.key && self.slow_start_ms == wanted.slow_start_ms
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

    /// Its share of requests; 0 where it takes none.
    pub(crate) fn share(&self, now: Instant) -> f64 {
        if self.draining.load(Ordering::Relaxed) { 0.0 } else { self.core().liveness.share(now) }
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
            core.liveness.step(now, probe, urgent)
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

    /// Notes a request of about `tokens` as sent there, until the ticket is dropped.
    pub(crate) fn ticket(self: &Arc<Replica>, tokens: u64) -> Ticket {
        self.outstanding_requests.fetch_add(1, Ordering::Relaxed);
        self.outstanding_tokens.fetch_add(tokens, Ordering::Relaxed);
        Ticket { replica: Arc::clone(self), tokens }
    }
}

/// A request's place at a replica.
pub(crate) struct Ticket {
    pub(crate) replica: Arc<Replica>,
    /// Estimated to be computed yet.
    tokens: u64,
}

impl Ticket {
    /// `count` of them are computed.
    pub(crate) fn done(&mut self, count: u64) {
        let count = count.min(self.tokens);
        self.tokens -= count;
        self.replica.outstanding_tokens.fetch_sub(count, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.replica.outstanding_requests.fetch_sub(1, Ordering::Relaxed);
        self.replica.outstanding_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

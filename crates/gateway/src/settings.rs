//! How a gateway runs.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use consort_api::deployment::Balancing;
use consort_base::Backoff;
use tokio::sync::Notify;

pub use crate::policy::breaker::BreakerSettings;
pub use crate::policy::budget::BudgetSettings;
pub use crate::policy::hedge::HedgeSettings;
pub use crate::policy::idempotency::IdempotencySettings;
pub use crate::policy::outlier::OutlierSettings;
pub use crate::proxy::trust::Trust;

/// How a gateway runs. The defaults are safe on a loopback address.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Limits on what clients may cost.
    pub clients: ClientSettings,
    /// How replicas are watched, and when an answer moves on to another.
    pub replicas: ReplicaSettings,
    /// How often a request is tried.
    pub retries: RetrySettings,
    /// How long answers are kept for repeats of their requests.
    pub idempotency: IdempotencySettings,
    /// Whether a slow first token is asked for twice.
    pub hedging: HedgeSettings,
}

/// Limits on what clients may cost.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// Host names, beside loopback's, under which a loopback gateway without keys may be reached (behind a proxy).
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://example.org`) whose pages may call the API (CORS).
    pub allowed_origins: Vec<String>,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Bytes of all bodies being read at one time; past it, 429.
    pub max_body_bytes_in_flight: usize,
    /// Bytes of a request's line and headers (at least 8 KiB); past it, 431.
    pub max_header_bytes: usize,
    /// Headers of a request; past it, 431.
    pub max_headers: usize,
    /// Connections at one time; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// A request's headers must be in within this; an idle connection is closed after it.
    pub header_timeout: Duration,
    /// And its body within this.
    pub body_timeout: Duration,
    /// A client that takes nothing of an answer for this long is cut off.
    pub write_timeout: Duration,
    /// The longest a request may take, waiting included. `X-Request-Timeout-Ms` asks for less.
    pub request_timeout: Duration,
    /// A comment on a stream that has been silent for this long, so that proxies keep it open.
    pub keep_alive: Duration,
    /// A stream whose client is gone can be taken up again for this long; 0 for not at all.
    pub resume_window: Duration,
}

/// How replicas are watched.
#[derive(Clone, Debug)]
pub struct ReplicaSettings {
    /// A connection must be there within this.
    pub connect_timeout: Duration,
    /// Between two questions for `/ready`.
    pub probe_interval: Duration,
    /// An answer to it must be there within this.
    pub probe_timeout: Duration,
    /// A stream that has been silent for this long, on a replica from which nothing else came either, has the replica
    /// asked at once whether it lives.
    pub suspect_after: Duration,
    /// A stream without a byte for this long, keep-alive comments included, is continued elsewhere.
    pub silence_timeout: Duration,
    /// An engine that has work and makes no step for this long hangs.
    pub stalled_after: Duration,
    /// Requests sent to one replica at one time; further ones wait here, where they can still go anywhere.
    pub max_outstanding: usize,
    /// Requests that may wait here for one model; one more is refused with 429.
    pub max_pending: usize,
    /// Which of the replicas that can take a request gets it.
    pub balancing: Balancing,
    /// When a replica that answers badly is taken out.
    pub outlier: OutlierSettings,
    /// When a replica that can't be reached is left alone.
    pub breaker: BreakerSettings,
    /// Whose certificates replicas may have, for those at `https://` addresses.
    pub trust: Trust,
}

/// How often a request is tried.
#[derive(Clone, Debug)]
pub struct RetrySettings {
    /// Replicas that may fail a request, one after the other, without a token between.
    pub attempts: u32,
    /// Between two attempts, once each replica has had one.
    pub backoff: Backoff,
    /// How many may be under way for a second time, against those that are active. An answer that had begun goes on
    /// outside of it.
    pub budget: BudgetSettings,
    /// How long a request may wait where no replica can take it.
    pub wait: Duration,
    /// A replica that hasn't begun its answer within this is left for another one, where there is one.
    pub begin: Duration,
}

/// The settings of a gateway that runs: one value, replaced as a whole. Who uses them takes a look (a reference count)
/// and keeps it, so that no request sees half of an edit.
#[derive(Default)]
pub(crate) struct Live {
    settings: RwLock<Arc<Settings>>,
    /// They were replaced.
    pub(crate) replaced: Notify,
}

impl Live {
    pub(crate) fn new(settings: Settings) -> Arc<Live> {
        Arc::new(Live { settings: RwLock::new(Arc::new(settings)), replaced: Notify::new() })
    }

    /// As they are now.
    pub(crate) fn now(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn replace(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        self.replaced.notify_waiters();
    }
}

impl Default for ClientSettings {
    fn default() -> ClientSettings {
        ClientSettings {
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            max_body_bytes: 4 << 20,
            max_body_bytes_in_flight: 256 << 20,
            max_header_bytes: 64 << 10,
            max_headers: 100,
            max_connections: 4096,
            header_timeout: Duration::from_secs(20),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(600),
            keep_alive: Duration::from_secs(15),
            resume_window: Duration::from_secs(60),
        }
    }
}

impl Default for ReplicaSettings {
    fn default() -> ReplicaSettings {
        ReplicaSettings {
            connect_timeout: Duration::from_secs(1),
            probe_interval: Duration::from_secs(1),
            probe_timeout: Duration::from_millis(400),
            suspect_after: Duration::from_millis(300),
            // Longer than a replica's own keep-alive comments are apart.
            silence_timeout: Duration::from_secs(20),
            stalled_after: Duration::from_secs(10),
            max_outstanding: 64,
            max_pending: 1024,
            balancing: Balancing::default(),
            outlier: OutlierSettings::default(),
            breaker: BreakerSettings::default(),
            trust: Trust::default(),
        }
    }
}

impl Default for RetrySettings {
    fn default() -> RetrySettings {
        RetrySettings {
            attempts: 4,
            budget: BudgetSettings { ratio: 0.2, floor: 3 },
            backoff: Backoff { base: Duration::from_millis(50), cap: Duration::from_secs(2) },
            wait: Duration::from_secs(30),
            begin: Duration::from_secs(60),
        }
    }
}

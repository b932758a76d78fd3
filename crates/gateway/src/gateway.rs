//! The handle: what its owner sets and reads, and the server's life.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use consort_api::{ApiKeyRecord, Fleet, FleetSnapshot};
use consort_edge::is_loopback;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use tokio::net::TcpListener;

use crate::fleet::{FleetError, Registry};
use crate::http::accept::Server;
use crate::http::body::Body;
use crate::http::tls::Tls;
use crate::keys::{KeyError, Keys};
use crate::policy::budget::Budget;
use crate::policy::hedge::Purse;
use crate::policy::idempotency::Idempotency;
use crate::policy::shadow::Pace;
use crate::proxy::{Held, Recording};
use crate::settings::{Live, Settings};
use crate::telemetry::Telemetry;

/// A front door. Its owner keeps it in an [`Arc`], serves it, and changes its fleet while it runs.
pub struct Gateway {
    live: Arc<Live>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) keys: Keys,
    pub(crate) telemetry: Arc<Telemetry>,
    budget: Mutex<Budget>,
    purse: Mutex<Purse>,
    shadow: Mutex<Pace>,
    idempotency: Mutex<Idempotency<Arc<Recording>>>,
    pub(crate) held: Arc<Held>,
    tls: OnceLock<Tls>,
    pub(crate) extra: OnceLock<Box<dyn Extra>>,
    draining: AtomicBool,
}

/// An answer that is on its way.
pub type Answering = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// Paths that aren't the gateway's own, on its socket: its owner's page and what that page asks for.
pub trait Extra: Send + Sync {
    /// Whether this request is for it. Asked of every request, so it should be quick.
    fn knows(&self, method: &Method, path: &str) -> bool;

    /// Answers a request that it knows. It checks for itself who may ask.
    fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answering;
}

/// Why a gateway didn't start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Anyone on the network could use it.
    #[error(
        "{address} can be reached from other machines: that needs an API key; set one, or bind 127.0.0.1"
    )]
    KeyNeeded {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// The socket is unusable.
    #[error("the listening socket failed: {0}")]
    Socket(#[from] io::Error),
}

impl Gateway {
    /// A gateway before an empty fleet.
    pub fn new(settings: Settings) -> Arc<Gateway> {
        Arc::new(Gateway {
            live: Live::new(settings),
            registry: Arc::default(),
            keys: Keys::default(),
            telemetry: Arc::new(Telemetry::new()),
            budget: Mutex::default(),
            purse: Mutex::default(),
            shadow: Mutex::default(),
            idempotency: Mutex::default(),
            held: Arc::default(),
            tls: OnceLock::new(),
            extra: OnceLock::new(),
            draining: AtomicBool::new(false),
        })
    }

    /// Replaces the fleet. Requests under way go on where they are; replicas that are gone are left as they end.
    ///
    /// # Errors
    /// [`FleetError`]; the fleet is then as it was.
    pub fn set_fleet(&self, fleet: &Fleet) -> Result<(), FleetError> {
        self.registry.replace(fleet, &self.settings().replicas)
    }

    /// Replaces the settings. What begins from now on is under the new ones; requests under way keep those they began
    /// with, but for the number of connections and how replicas are watched, which change at once.
    pub fn set_settings(&self, settings: Settings) {
        self.live.replace(settings);
        let settings = self.settings();
        for replica in self.registry.models().replicas() {
            replica.obey(&settings.replicas);
        }
    }

    /// The settings as they are now.
    pub fn settings(&self) -> Arc<Settings> {
        self.live.now()
    }

    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// Replaces the API keys. What a key has used of its limits stays used. Where keys are `required`, nobody may ask
    /// without one; where they aren't, a right one counts and anything else is nobody.
    ///
    /// # Errors
    /// [`KeyError`]; the keys are then as they were.
    pub fn set_keys(&self, keys: &[ApiKeyRecord], required: bool) -> Result<(), KeyError> {
        self.keys.replace(keys, required)
    }

    /// The fleet as it is now.
    pub fn snapshot(&self) -> FleetSnapshot {
        let now = Instant::now();
        let models = self.registry.models();
        let models: Vec<_> = models.list.iter().map(|model| model.snapshot(now)).collect();
        let milliseconds =
            |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        FleetSnapshot {
            at_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, milliseconds),
            uptime_ms: milliseconds(now - self.telemetry.started),
            totals: self.telemetry.totals(now, models.iter().map(|model| model.queued).sum()),
            models,
        }
    }

    pub(crate) fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn purse(&self) -> MutexGuard<'_, Purse> {
        self.purse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shadow(&self) -> MutexGuard<'_, Pace> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn idempotency(&self) -> MutexGuard<'_, Idempotency<Arc<Recording>>> {
        self.idempotency.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Speaks TLS on its socket. To be set once, before [`Gateway::serve`]; later calls change nothing.
    pub fn set_tls(&self, tls: Tls) {
        let _ = self.tls.set(tls);
    }

    pub(crate) fn tls(&self) -> Option<&Tls> {
        self.tls.get()
    }

    /// Answers further paths. To be set once, before [`Gateway::serve`]; later calls change nothing.
    pub fn set_extra(&self, extra: Box<dyn Extra>) {
        let _ = self.extra.set(extra);
    }

    /// Serves on `listener` until `shutdown` completes; then lets what runs finish and returns.
    ///
    /// # Errors
    /// [`ServeError`]
    pub async fn serve(
        self: Arc<Gateway>,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let address = listener.local_addr()?;
        if !is_loopback(address.ip()) && !self.keys.required() {
            return Err(ServeError::KeyNeeded { address });
        }
        let watching = tokio::spawn(crate::fleet::watch(self.registry.clone(), self.live.clone()));
        tracing::info!(%address, "listening");
        Server::new(self.clone()).run(&listener, shutdown).await;
        watching.abort();
        Ok(())
    }

    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

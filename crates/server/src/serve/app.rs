//! What all requests of one server share.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use consort_edge::Connections;
use tokio::sync::Semaphore;

use crate::engine::{Replica, Slot};
use crate::error::{ApiError, ApiResult};
use crate::http::body::BodyLimits;
use crate::http::guard::Guard;
use crate::metrics::ServerMetrics;
use crate::options::Options;

/// Long jobs (tokenizing, grammars) at one time.
const LONG_JOBS: usize = 2;

/// Shared by all requests.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) slot: Slot,
    pub(crate) options: Options,
    pub(crate) guard: Guard,
    pub(crate) metrics: Arc<ServerMetrics>,
    pub(crate) body_limits: BodyLimits,
    /// When the server started, in seconds since 1970.
    pub(crate) created: u64,
    draining: AtomicBool,
    long_jobs: Arc<Semaphore>,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    pub(crate) fn new(slot: Slot, options: Options, loopback: bool, connections: &Arc<Connections>) -> App {
        App(Arc::new(Shared {
            guard: Guard::new(&options, loopback),
            metrics: Arc::new(ServerMetrics::new(&slot, connections)),
            body_limits: BodyLimits {
                max_bytes: options.max_body_bytes,
                max_bytes_in_flight: options.max_body_bytes_in_flight,
                timeout: options.body_timeout,
                in_flight: Arc::new(AtomicUsize::new(0)),
            },
            created: crate::respond::now(),
            draining: AtomicBool::new(false),
            long_jobs: Arc::new(Semaphore::new(LONG_JOBS)),
            slot,
            options,
        }))
    }

    /// Runs `work` where it holds up nobody else, once there is a place for it. Work that has begun is done, and keeps
    /// its place, even where nobody waits for it any more: clients that come and go can't pile it up.
    pub(crate) async fn off_thread<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> ApiResult<T> {
        let gone = || ApiError::internal("the request's work was lost; the log says why");
        let place = tokio::time::timeout_at(deadline.into(), self.long_jobs.clone().acquire_owned());
        let place = place.await.map_err(|_| ApiError::deadline())?.map_err(|_| gone())?;
        let work = move || {
            let _place = place;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "work for a request failed");
            gone()
        })
    }

    /// Lets the engine finish or hand over what runs.
    pub(crate) async fn drain(&self) {
        let Some(replica) = self.slot.get() else { return };
        let (engine, budget) = (replica.engine.clone(), self.options.drain_budget);
        if let Err(error) = tokio::task::spawn_blocking(move || engine.drain(budget)).await {
            tracing::error!(%error, "the drain failed");
        }
    }
}

impl Shared {
    /// The replica, or why there is none.
    pub(crate) fn replica(&self) -> ApiResult<&Replica> {
        self.slot.get().ok_or_else(ApiError::loading)
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn work_keeps_its_place_when_its_client_leaves_and_waiting_has_an_end() {
        let app = App::new(Slot::empty(), Options::default(), true, &Arc::default());
        let far = Instant::now() + Duration::from_secs(600);
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..LONG_JOBS {
            let (gate, (begun, begins)) = (gate.clone(), oneshot::channel());
            let work = app.off_thread(far, move || {
                begun.send(()).unwrap();
                gate.lock().unwrap().recv().unwrap();
            });
            tokio::select! {
                _ = work => panic!("it is not released yet"),
                begun = begins => begun.unwrap(),
            }
        }
        let late = app.off_thread(Instant::now(), || ()).await.unwrap_err();
        assert_eq!(late, ApiError::deadline());
        release.send(()).unwrap();
        app.off_thread(far, || ()).await.unwrap();
        release.send(()).unwrap();
    }
}

//! Asks each replica for `/ready`, again and again, and at once where a stream from it has fallen silent.
//!
//! Each probe takes a connection of its own or one that is idle, like a request would: what it proves is that a
//! request would be heard.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::{ErrorBody, ModelList, Protocol, ReadyReport};
use hyper::StatusCode;
use tokio::task::AbortHandle;

use super::{Registry, Replica};
use crate::policy::liveness::{Change, Probe};
use crate::proxy::upstream::{self, SendError};
use crate::settings::Live;

/// Bytes of a probe's answer.
const MAX_BYTES: usize = 64 << 10;
/// What a server that isn't ours gets to answer: many do nothing else while they compute.
const PLAIN: Duration = Duration::from_secs(2);

/// Watches all replicas of the fleet, whatever it is replaced by. Never returns; dropping it ends all probes.
pub(crate) async fn watch(registry: Arc<Registry>, live: Arc<Live>) {
    let mut probes: HashMap<String, Watched> = HashMap::new();
    loop {
        let replaced = registry.replaced.notified();
        let models = registry.models();
        probes.retain(|_, watched| models.replicas().any(|replica| Arc::ptr_eq(replica, &watched.replica)));
        for replica in models.replicas() {
            if !probes.contains_key(&replica.id) {
                let task = tokio::spawn(probe_for_ever(registry.clone(), replica.clone(), live.clone()));
                probes.insert(
                    replica.id.clone(),
                    Watched { replica: replica.clone(), task: task.abort_handle() },
                );
            }
        }
        drop(models);
        replaced.await;
    }
}

struct Watched {
    replica: Arc<Replica>,
    task: AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn probe_for_ever(registry: Arc<Registry>, replica: Arc<Replica>, live: Arc<Live>) {
    let mut urgent = false;
    loop {
        let settings = &live.now().replicas;
        let probe = probe(&replica, settings.probe_timeout).await;
        let change = replica.probed(Instant::now(), &probe, urgent);
        if change == Change::Up {
            if replica.protocol == Protocol::Consort {
                learn(&replica, settings.probe_timeout).await;
            }
            registry.room.notify_waiters();
        }
        // One that isn't there yet is asked more often: a start takes tenths of a second.
        let pause = if matches!(probe, Probe::Report(_)) {
            settings.probe_interval
        } else {
            settings.probe_interval.min(Duration::from_millis(100))
        };
        urgent = tokio::select! {
            () = tokio::time::sleep(pause) => false,
            () = replica.suspected.notified() => true,
        };
    }
}

async fn probe(replica: &Replica, timeout: Duration) -> Probe {
    if replica.protocol == Protocol::OpenAi {
        return probe_plain(replica, timeout.max(PLAIN)).await;
    }
    match tokio::time::timeout(timeout, get(replica, "/ready", timeout)).await {
        Err(_) => Probe::Silent,
        Ok(Err(SendError::Connect(error))) if error.kind() == io::ErrorKind::TimedOut => Probe::Silent,
        Ok(Err(SendError::Connect(_) | SendError::Broken { .. })) => Probe::Refused,
        Ok(Ok((StatusCode::OK, body))) => match serde_json::from_slice::<ReadyReport>(&body) {
            Ok(report) => Probe::Report(report),
            Err(_) => Probe::Wrong("its /ready is no replica's".to_owned()),
        },
        Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, body))) => {
            let code = serde_json::from_slice::<ErrorBody>(&body).ok().and_then(|body| body.error.code);
            Probe::NotReady { draining: code.as_deref() == Some("draining") }
        }
        Ok(Ok((status, _))) => Probe::Wrong(format!("its /ready answers {status}")),
    }
}

/// Somebody else's server has no `/ready`: it lives where it lists its models, or answers at all.
async fn probe_plain(replica: &Replica, timeout: Duration) -> Probe {
    match tokio::time::timeout(timeout, get(replica, "/v1/models", timeout)).await {
        Err(_) => Probe::Silent,
        Ok(Err(SendError::Connect(error))) if error.kind() == io::ErrorKind::TimedOut => Probe::Silent,
        Ok(Err(SendError::Connect(_) | SendError::Broken { .. })) => Probe::Refused,
        Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, _))) => Probe::NotReady { draining: false },
        Ok(Ok((status, _))) if status.is_server_error() => {
            Probe::Wrong(format!("its /v1/models answers {status}"))
        }
        Ok(Ok(_)) => Probe::Report(ReadyReport { status: "ready".to_owned(), ..ReadyReport::default() }),
    }
}

/// Asks what is worth knowing once.
async fn learn(replica: &Replica, timeout: Duration) {
    let asked = tokio::time::timeout(timeout, get(replica, "/v1/models", timeout)).await;
    if let Ok(Ok((StatusCode::OK, body))) = asked
        && let Ok(models) = serde_json::from_slice::<ModelList>(&body)
    {
        replica.core().max_model_len = models.data.first().map(|card| card.max_model_len);
    }
}

async fn get(
    replica: &Replica,
    path: &'static str,
    timeout: Duration,
) -> Result<(StatusCode, Bytes), SendError> {
    upstream::ask(&replica.upstream, path, Bytes::new(), timeout, MAX_BYTES).await
}

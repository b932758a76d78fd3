//! Servers of which only the addresses are known: asks each what it is and serves, and groups them by model.
//!
//! For a gateway before replicas that somebody else runs, or before other servers of OpenAI's API. One that can't be asked yet is asked again until it can;
//! one that is started anew with another model moves to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consort_api::{
    ErrorBody, Fleet, FleetModel, FleetReplica, FleetVersion, Numerics, Protocol, ReadyReport,
};
use hyper::StatusCode;

use crate::fleet::FleetError;
use crate::proxy::trust::Trust;
use crate::proxy::upstream::{self, AddressError, SendError, Upstream};
use crate::{Gateway, fleet};

/// Between two rounds of questions.
const ROUND: Duration = Duration::from_millis(500);
/// An answer must be there within this.
const PATIENCE: Duration = Duration::from_secs(2);

/// A replica's address, and how answers may move on from it.
#[derive(Clone, Debug)]
pub struct Discovery {
    replicas: Vec<FleetReplica>,
    numerics: Numerics,
    trust: Trust,
}

impl Discovery {
    /// Replicas at these addresses; their ids are the addresses'.
    ///
    /// # Errors
    /// [`FleetError`] where an address is unusable or there twice.
    pub fn new(
        replicas: Vec<FleetReplica>,
        numerics: Numerics,
        trust: &Trust,
    ) -> Result<Discovery, FleetError> {
        for (i, replica) in replicas.iter().enumerate() {
            Upstream::new(&replica.url, replica.key.as_deref(), trust)?;
            if replicas[..i].iter().any(|other| other.id == replica.id) {
                return Err(FleetError::Twice { what: "replica", name: replica.id.clone() });
            }
        }
        Ok(Discovery { replicas, numerics, trust: trust.clone() })
    }

    /// Asks for ever and keeps the gateway's fleet to what was answered.
    pub async fn run(self, gateway: Arc<Gateway>) {
        let mut found: Vec<Option<Found>> = vec![None; self.replicas.len()];
        loop {
            let mut changed = false;
            for (replica, known) in self.replicas.iter().zip(&mut found) {
                match ask(replica, &self.trust).await {
                    Ok(answer) if known.as_ref() != Some(&answer) => {
                        tracing::info!(replica = replica.id, ?answer, "found a server");
                        *known = Some(answer);
                        changed = true;
                    }
                    // One that is down keeps its place: the gateway watches it.
                    Ok(_) => {}
                    Err(error) => tracing::debug!(replica = replica.id, ?error, "no answer yet"),
                }
            }
            if changed && let Err(error) = gateway.set_fleet(&self.fleet(&found)) {
                tracing::error!(%error, "the replicas found make no fleet");
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    fn fleet(&self, found: &[Option<Found>]) -> Fleet {
        let mut fleet = Fleet::default();
        for (replica, found) in self.replicas.iter().zip(found) {
            let Some(Found { protocol, models }) = found else { continue };
            for (i, name) in models.iter().enumerate() {
                if !fleet.models.iter().any(|model| model.name == *name) {
                    fleet.models.push(FleetModel {
                        name: name.clone(),
                        aliases: Vec::new(),
                        versions: vec![FleetVersion {
                            name: fleet::ONLY_VERSION.to_owned(),
                            weight: 1,
                            numerics: self.numerics,
                            on_trial: false,
                            replicas: Vec::new(),
                        }],
                        shadow: None,
                    });
                }
                // A server of several models is one replica of each.
                let id = if i == 0 { replica.id.clone() } else { format!("{}/{name}", replica.id) };
                for model in fleet.models.iter_mut().filter(|model| model.name == *name) {
                    let replica = FleetReplica { id: id.clone(), protocol: *protocol, ..replica.clone() };
                    model.versions[0].replicas.push(replica);
                }
            }
        }
        fleet
    }
}

/// What a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    protocol: Protocol,
    /// Each once.
    models: Vec<String>,
}

/// Models of one server.
const MAX_MODELS: usize = 1024;

/// What another server's list of models is read for.
#[derive(serde::Deserialize)]
struct Listed {
    data: Vec<ListedModel>,
}

#[derive(serde::Deserialize)]
struct ListedModel {
    id: String,
}

/// What is at an address: a replica, by its `/ready`, or a server of OpenAI's API, by its list of models.
async fn ask(replica: &FleetReplica, trust: &Trust) -> Result<Found, AskError> {
    let upstream = Upstream::new(&replica.url, replica.key.as_deref(), trust).map_err(AskError::Address)?;
    let (_, body) = get(&upstream, "/ready").await?;
    // A replica that loads answers with an error's envelope or without a name: it is asked again.
    match serde_json::from_slice::<ReadyReport>(&body) {
        Ok(report) if !report.model.is_empty() => {
            return Ok(Found { protocol: Protocol::Consort, models: vec![report.model] });
        }
        _ if is_replica(&body) => return Err(AskError::Loading),
        _ => {}
    }
    let (status, body) = get(&upstream, "/v1/models").await?;
    let listed: Listed = serde_json::from_slice(&body).map_err(|_| AskError::Models(status))?;
    let mut models: Vec<String> = Vec::new();
    for model in listed.data.into_iter().take(MAX_MODELS) {
        if !model.id.is_empty() && !models.contains(&model.id) {
            models.push(model.id);
        }
    }
    if models.is_empty() {
        Err(AskError::Models(status))
    } else {
        Ok(Found { protocol: Protocol::OpenAi, models })
    }
}

/// Whether what answered `/ready` without naming a model is a replica all the same: it loads, or shuts down.
fn is_replica(body: &[u8]) -> bool {
    let code = serde_json::from_slice::<ErrorBody>(body).ok().and_then(|body| body.error.code);
    let status = serde_json::from_slice::<ReadyReport>(body).map(|report| report.status).unwrap_or_default();
    matches!(code.as_deref(), Some("loading" | "draining" | "unavailable" | "load_failed"))
        || matches!(status.as_str(), "loading" | "draining")
}

async fn get(upstream: &Upstream, path: &'static str) -> Result<(StatusCode, Bytes), AskError> {
    upstream::ask(upstream, path, Bytes::new(), PATIENCE, 1 << 20).await.map_err(AskError::Send)
}

/// For the log alone.
#[derive(Debug)]
enum AskError {
    Address(#[expect(dead_code, reason = "printed by Debug")] AddressError),
    Send(#[expect(dead_code, reason = "printed by Debug")] SendError),
    Models(#[expect(dead_code, reason = "printed by Debug")] StatusCode),
    Loading,
}

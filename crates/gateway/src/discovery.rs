//! Replicas of which only the addresses are known: asks each for the model it serves, and groups them by it.
//!
//! For a gateway before replicas that somebody else runs. One that can't be asked yet is asked again until it can;
//! one that is started anew with another model moves to it.

use std::sync::Arc;
use std::time::Duration;

use consort_api::{Fleet, FleetModel, FleetReplica, FleetVersion, Numerics, ReadyReport};
use http_body_util::{BodyExt as _, Limited};

use crate::fleet::FleetError;
use crate::proxy::upstream::{AddressError, SendError, Upstream};
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
}

impl Discovery {
    /// Replicas at these addresses; their ids are the addresses'.
    ///
    /// # Errors
    /// [`FleetError`] where an address is unusable or there twice.
    pub fn new(replicas: Vec<FleetReplica>, numerics: Numerics) -> Result<Discovery, FleetError> {
        for (i, replica) in replicas.iter().enumerate() {
            Upstream::new(&replica.url, replica.key.as_deref())?;
            if replicas[..i].iter().any(|other| other.id == replica.id) {
                return Err(FleetError::Twice { what: "replica", name: replica.id.clone() });
            }
        }
        Ok(Discovery { replicas, numerics })
    }

    /// Asks for ever and keeps the gateway's fleet to what was answered.
    pub async fn run(self, gateway: Arc<Gateway>) {
        let mut models: Vec<Option<String>> = vec![None; self.replicas.len()];
        loop {
            let mut changed = false;
            for (replica, known) in self.replicas.iter().zip(&mut models) {
                match ask(replica).await {
                    Ok(Some(model)) if known.as_deref() != Some(&model) => {
                        tracing::info!(replica = replica.id, model, "found a replica");
                        *known = Some(model);
                        changed = true;
                    }
                    // One that is down keeps its place: the gateway watches it.
                    Ok(_) => {}
                    Err(error) => tracing::debug!(replica = replica.id, ?error, "no answer yet"),
                }
            }
            if changed && let Err(error) = gateway.set_fleet(&self.fleet(&models)) {
                tracing::error!(%error, "the replicas found make no fleet");
            }
            tokio::time::sleep(ROUND).await;
        }
    }

    fn fleet(&self, models: &[Option<String>]) -> Fleet {
        let mut fleet = Fleet::default();
        for (replica, name) in self.replicas.iter().zip(models) {
            let Some(name) = name else { continue };
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
            for model in fleet.models.iter_mut().filter(|model| model.name == *name) {
                model.versions[0].replicas.push(replica.clone());
            }
        }
        fleet
    }
}

/// The model a replica serves; none while it loads.
async fn ask(replica: &FleetReplica) -> Result<Option<String>, AskError> {
    let upstream = Upstream::new(&replica.url, replica.key.as_deref()).map_err(AskError::Address)?;
    let asking = async {
        let mut connection = upstream.connect(PATIENCE).await.map_err(AskError::Send)?;
        let mut request = hyper::Request::new(http_body_util::Full::default());
        *request.uri_mut() = hyper::Uri::from_static("/ready");
        let response = upstream.send(&mut connection, request).await.map_err(AskError::Send)?;
        let body =
            Limited::new(response.into_body(), 64 << 10).collect().await.map_err(|_| AskError::Body)?;
        let report: ReadyReport = serde_json::from_slice(&body.to_bytes()).map_err(|_| AskError::Body)?;
        Ok(Some(report.model).filter(|model| !model.is_empty()))
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or(Err(AskError::Late))
}

/// For the log alone.
#[derive(Debug)]
enum AskError {
    Address(#[expect(dead_code, reason = "printed by Debug")] AddressError),
    Send(#[expect(dead_code, reason = "printed by Debug")] SendError),
    Body,
    Late,
}

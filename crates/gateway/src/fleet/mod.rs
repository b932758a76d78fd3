//! The models, versions and replicas that the gateway stands before, replaced live.
//!
//! A request takes one look at the fleet (a reference count) and keeps it; a replacement is a new value beside it.
//! What is known of a replica, a version or a model outlives replacements as long as its name does.

mod pending;
mod probe;
mod replica;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use consort_api::{Fleet, ModelSnapshot, Numerics, Shadow, VersionSnapshot};
use tokio::sync::Notify;

use crate::policy::balance::Balance;
use crate::proxy::upstream::{AddressError, Upstream};
use crate::settings::ReplicaSettings;
use crate::telemetry::{Usual, VersionStats};

pub(crate) use pending::{Pending, Place, Running};
pub(crate) use probe::watch;
pub(crate) use replica::{Replica, Ticket, Went, Work};

/// Why a fleet can't be stood before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FleetError {
    /// A replica's address is unusable.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Two things bear one name.
    #[error("{what} {name:?} is there twice; each needs a name of its own")]
    Twice {
        /// What they are.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A model has no version.
    #[error("the model {model:?} has no version; give it at least one, which may be without replicas")]
    NoVersion {
        /// The model.
        model: String,
    },
}

/// The version's name where a model has but one and nobody named it.
pub(crate) const ONLY_VERSION: &str = "stable";

/// One model.
pub(crate) struct Model {
    pub(crate) name: String,
    /// The name as JSON.
    pub(crate) literal: String,
    pub(crate) versions: Vec<Version>,
    pub(crate) pending: Arc<Pending>,
    pub(crate) shadow: Option<Shadow>,
}

/// One version of a model.
pub(crate) struct Version {
    pub(crate) name: String,
    pub(crate) weight: u32,
    pub(crate) numerics: Numerics,
    /// What its replicas can't do, another version does.
    pub(crate) on_trial: bool,
    pub(crate) replicas: Vec<Arc<Replica>>,
    pub(crate) stats: Arc<VersionStats>,
    /// What its requests are counted by.
    pub(crate) usual: Usual,
    pub(crate) balance: Arc<Mutex<Balance>>,
}

/// The fleet at one time.
#[derive(Default)]
pub(crate) struct Models {
    pub(crate) list: Vec<Arc<Model>>,
    by_name: HashMap<String, Arc<Model>>,
}

/// The fleet, live.
#[derive(Default)]
pub(crate) struct Registry {
    models: RwLock<Arc<Models>>,
    /// A replica may take a request now that couldn't before.
    pub(crate) room: Arc<Notify>,
    /// The fleet was replaced.
    pub(crate) replaced: Notify,
}

impl Model {
    /// What the owner of the gateway sees of it.
    pub(crate) fn snapshot(&self, now: Instant) -> ModelSnapshot {
        let (queued, queued_tokens, oldest) = self.pending.waiting();
        let since =
            |at: Instant| u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
        let version = |version: &Version| VersionSnapshot {
            name: version.name.clone(),
            weight: version.weight,
            replicas: version.replicas.iter().map(|replica| replica.snapshot(now)).collect(),
            ..version.stats.snapshot(now)
        };
        ModelSnapshot {
            name: self.name.clone(),
            queued: queued as u64,
            queued_tokens,
            oldest_wait_ms: oldest.map_or(0, since),
            running: self.pending.running.load(std::sync::atomic::Ordering::Relaxed),
            idle_ms: self.pending.last().map(since),
            versions: self.versions.iter().map(version).collect(),
        }
    }
}

impl Models {
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Model>> {
        self.by_name.get(name)
    }

    pub(crate) fn replicas(&self) -> impl Iterator<Item = &Arc<Replica>> {
        self.list.iter().flat_map(|model| &model.versions).flat_map(|version| &version.replicas)
    }
}

impl Registry {
    /// The fleet now.
    pub(crate) fn models(&self) -> Arc<Models> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the fleet. Replicas that keep id, address and key keep what is known of them.
    ///
    /// # Errors
    /// [`FleetError`]; the fleet is then as it was.
    pub(crate) fn replace(&self, fleet: &Fleet, settings: &ReplicaSettings) -> Result<(), FleetError> {
        let twice = |what, name: &str| Err(FleetError::Twice { what, name: name.to_owned() });
        let before = self.models();
        let known: HashMap<&str, &Arc<Replica>> = before.replicas().map(|r| (r.id.as_str(), r)).collect();
        let mut seen = std::collections::HashSet::new();
        let mut models = Models::default();
        for model in &fleet.models {
            if model.versions.is_empty() {
                return Err(FleetError::NoVersion { model: model.name.clone() });
            }
            let mut versions: Vec<Version> = Vec::with_capacity(model.versions.len());
            for version in &model.versions {
                if versions.iter().any(|v| v.name == version.name) {
                    return twice("version", &version.name);
                }
                let mut replicas = Vec::with_capacity(version.replicas.len());
                for replica in &version.replicas {
                    if !seen.insert(replica.id.as_str()) {
                        return twice("replica", &replica.id);
                    }
                    let same = known.get(replica.id.as_str()).filter(|known| known.is(replica));
                    replicas.push(match same {
                        Some(known) => Arc::clone(known),
                        None => {
                            let upstream =
                                Upstream::new(&replica.url, replica.key.as_deref(), &settings.trust)?;
                            Arc::new(Replica::new(replica, upstream, settings, self.room.clone()))
                        }
                    });
                }
                let known =
                    before.get(&model.name).and_then(|m| m.versions.iter().find(|v| v.name == version.name));
                versions.push(Version {
                    stats: known.map_or_else(|| Arc::new(VersionStats::new()), |known| known.stats.clone()),
                    balance: known.map_or_else(Arc::default, |known| known.balance.clone()),
                    usual: Usual::default(),
                    name: version.name.clone(),
                    weight: version.weight,
                    numerics: version.numerics,
                    on_trial: version.on_trial,
                    replicas,
                });
            }
            let known = before.get(&model.name).filter(|known| known.name == model.name);
            let entry = Arc::new(Model {
                pending: known.map_or_else(|| Arc::new(Pending::new()), |known| known.pending.clone()),
                name: model.name.clone(),
                literal: crate::proxy::chunk::literal(&model.name),
                versions,
                shadow: model.shadow.clone(),
            });
            for name in std::iter::once(&model.name).chain(&model.aliases) {
                if models.by_name.insert(name.clone(), Arc::clone(&entry)).is_some() {
                    return twice("model", name);
                }
            }
            models.list.push(entry);
        }
        // Draining is asked for and withdrawn on the replicas that stay; nothing above can fail any more.
        let wanted = fleet.models.iter().flat_map(|m| &m.versions).flat_map(|v| &v.replicas);
        for (replica, wanted) in models.replicas().zip(wanted) {
            replica.set_draining(wanted.draining);
        }
        *self.models.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(models);
        self.replaced.notify_waiters();
        self.room.notify_waiters();
        Ok(())
    }
}

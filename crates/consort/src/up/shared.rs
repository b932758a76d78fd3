//! What the parts of `up` share, and the status that the page and `consort status` show.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use consort_api::{ApiKeyRecord, FleetSnapshot, KeyLimits};
use consort_control::keeper::Keeper;
use consort_control::store::Store;
use consort_control::supervisor::{Notice, SlotView};
use consort_gateway::Gateway;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::Plan;
use super::rollouts::{ASKS, Ask, Asks, RolloutView};
use crate::terminal::note;

/// Notices that are remembered.
const NOTICES: usize = 50;

/// A deployment as it runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct FleetStatus {
    /// Of this program.
    pub(crate) version: String,
    /// The process of `consort up`.
    pub(crate) pid: u32,
    /// Where clients go.
    pub(crate) url: String,
    /// Milliseconds since the start.
    pub(crate) uptime_ms: u64,
    /// The file, where there is one.
    pub(crate) file: Option<String>,
    /// Why the file's last edit isn't what runs.
    pub(crate) file_error: Option<String>,
    /// Keys of the file whose new values wait for the next start.
    #[serde(default)]
    pub(crate) restart_needed: Vec<String>,
    /// Whether requests need a key.
    pub(crate) keys_required: bool,
    /// This machine's.
    pub(crate) cores: u16,
    /// What is unwise about the deployment.
    pub(crate) warning: Option<String>,
    /// Every replica's place.
    pub(crate) slots: Vec<SlotView>,
    /// How many replicas each version should have, and why.
    pub(crate) scaling: Vec<Scaling>,
    /// The latest rollout of each model.
    #[serde(default)]
    pub(crate) rollouts: Vec<RolloutView>,
    /// The fleet as the front door sees it.
    pub(crate) gateway: FleetSnapshot,
    /// Replicas lost since the store was made.
    pub(crate) restarts_ever: u64,
    /// The latest last.
    pub(crate) notices: Vec<Said>,
}

/// How many replicas a version should have, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Scaling {
    pub(crate) model: String,
    pub(crate) version: String,
    pub(crate) min: u32,
    pub(crate) max: u32,
    pub(crate) replicas: u32,
    pub(crate) reason: String,
}

/// A notice with its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Said {
    /// Milliseconds since 1970.
    pub(crate) at_ms: u64,
    pub(crate) bad: bool,
    pub(crate) text: String,
}

/// Shared by the parts of `up`.
pub(crate) struct Shared {
    pub(crate) store: Arc<Store>,
    pub(crate) door: Arc<Gateway>,
    /// What replicas demand of whoever asks them.
    pub(crate) replica_key: String,
    /// Administration from this machine bears it.
    pub(crate) admin_token: String,
    /// A key from the command line, which is in no store.
    extra_key: Option<ApiKeyRecord>,
    pub(crate) cores: u16,
    pub(crate) url: String,
    file: Option<String>,
    started: Instant,
    keeper: OnceLock<Keeper>,
    /// Where the director hears what people ask of rollouts.
    pub(crate) asks: mpsc::Sender<Ask>,
    heard: Mutex<Option<Asks>>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    notices: VecDeque<Said>,
    pub(crate) file_error: Option<String>,
    pub(crate) restart_needed: Vec<String>,
    pub(crate) keys_required: bool,
    /// Whether the page is served.
    pub(crate) page: bool,
    pub(crate) warning: Option<String>,
    pub(crate) scaling: Vec<Scaling>,
    pub(crate) rollouts: Vec<RolloutView>,
    pub(crate) restarts_ever: u64,
    keys: Vec<ApiKeyRecord>,
}

impl Shared {
    pub(crate) fn new(plan: &Plan, store: Arc<Store>, door: Arc<Gateway>) -> Result<Shared> {
        let secret = || {
            consort_control::keys::secret().map_err(|e| anyhow!("the system gives no random numbers: {e}"))
        };
        let restarts_ever = store.count(&[("restarts", 0)])?.first().copied().unwrap_or(0);
        let state = State {
            keys_required: plan.deployment.keys_required || plan.bound.key.is_some(),
            page: plan.deployment.page,
            restarts_ever,
            ..State::default()
        };
        let extra_key = plan.bound.key.as_ref().map(|key| ApiKeyRecord {
            id: "command-line".to_owned(),
            name: "given to consort up".to_owned(),
            hash: blake3::hash(key.secret.as_bytes()).to_hex().to_string(),
            limits: KeyLimits::default(),
            created: 0,
        });
        let (asks, heard) = mpsc::channel(ASKS);
        let shared = Shared {
            store,
            door,
            replica_key: secret()?,
            admin_token: secret()?,
            extra_key,
            cores: cores(),
            url: super::url(&plan.bound, &plan.deployment),
            file: plan.source.file().map(|f| f.display().to_string()),
            started: plan.started,
            keeper: OnceLock::new(),
            asks,
            heard: Mutex::new(Some(heard)),
            state: Mutex::new(state),
        };
        shared.reload_keys()?;
        Ok(shared)
    }

    /// The keys that open the front door.
    pub(crate) fn keys(&self) -> Vec<ApiKeyRecord> {
        self.state().keys.clone()
    }

    /// Reads the keys from the store, for the front door from now on.
    pub(crate) fn reload_keys(&self) -> Result<()> {
        let mut keys = self.store.keys()?;
        keys.extend(self.extra_key.clone());
        self.state().keys = keys;
        self.arm_door()
    }

    /// Tells the front door who may ask.
    pub(crate) fn arm_door(&self) -> Result<()> {
        let (keys, required) = {
            let state = self.state();
            (state.keys.clone(), state.keys_required)
        };
        Ok(self.door.set_keys(&keys, required)?)
    }

    /// What people ask of rollouts; the director takes it, once.
    pub(crate) fn take_asks(&self) -> Option<Asks> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn set_keeper(&self, keeper: Keeper) {
        // There is one keeper in a process's life.
        let _ = self.keeper.set(keeper);
    }

    pub(crate) fn keeper(&self) -> Option<&Keeper> {
        self.keeper.get()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever watches: the terminal, the log, the page.
    pub(crate) fn say(&self, notice: Notice) {
        match (crate::environment::log_json(), notice.bad) {
            (true, true) => tracing::warn!("{}", notice.text),
            (true, false) => tracing::info!("{}", notice.text),
            (false, _) => note(&notice.text),
        }
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let mut state = self.state();
        if state.notices.len() == NOTICES {
            state.notices.pop_front();
        }
        state.notices.push_back(Said { at_ms, bad: notice.bad, text: notice.text });
    }

    /// The fleet as the front door sees it.
    pub(crate) fn snapshot(&self) -> FleetSnapshot {
        self.door.snapshot()
    }

    pub(crate) fn status(&self) -> FleetStatus {
        let slots = self.keeper().map(Keeper::view).unwrap_or_default();
        let state = self.state();
        FleetStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            url: self.url.clone(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            file: self.file.clone(),
            file_error: state.file_error.clone(),
            restart_needed: state.restart_needed.clone(),
            keys_required: state.keys_required,
            cores: self.cores,
            warning: state.warning.clone(),
            slots,
            scaling: state.scaling.clone(),
            rollouts: state.rollouts.clone(),
            gateway: self.snapshot(),
            restarts_ever: state.restarts_ever,
            notices: state.notices.iter().cloned().collect(),
        }
    }
}

/// Cores that this process may use.
pub(crate) fn cores() -> u16 {
    std::thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX))
}

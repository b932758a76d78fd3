//! Decides what should run: reads the file when it changes, looks at the models' files and at the load, and tells the
//! keeper and the front door.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use consort_api::deployment::{Deployment, TlsFiles, Version};
use consort_api::{Fleet, FleetModel, FleetReplica, FleetVersion, ModelSnapshot, Numerics, Protocol};
use consort_control::autoscale::{self, History, Load};
use consort_control::keeper::Keeper;
use consort_control::launch::{self, Located};
use consort_control::supervisor::{Notice, Options, ReplicaView, Route, SlotState, SlotView};
use consort_control::threads;
use consort_hub::Hub;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::rollouts::{Ask, Now, Rollouts};
use super::shared::{Scaling, Shared};
use super::source::Source;
use super::{Plan, locate, source, summary};
use crate::listen::Bound;

/// Between two looks at files and load.
const TICK: Duration = Duration::from_millis(250);
/// The models' files are looked at every so many ticks.
const MODELS_EVERY: u64 = 4;
/// A replica that ends so often before any was ready: the start has failed.
const HOPELESS: u32 = 3;
/// A supervised replica gets so long beyond its own drain to close its connections.
const CLOSING: Duration = Duration::from_secs(15);

type Finding = JoinHandle<Result<BTreeMap<String, Located>>>;

pub(crate) struct Director {
    /// What the file says.
    file: Deployment,
    /// What runs: the file with rollouts laid over it.
    deployment: Deployment,
    rollouts: Rollouts,
    source: Source,
    hub: Arc<Hub>,
    located: BTreeMap<String, Located>,
    shared: Arc<Shared>,
    bound: Bound,
    json: bool,
    started: Instant,
    /// The values that a running process keeps, as they were at its start.
    fixed: Fixed,
    /// How many restarts of everything were asked for.
    revision: u64,
    counts: BTreeMap<(String, String), u32>,
    histories: BTreeMap<(String, String), History>,
    /// The file as it was last read: its stamp and its text's hash.
    file_seen: Option<(String, blake3::Hash)>,
    /// A new deployment whose models are being located.
    finding: Option<(Deployment, Finding)>,
    /// Models' files that looked changed at the last look; a copy under way changes until it is done.
    restless: BTreeMap<String, String>,
    greeted: bool,
    restarts: u64,
    /// Whether somebody watched the start.
    at_terminal: bool,
}

impl Director {
    pub(crate) fn new(
        plan: Plan,
        hub: Hub,
        located: BTreeMap<String, Located>,
        rollouts: Rollouts,
        shared: Arc<Shared>,
    ) -> Director {
        let file_seen = plan.source.file().and_then(|path| {
            let text = source::text(path).ok()?;
            Some((locate::stamp(path).ok()?, blake3::hash(text.as_bytes())))
        });
        Director {
            fixed: Fixed::of(&plan.deployment),
            deployment: rollouts.promoted(&plan.deployment),
            file: plan.deployment,
            rollouts,
            source: plan.source,
            hub: Arc::new(hub),
            located,
            shared,
            bound: plan.bound,
            json: plan.json,
            started: plan.started,
            revision: 0,
            counts: BTreeMap::new(),
            histories: BTreeMap::new(),
            file_seen,
            finding: None,
            restless: BTreeMap::new(),
            greeted: false,
            restarts: 0,
            at_terminal: std::io::stderr().is_terminal(),
        }
    }

    /// The supervisor's deadlines under this deployment.
    pub(crate) fn options(&self) -> Options {
        let timeouts = &self.deployment.timeouts;
        Options {
            start: timeouts.start,
            probe: timeouts.probe,
            stalled: timeouts.step,
            drain: timeouts.drain + CLOSING,
            starting_at_once: usize::from(self.shared.cores).max(2),
            ..Options::default()
        }
    }

    /// Runs until it is dropped, or until the start has failed.
    pub(crate) async fn run(&mut self, keeper: &Keeper) -> Result<()> {
        let mut routes = keeper.routes();
        let mut view = keeper.watch();
        let mut hangups = Hangups::new()?;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = 0u64;
        let mut asks = self.shared.take_asks().context("the deployment has a director already")?;
        self.forget_outdated();
        self.rollouts.end_stranded(&self.file).into_iter().for_each(|notice| self.shared.say(notice));
        self.rollouts.find_again(&self.file, &self.hub);
        self.refresh();
        self.publish(&routes.borrow_and_update())?;
        self.want(keeper).await;
        if versions(&self.deployment).all(|(_, version)| version.min == 0) {
            // The first request starts the first replica.
            self.greet(&[])?;
        }
        loop {
            tokio::select! {
                changed = routes.changed() => {
                    changed.context("the supervisor is gone")?;
                    let routes = routes.borrow_and_update().clone();
                    self.publish(&routes)?;
                }
                changed = view.changed() => {
                    changed.context("the supervisor is gone")?;
                    let slots = view.borrow_and_update().clone();
                    self.greet(&slots)?;
                    self.count(&slots);
                }
                Some(Ask { what, answer }) = asks.recv() => {
                    let done = self.rollouts.ask(&self.file, &self.hub, what);
                    let changed = done.is_ok();
                    // Whoever asked may be gone.
                    let _ = answer.send(done);
                    if changed {
                        self.apply(keeper).await?;
                    }
                }
                () = hangups.next() => {
                    if self.at_terminal && !std::io::stderr().is_terminal() {
                        // The terminal was closed, which is no wish for a restart.
                        return Ok(());
                    }
                    self.say(false, "restarting every replica, one after the other");
                    self.revision += 1;
                    self.file_seen = None;
                    self.want(keeper).await;
                }
                _ = ticks.tick() => {
                    count += 1;
                    self.look_at_file();
                    let mut changed = self.found().await;
                    if count.is_multiple_of(MODELS_EVERY) {
                        changed |= self.look_at_models();
                    }
                    changed |= self.scale(keeper);
                    changed |= self.look_at_rollouts(keeper).await;
                    if changed {
                        self.apply(keeper).await?;
                    }
                }
            }
        }
    }

    /// Makes what should run run.
    async fn apply(&mut self, keeper: &Keeper) -> Result<()> {
        self.refresh();
        self.want(keeper).await;
        let routes = keeper.routes().borrow().clone();
        self.publish(&routes)
    }

    /// Lays the rollouts over the file.
    fn refresh(&mut self) {
        self.deployment = self.rollouts.book.over(&self.file, &self.counts);
        let known: Vec<_> =
            versions(&self.deployment).map(|(model, v)| (model.to_owned(), v.name.clone())).collect();
        self.counts.retain(|key, _| known.contains(key));
        self.histories.retain(|key, _| known.contains(key));
    }

    /// What was promoted over a version that the file has no more is over.
    fn forget_outdated(&mut self) {
        for model in self.rollouts.book.outdated(&self.file) {
            self.say(
                false,
                format!("the file's version of {model} takes over from the one that was promoted"),
            );
            if let Err(error) = self.rollouts.write(&model) {
                self.say(true, format!("that can't be written down: {error}"));
            }
        }
    }

    /// Lets rollouts go on; whether something is to change.
    async fn look_at_rollouts(&mut self, keeper: &Keeper) -> bool {
        let (snapshot, slots) = (self.shared.snapshot(), keeper.view());
        let now = Now {
            file: &self.file,
            running: &self.deployment,
            snapshot: &snapshot,
            slots: &slots,
            counts: &self.counts,
        };
        let looked = self.rollouts.look(&now).await;
        self.shared.state().rollouts = self.rollouts.views(&now);
        self.located.extend(looked.located);
        looked.notices.into_iter().for_each(|notice| self.shared.say(notice));
        looked.changed
    }

    fn say(&self, bad: bool, text: impl Into<String>) {
        self.shared.say(Notice { bad, text: text.into() });
    }

    /// Tells the keeper what should run.
    async fn want(&self, keeper: &Keeper) {
        let wanted =
            launch::wanted(&self.deployment, &self.located, &self.counts, self.shared.cores, self.revision);
        let threads = wanted.values().map(|launch| u32::from(launch.threads)).sum();
        let replicas = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        let warning = threads::warning(self.shared.cores, threads, replicas);
        let news = {
            let mut state = self.shared.state();
            let news = warning.clone().filter(|_| state.warning != warning);
            state.warning = warning;
            news
        };
        if let Some(text) = news {
            self.say(true, text);
        }
        keeper.want(wanted, self.options()).await;
    }

    /// Tells the front door where requests may go.
    pub(crate) fn publish(&self, routes: &[Route]) -> Result<()> {
        let fleet = fleet(&self.deployment, &self.rollouts, routes, &self.shared.replica_key);
        self.shared.door.set_fleet(&fleet).context("the front door refuses the fleet")
    }

    /// Reads the file where it has changed.
    fn look_at_file(&mut self) {
        let Some(path) = self.source.file() else { return };
        // While an editor replaces it, it may be missing for a moment; what runs goes on.
        let Ok(stamp) = locate::stamp(path) else { return };
        if self.file_seen.as_ref().is_some_and(|(seen, _)| *seen == stamp) {
            return;
        }
        let read = source::text(path);
        let hash = blake3::hash(read.as_deref().unwrap_or_default().as_bytes());
        let same = self.file_seen.as_ref().is_some_and(|(_, seen)| *seen == hash);
        self.file_seen = Some((stamp, hash));
        if same {
            return;
        }
        match read.and_then(|_| source::read(path)) {
            Ok(deployment) => {
                if let Some(why) = self.rollouts.book.refuses(&self.file, &deployment) {
                    return self.refuse(&anyhow::anyhow!(why));
                }
                let (hub, sources) =
                    (self.hub.clone(), locate::sources(&self.rollouts.promoted(&deployment)));
                let finding = tokio::task::spawn_blocking(move || {
                    let find = |source: String| locate::one(&hub, &source).map(|found| (source, found));
                    sources.into_iter().map(find).collect()
                });
                self.finding = Some((deployment, finding));
            }
            Err(error) => self.refuse(&error),
        }
    }

    /// An edit that can't be; what ran before goes on.
    fn refuse(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        self.say(true, format!("the edit is refused and the deployment runs on as it was:\n{text}"));
        self.shared.state().file_error = Some(text);
    }

    /// Takes up a new deployment once its models are here; whether it did.
    async fn found(&mut self) -> bool {
        if !self.finding.as_ref().is_some_and(|(_, finding)| finding.is_finished()) {
            return false;
        }
        let Some((deployment, finding)) = self.finding.take() else { return false };
        match finding.await.context("the search for models failed").and_then(|found| found) {
            Ok(located) => {
                self.adopt(deployment, located);
                true
            }
            Err(error) => {
                self.refuse(&error);
                false
            }
        }
    }

    fn adopt(&mut self, deployment: Deployment, located: BTreeMap<String, Located>) {
        let later = self.fixed.other(&deployment);
        if deployment == self.file {
            self.say(false, "the file was edited; it asks for what runs already");
        } else {
            self.say(false, "the edit is applied; only what it changes restarts");
        }
        if !later.is_empty() {
            self.say(
                true,
                format!("these changes wait for the next start of consort up: {}", later.join(", ")),
            );
        }
        let mut state = self.shared.state();
        state.file_error = None;
        state.restart_needed = later;
        state.keys_required = deployment.keys_required || self.bound.key.is_some();
        state.page = deployment.page;
        drop(state);
        self.shared.door.set_settings(super::settings(&deployment));
        if let Err(error) = self.shared.arm_door() {
            self.say(true, format!("the front door keeps its old keys: {error:#}"));
        }
        // A candidate's model was found for its rollout, and is in no file.
        self.located.extend(located);
        self.file = deployment;
        self.forget_outdated();
        self.refresh();
        let sources = locate::sources(&self.deployment);
        self.located.retain(|source, _| sources.contains(source));
    }

    /// Whether a model's file was replaced.
    fn look_at_models(&mut self) -> bool {
        let mut changed = Vec::new();
        for (source, located) in &mut self.located {
            // A file that is gone keeps what runs; a replica that has to start without it says so.
            let Ok(stamp) = locate::stamp(&located.path) else { continue };
            if stamp == located.stamp {
                self.restless.remove(source);
            } else if self.restless.get(source) == Some(&stamp) {
                located.stamp = stamp;
                self.restless.remove(source);
                changed.push(source.clone());
            } else {
                self.restless.insert(source.clone(), stamp);
            }
        }
        for source in &changed {
            self.say(
                false,
                format!("the file of {source} was replaced; its replicas restart, one after the other"),
            );
        }
        !changed.is_empty()
    }

    /// How many replicas there should be; whether that changed.
    fn scale(&mut self, keeper: &Keeper) -> bool {
        let (now, slots) = (Instant::now(), keeper.view());
        let snapshot = self.shared.snapshot();
        let (mut scaling, mut notices, mut changed) = (Vec::new(), Vec::new(), false);
        for (model, version) in versions(&self.deployment) {
            let key = (model.to_owned(), version.name.clone());
            let seen = snapshot.models.iter().find(|m| m.name == model);
            let before = self.counts.get(&key).copied().unwrap_or(version.min);
            let load = load(before, model, &version.name, seen, &slots);
            let history = self.histories.entry(key.clone()).or_default();
            let decision = autoscale::decide(version, history, now, &load);
            if decision.replicas != before {
                changed = true;
                notices.push(format!(
                    "{model} goes from {before} to {} replicas: {}",
                    decision.replicas, decision.reason
                ));
            }
            self.counts.insert(key, decision.replicas);
            scaling.push(Scaling {
                model: model.to_owned(),
                version: version.name.clone(),
                min: version.min,
                max: version.max,
                replicas: decision.replicas,
                reason: decision.reason,
            });
        }
        self.shared.state().scaling = scaling;
        for text in notices {
            self.say(false, text);
        }
        changed
    }

    /// Prints what there is once everything wanted is ready, or gives up where nothing ever will be.
    fn greet(&mut self, slots: &[SlotView]) -> Result<()> {
        if self.greeted {
            return Ok(());
        }
        let ready = |slot: &SlotView| matches!(slot.state, SlotState::Ready | SlotState::Rolling);
        if !slots.iter().any(ready) && !slots.is_empty() && slots.iter().all(|s| s.failures >= HOPELESS) {
            let why = slots.iter().find_map(|slot| slot.last_failure.clone()).unwrap_or_default();
            bail!("no replica could be started: {why}");
        }
        if slots.iter().all(|slot| ready(slot) || slot.failures >= HOPELESS) {
            self.greeted = true;
            summary::print(&self.deployment, &self.bound, slots, self.started, self.json)?;
        }
        Ok(())
    }

    /// Counts lost replicas in the store.
    fn count(&mut self, slots: &[SlotView]) {
        let restarts: u64 = slots.iter().map(|slot| slot.restarts).sum();
        let more = restarts.saturating_sub(self.restarts);
        self.restarts = restarts;
        if more == 0 {
            return;
        }
        match self.shared.store.count(&[("restarts", more)]) {
            Ok(totals) => self.shared.state().restarts_ever = totals.first().copied().unwrap_or(0),
            Err(error) => tracing::warn!(%error, "a restart could not be counted"),
        }
    }
}

fn versions(deployment: &Deployment) -> impl Iterator<Item = (&str, &Version)> {
    deployment.models.iter().flat_map(|model| {
        let canary = model.canary.as_ref().map(|canary| &canary.version);
        std::iter::once(&model.stable).chain(canary).map(|version| (model.name.as_str(), version))
    })
}

/// What a version has to do, as the front door and its replicas tell it.
fn load(replicas: u32, name: &str, version: &str, door: Option<&ModelSnapshot>, slots: &[SlotView]) -> Load {
    let places = slots.iter().filter(|slot| slot.model == name && slot.version == version);
    let sent = |id: &str| {
        let seen = door.into_iter().flat_map(|m| &m.versions).flat_map(|v| &v.replicas).find(|r| r.id == id);
        seen.map_or(0, |replica| replica.outstanding_tokens)
    };
    // What the door has sent there, or what the replica has where somebody else sends to it too.
    let of = |replica: &ReplicaView| {
        replica.report.as_ref().map_or(0, |report| report.outstanding_tokens).max(sent(&replica.id))
    };
    let running: u64 = places.flat_map(|slot| &slot.replicas).map(of).sum();
    // Who waits, waits for the model: each of its versions would do.
    Load {
        replicas,
        tokens: running + door.map_or(0, |m| m.queued_tokens),
        waiting: door.map_or(0, |m| m.queued),
        // A door that hasn't seen the model yet tells nothing; then nothing is shut down for idling.
        idle: door.map_or(Some(Duration::ZERO), |m| m.idle_ms.map(Duration::from_millis)),
    }
}

/// The fleet that the front door should stand before.
fn fleet(deployment: &Deployment, rollouts: &Rollouts, routes: &[Route], key: &str) -> Fleet {
    let numerics = if deployment.cross_class { Numerics::AnyClass } else { Numerics::SameClass };
    let version = |model: &str, name: &str, weight, on_trial| FleetVersion {
        name: name.to_owned(),
        weight,
        numerics,
        on_trial,
        replicas: routes
            .iter()
            .filter(|route| route.slot.model == model && route.slot.version == name)
            .map(|route| FleetReplica {
                id: route.id.to_string(),
                url: format!("http://{}", route.address),
                key: Some(key.to_owned()),
                slow_start_ms: 0,
                draining: route.draining,
                protocol: Protocol::Consort,
            })
            .collect(),
    };
    let models = deployment.models.iter().map(|model| {
        let share = model.canary.as_ref().map_or(0, |canary| canary.weight);
        let trial = rollouts.trial(&model.name);
        let mut versions = vec![version(&model.name, &model.stable.name, 100 - share, false)];
        versions.extend(model.canary.iter().map(|canary| {
            let name = &canary.version.name;
            // One that may have no replica waits for its requests, or it would never get one.
            let on_trial = trial.as_ref().is_some_and(|(on, _)| on == name) || canary.version.min > 0;
            version(&model.name, name, canary.weight, on_trial)
        }));
        let shadow = trial.and_then(|(_, shadow)| shadow);
        FleetModel { name: model.name.clone(), aliases: Vec::new(), versions, shadow }
    });
    Fleet { models: models.collect() }
}

/// What can't change while it runs: the socket, which is open, and the certificate that its clients were told.
struct Fixed {
    listen: SocketAddr,
    tls: Option<TlsFiles>,
}

impl Fixed {
    fn of(deployment: &Deployment) -> Fixed {
        Fixed { listen: deployment.listen, tls: deployment.tls.clone() }
    }

    /// The keys of these whose value is another one now.
    fn other(&self, new: &Deployment) -> Vec<String> {
        let keys = [("listen", self.listen != new.listen), ("[tls]", self.tls != new.tls)];
        keys.into_iter().filter(|(_, changed)| *changed).map(|(name, _)| name.to_owned()).collect()
    }
}

/// A seed for the jitter.
pub(crate) fn seed() -> u64 {
    let mut bytes = [0u8; 8];
    // Without random numbers the delays are the same at every start, which does no harm on one machine.
    let _ = getrandom::fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// SIGHUP, where there is one.
struct Hangups {
    #[cfg(unix)]
    signal: tokio::signal::unix::Signal,
}

impl Hangups {
    fn new() -> Result<Hangups> {
        Ok(Hangups {
            #[cfg(unix)]
            signal: tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())
                .context("can't listen for SIGHUP")?,
        })
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        if self.signal.recv().await.is_some() {
            return;
        }
        std::future::pending().await
    }
}

//! Rollouts at work: what the front door and the supervisor see goes to their state machines, what those decide is
//! written down before it is done, and what people ask for comes in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use consort_api::deployment::Deployment;
use consort_api::{FleetSnapshot, Shadow, VersionSnapshot};
use consort_control::launch::Located;
use consort_control::rollout::{
    Book, Deadlines, Event, Page, Record, Rollout, Runner, Sample, Seen, Spec, Stage,
};
use consort_control::store::Store;
use consort_control::supervisor::{Notice, SlotState, SlotView};
use consort_hub::Hub;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::locate;

/// Asks that may wait for the director.
pub(crate) const ASKS: usize = 16;

/// What people ask for, and where the answer goes.
pub(crate) struct Ask {
    pub(crate) what: What,
    pub(crate) answer: oneshot::Sender<Result<Rollout, String>>,
}

/// What people ask for.
pub(crate) enum What {
    Start(Box<Spec>),
    Promote(String),
    Abort(String),
}

pub(crate) type Asks = mpsc::Receiver<Ask>;

/// A rollout as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RolloutView {
    #[serde(flatten)]
    pub(crate) rollout: Rollout,
    /// The incumbent's and the candidate's share of requests, in percent.
    pub(crate) weights: (u32, u32),
    /// What the incumbent did since it began.
    pub(crate) incumbent_did: Numbers,
    /// What the candidate did in this step; what it scored, since the rollout began.
    pub(crate) candidate_did: Numbers,
    /// What was promoted runs instead of what the file says.
    pub(crate) over_the_file: bool,
}

/// What the judge sees of a version.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Numbers {
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    /// Medians in milliseconds.
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) inter_token_ms: Option<f64>,
    pub(crate) scored: u64,
    pub(crate) refused: u64,
    /// In nats a token.
    pub(crate) disagreement: Option<f64>,
}

impl RolloutView {
    /// One that was written down, where no `consort up` runs.
    pub(crate) fn at_rest(rollout: Rollout) -> RolloutView {
        let weights = Runner::resume(rollout.clone(), Instant::now()).weights();
        RolloutView {
            rollout,
            weights,
            incumbent_did: Numbers::default(),
            candidate_did: Numbers::default(),
            over_the_file: false,
        }
    }
}

impl Numbers {
    fn of(sample: &Sample) -> Numbers {
        Numbers {
            requests: sample.requests,
            errors: sample.errors,
            first_token_ms: sample.first_token.quantile_ms(0.5),
            inter_token_ms: sample.inter_token.quantile_ms(0.5),
            scored: sample.scored,
            refused: sample.refused,
            disagreement: sample.disagreement().map(|(mean, _)| mean),
        }
    }
}

/// All rollouts of a deployment.
pub(crate) struct Rollouts {
    store: Arc<Store>,
    pub(crate) book: Book,
    /// Models that are looked for, by the rollout's model, with their source.
    finding: BTreeMap<String, (String, JoinHandle<Result<Located>>)>,
}

/// What a look at all rollouts came to.
#[derive(Default)]
pub(crate) struct Looked {
    /// What should run, or with which weights, is another now.
    pub(crate) changed: bool,
    /// Models that were found.
    pub(crate) located: Vec<(String, Located)>,
    pub(crate) notices: Vec<Notice>,
}

/// How a deployment is now, for the judge.
pub(crate) struct Now<'a> {
    pub(crate) file: &'a Deployment,
    pub(crate) running: &'a Deployment,
    pub(crate) snapshot: &'a FleetSnapshot,
    pub(crate) slots: &'a [SlotView],
    pub(crate) counts: &'a BTreeMap<(String, String), u32>,
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What is written down, by model. Entries that another version of this program wrote and this one can't read are
/// left alone.
pub(crate) fn records(store: &Store) -> Result<Vec<(String, Record)>> {
    let all = store.rollouts()?.into_iter();
    Ok(all.filter_map(|(model, json)| Some((model, serde_json::from_value(json).ok()?))).collect())
}

/// Ends a model's rollout where no `consort up` runs; none where there is none under way.
pub(crate) fn abort_at_rest(store: &Store, model: &str) -> Result<Option<Rollout>> {
    let found = records(store)?.into_iter().find(|(name, _)| name == model);
    let Some((_, Record { promoted, rollout: Some(rollout) })) = found else { return Ok(None) };
    if rollout.stage.ended() {
        return Ok(None);
    }
    let mut runner = Runner::resume(rollout, Instant::now());
    let at_rest = Deadlines { start: Duration::ZERO, route: Duration::ZERO };
    runner.step(Instant::now(), now_ms(), at_rest, &Event::Abort("aborted by hand".into()));
    let none = Seen::default();
    runner.step(Instant::now(), now_ms(), at_rest, &Event::Tick(&none, &none));
    let record = Record { promoted, rollout: Some(runner.rollout.clone()) };
    store.set_rollout(model, Some(&serde_json::to_value(record)?))?;
    Ok(Some(runner.rollout))
}

impl Rollouts {
    /// What was written down.
    pub(crate) fn load(store: Arc<Store>) -> Result<Rollouts> {
        let mut book = Book::default();
        for (model, record) in records(&store)? {
            let runner = record.rollout.map(|rollout| Runner::resume(rollout, Instant::now()));
            book.pages.insert(model, Page { promoted: record.promoted, runner });
        }
        Ok(Rollouts { store, book, finding: BTreeMap::new() })
    }

    /// The file with what was promoted laid over it, and nothing that is only on trial.
    pub(crate) fn promoted(&self, file: &Deployment) -> Deployment {
        let mut book = self.book.clone();
        book.pages.values_mut().for_each(|page| page.runner = None);
        book.over(file, &BTreeMap::new())
    }

    pub(crate) fn write(&self, model: &str) -> Result<(), String> {
        let Some(page) = self.book.pages.get(model) else { return Ok(()) };
        let json = serde_json::to_value(page.record()).map_err(|e| e.to_string())?;
        self.store.set_rollout(model, Some(&json)).map_err(|e| e.to_string())
    }

    /// Does what somebody asks for.
    pub(crate) fn ask(&mut self, file: &Deployment, hub: &Arc<Hub>, what: What) -> Result<Rollout, String> {
        let model = match &what {
            What::Start(spec) => spec.model.clone(),
            What::Promote(model) | What::Abort(model) => model.clone(),
        };
        let before = self.book.pages.get(&model).cloned();
        match what {
            What::Start(mut spec) => {
                if spec.version.is_empty() {
                    let counted = self.store.count(&[("rollouts", 1)]).map_err(|e| e.to_string())?;
                    spec.version = format!("v{}", counted.first().copied().unwrap_or(1));
                }
                let incumbent = self.book.check(file, &spec).map_err(|e| e.to_string())?;
                let runner = Runner::start(*spec, incumbent, Instant::now(), now_ms());
                self.book.pages.entry(model.clone()).or_default().runner = Some(runner);
            }
            What::Promote(_) => self.event(&model, &Event::Promote)?,
            What::Abort(_) => self.event(&model, &Event::Abort("aborted by hand".into()))?,
        }
        // Written down first: what is done and forgotten would be done otherwise after a restart.
        if let Err(error) = self.write(&model) {
            match before {
                Some(before) => self.book.pages.insert(model, before),
                None => self.book.pages.remove(&model),
            };
            return Err(format!("it can't be written down: {error}"));
        }
        self.find(file, hub);
        let runner = self.book.pages.get(&model).and_then(|page| page.runner.as_ref());
        runner.map(|runner| runner.rollout.clone()).ok_or_else(|| format!("there is no rollout of {model:?}"))
    }

    fn event(&mut self, model: &str, event: &Event<'_>) -> Result<(), String> {
        let runner = self.book.pages.get_mut(model).and_then(|page| page.runner.as_mut());
        let runner = runner.filter(|runner| !runner.rollout.stage.ended());
        let runner = runner.ok_or_else(|| format!("no rollout of {model:?} is under way"))?;
        if *event == Event::Promote && runner.rollout.stage == Stage::Fetching {
            return Err("its model isn't here yet; try again when it has started".into());
        }
        let none = Deadlines { start: Duration::MAX, route: Duration::MAX };
        runner.step(Instant::now(), now_ms(), none, event);
        Ok(())
    }

    /// Looks for the models of rollouts under way that nobody looks for yet.
    pub(crate) fn find(&mut self, file: &Deployment, hub: &Arc<Hub>) {
        for (model, page) in &self.book.pages {
            let fetching = page.runner.as_ref().is_some_and(|r| r.rollout.stage == Stage::Fetching);
            if let Some(source) = self.book.source(file, model).filter(|_| fetching)
                && !self.finding.contains_key(model)
            {
                let (hub, wanted) = (hub.clone(), source.clone());
                let task = tokio::task::spawn_blocking(move || locate::one(&hub, &wanted));
                self.finding.insert(model.clone(), (source, task));
            }
        }
    }

    /// Ends rollouts that can't go on with this file; what to say of it.
    pub(crate) fn end_stranded(&mut self, file: &Deployment) -> Vec<Notice> {
        let mut notices = Vec::new();
        for (model, why) in self.book.stranded(file) {
            let ended = self.event(&model, &Event::Abort(why.clone()));
            let at_rest = Deadlines { start: Duration::ZERO, route: Duration::ZERO };
            let none = Seen::default();
            if let Some(runner) = self.book.pages.get_mut(&model).and_then(|page| page.runner.as_mut()) {
                runner.step(Instant::now(), now_ms(), at_rest, &Event::Tick(&none, &none));
            }
            let written = ended.and_then(|()| self.write(&model));
            notices.push(Notice { bad: true, text: format!("the rollout of {model} can't go on: {why}") });
            notices.extend(
                written
                    .err()
                    .map(|error| Notice { bad: true, text: format!("that can't be written down: {error}") }),
            );
        }
        notices
    }

    /// The models of rollouts that were under way when the process began are looked for again.
    pub(crate) fn find_again(&mut self, file: &Deployment, hub: &Arc<Hub>) {
        for (model, page) in &self.book.pages {
            let Some(source) = self.book.source(file, model) else { continue };
            if page.runner.as_ref().is_some_and(|runner| runner.runs_both()) {
                let (hub, wanted) = (hub.clone(), source.clone());
                let task = tokio::task::spawn_blocking(move || locate::one(&hub, &wanted));
                self.finding.insert(model.clone(), (source, task));
            }
        }
        self.find(file, hub);
    }

    /// Lets every rollout see how things are.
    pub(crate) async fn look(&mut self, now: &Now<'_>) -> Looked {
        let mut looked = Looked::default();
        let mut found = BTreeMap::new();
        let done: Vec<_> =
            self.finding.iter().filter(|(_, (_, task))| task.is_finished()).map(|(m, _)| m.clone()).collect();
        for model in done {
            let Some((source, task)) = self.finding.remove(&model) else { continue };
            let outcome = match task.await {
                Ok(Ok(located)) => {
                    looked.located.push((source, located));
                    looked.changed = true;
                    Ok(())
                }
                Ok(Err(error)) => Err(crate::terminal::said(&error)),
                Err(error) => Err(format!("the search failed: {error}")),
            };
            found.insert(model, outcome);
        }
        let timeouts = &now.file.timeouts;
        let deadlines = Deadlines { start: timeouts.start, route: timeouts.route };
        let models: Vec<String> = self.book.pages.keys().cloned().collect();
        for name in models {
            let Some(runner) = self.book.pages.get_mut(&name).and_then(|page| page.runner.as_mut()) else {
                continue;
            };
            if runner.rollout.stage.ended() {
                continue;
            }
            let before = runner.rollout.stage;
            if let Some(outcome) = found.remove(&name) {
                runner.step(Instant::now(), now_ms(), deadlines, &Event::Located(outcome));
            }
            let (incumbent, candidate) = both(&runner.rollout, now);
            runner.step(Instant::now(), now_ms(), deadlines, &Event::Tick(&incumbent, &candidate));
            let rollout = runner.rollout.clone();
            if rollout.stage == before {
                continue;
            }
            if rollout.stage == Stage::Promoted {
                self.book.promote(now.file, &name);
            }
            looked.changed = true;
            if let Err(error) = self.write(&name) {
                looked
                    .notices
                    .push(Notice { bad: true, text: format!("a rollout can't be written down: {error}") });
            }
            looked.notices.push(Notice {
                bad: matches!(rollout.stage, Stage::Withdrawing | Stage::Withdrawn),
                text: format!(
                    "{name}: {} is {}: {}",
                    rollout.spec.version,
                    rollout.stage.text(),
                    rollout.reason
                ),
            });
        }
        looked
    }

    /// Whether a version is on trial, and which version scores a model's answers.
    pub(crate) fn trial(&self, model: &str) -> Option<(&str, Option<Shadow>)> {
        let runner = self.book.pages.get(model)?.runner.as_ref()?;
        let (rollout, spec) = (&runner.rollout, &runner.rollout.spec);
        let on = matches!(rollout.stage, Stage::Baking { .. } | Stage::Growing | Stage::Settling);
        let shadow = matches!(rollout.stage, Stage::Baking { .. } | Stage::Growing) && spec.shadow > 0;
        let shadow = shadow.then(|| Shadow {
            incumbent: rollout.incumbent.clone(),
            candidate: spec.version.clone(),
            percent: spec.shadow,
        });
        on.then_some((spec.version.as_str(), shadow))
    }

    /// All rollouts, as they are shown.
    pub(crate) fn views(&self, now: &Now<'_>) -> Vec<RolloutView> {
        let view = |page: &Page| {
            let runner = page.runner.as_ref()?;
            let (incumbent, candidate) = both(&runner.rollout, now);
            let (own, theirs) = runner.evidence(&incumbent, &candidate);
            let rollout = runner.rollout.clone();
            let over = page.promoted.as_ref().is_some_and(|p| p.version == rollout.spec.version);
            Some(RolloutView {
                over_the_file: over && rollout.stage == Stage::Promoted,
                rollout,
                weights: runner.weights(),
                incumbent_did: Numbers::of(&own),
                candidate_did: Numbers::of(&theirs),
            })
        };
        self.book.pages.values().filter_map(view).collect()
    }
}

/// The incumbent and the candidate as they are now.
fn both(rollout: &Rollout, now: &Now<'_>) -> (Seen, Seen) {
    let model = &rollout.spec.model;
    let seen = |version: &str| {
        let versions = now.snapshot.models.iter().filter(|m| m.name == *model).flat_map(|m| &m.versions);
        let door = versions.clone().find(|v| v.name == version);
        let slots = || now.slots.iter().filter(move |s| s.model == *model && s.version == version);
        let ready = slots().filter(|s| matches!(s.state, SlotState::Ready | SlotState::Rolling)).count();
        let failures = if ready == 0 { slots().map(|s| s.failures).max().unwrap_or(0) } else { 0 };
        let key = (model.clone(), version.to_owned());
        let wanted = now.counts.get(&key).copied().unwrap_or(0);
        let planned = now.running.models.iter().filter(|m| m.name == *model).flat_map(|m| &m.canary);
        let least = planned.filter(|c| c.version.name == version).map(|c| c.version.min).max().unwrap_or(0);
        Seen {
            did: door.map(did).unwrap_or_default(),
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            wanted: wanted.max(least),
            running: door.map_or(0, |v| v.replicas.iter().map(|r| r.outstanding_requests).sum()),
            lost: slots().map(|s| s.restarts).sum(),
            failures,
            last_failure: slots().find_map(|s| s.last_failure.clone()),
        }
    };
    (seen(&rollout.incumbent), seen(&rollout.spec.version))
}

fn did(version: &VersionSnapshot) -> Sample {
    let shadow = &version.shadow;
    Sample {
        requests: version.requests,
        errors: version.errors,
        first_token: version.first_token_ever.clone(),
        inter_token: version.inter_token_ever.clone(),
        scored: shadow.scored,
        refused: shadow.refused,
        disagreement_sum: shadow.disagreement_sum,
        disagreement_squares: shadow.disagreement_squares,
    }
}

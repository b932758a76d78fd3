//! Every model's rollout, and what they make of the file's deployment.
//!
//! The file says what a model runs; a rollout that was promoted says otherwise, and must outlast a restart. So the book
//! remembers what the file said when the candidate became the model, and lays the promoted version over it for as
//! long as the file says that still. Whoever edits the file's version means it: the edit wins and the entry is forgotten.

use std::collections::BTreeMap;

use consort_api::deployment::{Canary, Deployment, ModelDeployment, Version};
use serde::{Deserialize, Serialize};

use super::{Rollout, Runner, Spec, SpecError, Stage};

/// What a promoted candidate laid over the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Promoted {
    /// The version that the file named.
    pub file_version: String,
    /// And its source.
    pub file_source: String,
    /// What runs instead.
    pub version: String,
    /// Its source.
    pub source: String,
    /// Its threads, where they differ.
    pub threads: Option<u16>,
    /// Its context, where it differs.
    pub context: Option<u32>,
    /// Its requests at once, where they differ.
    pub max_running: Option<u32>,
}

/// What is written down of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// What was promoted last.
    pub promoted: Option<Promoted>,
    /// The latest rollout.
    pub rollout: Option<Rollout>,
}

/// What is known of one model.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// What was promoted last.
    pub promoted: Option<Promoted>,
    /// The latest rollout.
    pub runner: Option<Runner>,
}

/// Why a rollout can't be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// What was asked for can't be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// There is no such model.
    #[error("there is no model {0:?} here; there is: {1}")]
    NoModel(String, String),
    /// The file gives the model a second version already.
    #[error(
        "the file gives {0:?} a canary of its own; take [models.{0}.canary] out to roll out another version"
    )]
    Canary(String),
    /// One is under way.
    #[error("a rollout of {0:?} is under way; end it with: consort rollout abort {0}")]
    UnderWay(String),
    /// The name is taken.
    #[error("a version of {0:?} is called {1:?} already; choose another --version")]
    Version(String, String),
}

/// Every model's page, by name.
#[derive(Clone, Debug, Default)]
pub struct Book {
    /// The pages.
    pub pages: BTreeMap<String, Page>,
}

impl Promoted {
    fn fits(&self, stable: &Version) -> bool {
        self.file_version == stable.name && self.file_source == stable.source
    }

    fn over(&self, stable: &Version) -> Version {
        Version {
            name: self.version.clone(),
            source: self.source.clone(),
            threads: self.threads.or(stable.threads),
            context: self.context.or(stable.context),
            max_running: self.max_running.unwrap_or(stable.max_running),
            ..stable.clone()
        }
    }
}

impl Page {
    /// As it is written down.
    pub fn record(&self) -> Record {
        Record {
            promoted: self.promoted.clone(),
            rollout: self.runner.as_ref().map(|runner| runner.rollout.clone()),
        }
    }

    fn under_way(&self) -> Option<&Runner> {
        self.runner.as_ref().filter(|runner| !runner.rollout.stage.ended())
    }
}

/// The candidate as a version beside `stable`, of which there are `count` replicas.
fn candidate(spec: &Spec, stable: &Version, grown: bool, count: u32) -> Version {
    let replicas = if grown { count.max(stable.min).max(1) } else { spec.replicas };
    Version {
        name: spec.version.clone(),
        source: spec.source.clone().unwrap_or_else(|| stable.source.clone()),
        min: replicas,
        max: replicas.max(if grown { stable.max } else { replicas }),
        threads: spec.threads.or(stable.threads),
        context: spec.context.or(stable.context),
        max_running: spec.max_running.unwrap_or(stable.max_running),
        ..stable.clone()
    }
}

impl Book {
    /// What a model's file entry is with what was promoted laid over it.
    fn stable(&self, model: &ModelDeployment) -> Version {
        let promoted = self.pages.get(&model.name).and_then(|page| page.promoted.as_ref());
        match promoted.filter(|promoted| promoted.fits(&model.stable)) {
            Some(promoted) => promoted.over(&model.stable),
            None => model.stable.clone(),
        }
    }

    /// The deployment that should run. `counts` says how many replicas each (model, version) has now.
    pub fn over(&self, file: &Deployment, counts: &BTreeMap<(String, String), u32>) -> Deployment {
        let mut deployment = file.clone();
        for model in &mut deployment.models {
            model.stable = self.stable(model);
            let Some(runner) = self.pages.get(&model.name).and_then(Page::under_way) else { continue };
            if runner.runs_both() {
                let key = (model.name.clone(), model.stable.name.clone());
                let count = counts.get(&key).copied().unwrap_or(model.stable.min);
                let version = candidate(&runner.rollout.spec, &model.stable, runner.grown(), count);
                model.canary = Some(Canary { version, weight: runner.weights().1 });
            }
        }
        deployment
    }

    /// The source that a rollout under way needs.
    pub fn source(&self, file: &Deployment, model: &str) -> Option<String> {
        let runner = self.pages.get(model)?.under_way()?;
        let stable = file.models.iter().find(|m| m.name == model).map(|m| self.stable(m))?;
        Some(runner.rollout.spec.source.clone().unwrap_or(stable.source))
    }

    /// Checks a rollout that is to be started; the incumbent's name where it can be.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn check(&self, file: &Deployment, spec: &Spec) -> Result<String, StartError> {
        spec.check()?;
        let name = || spec.model.clone();
        let Some(model) = file.models.iter().find(|model| model.name == spec.model) else {
            let names: Vec<_> = file.models.iter().map(|model| model.name.as_str()).collect();
            return Err(StartError::NoModel(name(), names.join(", ")));
        };
        if model.canary.is_some() {
            return Err(StartError::Canary(name()));
        }
        if self.pages.get(&spec.model).and_then(Page::under_way).is_some() {
            return Err(StartError::UnderWay(name()));
        }
        let stable = self.stable(model);
        if stable.name == spec.version || model.stable.name == spec.version {
            return Err(StartError::Version(name(), spec.version.clone()));
        }
        let new = candidate(spec, &stable, false, 1);
        let same = Version { name: stable.name.clone(), min: stable.min, max: stable.max, ..new };
        if same == stable {
            return Err(SpecError::Same.into());
        }
        Ok(stable.name)
    }

    /// Why an edit of the file can't be while rollouts are under way; none where it can.
    pub fn refuses(&self, before: &Deployment, after: &Deployment) -> Option<String> {
        let find = |deployment: &Deployment, name: &str| {
            deployment.models.iter().find(|model| model.name == name).cloned()
        };
        self.pages.iter().filter(|(_, page)| page.under_way().is_some()).find_map(|(name, _)| {
            let what = match (find(before, name), find(after, name)) {
                (Some(old), Some(new)) => {
                    let version = |m: &ModelDeployment| (m.stable.name.clone(), m.stable.source.clone());
                    match (version(&old) == version(&new), new.canary.is_some()) {
                        (true, false) => return None,
                        (false, _) => "gives it another version",
                        (true, true) => "gives it a canary",
                    }
                }
                _ => "takes it out",
            };
            Some(format!(
                "a rollout of {name:?} is under way and this edit {what}; end it first with: consort rollout abort {name}"
            ))
        })
    }

    /// Models whose rollout under way can't go on with this file, which was edited while nothing ran, and why.
    pub fn stranded(&self, file: &Deployment) -> Vec<(String, String)> {
        let under_way = self.pages.iter().filter_map(|(name, page)| Some((name, page.under_way()?)));
        let stranded = under_way.filter_map(|(name, runner)| {
            let incumbent = &runner.rollout.incumbent;
            let why = match file.models.iter().find(|model| model.name == *name) {
                None => "the file has the model no more".to_owned(),
                Some(model) if model.canary.is_some() => "the file gives the model a canary".to_owned(),
                Some(model) if self.stable(model).name != *incumbent => {
                    format!("the file's version is {:?} and no more {incumbent:?}", self.stable(model).name)
                }
                Some(_) => return None,
            };
            Some((name.clone(), why))
        });
        stranded.collect()
    }

    /// Forgets what was promoted over versions that the file has no more; the models.
    pub fn outdated(&mut self, file: &Deployment) -> Vec<String> {
        let mut gone = Vec::new();
        for (name, page) in &mut self.pages {
            let stable = file.models.iter().find(|model| model.name == *name).map(|model| &model.stable);
            let fits = page.promoted.as_ref().is_none_or(|p| stable.is_some_and(|stable| p.fits(stable)));
            if !fits {
                page.promoted = None;
                gone.push(name.clone());
            }
        }
        gone
    }

    /// Notes that a model's rollout has made its candidate the model.
    pub fn promote(&mut self, file: &Deployment, name: &str) {
        let Some(model) = file.models.iter().find(|model| model.name == name) else { return };
        let stable = self.stable(model);
        let Some(page) = self.pages.get_mut(name) else { return };
        let Some(runner) = page.runner.as_ref().filter(|r| r.rollout.stage == Stage::Promoted) else {
            return;
        };
        let spec = &runner.rollout.spec;
        let before = page.promoted.take().filter(|promoted| promoted.fits(&model.stable));
        let kept = before.map_or((None, None, None), |p| (p.threads, p.context, p.max_running));
        page.promoted = Some(Promoted {
            file_version: model.stable.name.clone(),
            file_source: model.stable.source.clone(),
            version: spec.version.clone(),
            source: spec.source.clone().unwrap_or(stable.source),
            threads: spec.threads.or(kept.0),
            context: spec.context.or(kept.1),
            max_running: spec.max_running.or(kept.2),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::{Deadlines, Event, Seen, Thresholds};
    use super::*;

    fn spec(version: &str, source: Option<&str>) -> Spec {
        Spec {
            model: "chat".into(),
            version: version.into(),
            source: source.map(str::to_owned),
            threads: None,
            context: None,
            max_running: None,
            replicas: 1,
            steps: vec![50],
            bake: Duration::ZERO,
            shadow: 0,
            thresholds: Thresholds::default(),
        }
    }

    /// Takes a rollout to its end by hand.
    fn promoted(book: &mut Book, file: &Deployment, spec: Spec) {
        let incumbent = book.check(file, &spec).unwrap();
        let (now, deadlines) =
            (Instant::now(), Deadlines { start: Duration::from_secs(1), route: Duration::from_secs(1) });
        let mut runner = Runner::start(spec, incumbent, now, 0);
        let seen = Seen { ready: 1, wanted: 1, ..Seen::default() };
        for event in
            [Event::Located(Ok(())), Event::Promote, Event::Tick(&seen, &seen), Event::Tick(&seen, &seen)]
        {
            runner.step(now, 0, deadlines, &event);
        }
        assert_eq!(runner.rollout.stage, Stage::Promoted);
        book.pages.entry("chat".into()).or_default().runner = Some(runner);
        book.promote(file, "chat");
    }

    #[test]
    fn a_candidate_runs_beside_and_then_instead_until_the_file_says_otherwise() {
        let mut file = Deployment::of("chat", "old", 3);
        let (mut book, none) = (Book::default(), BTreeMap::new());
        let runner = Runner::start(spec("v2", Some("new")), "stable".into(), Instant::now(), 0);
        book.pages.entry("chat".into()).or_default().runner = Some(runner);
        assert_eq!(book.over(&file, &none), file, "its model is looked for yet");
        let deadlines = Deadlines { start: Duration::from_secs(1), route: Duration::from_secs(1) };
        let page = book.pages.get_mut("chat").unwrap();
        page.runner.as_mut().unwrap().step(Instant::now(), 0, deadlines, &Event::Located(Ok(())));
        let both = book.over(&file, &none);
        let canary = both.models[0].canary.as_ref().unwrap();
        assert_eq!((canary.version.min, canary.version.max, canary.weight), (1, 1, 0));
        page_promotes(&mut book);
        let both = book.over(&file, &BTreeMap::from([(("chat".into(), "stable".into()), 3)]));
        assert_eq!(both.models[0].canary.as_ref().unwrap().version.min, 3, "as many as the incumbent");

        let mut book = Book::default();
        promoted(&mut book, &file, spec("v2", Some("new")));
        let now = book.over(&file, &none);
        assert_eq!((now.models[0].stable.name.as_str(), now.models[0].stable.source.as_str()), ("v2", "new"));
        assert_eq!(now.models[0].stable.max, 3);
        let record = serde_json::to_string(&book.pages["chat"].record()).unwrap();
        let record: Record = serde_json::from_str(&record).unwrap();
        assert_eq!(record, book.pages["chat"].record());

        // A second one on top, which keeps the source and changes a setting.
        let slow = Spec { threads: Some(1), ..spec("v3", None) };
        promoted(&mut book, &file, slow);
        let now = book.over(&file, &none);
        assert_eq!((now.models[0].stable.source.as_str(), now.models[0].stable.threads), ("new", Some(1)));
        file.models[0].stable.max_queued = 7;
        assert!(book.outdated(&file).is_empty(), "other settings go on applying");
        assert_eq!(book.over(&file, &none).models[0].stable.max_queued, 7);
        file.models[0].stable.source = "newest".into();
        assert_eq!(book.outdated(&file), ["chat"]);
        assert_eq!(book.over(&file, &none), file);
    }

    fn page_promotes(book: &mut Book) {
        let deadlines = Deadlines { start: Duration::from_secs(1), route: Duration::from_secs(1) };
        let runner = book.pages.get_mut("chat").unwrap().runner.as_mut().unwrap();
        assert!(runner.step(Instant::now(), 0, deadlines, &Event::Promote));
    }

    #[test]
    fn what_cannot_be_started_or_edited_is_refused_with_the_cure() {
        let file = Deployment::of("chat", "old", 1);
        let mut book = Book::default();
        let said =
            |book: &Book, file: &Deployment, spec: &Spec| book.check(file, spec).unwrap_err().to_string();
        assert!(
            said(&book, &file, &Spec { model: "cat".into(), ..spec("v2", None) }).contains("there is: chat")
        );
        assert!(said(&book, &file, &spec("v2", None)).contains("what runs already"));
        assert!(said(&book, &file, &spec("v2", Some("old"))).contains("what runs already"));
        assert!(said(&book, &file, &spec("stable", Some("new"))).contains("--version"));
        let mut own = file.clone();
        own.models[0].canary = Some(Canary { version: Version::new("canary", "new", 1), weight: 5 });
        assert!(said(&book, &own, &spec("v2", Some("new"))).contains("[models.chat.canary]"));
        let runner = Runner::start(spec("v2", Some("new")), "stable".into(), Instant::now(), 0);
        book.pages.entry("chat".into()).or_default().runner = Some(runner);
        assert!(said(&book, &file, &spec("v3", Some("new"))).contains("consort rollout abort chat"));

        assert!(book.refuses(&file, &own).unwrap().contains("canary"));
        assert!(
            book.refuses(&file, &Deployment::of("chat", "other", 1)).unwrap().contains("another version")
        );
        assert!(book.refuses(&file, &Deployment::of("cat", "old", 1)).unwrap().contains("takes it out"));
        assert_eq!(book.refuses(&file, &Deployment::of("chat", "old", 4)), None);

        // The same edits, made while nothing ran.
        assert!(book.stranded(&own)[0].1.contains("canary"));
        assert!(book.stranded(&Deployment::of("cat", "old", 1))[0].1.contains("no more"));
        let mut renamed = file.clone();
        renamed.models[0].stable.name = "other".into();
        assert!(book.stranded(&renamed)[0].1.contains("\"other\""));
        assert!(book.stranded(&Deployment::of("chat", "old", 4)).is_empty());
    }
}

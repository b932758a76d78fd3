//! How one replica is started, and which replicas a deployment wants.

use std::collections::BTreeMap;
use std::path::PathBuf;

use consort_api::deployment::{Deployment, Version};

/// How one replica is started. Two replicas with equal launches are interchangeable; a replica whose launch is not
/// the one wanted any more is replaced by one that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The name that requests use.
    pub model: String,
    /// The version of that model.
    pub version: String,
    /// The file or folder.
    pub path: PathBuf,
    /// What that file was when it was looked at: a model that is replaced on disk is another launch.
    pub stamp: String,
    /// Compute threads.
    pub threads: u16,
    /// Longest sequence in tokens.
    pub context: Option<u32>,
    /// Memory for keys and values.
    pub kv_bytes: Option<u64>,
    /// Requests at once.
    pub max_running: u32,
    /// Requests that may wait.
    pub max_queued: u32,
    /// Whether prompts reuse what earlier ones had in common.
    pub prefix_cache: bool,
    /// What a stream may still get while the replica drains.
    pub drain_tokens: u32,
    /// Seconds from being told to stop to being stopped.
    pub drain_seconds: u64,
    /// Counts the restarts that were asked for.
    pub revision: u64,
}

/// A place for one replica: `chat-0`, `chat@canary-1`.
///
/// The last `-N` is the index and `@` is in no name, so two slots never share a text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The model's name.
    pub model: String,
    /// The version's name; `stable` is not shown.
    pub version: String,
    /// From 0.
    pub index: u32,
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.version.as_str() {
            "stable" => write!(f, "{}-{}", self.model, self.index),
            version => write!(f, "{}@{version}-{}", self.model, self.index),
        }
    }
}

/// A model's file as it is on disk now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Where it is.
    pub path: PathBuf,
    /// Changes when the file does.
    pub stamp: String,
}

/// The launch of every replica wanted. `located` maps a source to its file; `counts` says how many replicas each
/// (model, version) should have; sources that weren't located have none.
pub fn wanted(
    deployment: &Deployment,
    located: &BTreeMap<String, Located>,
    counts: &BTreeMap<(String, String), u32>,
    cores: u16,
    revision: u64,
) -> BTreeMap<Slot, Launch> {
    let versions = || {
        deployment.models.iter().flat_map(|model| {
            let canary = model.canary.as_ref().map(|canary| &canary.version);
            std::iter::once(&model.stable).chain(canary).map(|version| (model.name.as_str(), version))
        })
    };
    let count = |model: &str, version: &Version| {
        let count = counts.get(&(model.to_owned(), version.name.clone())).copied().unwrap_or(version.min);
        count.clamp(version.min, version.max)
    };
    let asked: Vec<_> = versions().map(|(model, version)| (count(model, version), version.threads)).collect();
    let shared = crate::threads::share(cores, &asked);
    let mut wanted = BTreeMap::new();
    for (model, version) in versions() {
        let Some(file) = located.get(&version.source) else { continue };
        for index in 0..count(model, version) {
            let slot = Slot { model: model.to_owned(), version: version.name.clone(), index };
            let launch = Launch {
                model: model.to_owned(),
                version: version.name.clone(),
                path: file.path.clone(),
                stamp: file.stamp.clone(),
                threads: version.threads.unwrap_or(shared),
                context: version.context,
                kv_bytes: version.kv_bytes,
                max_running: version.max_running,
                max_queued: version.max_queued,
                prefix_cache: version.prefix_cache,
                drain_tokens: deployment.drain_tokens,
                drain_seconds: deployment.timeouts.drain.as_secs(),
                revision,
            };
            wanted.insert(slot, launch);
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_all_versions_share_the_cores() {
        let mut deployment = Deployment::of("chat", "m", 2);
        let mut canary = Version::new("canary", "n", 1);
        canary.max = 3;
        deployment.models[0].canary = Some(consort_api::deployment::Canary { version: canary, weight: 5 });
        let file = |path: &str| Located { path: path.into(), stamp: String::new() };
        let mut located = BTreeMap::from([("m".to_owned(), file("/m")), ("n".to_owned(), file("/n"))]);
        let counts = BTreeMap::from([(("chat".to_owned(), "canary".to_owned()), 9)]);
        let slots = wanted(&deployment, &located, &counts, 10, 0);
        let names: Vec<_> = slots.keys().map(Slot::to_string).collect();
        assert_eq!(names, ["chat@canary-0", "chat@canary-1", "chat@canary-2", "chat-0", "chat-1"]);
        assert!(slots.values().all(|launch| launch.threads == 2));
        located.remove("n");
        assert_eq!(wanted(&deployment, &located, &counts, 10, 0).len(), 2);
    }
}

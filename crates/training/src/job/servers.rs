//! `[servers]`: how a job with `sync = "server"` keeps its weights, and what of that can't be.

use std::ops::Range;
use std::time::Duration;

use consort_config::values::{choice, count, duration, whole};
use consort_config::{Problem, Section};

use super::Train;
use crate::server::{Aggregate, Mode, Replication};

/// Groups of micro-batches that a step may have.
const MOST_GROUPS: usize = 1 << 10;

/// Parameter servers of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Servers {
    /// Processes, and shards: each server is the primary of one and the backup of another.
    pub count: usize,
    /// When workers see each other's updates.
    pub mode: Mode,
    /// What becomes of a step's gradients.
    pub aggregate: Aggregate,
    /// When a push is acknowledged.
    pub replication: Replication,
    /// How long a group may take before a worker with nothing to do computes it too; zero: for ever.
    pub speculate: Duration,
    /// Micro-batches that a worker claims, and pushes, at once: a group. `None`: one.
    pub claim: Option<usize>,
}

impl Default for Servers {
    /// Two that wait for each other.
    fn default() -> Servers {
        Servers {
            count: 2,
            mode: Mode::Synchronous,
            aggregate: Aggregate::Mean,
            replication: Replication::Sync,
            speculate: Duration::ZERO,
            claim: None,
        }
    }
}

impl Servers {
    /// Whether the weights are the same bits for any number of workers: what `exact` promises.
    pub fn exact(&self) -> bool {
        self.mode == Mode::Synchronous && self.aggregate == Aggregate::Mean
    }

    /// The groups of a step that workers claim, and the micro-batches of each. Where gradients are compared, every worker gives
    /// one, so that one that is wrong is one of them.
    ///
    /// # Errors
    /// Why `workers` workers can't share a step so, and what would help.
    pub fn groups(&self, train: &Train, workers: usize) -> Result<(u64, u64), String> {
        let all = train.batch / train.micro_batch.max(1);
        if self.aggregate == Aggregate::Mean {
            let each = match self.claim {
                Some(each) => each,
                None => (1..=all).find(|n| all.is_multiple_of(*n) && all / n <= MOST_GROUPS).unwrap_or(all),
            };
            return Ok(((all / each.max(1)) as u64, each as u64));
        }
        let name = name(self.aggregate);
        let (needs, why) = match self.aggregate {
            Aggregate::Mean => (1, String::new()),
            Aggregate::Median => (3, "fewer than half may be wrong".to_owned()),
            Aggregate::TrimmedMean { wrong } => {
                (2 * wrong + 1, format!("2 × wrong + 1, and wrong = {wrong}"))
            }
            Aggregate::Krum { wrong } => (2 * wrong + 3, format!("2 × wrong + 3, and wrong = {wrong}")),
        };
        if (workers as u64) < needs {
            return Err(format!(
                "`aggregate = \"{name}\"` in [servers] compares the gradients of at least {needs} workers ({why}); this job has \
                 {workers}: take {needs} workers or more, or make `wrong` smaller, or set `aggregate = \"mean\"`"
            ));
        }
        if matches!(self.aggregate, Aggregate::Krum { .. }) && workers > 64 {
            return Err(format!(
                "`aggregate = \"krum\"` in [servers] compares every two of at most 64 gradients, and this job has {workers} \
                 workers: take 64, or set `aggregate = \"trimmed_mean\"`"
            ));
        }
        if !all.is_multiple_of(workers) {
            return Err(format!(
                "`aggregate = \"{name}\"` in [servers] compares one gradient of each worker, and {workers} workers can't share \
                 {} / {} = {all} micro-batches evenly: make [train]'s `batch` {}",
                train.batch,
                train.micro_batch,
                all.next_multiple_of(workers) * train.micro_batch
            ));
        }
        Ok((workers as u64, (all / workers) as u64))
    }
}

/// As the file has it.
fn name(aggregate: Aggregate) -> &'static str {
    match aggregate {
        Aggregate::Mean => "mean",
        Aggregate::Median => "median",
        Aggregate::TrimmedMean { .. } => "trimmed_mean",
        Aggregate::Krum { .. } => "krum",
    }
}

/// What [train] says of adding gradients.
#[derive(Clone, Debug, Default)]
pub(super) struct Sync {
    /// `sync = "server"`.
    pub(super) servers: bool,
    /// Where `exact` stands.
    pub(super) exact: Option<Range<usize>>,
    /// Keys that only the ring has, and where they stand.
    pub(super) ring: Vec<(&'static str, Range<usize>)>,
}

/// Reads the table, or what holds without it, against what [train] says.
pub(super) fn servers(
    section: Option<Section<'_>>,
    train: &Train,
    sync: &Sync,
    problems: &mut Vec<Problem>,
) -> Option<Servers> {
    if !sync.servers {
        if let Some(section) = section {
            problems.push(Problem {
                span: section.header(),
                message: "[servers] in a job whose workers have none".into(),
                label: "nothing would read it".into(),
                help: Some("set `sync = \"server\"` in [train], or remove this table".into()),
            });
        }
        return None;
    }
    for (key, span) in &sync.ring {
        problems.push(Problem {
            span: span.clone(),
            message: format!("`{key}` in a job with parameter servers"),
            label: "workers that add gradients among themselves have it".into(),
            help: Some("remove it, or set `sync = \"ring\"`".into()),
        });
    }
    let (servers, place) = match section {
        Some(section) => table(section, train, problems),
        None => (Servers::default(), None),
    };
    match (train.exact, servers.exact()) {
        (true, false) => {
            let (what, cure) = match servers.aggregate {
                Aggregate::Mean => ("updates that don't wait for each other", "mode = \"synchronous\""),
                _ => ("gradients that are compared", "aggregate = \"mean\""),
            };
            problems.push(Problem {
                span: place.unwrap_or(0..0),
                message: format!("{what} with exact sums"),
                label: "who computed what, and when, would change the result".into(),
                help: Some(format!("set `exact = false` in [train] to allow that, or `{cure}` here")),
            });
        }
        (false, true) => problems.push(Problem {
            span: sync.exact.clone().unwrap_or(0..0),
            message: "`exact = false` with servers whose sums are exact".into(),
            label: "a synchronous mean costs no more for being exact".into(),
            help: Some("remove it, or set `mode = \"asynchronous\"` in [servers]".into()),
        }),
        _ => {}
    }
    Some(servers)
}

/// And where it says that sums depend on more than what is summed.
fn table(
    mut section: Section<'_>,
    train: &Train,
    problems: &mut Vec<Problem>,
) -> (Servers, Option<Range<usize>>) {
    let usual = Servers::default();
    let day = Duration::from_secs(86_400);
    let servers = section.get("count", usual.count as u32, problems, count(1, 64)).value as usize;
    let modes = &[("synchronous", 0u8), ("asynchronous", 1), ("bounded", 2)];
    let mode = section.get("mode", 0, problems, choice(modes));
    let staleness = section.get("staleness", 2, problems, whole(0, 1 << 20)).value;
    let aggregates = &[("mean", 0u8), ("median", 1), ("trimmed_mean", 2), ("krum", 3)];
    let aggregate = section.get("aggregate", 0, problems, choice(aggregates));
    let wrong = section.get("wrong", 1, problems, whole(0, 512)).value;
    let replications = &[("sync", false), ("async", true)];
    let lags = section.get("replication", false, problems, choice(replications)).value;
    let max_lag = section.get("max_lag", 16, problems, whole(1, 1 << 20)).value;
    let speculate = section.get("speculate", usual.speculate, problems, duration(Duration::ZERO, day)).value;
    let claim = section.get("claim", None, problems, |value| count(1, 4096)(value).map(Some));
    let servers = Servers {
        count: servers,
        mode: match mode.value {
            0 => Mode::Synchronous,
            1 => Mode::Asynchronous,
            _ => Mode::bounded(staleness),
        },
        aggregate: match aggregate.value {
            0 => Aggregate::Mean,
            1 => Aggregate::Median,
            2 => Aggregate::TrimmedMean { wrong },
            _ => Aggregate::Krum { wrong },
        },
        replication: if lags { Replication::Async { max_lag } } else { Replication::Sync },
        speculate,
        claim: claim.value.map(|claim| claim as usize),
    };
    let compares = servers.aggregate != Aggregate::Mean;
    let mut refuse = |span: Range<usize>, message: String, label: &str, help: String| {
        problems.push(Problem { span, message, label: label.into(), help: Some(help) });
    };
    if compares && servers.mode != Mode::Synchronous {
        refuse(
            section.place("aggregate"),
            format!("`aggregate = \"{}\"` where nobody waits for gradients", name(servers.aggregate)),
            "only a synchronous step has gradients to compare",
            "set `mode = \"synchronous\"`, or remove it".into(),
        );
    }
    let counts = matches!(servers.aggregate, Aggregate::TrimmedMean { .. } | Aggregate::Krum { .. });
    let idle = [
        ("staleness", mode.value == 2, "mode = \"bounded\""),
        ("wrong", counts, "aggregate = \"trimmed_mean\"` or `\"krum\""),
        ("max_lag", lags, "replication = \"async\""),
        (
            "speculate",
            servers.exact() || speculate.is_zero(),
            "mode = \"synchronous\"` and `aggregate = \"mean\"",
        ),
        ("claim", !compares, "aggregate = \"mean\""),
    ];
    for (key, _, with) in idle.into_iter().filter(|(key, read, _)| !read && section.has(key)) {
        refuse(
            section.place(key),
            format!("`{key}` without `{with}`"),
            "nothing would read it",
            format!("remove it, or set `{with}`"),
        );
    }
    let all = train.batch / train.micro_batch.max(1);
    if let Some(each) = servers.claim.filter(|each| !all.is_multiple_of(*each) || all / each > MOST_GROUPS) {
        let near = (1..=all).filter(|n| all.is_multiple_of(*n) && all / n <= MOST_GROUPS);
        let near = near.min_by_key(|n| n.abs_diff(each)).unwrap_or(all);
        refuse(
            claim.span.clone().unwrap_or(0..0),
            format!(
                "a step of {} / {} = {all} micro-batches, claimed {each} at a time",
                train.batch, train.micro_batch
            ),
            "a step has whole claims, 1024 at most",
            format!("`claim = {near}` would do"),
        );
    }
    let place = if compares { section.place("aggregate") } else { section.place("mode") };
    section.finish(problems);
    (servers, Some(place))
}

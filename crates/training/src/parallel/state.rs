//! Who has the newest state, and how the others get it.
//!
//! After every change of members each worker says where it stands. The newest state wins, and among equals the lowest
//! rank's; whoever is not there gets weights, optimizer and grids from that worker's memory, in chunks with a BLAKE3 sum
//! each. Nothing comes from a disk. Where sums depend on who computed them (not exact), two workers may have taken the
//! same number of steps to different weights: one was cut off when it took its last. So a state has a *lineage*, a hash
//! over the beginning and over every epoch in which a step was taken.

use consort_collectives::{Error as GroupError, Group};
use consort_tensor::train::exact::Grid;
use serde_json::{Map, Value};

use super::board::{Activity, Board};
use super::link::{Link, Standing};
use super::worker::Fail;
use crate::{Error, Trainer};

/// Values of a chunk: 16 MB.
const CHUNK: usize = 4 << 20;
/// The longest description of a job that is read.
const MAX_IDENTITY: u64 = 1 << 20;
/// What a bucket's largest gradient is taken for before one was seen: a sum over the rows of a micro-batch.
const FIRST_LARGEST: f32 = 64.0;

/// Where a worker stands between two steps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct State {
    /// Steps taken.
    pub(super) step: u64,
    /// How often the next step was begun on other grids.
    pub(super) attempt: u64,
    /// A hash of how it came here.
    pub(super) lineage: u64,
    /// The bits of the last gradient's length.
    pub(super) check: i64,
    /// Each bucket's grid for the next step.
    pub(super) grids: Vec<Grid>,
    /// Weights and optimizer are those of `step`: no transfer was cut short.
    pub(super) whole: bool,
}

/// Words that a worker says of its state.
const WORDS: usize = 5;

impl State {
    pub(super) fn first(trainer: &Trainer) -> State {
        let mut hasher = blake3::Hasher::new();
        hash(trainer.weights(), &mut hasher);
        hasher.update(&trainer.steps().to_le_bytes());
        let grids = vec![Grid::for_largest(FIRST_LARGEST); trainer.decoder().layout().buckets().len()];
        State { step: trainer.steps(), attempt: 0, lineage: word(&hasher), check: 0, grids, whole: true }
    }

    /// A step was taken in `epoch`; `None` where it doesn't matter in which.
    pub(super) fn advance(&mut self, epoch: Option<u64>) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.lineage.to_le_bytes());
        hasher.update(&epoch.unwrap_or(0).to_le_bytes());
        self.lineage = word(&hasher);
        self.step += 1;
        self.attempt = 0;
    }

    /// Grids as a checkpoint keeps them.
    pub(super) fn exponents(&self) -> Vec<i32> {
        self.grids.iter().map(|grid| grid.exponent()).collect()
    }

    fn words(&self, digest: u64) -> [u64; WORDS] {
        [u64::from(self.whole), self.step, self.attempt, self.lineage, digest]
    }
}

fn word(hasher: &blake3::Hasher) -> u64 {
    let hash = hasher.finalize();
    u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
}

/// A number that differs where `identity` does.
pub(super) fn digest(identity: &Map<String, Value>) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for (name, value) in identity {
        hasher.update(format!("{name}={value}\n").as_bytes());
    }
    word(&hasher)
}

/// Adds values to a hash, as little-endian bytes.
pub(super) fn hash(values: &[f32], hasher: &mut blake3::Hasher) {
    let mut bytes = vec![0u8; 64 << 10];
    for values in values.chunks(bytes.len() / 4) {
        for (bytes, value) in bytes.chunks_exact_mut(4).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        hasher.update(&bytes[..4 * values.len()]);
    }
}

/// The first setting in which two jobs differ.
pub(super) fn difference(
    ours: &Map<String, Value>,
    theirs: &Map<String, Value>,
    whose: &str,
    cure: &'static str,
) -> Option<Error> {
    let missing = Value::Null;
    let name = ours.keys().chain(theirs.keys()).find(|name| ours.get(*name) != theirs.get(*name))?;
    let text = |map: &Map<String, Value>| map.get(name).unwrap_or(&missing).to_string();
    let (ours, theirs) = (text(ours), text(theirs));
    Some(Error::AnotherJob { whose: whose.to_owned(), name: name.clone(), theirs, ours, cure })
}

/// What the workers said.
#[derive(Clone, Debug)]
struct Table(Vec<[u64; WORDS]>);

impl Table {
    /// Who has the newest state: whole, most steps, most attempts; the lowest rank of several.
    fn source(&self) -> Option<usize> {
        let newest = self.0.iter().filter(|w| w[0] == 1).map(|w| (w[1], w[2])).max()?;
        self.0.iter().position(|w| w[0] == 1 && (w[1], w[2]) == newest)
    }

    /// Who has another state than `source`.
    fn behind(&self, source: usize) -> Vec<usize> {
        let state = |rank: usize| &self.0[rank][..4];
        (0..self.0.len()).filter(|rank| state(*rank) != state(source)).collect()
    }
}

/// Everyone ends with the newest state. Says how many bytes this worker received.
pub(super) fn agree(
    link: &Link,
    standing: Standing,
    identity: &Map<String, Value>,
    state: &mut State,
    trainer: &mut Trainer,
    board: &Board,
) -> Result<u64, Fail> {
    let Standing { epoch, rank, workers } = standing;
    let own = state.words(digest(identity));
    let said = link.start(epoch, "agreement on the state".into(), move |group| {
        let mut words = vec![0; WORDS * workers];
        words[rank * WORDS..][..WORDS].copy_from_slice(&own);
        group.all_gather_uneven(&mut words, &vec![WORDS; workers]).map(|()| words)
    });
    let words = said.wait()?;
    let table = Table(words.as_chunks::<WORDS>().0.to_vec());
    let Some(source) = table.source() else {
        let what = "no worker that is left has a whole state; go on from the last checkpoint (--resume)";
        return Err(Error::Disagreement(what.into()).into());
    };
    if table.0.iter().any(|words| words[4] != table.0[source][4]) {
        same_job(link, standing, identity, source)?;
    }
    let behind = table.behind(source);
    if behind.is_empty() {
        return Ok(0);
    }
    let mut transfer = Transfer {
        link,
        standing,
        source,
        ranks: std::iter::once(source).chain(behind.iter().copied()).collect(),
        receives: behind.contains(&rank),
        board,
        bytes: 0,
        total: 0,
        step: table.0[source][1],
    };
    transfer.state(state, trainer)?;
    Ok(if transfer.receives { transfer.bytes } else { 0 })
}

/// Compares this worker's job with the source's.
fn same_job(
    link: &Link,
    standing: Standing,
    identity: &Map<String, Value>,
    source: usize,
) -> Result<(), Fail> {
    let own = Value::Object(identity.clone()).to_string().into_bytes();
    let text = link.start(standing.epoch, "comparison of jobs".into(), move |group| {
        let mut len = [own.len() as u64];
        group.broadcast(&mut len, source)?;
        if len[0] > MAX_IDENTITY {
            let what = format!("a description of a job of {} bytes", len[0]);
            return Err(GroupError::Broken { reason: what });
        }
        let mut text = own;
        text.resize(len[0] as usize, 0);
        group.broadcast(&mut text, source).map(|()| text)
    });
    let text = text.wait()?;
    let theirs: Map<String, Value> = serde_json::from_slice(&text).map_err(|error| {
        Error::Disagreement(format!("rank {source} describes its job in no JSON: {error}"))
    })?;
    let cure = "start all workers with the same job file, data and version";
    match difference(identity, &theirs, &format!("worker {source}"), cure) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

struct Transfer<'a> {
    link: &'a Link,
    standing: Standing,
    source: usize,
    /// The source, then who receives.
    ranks: Vec<usize>,
    receives: bool,
    board: &'a Board,
    bytes: u64,
    total: u64,
    step: u64,
}

impl Transfer<'_> {
    fn state(&mut self, state: &mut State, trainer: &mut Trainer) -> Result<(), Fail> {
        if self.receives {
            state.whole = false;
        }
        let parts = trainer.state_mut();
        self.total = 4 * (parts.weights.len() * (1 + parts.optimizer.len())) as u64;
        let grids = state.grids.iter().map(|grid| i64::from(grid.exponent()) as u64);
        let words = [state.step, state.attempt, state.lineage, state.check as u64, *parts.steps];
        let mut words: Vec<u64> = words.into_iter().chain(grids).collect();
        let source = self.source;
        let head = self.link.start(self.standing.epoch, "the state's head".into(), move |group| {
            group.broadcast(&mut words, source).map(|()| words)
        });
        let head = head.wait()?;
        self.values(parts.weights)?;
        for buffer in parts.optimizer {
            self.values(buffer)?;
        }
        if let ([step, attempt, lineage, check, steps], true) = (&head[..5], self.receives) {
            *parts.steps = *steps;
            let grids = head[5..].iter().map(|word| Grid::from_exponent(*word as i64 as i32)).collect();
            let (step, attempt, lineage, check) = (*step, *attempt, *lineage, *check as i64);
            *state = State { step, attempt, lineage, check, grids, whole: true };
        }
        Ok(())
    }

    fn values(&mut self, values: &mut [f32]) -> Result<(), Fail> {
        for chunk in values.chunks_mut(CHUNK) {
            self.chunk(chunk)?;
            self.bytes += 4 * chunk.len() as u64;
            let (bytes, total) = (self.bytes, self.total);
            if self.receives {
                self.board.doing(self.step, Activity::Receiving { from: self.source, bytes, total });
            } else if self.standing.rank == self.source {
                self.board.doing(self.step, Activity::Sending { bytes, total });
            }
        }
        Ok(())
    }

    fn chunk(&self, values: &mut [f32]) -> Result<(), Fail> {
        let sends = self.standing.rank == self.source;
        let mut sum = if sends { sum(values) } else { [0; 4] };
        let ranks = self.ranks.clone();
        let len = values.len();
        let mut copy = if sends { values.to_vec() } else { Vec::new() };
        let what = format!("the state, {} of {} bytes", self.bytes, self.total);
        let sent = self.link.start(self.standing.epoch, what, move |group: &mut Group| {
            if let Some(mut few) = group.subgroup(&ranks)? {
                copy.resize(len, 0.0);
                few.broadcast(&mut copy, 0)?;
                few.broadcast(&mut sum, 0)?;
            }
            // Those who need nothing wait here, chunk by chunk, so that no call waits for a whole model.
            group.barrier()?;
            Ok((copy, sum))
        });
        let (copy, announced) = sent.wait()?;
        if self.receives {
            if self::sum(&copy) != announced {
                let from = self.source;
                let what = format!("what worker {from} sent of its state did not arrive as it was (BLAKE3)");
                let operation = "transfer of the state".into();
                let error = Box::new(GroupError::Broken { reason: what });
                return Err(Fail::Link { operation, error });
            }
            values.copy_from_slice(&copy);
        }
        Ok(())
    }
}

fn sum(values: &[f32]) -> [u64; 4] {
    let mut hasher = blake3::Hasher::new();
    hash(values, &mut hasher);
    let bytes = *hasher.finalize().as_bytes();
    std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|j| bytes[8 * i + j])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_state_wins_and_others_are_behind() {
        let table = Table(vec![[1, 4, 0, 7, 0], [1, 5, 0, 8, 0], [1, 5, 0, 8, 0], [0, 6, 0, 9, 0]]);
        assert_eq!(table.source(), Some(1));
        assert_eq!(table.behind(1), [0, 3]);
        // As many steps, but taken elsewhere.
        assert_eq!(Table(vec![[1, 5, 0, 8, 0], [1, 5, 0, 9, 0]]).behind(0), [1]);
        // The same step on newer grids.
        assert_eq!(Table(vec![[1, 5, 0, 8, 0], [1, 5, 1, 8, 0]]).source(), Some(1));
        assert_eq!(Table(vec![[0, 5, 0, 8, 0]]).source(), None);
    }

    #[test]
    fn a_difference_is_named() {
        let map = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let ours = map(r#"{"seed": 1, "samples": 4}"#);
        assert!(difference(&ours, &ours.clone(), "the checkpoint", "cure").is_none());
        let theirs = map(r#"{"seed": 1, "samples": 5}"#);
        let error = difference(&ours, &theirs, "the checkpoint", "change it").unwrap().to_string();
        assert_eq!(error, "the checkpoint has samples = 5, this job has 4: change it");
        let less = map(r#"{"seed": 1}"#);
        assert!(difference(&ours, &less, "x", "").unwrap().to_string().contains("samples = null"));
        assert_ne!(digest(&ours), digest(&theirs));
    }
}

//! What a job's shards hold: given to them at its beginning, and fetched for checkpoints and at its end.

use std::time::{Duration, Instant};

use consort_collectives::link;

use super::Lead;
use crate::Error;
use crate::parallel::Control;
use crate::server::coordinator::Start;
use crate::server::op::{Op, Outcome};
use crate::server::spec::{Mode, Spec};
use crate::server::wire::{Answer, Order};

/// Times that the shards are read anew because a step ended meanwhile.
const FETCHES: usize = 5;
/// Times that the shards are loaded: again after each death of a server that took its part with it.
const LOADS: usize = 16;
/// How often it is looked whether every shard has a backup; a change wakes earlier.
const LOOK: Duration = Duration::from_millis(50);

/// How far the loading of the shards is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loading {
    /// This bucket comes next.
    Piece {
        /// Which.
        piece: usize,
        /// Of so many.
        of: usize,
    },
    /// All are loaded; backups get their copies.
    Backups,
}

/// Everything that a job's shards hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Holdings {
    /// Steps taken.
    pub steps: u64,
    /// Steps of the optimizer.
    pub updates: u64,
    /// The weights, bucket after bucket.
    pub weights: Vec<f32>,
    /// The optimizer's buffers, each as long as the weights; empty for one that has taken no step.
    pub state: Vec<Vec<f32>>,
    /// The grid of each bucket, of a synchronous job with exact sums.
    pub exponents: Vec<i32>,
}

impl Holdings {
    /// BLAKE3 of the weights, as hexadecimal digits.
    pub fn weights_hash(&self) -> String {
        blake3::hash(link::bytes(&self.weights)).to_hex().to_string()
    }
}

impl Lead {
    /// Gives the shards what the job begins with, once the servers are there, and waits until each has a backup. See
    /// [`Lead::load_watched`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&self, begin: &Holdings) -> Result<(), Error> {
        self.load_watched(begin, &mut |_| Control::Go)
    }

    /// The same; `watch` hears of it and may stop it. A server that dies meanwhile loses nothing: whoever gets its place is
    /// given the same again, and what a server has already it takes for known. Where backups don't come in time, the job
    /// begins without.
    ///
    /// # Errors
    /// [`Error::Setting`] for weights of another length, [`Error::Server`] where no servers come in half a minute or they die
    /// again and again, [`Error::Ended`] where `watch` says [`Control::Stop`].
    pub fn load_watched(
        &self,
        begin: &Holdings,
        watch: &mut dyn FnMut(Loading) -> Control,
    ) -> Result<(), Error> {
        let spec = &self.shared.spec;
        let len: usize = spec.buckets.iter().map(|bucket| bucket.len).sum();
        let state = begin.state.is_empty() || begin.state.len() == spec.buffers();
        if begin.weights.len() != len || !state || begin.state.iter().any(|state| state.len() != len) {
            let value = format!("{} values and {} buffers", begin.weights.len(), begin.state.len());
            return Err(Error::Setting { name: "weights", value, expected: "as many as the job has" });
        }
        let mut watch = |loading| match watch(loading) {
            Control::Go => Ok(()),
            Control::Stop => Err(Error::Ended),
        };
        for _ in 0..LOADS {
            let epochs = self.load_once(begin, &mut watch)?;
            let until = Instant::now() + self.connect.patience;
            loop {
                let bare = Instant::now() >= until;
                match self.shared.lock().coordinator.begin(&epochs, bare) {
                    Start::Begun => {
                        self.shared.changed.notify_all();
                        return Ok(());
                    }
                    Start::Reload => break,
                    Start::Wait => {}
                }
                watch(Loading::Backups)?;
                drop(self.shared.wait(self.shared.lock(), LOOK));
            }
        }
        Err(Error::Server(format!("servers died each of {LOADS} times that they got the first weights")))
    }

    /// The lowest epoch, of each shard, in which a primary had a bucket.
    fn load_once(
        &self,
        begin: &Holdings,
        watch: &mut dyn FnMut(Loading) -> Result<(), Error>,
    ) -> Result<Vec<u64>, Error> {
        let spec = &self.shared.spec;
        let mut shards = self.shards();
        let mut epochs = vec![u64::MAX; spec.shards.len()];
        let (mut start, of) = (0, spec.buckets.len());
        for (bucket, BucketPlace { shard, len }) in places(spec).into_iter().enumerate() {
            watch(Loading::Piece { piece: bucket, of })?;
            let range = start..start + len;
            start = range.end;
            let mut body = link::bytes(&begin.weights[range.clone()]).to_vec();
            for buffer in 0..spec.buffers() {
                match begin.state.get(buffer) {
                    Some(state) => body.extend_from_slice(link::bytes(&state[range.clone()])),
                    None => body.resize(body.len() + 4 * len, 0),
                }
            }
            let op = Op::Load { bucket, step: begin.steps, updates: begin.updates };
            let order = |epoch| Order::Change { shard, epoch, op: op.clone() };
            match shards.ask(shard, order, &body)?.0 {
                Answer::Outcome { outcome: Outcome::Refused(reason), .. } => {
                    return Err(Error::Server(reason));
                }
                Answer::Outcome { epoch, .. } => epochs[shard] = epochs[shard].min(epoch),
                other => return Err(Error::Server(format!("a server answers a load with {other:?}"))),
            }
        }
        Ok(epochs)
    }

    /// Everything that the shards hold now. Of one moment only where nothing is pushed: at the end, or while the job is
    /// held ([`Lead::held`]).
    ///
    /// # Errors
    /// [`Error::Server`] where a shard can't be reached.
    pub fn fetch(&self) -> Result<Holdings, Error> {
        // Synchronous steps that end meanwhile show in the buckets' own counts.
        for _ in 0..FETCHES {
            if let Some(all) = self.fetch_once()? {
                return Ok(all);
            }
        }
        Err(Error::Server("the shards moved on each time that they were read: hold the job first".into()))
    }

    fn fetch_once(&self) -> Result<Option<Holdings>, Error> {
        let spec = &self.shared.spec;
        let synchronous = spec.mode == Mode::Synchronous;
        let mut shards = self.shards();
        let (steps, exponents) = self.look(|coordinator| {
            let progress = coordinator.progress();
            (progress.steps(), progress.step().1.to_vec())
        });
        let mut all =
            Holdings { steps, state: vec![Vec::new(); spec.buffers()], exponents, ..Holdings::default() };
        for (bucket, BucketPlace { shard, len }) in places(spec).into_iter().enumerate() {
            let order = |epoch| Order::State { shard, epoch, bucket, step: steps };
            let (answer, message) = shards.ask(shard, order, &[])?;
            let Answer::Values { step, updates, .. } = answer else {
                return Err(Error::Server(format!(
                    "a server answers a question for its state with {answer:?}"
                )));
            };
            if synchronous && step != steps {
                return Ok(None);
            }
            let values =
                link::numbers::<f32>(&message.body).filter(|v| v.len() == len * (1 + spec.buffers()));
            let values =
                values.ok_or_else(|| Error::Server(format!("bucket {bucket} came with another length")))?;
            all.updates = if synchronous { updates } else { updates / spec.groups };
            all.weights.extend_from_slice(&values[..len]);
            for (state, values) in all.state.iter_mut().zip(values[len..].chunks_exact(len.max(1))) {
                state.extend_from_slice(values);
            }
        }
        Ok(Some(all))
    }
}

struct BucketPlace {
    shard: usize,
    len: usize,
}

/// Each bucket's shard and length.
fn places(spec: &Spec) -> Vec<BucketPlace> {
    let shard = |bucket| spec.shards.iter().position(|own| own.contains(&bucket)).unwrap_or_default();
    spec.buckets
        .iter()
        .enumerate()
        .map(|(i, bucket)| BucketPlace { shard: shard(i), len: bucket.len })
        .collect()
}

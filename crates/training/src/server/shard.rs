//! One shard: some buckets of the weights with their optimizer's state, and what has been pushed to them.
//!
//! A pure state machine. It changes by [`Op`]s alone, and the same ops in the same order give the same bits, which is
//! what its backup lives from. It decides by itself what is new, known or wrong, so that whoever is unsure sends again.
//!
//! In the synchronous mode a bucket waits for all groups of a step: `i64` sums on a grid, or a copy of each where
//! gradients are compared. It then reports [`Ready`] and moves on the coordinator's [`Decision`], which knows all
//! shards' norms. In the other modes a push moves the weights at once. Memory: weights and optimizer, and for each value
//! 12 bytes (sum and total), or 4 for each group compared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use consort_collectives::link;
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::exact::{Grid, add_sums};
use consort_tensor::train::optimizer::square_sum;

use super::aggregate::{distances, median, trimmed_mean};
use super::op::{Bits, Decision, Op, Outcome, Push, Ready, Terms};
use super::progress::ATTEMPTS;
use super::seen::Seen;
use super::spec::{Aggregate, Mode, Spec};
use crate::Error;
use crate::optimizer::Update;

/// Fenced workers that are remembered. They are named by numbers that only grow, and old ones have long gone.
const FENCED: usize = 4096;

/// What a shard has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Pushes that changed it.
    pub taken: u64,
    /// Pushes that were there already.
    pub known: u64,
    /// Pushes that held what is no number, and changed nothing.
    pub not_finite: u64,
}

/// Some buckets.
pub struct Shard {
    pub(super) spec: Arc<Spec>,
    /// Length of the log.
    pub(super) log: u64,
    pub(super) buckets: BTreeMap<usize, Bucket>,
    pub(super) fenced: BTreeSet<u64>,
    pub(super) counts: Counts,
}

/// A bucket's values and what was pushed to it.
pub(super) struct Bucket {
    pub(super) loaded: bool,
    /// Synchronous: steps taken. Else pushes taken.
    pub(super) step: u64,
    /// Steps of the optimizer.
    pub(super) updates: u64,
    pub(super) weights: Buffer<f32>,
    pub(super) state: Vec<Buffer<f32>>,
    /// Groups that count: in the synchronous mode, for the current try of the current step and all before it.
    pub(super) seen: Seen,
    pub(super) attempt: u32,
    pub(super) exponent: i32,
    pub(super) largest: u32,
    /// Sums of the current try; empty where gradients are compared.
    pub(super) sums: Buffer<i64>,
    /// Where gradients are compared: each group's.
    pub(super) held: BTreeMap<u64, Vec<f32>>,
    /// The gradient of a complete step.
    pub(super) total: Buffer<f32>,
    pub(super) ready: Option<Ready>,
}

impl Shard {
    /// Shard `index` of a job, with nothing in it.
    ///
    /// # Errors
    /// [`Error::Setting`] for a job that makes no sense, [`Error::Tensor`] where memory is refused.
    pub fn new(spec: Arc<Spec>, index: usize) -> Result<Shard, Error> {
        spec.check()?;
        let own = spec.shards.get(index).ok_or_else(|| Error::Setting {
            name: "shard",
            value: index.to_string(),
            expected: "one of the job's",
        })?;
        let buckets = own.iter().map(|&bucket| Ok((bucket, Bucket::new(&spec, spec.buckets[bucket].len)?)));
        let buckets = buckets.collect::<Result<_, Error>>()?;
        Ok(Shard { spec, log: 0, buckets, fenced: BTreeSet::new(), counts: Counts::default() })
    }

    /// Length of its log: changes since it was empty.
    pub fn log(&self) -> u64 {
        self.log
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether every bucket has its weights.
    pub fn loaded(&self) -> bool {
        self.buckets.values().all(|bucket| bucket.loaded)
    }

    /// Buckets whose step is complete.
    pub fn ready(&self) -> impl Iterator<Item = &Ready> {
        self.buckets.values().filter_map(|bucket| bucket.ready.as_ref())
    }

    /// Which groups count in each bucket: (bucket, try, groups).
    pub fn seen(&self) -> Vec<(usize, u32, Seen)> {
        self.buckets.iter().map(|(&index, bucket)| (index, bucket.attempt, bucket.seen.clone())).collect()
    }

    /// Whether nothing of this worker counts any more.
    pub fn fences(&self, worker: u64) -> bool {
        self.fenced.contains(&worker)
    }

    /// A bucket's steps and weights.
    pub fn weights(&self, bucket: usize) -> Option<(u64, &[f32])> {
        self.buckets.get(&bucket).filter(|b| b.loaded).map(|b| (b.step, &b.weights[..]))
    }

    /// A bucket's optimizer: its steps and what it remembers.
    pub fn state(&self, bucket: usize) -> Option<(u64, &[Buffer<f32>])> {
        self.buckets.get(&bucket).filter(|b| b.loaded).map(|b| (b.updates, &b.state[..]))
    }

    /// Takes one change, with the numbers that belong to it.
    pub fn apply(&mut self, pool: &Pool, op: &Op, body: &[u8]) -> Outcome {
        let outcome = match op {
            Op::Load { bucket, step, updates } => self.load(*bucket, (*step, *updates), body),
            Op::Push(push) => self.push(pool, push, body),
            Op::Apply(decision) => self.decide(pool, decision),
            Op::Fence { worker } => match self.fenced.insert(*worker) {
                true => {
                    if self.fenced.len() > FENCED {
                        self.fenced.pop_first();
                    }
                    Outcome::Taken
                }
                false => Outcome::Known,
            },
        };
        if outcome == Outcome::Taken {
            self.log += 1;
        }
        outcome
    }

    fn load(&mut self, index: usize, (step, updates): (u64, u64), body: &[u8]) -> Outcome {
        let Some(bucket) = self.buckets.get_mut(&index) else {
            return Outcome::Refused(format!("bucket {index} is not here"));
        };
        if bucket.loaded {
            return Outcome::Known;
        }
        let len = bucket.weights.len();
        let Some(values) = link::numbers::<f32>(body).filter(|v| v.len() == len * (1 + bucket.state.len()))
        else {
            return Outcome::Refused(format!("bucket {index} is loaded with {} bytes", body.len()));
        };
        bucket.weights.copy_from_slice(&values[..len]);
        for (state, values) in bucket.state.iter_mut().zip(values[len..].chunks_exact(len.max(1))) {
            state.copy_from_slice(values);
        }
        bucket.loaded = true;
        // Where every push moves the weights, a step is as many updates as it has groups.
        let each = if self.spec.mode == Mode::Synchronous { 1 } else { self.spec.groups };
        (bucket.step, bucket.updates) = (step * each, updates * each);
        bucket.seen = Seen::below(step * self.spec.groups);
        Outcome::Taken
    }

    fn push(&mut self, pool: &Pool, push: &Push, body: &[u8]) -> Outcome {
        let Some(bucket) = self.buckets.get_mut(&push.bucket).filter(|bucket| bucket.loaded) else {
            return Outcome::Refused(format!("bucket {} is not here", push.bucket));
        };
        if self.fenced.contains(&push.worker) {
            return Outcome::Refused(format!("worker {} was given up", push.worker));
        }
        if push.group >= self.spec.total() {
            return Outcome::Refused(format!("group {} of {}", push.group, self.spec.total()));
        }
        let known = match self.spec.mode {
            Mode::Synchronous => {
                let step = push.group / self.spec.groups;
                if step > bucket.step {
                    let here = bucket.step;
                    return Outcome::Refused(format!("a push for step {step}, and step {here} is not over"));
                }
                step < bucket.step
                    || push.attempt < bucket.attempt
                    || (push.attempt == bucket.attempt && bucket.seen.contains(push.group))
            }
            _ => bucket.seen.contains(push.group),
        };
        if known {
            self.counts.known += 1;
            return Outcome::Known;
        }
        if push.attempt > ATTEMPTS {
            return Outcome::Refused(format!("try {} of a step that has {ATTEMPTS}", push.attempt));
        }
        let outcome = match (self.spec.mode, self.spec.aggregate, push.terms) {
            (Mode::Synchronous, Aggregate::Mean, Terms::Sums { largest, .. })
                if !f32::from_bits(largest).is_finite() =>
            {
                self.counts.not_finite += 1;
                Outcome::NotFinite
            }
            (Mode::Synchronous, Aggregate::Mean, Terms::Sums { exponent, largest }) => {
                bucket.add(pool, &self.spec, push, (exponent, largest), body)
            }
            (Mode::Synchronous, aggregate, Terms::Gradient { scale }) if aggregate != Aggregate::Mean => {
                bucket.hold(pool, &self.spec, push, scale, body)
            }
            (Mode::Asynchronous | Mode::Bounded { .. }, _, Terms::Gradient { scale }) => {
                match bucket.follow(pool, &self.spec, push, scale, body) {
                    Ok(finite) => {
                        self.counts.not_finite += u64::from(!finite);
                        Outcome::Taken
                    }
                    Err(refused) => refused,
                }
            }
            (mode, aggregate, terms) => Outcome::Refused(format!("{terms:?} in {mode:?} with {aggregate:?}")),
        };
        self.counts.taken += u64::from(outcome == Outcome::Taken);
        outcome
    }

    fn decide(&mut self, pool: &Pool, decision: &Decision) -> Outcome {
        if self.buckets.values().all(|bucket| bucket.step > decision.step) {
            return Outcome::Known;
        }
        let complete = |bucket: &Bucket| {
            let ready = bucket.ready.as_ref();
            ready.is_some_and(|ready| ready.step == decision.step && ready.attempt == decision.attempt)
        };
        if let Some((index, _)) = self.buckets.iter().find(|(_, bucket)| !complete(bucket)) {
            return Outcome::Refused(format!("bucket {index} is not complete for step {}", decision.step));
        }
        for (&index, bucket) in &mut self.buckets {
            bucket.decide(pool, &self.spec, index, decision);
        }
        Outcome::Taken
    }
}

impl Bucket {
    pub(super) fn new(spec: &Spec, len: usize) -> Result<Bucket, Error> {
        let state = (0..spec.buffers()).map(|_| Buffer::zeroed(len));
        let exact = spec.exact();
        Ok(Bucket {
            loaded: false,
            step: 0,
            updates: 0,
            weights: Buffer::zeroed(len)?,
            state: state.collect::<Result<_, _>>()?,
            seen: Seen::default(),
            attempt: 0,
            exponent: 0,
            largest: 0,
            sums: Buffer::zeroed(if exact { len } else { 0 })?,
            held: BTreeMap::new(),
            total: Buffer::zeroed(if spec.mode == Mode::Synchronous { len } else { 0 })?,
            ready: None,
        })
    }

    /// Nothing was pushed to this try of the step.
    fn begin(&mut self, pool: &Pool, spec: &Spec, attempt: u32) {
        self.seen = Seen::below(self.step * spec.groups);
        (self.attempt, self.largest, self.ready) = (attempt, 0, None);
        self.held.clear();
        consort_tensor::train::exact::clear_sums(pool, &mut self.sums);
    }

    /// A group's exact sums.
    fn add(
        &mut self,
        pool: &Pool,
        spec: &Spec,
        push: &Push,
        (exponent, largest): (i32, u32),
        body: &[u8],
    ) -> Outcome {
        let Some(sums) = link::numbers::<i64>(body).filter(|sums| sums.len() == self.sums.len()) else {
            return Outcome::Refused(format!("bucket {} gets {} bytes of sums", push.bucket, body.len()));
        };
        let first = self.seen.count() == self.step * spec.groups;
        if push.attempt == self.attempt && !first && exponent != self.exponent {
            return Outcome::Refused(format!("grids {exponent} and {} in one sum", self.exponent));
        }
        if push.attempt > self.attempt {
            self.begin(pool, spec, push.attempt);
        }
        self.exponent = exponent;
        self.largest = self.largest.max(largest);
        self.seen.insert(push.group);
        add_sums(pool, &sums, &mut self.sums);
        self.complete(pool, spec, push.bucket);
        Outcome::Taken
    }

    /// A group's gradient, to be compared with the others'.
    fn hold(&mut self, pool: &Pool, spec: &Spec, push: &Push, scale: Bits, body: &[u8]) -> Outcome {
        let Some(mut values) = link::numbers::<f32>(body).filter(|v| v.len() == self.weights.len()) else {
            return Outcome::Refused(format!("bucket {} gets {} bytes", push.bucket, body.len()));
        };
        if push.attempt > self.attempt {
            self.begin(pool, spec, push.attempt);
        }
        let scale = scale.get() as f32;
        values.iter_mut().for_each(|x| *x *= scale);
        self.seen.insert(push.group);
        self.held.insert(push.group, values);
        self.complete(pool, spec, push.bucket);
        Outcome::Taken
    }

    /// Makes the step's gradient when its last group is in.
    pub(super) fn complete(&mut self, pool: &Pool, spec: &Spec, bucket: usize) {
        if !self.loaded || self.seen.count() < (self.step + 1) * spec.groups {
            return;
        }
        let held: Vec<&[f32]> = self.held.values().map(Vec::as_slice).collect();
        let squares = match spec.aggregate {
            Aggregate::Mean => {
                Grid::from_exponent(self.exponent).read(pool, &self.sums, &mut self.total);
                vec![square_sum(pool, &self.total)]
            }
            Aggregate::Median => {
                median(&held, &mut self.total);
                vec![square_sum(pool, &self.total)]
            }
            Aggregate::TrimmedMean { wrong } => {
                trimmed_mean(&held, wrong as usize, &mut self.total);
                vec![square_sum(pool, &self.total)]
            }
            Aggregate::Krum { .. } => distances(&held),
        };
        self.ready = Some(Ready {
            bucket,
            step: self.step,
            attempt: self.attempt,
            largest: self.largest,
            squares: squares.into_iter().map(Bits::from).collect(),
        });
    }

    fn decide(&mut self, pool: &Pool, spec: &Spec, index: usize, decision: &Decision) {
        let chosen = decision.choice.and_then(|choice| self.held.values().nth(choice));
        if let Some(chosen) = chosen {
            self.total.copy_from_slice(chosen);
        }
        self.updates += u64::from(decision.learns);
        let update = Update {
            config: spec.optimizer,
            step: self.updates,
            learning_rate: decision.learning_rate.get() as f32,
            gradient_scale: decision.scale.get() as f32,
        };
        for &(from, to, decays) in spec.buckets[index].pieces.iter().filter(|_| decision.learns) {
            let (values, gradient) = (&mut self.weights[from..to], &self.total[from..to]);
            update.apply(pool, decays, values, gradient, &mut self.state, from..to);
        }
        self.step += 1;
        self.begin(pool, spec, 0);
    }

    /// A push that moves the weights at once; `false` if it holds what is no number, and moves nothing.
    fn follow(
        &mut self,
        pool: &Pool,
        spec: &Spec,
        push: &Push,
        scale: Bits,
        body: &[u8],
    ) -> Result<bool, Outcome> {
        let Some(values) = link::numbers::<f32>(body).filter(|v| v.len() == self.weights.len()) else {
            return Err(Outcome::Refused(format!("bucket {} gets {} bytes", push.bucket, body.len())));
        };
        self.seen.insert(push.group);
        // A square sum that is no number or infinite: so is one of the values, or soon the optimizer's state.
        if !(square_sum(pool, &values) * scale.get().powi(2)).is_finite() {
            return Ok(false);
        }
        let learning_rate = spec.schedule.at(self.updates / spec.groups) as f32;
        self.updates += 1;
        let update = Update {
            config: spec.optimizer,
            step: self.updates,
            learning_rate,
            gradient_scale: scale.get() as f32,
        };
        for &(from, to, decays) in &spec.buckets[push.bucket].pieces {
            let (values, gradient) = (&mut self.weights[from..to], &values[from..to]);
            update.apply(pool, decays, values, gradient, &mut self.state, from..to);
        }
        self.step += 1;
        Ok(true)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use consort_tensor::Cpu;

    use super::super::spec::tests::spec;
    use super::*;

    pub(in crate::server) fn loaded(spec: Spec) -> (Shard, Pool) {
        let pool = Pool::new(1, Cpu::detect());
        let mut shard = Shard::new(Arc::new(spec), 0).unwrap();
        let buckets: Vec<(usize, usize)> = shard.buckets.iter().map(|(&i, b)| (i, b.weights.len())).collect();
        for (bucket, len) in buckets {
            let values = vec![0.5f32; len * 3];
            let op = Op::Load { bucket, step: 0, updates: 0 };
            assert_eq!(shard.apply(&pool, &op, link::bytes(&values)), Outcome::Taken);
            assert_eq!(shard.apply(&pool, &op, link::bytes(&values)), Outcome::Known);
        }
        (shard, pool)
    }

    pub(in crate::server) fn push(group: u64, bucket: usize, exponent: i32) -> Op {
        let terms = Terms::Sums { exponent, largest: 1f32.to_bits() };
        Op::Push(Push { worker: 7, group, attempt: 0, bucket, terms })
    }

    fn refused(outcome: Outcome, what: &str) {
        assert!(matches!(&outcome, Outcome::Refused(reason) if reason.contains(what)), "{outcome:?}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_changes_nothing() {
        let (mut shard, pool) = loaded(spec(&[4, 6], 1));
        let log = shard.log();
        let body = |len: usize| link::bytes(&vec![1i64; len]).to_vec();
        refused(shard.apply(&pool, &push(0, 9, 40), &body(4)), "bucket 9 is not here");
        refused(shard.apply(&pool, &push(0, 0, 40), &body(5)), "40 bytes");
        refused(shard.apply(&pool, &push(0, 0, 40), &body(4)[..31]), "31 bytes");
        refused(shard.apply(&pool, &push(1 << 40, 0, 40), &body(4)), "of 40");
        refused(shard.apply(&pool, &push(4, 0, 40), &body(4)), "step 0 is not over");
        let gradient = Op::Push(Push {
            worker: 7,
            group: 0,
            attempt: 0,
            bucket: 0,
            terms: Terms::Gradient { scale: 1.0.into() },
        });
        refused(shard.apply(&pool, &gradient, &body(2)), "Synchronous with Mean");
        assert_eq!(shard.apply(&pool, &push(0, 0, 40), &body(4)), Outcome::Taken);
        refused(shard.apply(&pool, &push(1, 0, 41), &body(4)), "grids 41 and 40");
        assert_eq!(shard.apply(&pool, &Op::Fence { worker: 7 }, &[]), Outcome::Taken);
        refused(shard.apply(&pool, &push(1, 0, 40), &body(4)), "worker 7 was given up");
        let decision = Decision {
            step: 0,
            attempt: 0,
            learning_rate: 0.1.into(),
            scale: 1.0.into(),
            learns: true,
            choice: None,
        };
        refused(shard.apply(&pool, &Op::Apply(decision), &[]), "not complete");
        assert_eq!(shard.log(), log + 2);
        assert!(Shard::new(Arc::new(spec(&[4], 1)), 3).is_err());
    }

    #[test]
    fn what_is_no_number_stays_out_of_an_exact_sum() {
        let (mut shard, pool) = loaded(spec(&[4], 1));
        let body = link::bytes(&[1i64 << 40; 4]).to_vec();
        for largest in [f32::NAN, f32::INFINITY] {
            let terms = Terms::Sums { exponent: 40, largest: largest.to_bits() };
            let push = Op::Push(Push { worker: 7, group: 0, attempt: 0, bucket: 0, terms });
            assert_eq!(shard.apply(&pool, &push, &body), Outcome::NotFinite);
        }
        // Somebody else's of the same group counts.
        (0..4).for_each(|group| assert_eq!(shard.apply(&pool, &push(group, 0, 40), &body), Outcome::Taken));
        assert_eq!((shard.ready().count(), shard.counts().not_finite), (1, 2));
        let far = match push(0, 0, 40) {
            Op::Push(push) => Op::Push(Push { attempt: ATTEMPTS + 1, ..push }),
            op => op,
        };
        refused(shard.apply(&pool, &far, &body), "try 4");
    }

    #[test]
    fn another_try_of_a_step_begins_again() {
        let (mut shard, pool) = loaded(spec(&[4], 1));
        let ones = link::bytes(&[1i64 << 40; 4]).to_vec();
        for group in 0..4 {
            shard.apply(&pool, &push(group, 0, 40), &ones);
        }
        let first = shard.ready().next().cloned().unwrap();
        assert_eq!(first.squares[0].get(), 4.0 * 16.0);
        let again = |group| match push(group, 0, 41) {
            Op::Push(push) => Op::Push(Push { attempt: 1, ..push }),
            op => op,
        };
        assert_eq!(shard.apply(&pool, &again(2), &ones), Outcome::Taken);
        assert_eq!(shard.ready().count(), 0, "nothing of the first try is left");
        assert_eq!(shard.apply(&pool, &push(3, 0, 40), &ones), Outcome::Known, "too late");
        [0, 1, 3].into_iter().for_each(|group| drop(shard.apply(&pool, &again(group), &ones)));
        let second = shard.ready().next().unwrap();
        assert_eq!((second.attempt, second.squares[0].get()), (1, 16.0));
    }

    #[test]
    fn what_is_no_number_moves_nothing_where_pushes_move_at_once() {
        let (mut shard, pool) = loaded(Spec { mode: Mode::Asynchronous, ..spec(&[4], 1) });
        let push = |group| {
            let terms = Terms::Gradient { scale: 1.0.into() };
            Op::Push(Push { worker: 1, group, attempt: 0, bucket: 0, terms })
        };
        for (group, bad) in [f32::NAN, f32::INFINITY, f32::MAX].into_iter().enumerate() {
            let body = link::bytes(&[1.0, bad, 0.0, 0.0]).to_vec();
            assert_eq!(shard.apply(&pool, &push(group as u64), &body), Outcome::Taken);
        }
        assert_eq!(shard.weights(0), Some((0, &[0.5f32; 4][..])));
        assert_eq!(shard.counts(), Counts { taken: 3, known: 0, not_finite: 3 });
        shard.apply(&pool, &push(3), link::bytes(&[1.0f32; 4]));
        assert!(shard.weights(0).is_some_and(|(step, weights)| step == 1 && weights[0] < 0.5));
    }
}

//! A worker that has joined: group after group, from the claim to the verdict.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use consort_model::train::Loss;
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::clear;
use consort_tensor::train::exact::Grid;
use consort_tensor::train::optimizer::square_sum;

use super::carry::{Carriers, Done, Numbers, Task};
use super::{Compute, Ending, Worked};
use crate::Error;
use crate::server::client::{Office, unexpected};
use crate::server::op::{Outcome, Push, Terms};
use crate::server::progress::{Claim, Grant, Verdict, WorkerId};
use crate::server::spec::{Mode, Spec};
use crate::server::wire::{Ask, Effort, Told};

pub(super) struct Run<'r> {
    id: WorkerId,
    office: &'r Office,
    spec: &'r Spec,
    carriers: Carriers,
    compute: &'r mut dyn Compute,
    worked: &'r mut Worked,
    /// The step whose weights are here.
    held: Option<u64>,
    sums: Vec<Option<Vec<i64>>>,
    /// Why a server refused the last push that was.
    refused: Option<String>,
}

/// A group's pushes.
type Pushes = BTreeMap<usize, (Push, Arc<Numbers>)>;

/// A group that is computed.
struct Computed {
    pushes: Pushes,
    losses: Vec<Loss>,
    /// The mean gradient's length, where pushes move the weights at once.
    norm: f64,
    /// When the first push went on its way, where that was while backward went on.
    first: Option<Instant>,
}

impl<'r> Run<'r> {
    pub(super) fn new(
        id: WorkerId,
        office: &'r Office,
        spec: &'r Spec,
        carriers: Carriers,
        compute: &'r mut dyn Compute,
        worked: &'r mut Worked,
    ) -> Run<'r> {
        let sums = spec.buckets.iter().map(|_| None).collect();
        Run { id, office, spec, carriers, compute, worked, held: None, sums, refused: None }
    }

    /// Until the job is over, or this worker is given up.
    pub(super) fn run(&mut self) -> Result<Ending, Error> {
        loop {
            let asked = Instant::now();
            let told = self.office.ask(&Ask::Claim { worker: self.id })?;
            self.worked.waited_s += asked.elapsed().as_secs_f64();
            let claim = match told {
                Told::Grant(Grant::Work(claim)) => claim,
                Told::Grant(Grant::Wait) => continue,
                Told::Grant(Grant::Finished) | Told::Ended => return Ok(Ending::JobOver),
                Told::Unknown => return Ok(Ending::GivenUp(None)),
                told => return Err(unexpected(&told)),
            };
            match self.group(&claim)? {
                Some(Verdict::Accepted) => self.worked.groups += 1,
                Some(Verdict::Over | Verdict::Again) => self.worked.vain += 1,
                None => return Ok(Ending::GivenUp(self.refused.take())),
            }
        }
    }

    /// One group; `None`: this worker was given up.
    fn group(&mut self, claim: &Claim) -> Result<Option<Verdict>, Error> {
        let began = Instant::now();
        if !self.weights(claim)? {
            return Ok(Some(Verdict::Over));
        }
        self.worked.waited_s += began.elapsed().as_secs_f64();
        let began = Instant::now();
        let exact = self.spec.exact();
        let Computed { pushes, losses, norm, first } =
            if exact { self.exact(claim)? } else { self.plain(claim)? };
        self.worked.computed_s += began.elapsed().as_secs_f64();
        let computed_us = began.elapsed().as_micros() as u64;
        let began = Instant::now();
        // Those of an exact group are on their way already.
        let mut waiting: usize = if exact { pushes.len() } else { self.send(&pushes) };
        let mut number = true;
        let verdict = loop {
            let mut epochs = vec![u64::MAX; self.spec.shards.len()];
            let mut given_up = false;
            while waiting > 0 {
                match self.carriers.next()? {
                    Done::Pushed { bucket, epoch, outcome } => {
                        waiting -= 1;
                        let slot = &mut epochs[self.carriers.shard[bucket]];
                        *slot = epoch.min(*slot);
                        given_up |= matches!(outcome, Outcome::Refused(_));
                        number &= outcome != Outcome::NotFinite;
                        if let Outcome::Refused(reason) = outcome {
                            tracing::info!(
                                worker = self.id,
                                bucket,
                                group = claim.group,
                                reason,
                                "a push was refused"
                            );
                            self.refused = Some(reason);
                        }
                    }
                    Done::Pulled { .. } | Done::Failed(_) => {}
                }
            }
            if given_up {
                break None;
            }
            if !number {
                let question = Ask::NotFinite { worker: self.id, group: claim.group, attempt: claim.attempt };
                break match self.office.ask(&question)? {
                    Told::Unknown => None,
                    Told::Fine | Told::Ended => Some(Verdict::Over),
                    told => return Err(unexpected(&told)),
                };
            }
            let losses = losses.iter().map(|&loss| loss.into()).collect();
            let (worker, group, attempt) = (self.id, claim.group, claim.attempt);
            let effort = Effort {
                computed_us,
                carried_us: first.unwrap_or(began).elapsed().as_micros() as u64,
                exposed_us: began.elapsed().as_micros() as u64,
                norm: norm.into(),
            };
            match self.office.ask(&Ask::Finish { worker, group, attempt, epochs, losses, effort })? {
                Told::Verdict(Verdict::Again) => {
                    // A shard failed over meanwhile. Its new primary says what it has, then takes what it lacks.
                    std::thread::sleep(Duration::from_millis(5));
                    waiting = self.send(&pushes);
                }
                Told::Verdict(verdict) => break Some(verdict),
                Told::Ended => break Some(Verdict::Over),
                Told::Unknown => break None,
                told => return Err(unexpected(&told)),
            }
        };
        self.worked.waited_s += began.elapsed().as_secs_f64();
        for (bucket, (_, numbers)) in pushes {
            if let Some(Numbers::Sums(sums)) = Arc::into_inner(numbers) {
                self.sums[bucket] = Some(sums);
            }
        }
        Ok(verdict)
    }

    /// Gets the weights that the claim needs; `false`: its step is over.
    fn weights(&mut self, claim: &Claim) -> Result<bool, Error> {
        let synchronous = self.spec.mode == Mode::Synchronous;
        if synchronous && self.held == Some(claim.step) {
            return Ok(true);
        }
        self.held = None;
        let buckets = self.spec.buckets.len();
        for bucket in 0..buckets {
            self.carriers.give(bucket, Task::Pull { bucket, step: claim.step });
        }
        let mut starts = Vec::with_capacity(buckets);
        let mut start = 0;
        for bucket in &self.spec.buckets {
            starts.push(start);
            start += bucket.len;
        }
        let mut right = true;
        for _ in 0..buckets {
            if let Done::Pulled { bucket, step, values } = self.carriers.next()? {
                right &= !synchronous || step == claim.step;
                let place = starts[bucket]..starts[bucket] + self.spec.buckets[bucket].len;
                let place = self.compute.weights().get_mut(place).filter(|place| place.len() == values.len());
                let place = place
                    .ok_or_else(|| Error::Server(format!("bucket {bucket} came with another length")))?;
                place.copy_from_slice(&values);
            }
        }
        self.held = Some(claim.step).filter(|_| right);
        Ok(right)
    }

    fn send(&self, pushes: &Pushes) -> usize {
        for (bucket, (push, numbers)) in pushes {
            self.carriers.give(*bucket, Task::Push { push: *push, numbers: Arc::clone(numbers) });
        }
        pushes.len()
    }

    fn push(&self, claim: &Claim, bucket: usize, terms: Terms) -> Push {
        Push { worker: self.id, group: claim.group, attempt: claim.attempt, bucket, terms }
    }

    /// The micro-batches of a claim.
    fn micro_batches(&self, claim: &Claim) -> std::ops::Range<u64> {
        let first = claim.group * self.spec.micro_batches;
        first..first + self.spec.micro_batches
    }

    /// Exact sums, each bucket on its way as soon as the last micro-batch has completed it.
    fn exact(&mut self, claim: &Claim) -> Result<Computed, Error> {
        let buckets = self.spec.buckets.len();
        let mut sums: Vec<Vec<i64>> = Vec::with_capacity(buckets);
        for (slot, bucket) in self.sums.iter_mut().zip(&self.spec.buckets) {
            let mut sum = slot.take().unwrap_or_default();
            sum.clear();
            sum.resize(bucket.len, 0);
            sums.push(sum);
        }
        let (mut largest, mut losses, mut pushes) = (vec![0u32; buckets], Vec::new(), Pushes::new());
        let mut first = None;
        let range = self.micro_batches(claim);
        for micro_batch in range.clone() {
            let last = micro_batch + 1 == range.end;
            let (carriers, id) = (&self.carriers, self.id);
            let completed = &mut |pool: &Pool, bucket: usize, values: &mut Buffer<f32>| {
                let exponent = claim.exponents.get(bucket).copied().unwrap_or_default();
                let most = Grid::from_exponent(exponent).add(pool, values, &mut sums[bucket]);
                largest[bucket] = largest[bucket].max(most.to_bits());
                clear(pool, values);
                if last {
                    first.get_or_insert_with(Instant::now);
                    let terms = Terms::Sums { exponent, largest: largest[bucket] };
                    let push = Push { worker: id, group: claim.group, attempt: claim.attempt, bucket, terms };
                    let numbers = Arc::new(Numbers::Sums(std::mem::take(&mut sums[bucket])));
                    pushes.insert(bucket, (push, Arc::clone(&numbers)));
                    carriers.give(bucket, Task::Push { push, numbers });
                }
            };
            losses.push(self.compute.accumulate(micro_batch, completed)?);
        }
        // Where the last micro-batch had no rows, nothing was sent yet.
        for (bucket, sum) in sums.into_iter().enumerate() {
            if pushes.contains_key(&bucket) {
                continue;
            }
            let exponent = claim.exponents.get(bucket).copied().unwrap_or_default();
            let push = self.push(claim, bucket, Terms::Sums { exponent, largest: largest[bucket] });
            let numbers = Arc::new(Numbers::Sums(sum));
            pushes.insert(bucket, (push, Arc::clone(&numbers)));
            self.carriers.give(bucket, Task::Push { push, numbers });
        }
        // The coordinator has the step's norm from the shards.
        Ok(Computed { pushes, losses, norm: 0.0, first })
    }

    /// The group's mean gradient. Where pushes move the weights at once, each is clipped by itself.
    fn plain(&mut self, claim: &Claim) -> Result<Computed, Error> {
        let (mut all, mut losses) = (Loss::default(), Vec::new());
        for micro_batch in self.micro_batches(claim) {
            let loss = self.compute.accumulate(micro_batch, &mut |_, _, _| ())?;
            all += loss;
            losses.push(loss);
        }
        let (pool, gradients) = self.compute.gradients();
        let squares: f64 = gradients.iter().map(|bucket| square_sum(pool, bucket)).sum();
        let mean = if all.weight > 0.0 { 1.0 / all.weight } else { 0.0 };
        let norm = squares.sqrt() * mean;
        let shorten = match (self.spec.mode, self.spec.clip_norm) {
            (Mode::Synchronous, _) | (_, None) => 1.0,
            (_, Some(clip)) => (clip / norm).min(1.0),
        };
        let scale = (mean * shorten).into();
        let mut numbers = Vec::with_capacity(gradients.len());
        for bucket in gradients.iter_mut() {
            numbers.push(Arc::new(Numbers::Values(bucket.to_vec())));
            clear(pool, bucket);
        }
        let pushes = numbers.into_iter().enumerate();
        let pushes = pushes.map(|(bucket, numbers)| {
            (bucket, (self.push(claim, bucket, Terms::Gradient { scale }), numbers))
        });
        Ok(Computed { pushes: pushes.collect(), losses, norm, first: None })
    }
}

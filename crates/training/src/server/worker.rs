//! A worker: claims groups, gets the weights, computes, and pushes.
//!
//! One thread computes; one a shard talks to that shard's primary, so that a synchronous step's buckets are on their way
//! while backward goes on with the next; one says that the worker lives. Everything that a worker sends, it keeps until
//! the coordinator has accepted the group: a server that dies may have lost it. A worker that was given up (it slept,
//! or was cut off) comes back as new and begins with the next group.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use consort_collectives::link;
use consort_model::train::Loss;
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::clear;
use consort_tensor::train::exact::Grid;
use consort_tensor::train::optimizer::square_sum;

use super::client::{Connect, Office, Shards, unexpected};
use super::op::{Op, Outcome, Push, Terms};
use super::progress::{Claim, Grant, Verdict, WorkerId};
use super::spec::{Aggregate, Mode, Spec};
use super::wire::{Answer, Ask, Order, Told};
use crate::Error;

/// Computes gradients.
pub trait Compute {
    /// The lengths of the buckets, in the order in which backward completes them.
    fn buckets(&self) -> Vec<usize>;

    /// The weights, bucket after bucket.
    fn weights(&mut self) -> &mut [f32];

    /// The loss of a micro-batch, counted over the job, and its gradients, added to what the buckets hold. `completed`
    /// gets each bucket as soon as it is complete, and the threads to work on it. A micro-batch of no rows has no
    /// gradients: `completed` is not called, and the loss is none.
    ///
    /// # Errors
    /// Any: the worker ends with it.
    fn accumulate(&mut self, micro_batch: u64, completed: &mut Completed<'_>) -> Result<Loss, Error>;

    /// The threads, and the buckets' gradients.
    fn gradients(&mut self) -> (&Pool, &mut [Buffer<f32>]);
}

/// Gets a bucket's number and gradient.
pub type Completed<'c> = dyn FnMut(&Pool, usize, &mut Buffer<f32>) + 'c;

/// What a worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Worked {
    /// Groups that counted.
    pub groups: u64,
    /// Groups that somebody else had done, or that were of a try that was over.
    pub vain: u64,
    /// Times that it was given up and came back.
    pub returns: u64,
    /// Seconds of forward and backward.
    pub computed_s: f64,
    /// Seconds of waiting: for weights, for servers, for others.
    pub waited_s: f64,
}

/// The numbers of a push, kept until it counts.
#[derive(Debug)]
enum Numbers {
    Sums(Vec<i64>),
    Values(Vec<f32>),
}

impl Numbers {
    fn bytes(&self) -> &[u8] {
        match self {
            Numbers::Sums(sums) => link::bytes(sums),
            Numbers::Values(values) => link::bytes(values),
        }
    }
}

enum Task {
    Pull { bucket: usize, step: u64 },
    Push { push: Push, numbers: Arc<Numbers> },
}

enum Done {
    Pulled { bucket: usize, step: u64, values: Vec<f32> },
    Pushed { bucket: usize, epoch: u64, outcome: Outcome },
    Failed(Error),
}

/// Works until the job is over.
///
/// # Errors
/// [`Error::Group`] where the coordinator is gone, [`Error::Server`] where the job can't go on or a shard doesn't answer,
/// and what [`Compute`] says.
pub fn work(connect: &Connect, compute: &mut dyn Compute) -> Result<Worked, Error> {
    let mut worked = Worked::default();
    let office = connect.coordinator()?;
    let spec = match office.ask(&Ask::Job)? {
        Told::Job { spec } => Arc::new(spec),
        Told::Ended => return Ok(worked),
        told => return Err(unexpected(&told)),
    };
    spec.check()?;
    let lens: Vec<usize> = spec.buckets.iter().map(|bucket| bucket.len).collect();
    if compute.buckets() != lens {
        return Err(Error::Server(format!(
            "this worker's model has buckets of {:?} values, and the job's has {lens:?}: start it with the job's model",
            compute.buckets()
        )));
    }
    loop {
        let office = connect.coordinator()?;
        let id = match office.ask(&Ask::Join)? {
            Told::Joined { worker } => worker,
            Told::Ended => return Ok(worked),
            told => return Err(unexpected(&told)),
        };
        let ending: Result<Ending, Error> = std::thread::scope(|scope| {
            let beat = Arc::new(Beat::default());
            let beating = connect.coordinator()?;
            let (interval, beats) = (spec.lease() / 5, Arc::clone(&beat));
            std::thread::Builder::new()
                .name("worker-beats".into())
                .spawn_scoped(scope, move || beats.run(&beating, id, interval))
                .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))?;
            let ending = Carriers::start(scope, connect, &spec).and_then(|carriers| {
                let grads = spec.buckets.iter().map(|_| None).collect();
                let mut run = Run {
                    id,
                    office: &office,
                    spec: &spec,
                    carriers,
                    compute,
                    worked: &mut worked,
                    held: None,
                    sums: grads,
                };
                run.run()
            });
            beat.stop();
            ending
        });
        match ending {
            Ok(Ending::JobOver) | Err(Error::Ended) => return Ok(worked),
            Err(error) => return Err(error),
            Ok(Ending::GivenUp) => {
                tracing::warn!(worker = id, "was given up; comes back as new");
                worked.returns += 1;
            }
        }
    }
}

enum Ending {
    JobOver,
    GivenUp,
}

/// Says that the worker lives.
#[derive(Default)]
struct Beat {
    over: Mutex<bool>,
    changed: Condvar,
}

impl Beat {
    fn run(&self, office: &Office, worker: WorkerId, interval: Duration) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        while !*over {
            over = self.changed.wait_timeout(over, interval).unwrap_or_else(PoisonError::into_inner).0;
            if *over {
                return;
            }
            drop(over);
            // The working thread is told the same when it asks.
            if !matches!(office.ask(&Ask::Beat { worker }), Ok(Told::Fine)) {
                return;
            }
            over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn stop(&self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// The threads that talk to servers, one a shard.
struct Carriers {
    tasks: Vec<SyncSender<Task>>,
    /// The shard of each bucket.
    shard: Vec<usize>,
    done: Receiver<Done>,
}

impl Carriers {
    fn start<'s>(
        scope: &'s std::thread::Scope<'s, '_>,
        connect: &Connect,
        spec: &Arc<Spec>,
    ) -> Result<Carriers, Error> {
        let buckets = spec.buckets.len();
        let (report, done) = mpsc::sync_channel(2 * buckets + spec.shards.len());
        let mut tasks = Vec::new();
        for shard in 0..spec.shards.len() {
            let (give, tasks_of_shard) = mpsc::sync_channel(2 * buckets);
            tasks.push(give);
            let (office, connect, report) = (connect.coordinator()?, connect.clone(), report.clone());
            let spec = Arc::clone(spec);
            std::thread::Builder::new()
                .name("worker-carries".into())
                .spawn_scoped(scope, move || carry(shard, &office, &connect, &spec, &tasks_of_shard, &report))
                .map_err(|e| Error::Server(format!("cannot start a thread: {e}")))?;
        }
        let place = |bucket| spec.shards.iter().position(|own| own.contains(&bucket)).unwrap_or_default();
        Ok(Carriers { tasks, shard: (0..buckets).map(place).collect(), done })
    }

    fn give(&self, bucket: usize, task: Task) {
        // A thread that has ended has said why.
        let _ = self.tasks[self.shard[bucket]].send(task);
    }

    fn next(&self) -> Result<Done, Error> {
        match self.done.recv() {
            Ok(Done::Failed(error)) => Err(error),
            Ok(done) => Ok(done),
            Err(_) => Err(Error::Server("the threads that talk to servers have ended".into())),
        }
    }
}

fn carry(
    shard: usize,
    office: &Office,
    connect: &Connect,
    spec: &Spec,
    tasks: &Receiver<Task>,
    report: &SyncSender<Done>,
) {
    let mut shards = Shards::new(office, connect, spec);
    while let Ok(task) = tasks.recv() {
        let done = match task {
            Task::Pull { bucket, step } => {
                let order = |epoch| Order::Pull { shard, epoch, bucket, step };
                shards.ask(shard, order, &[]).and_then(|(answer, message)| match answer {
                    Answer::Values { step, .. } => {
                        let values = link::numbers(&message.body);
                        let values =
                            values.ok_or_else(|| Error::Server("weights of uneven length".into()))?;
                        Ok(Done::Pulled { bucket, step, values })
                    }
                    other => Err(Error::Server(format!("a server answers a pull with {other:?}"))),
                })
            }
            Task::Push { push, numbers } => {
                let order = |epoch| Order::Change { shard, epoch, op: Op::Push(push) };
                shards.ask(shard, order, numbers.bytes()).and_then(|(answer, _)| match answer {
                    Answer::Outcome { epoch, outcome } => {
                        Ok(Done::Pushed { bucket: push.bucket, epoch, outcome })
                    }
                    other => Err(Error::Server(format!("a server answers a push with {other:?}"))),
                })
            }
        };
        let failed = done.is_err();
        if report.send(done.unwrap_or_else(Done::Failed)).is_err() || failed {
            return;
        }
    }
}

struct Run<'r> {
    id: WorkerId,
    office: &'r Office,
    spec: &'r Spec,
    carriers: Carriers,
    compute: &'r mut dyn Compute,
    worked: &'r mut Worked,
    /// The step whose weights are here.
    held: Option<u64>,
    sums: Vec<Option<Vec<i64>>>,
}

/// A group's pushes.
type Pushes = BTreeMap<usize, (Push, Arc<Numbers>)>;

impl Run<'_> {
    fn run(&mut self) -> Result<Ending, Error> {
        loop {
            let asked = Instant::now();
            let told = self.office.ask(&Ask::Claim { worker: self.id })?;
            self.worked.waited_s += asked.elapsed().as_secs_f64();
            let claim = match told {
                Told::Grant(Grant::Work(claim)) => claim,
                Told::Grant(Grant::Wait) => continue,
                Told::Grant(Grant::Finished) | Told::Ended => return Ok(Ending::JobOver),
                Told::Unknown => return Ok(Ending::GivenUp),
                told => return Err(unexpected(&told)),
            };
            match self.group(&claim)? {
                Some(Verdict::Accepted) => self.worked.groups += 1,
                Some(Verdict::Over | Verdict::Again) => self.worked.vain += 1,
                None => return Ok(Ending::GivenUp),
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
        let exact = self.spec.mode == Mode::Synchronous && self.spec.aggregate == Aggregate::Mean;
        let (pushes, losses) = if exact { self.exact(claim)? } else { self.plain(claim)? };
        self.worked.computed_s += began.elapsed().as_secs_f64();
        let began = Instant::now();
        // Those of an exact group are on their way already.
        let mut waiting: usize = if exact { pushes.len() } else { self.send(&pushes) };
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
                        if let Outcome::Refused(reason) = outcome {
                            tracing::warn!(
                                worker = self.id,
                                bucket,
                                group = claim.group,
                                reason,
                                "a push was refused"
                            );
                        }
                    }
                    Done::Pulled { .. } | Done::Failed(_) => {}
                }
            }
            if given_up {
                break None;
            }
            let losses = losses.iter().map(|&loss| loss.into()).collect();
            let (worker, group, attempt) = (self.id, claim.group, claim.attempt);
            match self.office.ask(&Ask::Finish { worker, group, attempt, epochs, losses })? {
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
    fn exact(&mut self, claim: &Claim) -> Result<(Pushes, Vec<Loss>), Error> {
        let buckets = self.spec.buckets.len();
        let mut sums: Vec<Vec<i64>> = Vec::with_capacity(buckets);
        for (slot, bucket) in self.sums.iter_mut().zip(&self.spec.buckets) {
            let mut sum = slot.take().unwrap_or_default();
            sum.clear();
            sum.resize(bucket.len, 0);
            sums.push(sum);
        }
        let (mut largest, mut losses, mut pushes) = (vec![0u32; buckets], Vec::new(), Pushes::new());
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
        Ok((pushes, losses))
    }

    /// The group's mean gradient. Where pushes move the weights at once, each is clipped by itself.
    fn plain(&mut self, claim: &Claim) -> Result<(Pushes, Vec<Loss>), Error> {
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
        Ok((pushes.collect(), losses))
    }
}

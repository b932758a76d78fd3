//! A worker: claims groups, gets the weights, computes, and pushes.
//!
//! One thread computes; one a shard talks to that shard's primary, so that a synchronous step's buckets are on their way
//! while backward goes on with the next; one says that the worker lives. Everything that a worker sends, it keeps until
//! the coordinator has accepted the group: a server that dies may have lost it. A worker that was given up (it slept,
//! or was cut off) comes back as new and begins with the next group.

mod carry;
mod run;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use consort_model::train::Loss;
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;

use self::carry::Carriers;
use self::run::Run;
use super::client::{Connect, Office, unexpected};
use super::progress::WorkerId;
use super::wire::{Ask, Told};
use crate::Error;

/// Lives in a row that end with a refusal and without a group that counts, after which a worker gives itself up.
const FRUITLESS: usize = 8;

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
    let (mut fruitless, mut groups) = (0, 0);
    loop {
        let office = connect.coordinator()?;
        let id = match office.ask(&Ask::Join { name: connect.name.clone() })? {
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
            let ending = Carriers::start(scope, connect, &spec)
                .and_then(|carriers| Run::new(id, &office, &spec, carriers, compute, &mut worked).run());
            beat.stop();
            ending
        });
        match ending {
            Ok(Ending::JobOver) | Err(Error::Ended) => return Ok(worked),
            Err(error) => return Err(error),
            Ok(Ending::GivenUp(refused)) => {
                tracing::info!(worker = id, "was given up; comes back as new");
                worked.returns += 1;
                // Once, as it was away; again and again without a group that counts, as what it sends is wrong.
                (fruitless, groups) =
                    if worked.groups > groups { (1, worked.groups) } else { (fruitless + 1, groups) };
                if let Some(reason) = refused.filter(|_| fruitless >= FRUITLESS) {
                    return Err(Error::Server(format!(
                        "servers refuse what this worker sends, again and again: {reason}"
                    )));
                }
            }
        }
    }
}

enum Ending {
    JobOver,
    /// Why a server refused what it sent, if that was it.
    GivenUp(Option<String>),
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

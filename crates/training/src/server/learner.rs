//! A decoder's gradients for a worker.

use consort_model::train::{Loss, MicroBatch};
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;

use super::worker::{Completed, Compute};
use crate::data::Order;
use crate::parallel::{Plan, Samples};
use crate::{Error, Trainer};

/// A trainer whose weights are the servers', and the micro-batches that it learns from.
pub struct Learner<'d> {
    trainer: Trainer,
    batches: Box<dyn FnMut(u64) -> MicroBatch + 'd>,
    /// For what is done with gradients between micro-batches.
    pool: Pool,
}

impl<'d> Learner<'d> {
    /// `batches` gives the micro-batch of each number over the job: the same one to every worker.
    pub fn new(trainer: Trainer, batches: impl FnMut(u64) -> MicroBatch + 'd) -> Learner<'d> {
        let pool = Pool::new(trainer.pool().threads(), trainer.pool().cpu());
        Learner { trainer, batches: Box::new(batches), pool }
    }

    /// The micro-batches of a plan: those that workers without servers would have.
    pub fn of_plan(trainer: Trainer, data: &'d dyn Samples, plan: &Plan) -> Learner<'d> {
        let (plan, order) = (plan.clone(), Order::new(data.count().max(1), plan.seed));
        Learner::new(trainer, move |number| {
            let (step, m) = (number / plan.micro_batches as u64, number as usize % plan.micro_batches);
            let mut batch = MicroBatch::new();
            plan.places(step, m).for_each(|place| data.push(order.at(place), &mut batch));
            batch
        })
    }

    /// The trainer, with the weights that came last.
    pub fn into_trainer(self) -> Trainer {
        self.trainer
    }
}

impl Compute for Learner<'_> {
    fn buckets(&self) -> Vec<usize> {
        self.trainer.decoder().layout().buckets().iter().map(|range| range.len()).collect()
    }

    fn weights(&mut self) -> &mut [f32] {
        self.trainer.weights_mut()
    }

    fn accumulate(&mut self, micro_batch: u64, completed: &mut Completed<'_>) -> Result<Loss, Error> {
        let batch = (self.batches)(micro_batch);
        if batch.rows() == 0 {
            return Ok(Loss::default());
        }
        self.trainer.accumulate_with(&batch, micro_batch, completed)
    }

    fn gradients(&mut self) -> (&Pool, &mut [Buffer<f32>]) {
        (&self.pool, &mut self.trainer.gradients_mut().buckets)
    }
}

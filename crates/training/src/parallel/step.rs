//! One step of one worker: its micro-batches, the sums of everybody's, the optimizer.
//!
//! A micro-batch's gradient is rounded onto the bucket's grid as soon as backward has completed the bucket, and the
//! bucket is cleared; after this worker's last micro-batch the bucket's sums go on their way while backward fills the
//! next one. A grid is made for the largest value of the step before. Where that was far off, the step is done again on
//! the grid that its own largest value asks for; everybody knows the largest of all, so everybody does.

use std::time::Instant;

use consort_collectives::ReduceOp;
use consort_model::train::{Loss, MicroBatch};
use consort_tensor::buffer::Buffer;
use consort_tensor::train::exact::Grid;

use super::board::{Activity, Board};
use super::buckets::{Buckets, Sent, Way};
use super::event::{Span, StepEvent, seen};
use super::link::{Link, Standing};
use super::outer::Anchor;
use super::plan::Plan;
use super::reduce::Reduced;
use super::state::State;
use super::tail::{Done, SAVING, STOP, STORE_LOST, Tail, Word};
use super::wire::Feedback;
use super::worker::{Fail, Samples};
use crate::data::Order;
use crate::{Error, Trainer};

/// Times that one step is done again before somebody must be wrong about its gradients.
const ATTEMPTS: u64 = 3;

/// What became of a step.
pub(super) enum Outcome {
    /// All workers took it.
    Committed(Committed),
    /// Other grids are needed.
    Redo,
}

pub(super) struct Committed {
    /// Of each step that was taken: one, or a round of local ones.
    pub(super) events: Vec<StepEvent>,
    /// Somebody asked for a stop.
    pub(super) stop: bool,
    pub(super) newcomers: usize,
    /// Somebody's store is gone.
    pub(super) store_lost: bool,
    /// Somebody is still writing the last checkpoint.
    pub(super) saving: bool,
}

impl Committed {
    pub(super) fn new(events: Vec<StepEvent>, tail: &Tail) -> Committed {
        Committed {
            events,
            stop: tail.workers().any(|word| word.flags & STOP != 0),
            newcomers: tail.workers().map(|word| word.newcomers as usize).sum(),
            store_lost: tail.workers().any(|word| word.flags & STORE_LOST != 0),
            saving: tail.workers().any(|word| word.flags & SAVING != 0),
        }
    }
}

/// What steps share.
pub(super) struct Stepper<'a> {
    pub(super) plan: Plan,
    data: &'a dyn Samples,
    order: Order,
    /// A buffer of sums for each bucket; gone while it is on its way.
    sums: Vec<Option<Buffer<i64>>>,
    /// What rounding took away of each bucket; forgotten where a step fails, as the step is then done again whole.
    pub(super) feedback: Vec<Feedback>,
    /// What a round of local steps began with.
    pub(super) anchor: Option<Anchor>,
}

impl<'a> Stepper<'a> {
    pub(super) fn new(plan: Plan, data: &'a dyn Samples, order: Order) -> Stepper<'a> {
        Stepper { plan, data, order, sums: Vec::new(), feedback: Vec::new(), anchor: None }
    }

    /// A micro-batch's samples.
    fn batch(&self, step: u64, m: usize) -> (MicroBatch, Done) {
        let (mut batch, mut done) = (MicroBatch::new(), Done::default());
        for place in self.plan.places(step, m) {
            let index = self.order.at(place);
            self.data.push(index, &mut batch);
            done.samples += 1;
            done.seen = done.seen.wrapping_add(seen(index));
        }
        (batch, done)
    }

    /// Sums for every bucket: those of a step that failed may be gone.
    fn prepare(&mut self, trainer: &Trainer) -> Result<(), Error> {
        let buckets = trainer.decoder().layout().buckets();
        self.feedback.resize_with(buckets.len(), Feedback::default);
        if !self.plan.exact {
            return Ok(());
        }
        self.sums.resize_with(buckets.len(), || None);
        for (sums, range) in self.sums.iter_mut().zip(buckets).filter(|(sums, _)| sums.is_none()) {
            *sums = Some(Buffer::zeroed(range.len())?);
        }
        Ok(())
    }

    /// Forgets what the last step left behind: it is done again.
    pub(super) fn forget(&mut self, trainer: &mut Trainer) {
        self.feedback.clear();
        if let Some(anchor) = &self.anchor {
            anchor.restore(trainer);
        }
    }

    /// What a step's buckets go through.
    pub(super) fn buckets<'s>(
        &'s mut self,
        trainer: &Trainer,
        state: &'s State,
        link: Option<&'s Link>,
        epoch: u64,
    ) -> Result<Buckets<'s>, Error> {
        self.prepare(trainer)?;
        let count = trainer.decoder().layout().buckets().len();
        let empty: Result<Vec<_>, _> = (0..count).map(|_| Buffer::zeroed(0)).collect();
        let (plan, cpu, step) = (&self.plan, trainer.pool().cpu(), state.step);
        Ok(Buckets {
            sums: &mut self.sums,
            feedback: &mut self.feedback,
            grids: &state.grids,
            empty: empty?,
            largest: vec![0.0; count],
            sent: Vec::with_capacity(count),
            way: link.map(|link| Way { link, epoch, step, plan, cpu }),
            exact: plan.exact,
        })
    }

    /// This worker's micro-batches of a step, but those without samples.
    pub(super) fn own(&self, step: u64, standing: Standing) -> Vec<(usize, MicroBatch, Done)> {
        let share = self.plan.share(standing.rank, standing.workers);
        let all = share.map(|m| {
            let (batch, done) = self.batch(step, m);
            (m, batch, done)
        });
        all.filter(|(.., done)| done.samples > 0).collect()
    }

    /// The next step, with the others of `standing` or alone.
    pub(super) fn step(
        &mut self,
        trainer: &mut Trainer,
        state: &mut State,
        link: Option<&Link>,
        standing: Standing,
        board: &Board,
        flags: i64,
    ) -> Result<Outcome, Fail> {
        let begun = Instant::now();
        let Standing { epoch, rank, workers } = standing;
        let step = state.step;
        let own = self.own(step, standing);
        let buckets = trainer.decoder().layout().buckets().len();
        let mut tail = Tail::new(self.plan.micro_batches, buckets, workers);
        let computed = own.iter().filter(|(_, batch, _)| batch.rows() > 0).count();
        let micro_batches = self.plan.micro_batches as u64;
        let mut work = self.buckets(trainer, state, link, epoch)?;
        let mut number = 0;
        for (m, batch, mut done) in own {
            if batch.rows() > 0 {
                board.doing(step, Activity::Computing { micro_batch: m });
                number += 1;
                let (first, last) = (number == 1, number == computed);
                let global = step * micro_batches + m as u64;
                if work.exact {
                    // The sums have the last micro-batch's already.
                    trainer.discard()?;
                }
                done.loss = trainer.accumulate_with(&batch, global, &mut |pool, bucket, values| {
                    work.completed(pool, bucket, values, first, last);
                })?;
            }
            tail.put_micro_batch(m, done);
        }
        if computed == 0 {
            // Nothing to add; the others need this worker's hands all the same.
            for sums in work.sums.iter_mut().flatten() {
                sums.fill(0);
            }
            for (bucket, values) in trainer.gradients_mut().buckets.iter_mut().enumerate() {
                work.send(bucket, values);
            }
        }
        let ready = Instant::now();
        board.doing(step, Activity::Waiting);
        let word = Word {
            flags,
            newcomers: 0,
            computed_us: ready.duration_since(begun).as_micros() as i64,
            check: state.check,
        };
        tail.put_worker(rank, word, &work.largest);
        let sent = std::mem::take(&mut work.sent);
        let (tail, reduced) = match link {
            Some(link) => self.collect(link, standing, step, tail, sent, trainer)?,
            None => (tail, Vec::new()),
        };
        let waited = ready.elapsed();
        let (loss, done) = self.judge(step, &tail, 0)?;
        if self.plan.exact && self.other_grids(state, &tail, loss)? {
            trainer.discard()?;
            return Ok(Outcome::Redo);
        }
        board.doing(step, Activity::Applying);
        let (mut norm, mut rate) = (0.0, 0.0);
        if loss.weight > 0.0 {
            let report = trainer.apply(loss)?;
            (norm, rate) = (report.gradient_norm, report.learning_rate);
        } else {
            tracing::warn!(step, "no row of this step has a weight: nothing is learned");
            trainer.discard()?;
        }
        state.check = norm.to_bits() as i64;
        state.advance((!self.plan.exact).then_some(epoch));
        let us = |moment: Instant| moment.saturating_duration_since(begun).as_micros() as u64;
        let (spans, overlapped_us) = spans(trainer, &reduced, begun, ready);
        let event = StepEvent {
            step,
            loss: loss.mean(),
            learning_rate: rate,
            gradient_norm: norm,
            rows: loss.rows as u64,
            samples: done.samples,
            seen: done.seen,
            cursor: self.plan.cursor(step + 1),
            workers,
            epoch,
            took_us: begun.elapsed().as_micros() as u64,
            computed_us: us(ready),
            waited_us: waited.as_micros() as u64,
            overlapped_us,
            saved_us: 0,
            spans,
            computed_by_rank_us: tail.workers().map(|word| word.computed_us as u64).collect(),
        };
        Ok(Outcome::Committed(Committed::new(vec![event], &tail)))
    }

    /// Sends the tail behind the buckets, and waits for all of them.
    pub(super) fn collect(
        &mut self,
        link: &Link,
        standing: Standing,
        step: u64,
        mut tail: Tail,
        sent: Vec<Sent>,
        trainer: &mut Trainer,
    ) -> Result<(Tail, Vec<(Reduced, Instant)>), Fail> {
        let place = tail.place(standing.rank);
        let end = link.start(standing.epoch, format!("the end of step {step}"), move |group| {
            match group.newcomers() {
                Ok(newcomers) => tail.words[place + 1] = newcomers as i64,
                Err(_) => tail.words[place] |= STORE_LOST,
            }
            group.all_reduce(&mut tail.words, ReduceOp::Sum)?;
            Ok(tail)
        });
        let mut all = Vec::with_capacity(sent.len());
        for Sent { bucket, ready, pending } in sent {
            let mut reduced = pending.wait()?;
            let empty = std::mem::replace(&mut reduced.values, Buffer::zeroed(0).map_err(Error::from)?);
            trainer.gradients_mut().buckets[bucket] = empty;
            if let Some(slot) = self.sums.get_mut(bucket) {
                *slot = reduced.sums.take();
            }
            self.feedback[bucket] = std::mem::take(&mut reduced.feedback);
            all.push((reduced, ready));
        }
        Ok((end.wait()?, all))
    }

    /// The step's loss and samples, if the workers computed each micro-batch once and know of the same steps before.
    ///
    /// The tail's micro-batches of `step` begin at `first`.
    pub(super) fn judge(&self, step: u64, tail: &Tail, first: usize) -> Result<(Loss, Done), Error> {
        let (mut loss, mut all) = (Loss::default(), Done::default());
        for m in 0..self.plan.micro_batches {
            let (times, done) = tail.micro_batch(first + m);
            if times != i64::from(!self.plan.places(step, m).is_empty()) {
                let what = format!("step {step}: micro-batch {m} was computed {times} times");
                return Err(Error::Disagreement(what));
            }
            loss += done.loss;
            all.samples += done.samples;
            all.seen = all.seen.wrapping_add(done.seen);
        }
        let check = tail.word(0).check;
        if let Some(rank) = tail.workers().position(|word| word.check != check) {
            let what = format!(
                "worker {rank} had another gradient than worker 0 in the step before step {step}: the memory of one \
                 of them is not to be trusted. Start again from the last checkpoint (--resume)"
            );
            return Err(Error::Disagreement(what));
        }
        Ok((loss, all))
    }

    /// Chooses the next grids; says whether this step needs others than it had.
    fn other_grids(&self, state: &mut State, tail: &Tail, loss: Loss) -> Result<bool, Error> {
        let largest: Vec<f32> = (0..state.grids.len()).map(|bucket| tail.largest(bucket)).collect();
        let step = state.step;
        if let Some(largest) = largest.iter().find(|largest| !largest.is_finite()) {
            return Err(Error::Diverged { step, norm: f64::from(*largest), loss: loss.mean() });
        }
        let redo = state.grids.iter().zip(&largest).any(|(grid, largest)| !grid.suits(*largest));
        if redo && state.attempt >= ATTEMPTS {
            let what = format!("step {step}: its gradients have another size each time they are computed");
            return Err(Error::Disagreement(what));
        }
        for (grid, largest) in state.grids.iter_mut().zip(largest).filter(|(_, largest)| *largest > 0.0) {
            *grid = Grid::for_largest(largest);
        }
        state.attempt += u64::from(redo);
        Ok(redo)
    }
}

/// When buckets were on their way, in microseconds since `begun`, and how much of that was before `ready`.
pub(super) fn spans(
    trainer: &Trainer,
    reduced: &[(Reduced, Instant)],
    begun: Instant,
    ready: Instant,
) -> (Vec<Span>, u64) {
    let us = |moment: Instant| moment.saturating_duration_since(begun).as_micros() as u64;
    let layout = trainer.decoder().layout();
    let spans = reduced.iter().map(|(r, sent)| Span {
        bucket: r.bucket,
        values: layout.buckets()[r.bucket].len(),
        ready_us: us(*sent),
        start_us: us(r.start),
        end_us: us(r.end),
    });
    let overlapped: u128 = reduced.iter().map(|(r, _)| r.before(ready).as_micros()).sum();
    (spans.collect(), overlapped as u64)
}

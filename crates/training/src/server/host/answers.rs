//! What a server answers: to workers and the launcher as a primary, to primaries as their backup.

use std::sync::Arc;
use std::time::{Duration, Instant};

use consort_collectives::link::{self, Message, Service};
use consort_tensor::Pool;

use super::{Host, State, lock, wait};
use crate::server::op::{Op, Outcome};
use crate::server::replica::{Entry, Held, Replica};
use crate::server::spec::Mode;
use crate::server::wire::{Answer, Order, head, said};

impl Host {
    /// An answer that says where to look instead.
    fn elsewhere(&self, shard: usize) -> Answer {
        let epoch = self.hosted(shard).map_or(0, |hosted| lock(&hosted.state).replica.epoch());
        Answer::Elsewhere { epoch }
    }

    fn change(&self, shard: usize, epoch: u64, op: &Op, body: Vec<u8>) -> Answer {
        let Some(hosted) = self.hosted(shard) else { return Answer::Elsewhere { epoch: 0 } };
        let until = Instant::now() + self.spec.lease();
        let body = Arc::new(body);
        let mut state = lock(&hosted.state);
        loop {
            if !state.replica.is_primary() || state.replica.epoch() < epoch || state.over {
                return Answer::Elsewhere { epoch: state.replica.epoch() };
            }
            if state.replica.room() {
                break;
            }
            let Some(left) = left(until) else { return Answer::Wait };
            state = wait(&hosted.changed, state, left);
        }
        let State { replica, pool, .. } = &mut *state;
        let not_finite = replica.shard().counts().not_finite;
        let Some((outcome, log)) = replica.change(pool, op, &body) else {
            return Answer::Elsewhere { epoch: replica.epoch() };
        };
        // In an exact sum its worker is told, and tells the coordinator.
        if outcome == Outcome::Taken && replica.shard().counts().not_finite > not_finite {
            self.refuse(op.worker(), "a process of the job", "its gradient is no number and moves nothing");
        }
        if outcome == Outcome::Taken {
            hosted.changed.notify_all();
            self.tell();
        }
        if let Outcome::Refused(reason) = &outcome {
            let (epoch, worker) = (state.replica.epoch(), op.worker());
            // What a fenced worker sends is no news: it was away.
            let fenced = worker.is_some_and(|worker| state.replica.shard().fences(worker));
            drop(state);
            if !fenced {
                self.refuse(worker, "a process of the job", reason);
            }
            return Answer::Outcome { epoch, outcome };
        }
        if outcome == Outcome::NotFinite {
            return Answer::Outcome { epoch: state.replica.epoch(), outcome };
        }
        let firm = matches!(op, Op::Load { .. });
        loop {
            match state.replica.safe(log, firm) {
                Some(true) => break,
                None => return Answer::Elsewhere { epoch: state.replica.epoch() },
                Some(false) => {}
            }
            let Some(left) = left(until) else { return Answer::Wait };
            state = wait(&hosted.changed, state, left);
        }
        let epoch = state.replica.epoch();
        drop(state);
        match self.leased() {
            true => Answer::Outcome { epoch, outcome },
            false => self.elsewhere(shard),
        }
    }

    /// A bucket's values; with the optimizer's if `all`.
    fn pull(&self, shard: usize, epoch: u64, bucket: usize, step: u64, all: bool) -> (Answer, Vec<u8>) {
        let Some(hosted) = self.hosted(shard) else { return (Answer::Elsewhere { epoch: 0 }, Vec::new()) };
        let until = Instant::now() + self.spec.lease() / 2;
        let step = if self.spec.mode == Mode::Synchronous { step } else { 0 };
        let mut state = lock(&hosted.state);
        loop {
            let replica = &state.replica;
            let here = replica.epoch();
            if !replica.is_primary() || here < epoch || state.over || !self.leased() {
                return (Answer::Elsewhere { epoch: here }, Vec::new());
            }
            let firm = self.spec.mode == Mode::Synchronous;
            let safe = replica.safe(replica.shard().log(), firm) == Some(true);
            let shard = replica.shard();
            if let (Some((at, weights)), Some((updates, own))) = (shard.weights(bucket), shard.state(bucket))
                && safe
                && at >= step
            {
                let mut body = link::bytes(weights).to_vec();
                if all {
                    own.iter().for_each(|buffer| body.extend_from_slice(link::bytes(&buffer[..])));
                }
                return (Answer::Values { epoch: here, step: at, updates }, body);
            }
            let Some(left) = left(until) else { return (Answer::Wait, Vec::new()) };
            state = wait(&hosted.changed, state, left);
        }
    }

    /// The backup's side.
    fn follow(&self, shard: usize, epoch: u64, of: impl FnOnce(&mut Replica, &Pool) -> Held) -> Answer {
        // A primary may hear of its backup before the backup does.
        let Some(hosted) = self.hosted(shard) else { return Answer::Elsewhere { epoch: 0 } };
        let mut state = lock(&hosted.state);
        let State { replica, pool, .. } = &mut *state;
        let held = of(replica, pool);
        drop(state);
        hosted.changed.notify_all();
        match held {
            Held::Log(log) => Answer::Held { log },
            Held::Elsewhere(here) => {
                if here > epoch {
                    tracing::warn!(shard, epoch, here, "refused a primary of an epoch that is over");
                }
                Answer::Elsewhere { epoch: here }
            }
            Held::Gap => Answer::Gap,
        }
    }
}

/// The time left.
fn left(until: Instant) -> Option<Duration> {
    Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

impl Service for Host {
    fn refused(&self, peer: &str, reason: &str) {
        self.refuse(None, peer, reason);
    }

    fn answer(&self, _: u64, question: Message) -> Result<Message, String> {
        let Message { head: order, body } = question;
        let order = said(&order).map_err(|error| error.to_string())?;
        let (answer, body) = match order {
            Order::Change { shard, epoch, op } => match op {
                // Decisions and fences come from the coordinator alone.
                Op::Apply(_) | Op::Fence { .. } => {
                    return Err("it decides what the coordinator alone may decide".into());
                }
                op => (self.change(shard, epoch, &op, body), Vec::new()),
            },
            Order::Pull { shard, epoch, bucket, step } => self.pull(shard, epoch, bucket, step, false),
            Order::State { shard, epoch, bucket, step } => self.pull(shard, epoch, bucket, step, true),
            Order::Probe { shard, epoch } => {
                (self.follow(shard, epoch, |replica, _| replica.stands(epoch)), Vec::new())
            }
            Order::Replicate { shard, epoch, log, op } => {
                let entry = Entry { log, op, body: Arc::new(body) };
                (self.follow(shard, epoch, |replica, pool| replica.follow(pool, epoch, &entry)), Vec::new())
            }
            Order::Copy { shard, epoch, part, head, hash } => {
                let message = Message { head, body };
                let held = |replica: &mut Replica, pool: &Pool| {
                    replica.receive(pool, epoch, part, message, hash.as_deref())
                };
                (self.follow(shard, epoch, held), Vec::new())
            }
        };
        Ok(Message { head: head(&answer), body })
    }
}

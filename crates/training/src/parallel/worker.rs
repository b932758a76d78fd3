//! One worker of a data-parallel job: from joining to the last step.

use std::time::Instant;

use consort_collectives::{Error as GroupError, JoinOptions};
use consort_model::train::MicroBatch;
use consort_tensor::train::exact::Grid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::board::{Activity, Board};
use super::event::{Control, Event, StepEvent};
use super::holding::{Keeper, keep};
use super::link::{Link, Standing};
use super::plan::Plan;
use super::record::JobRecord;
use super::saving::Saver;
use super::state::{self, State};
use super::step::{Committed, Outcome, Stepper};
use super::tail::{SAVING, STOP};
use crate::checkpoint::{self, CheckpointConfig};
use crate::data::{Dataset, Order};
use crate::{Error, Trainer};

/// Epochs in a row without a step, after which a job that only falls apart is given up.
const FRUITLESS: usize = 40;

/// Where samples come from.
pub trait Samples {
    /// How many there are: at least one.
    fn count(&self) -> u64;

    /// Equal for equal samples.
    fn id(&self) -> String;

    /// Appends a sample's sequences to a micro-batch. `index` is below [`Samples::count`].
    fn push(&self, index: u64, batch: &mut MicroBatch);
}

impl Samples for Dataset {
    fn count(&self) -> u64 {
        self.samples()
    }

    fn id(&self) -> String {
        Dataset::id(self).to_owned()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        Dataset::push(self, index, batch);
    }
}

/// With whom a worker works.
#[derive(Clone, Debug)]
pub enum Membership {
    /// With nobody.
    Alone,
    /// With whoever joins the same store. The deadline of a call must be longer than a worker computes in a step.
    Group(JoinOptions),
}

/// Why a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Reason {
    /// Its last step is done.
    Done,
    /// Somebody asked for it.
    Asked,
    /// The store is gone, so the workers could not have stood together after the next failure.
    StoreGone {
        /// What happened, and how to go on.
        message: String,
    },
}

/// How a worker ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// Steps taken, over all runs of the job.
    pub steps: u64,
    /// Why it ended.
    pub reason: Reason,
    /// BLAKE3 of the weights, as hexadecimal digits.
    pub weights_hash: String,
    /// The place in the data: samples seen, over all runs of the job.
    pub samples: u64,
}

/// What a job goes on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Resumed {
    /// Steps taken.
    pub step: u64,
    /// Newer checkpoints that are no good, as `file: reason`.
    pub refused: Vec<String>,
}

/// What stops a step.
#[derive(Debug)]
pub(super) enum Fail {
    /// The group; the step can be done again with another one.
    Link { operation: String, error: Box<GroupError> },
    /// Everything else.
    Fatal(Error),
}

impl From<Error> for Fail {
    fn from(error: Error) -> Fail {
        Fail::Fatal(error)
    }
}

/// A worker.
pub struct Worker<'a> {
    trainer: Trainer,
    data: &'a dyn Samples,
    order: Order,
    plan: Plan,
    membership: Membership,
    saver: Option<Saver>,
    record: JobRecord,
    board: Board,
    /// Step and grids of the checkpoint that it goes on from.
    resumed: Option<(u64, Vec<i32>)>,
}

impl<'a> Worker<'a> {
    /// A worker for `plan` on `data`. The trainer's weights are filled: from a seed or a model, the same on all workers.
    /// `checkpoints` says where they go; which worker of how many this is, it fills in itself.
    ///
    /// # Errors
    /// [`Error::Setting`] for a plan that makes no sense, [`Error::Checkpoint`] for a place that does not.
    pub fn new(
        mut trainer: Trainer,
        data: &'a dyn Samples,
        plan: Plan,
        membership: Membership,
        checkpoints: Option<CheckpointConfig>,
    ) -> Result<Worker<'a>, Error> {
        plan.check()?;
        if plan.outer.is_some() {
            let layout = trainer.decoder().layout().clone();
            trainer.optimizer_mut().remember(&layout)?;
        }
        let saver = checkpoints.map(|config| Saver::new(config, &trainer)).transpose()?;
        let record = JobRecord { identity: plan.identity(&data.id(), &trainer), plan: plan.clone() };
        let order = Order::new(data.count().max(1), plan.seed);
        let board = Board::new(plan.last());
        Ok(Worker { trainer, data, order, plan, membership, saver, record, board, resumed: None })
    }

    /// Where this worker notes what it is doing.
    pub fn board(&self) -> Board {
        self.board.clone()
    }

    /// What it begins with or goes on from, for somebody else to keep: its trainer, the grids (one a bucket; none where it
    /// begins), and what checkpoints say of the job.
    pub fn into_parts(self) -> (Trainer, Vec<i32>, JobRecord) {
        let exponents = self.resumed.map(|(_, exponents)| exponents).unwrap_or_default();
        (self.trainer, exponents, self.record)
    }

    /// Goes on from the newest good checkpoint, whoever wrote it and however many they were. `None` where there is none.
    /// It is enough for one worker to find it: the others get the state from that one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where none is good, [`Error::AnotherJob`] for a checkpoint of a job that computes something
    /// else. The trainer is then of no use.
    pub fn resume(&mut self) -> Result<Option<Resumed>, Error> {
        let Some(saver) = &self.saver else { return Ok(None) };
        let CheckpointConfig { location, options, .. } = saver.config();
        let parts = self.trainer.state_mut();
        let loaded = checkpoint::load(location, options, parts.layout, parts.weights, parts.optimizer)?;
        let Some(loaded) = loaded else { return Ok(None) };
        let step = loaded.step;
        let whose = format!("the checkpoint of step {step} at {location}");
        let unreadable = |what: &str| Error::Checkpoint(format!("{whose}: its job has no {what}"));
        let theirs = loaded.job.get("plan").and_then(Value::as_object).ok_or_else(|| unreadable("plan"))?;
        let cure = "put the setting back, or begin a new job in another place";
        if let Some(error) = state::difference(&self.record.identity, theirs, &whose, cure) {
            return Err(error);
        }
        let grids = loaded.job.get("grids").and_then(Value::as_array).ok_or_else(|| unreadable("grids"))?;
        let grids: Vec<i32> = grids.iter().filter_map(|k| k.as_i64()?.try_into().ok()).collect();
        if grids.len() != parts.layout.buckets().len() {
            return Err(unreadable("grid for each bucket"));
        }
        // Steps in which there was nothing to learn are no steps of the optimizer.
        *parts.steps = loaded.job.get("optimizer_steps").and_then(Value::as_u64).unwrap_or(step);
        self.resumed = Some((step, grids));
        Ok(Some(Resumed { step, refused: loaded.refused }))
    }

    /// Works until the job is done, somebody asks for a stop, or the store is gone; `watch` hears of everything.
    ///
    /// When another worker is lost, those who are left form a new group, agree on the newest state and do the step again.
    /// When newcomers wait, the group is formed anew behind the step. A worker that was taken for lost comes back by
    /// itself, as a newcomer. One that comes when the others have finished ends as they did, though without their weights.
    ///
    /// # Errors
    /// [`Error::Diverged`], [`Error::Model`]: on all workers alike. [`Error::AnotherJob`] on workers that were started for
    /// another job than the others. [`Error::Group`] where no group can be formed to begin with, or where it falls apart
    /// again and again. Others go on without a worker that ends with an error.
    pub fn run(self, watch: &mut dyn FnMut(&Event) -> Control) -> Result<Finished, Error> {
        let Worker { trainer, data, order, plan, membership, saver, record, board, resumed } = self;
        let mut state = State::first(&trainer);
        if let Some((step, exponents)) = resumed {
            state.step = step;
            state.grids = exponents.into_iter().map(Grid::from_exponent).collect();
        }
        board.doing(state.step, Activity::Joining);
        let alone = Standing { epoch: 0, rank: 0, workers: 1 };
        let (link, standing) = match membership {
            Membership::Alone => (None, alone),
            Membership::Group(options) => match Link::join(options, plan.algorithm, board.clone()) {
                Ok((link, standing)) => (Some(link), standing),
                Err(error) => {
                    board.doing(state.step, Activity::Ended);
                    return outrun(&error).ok_or_else(|| error.into());
                }
            },
        };
        let stepper = Stepper::new(plan.clone(), data, order);
        let mut run = Run {
            trainer,
            plan,
            saver,
            record,
            board,
            state,
            link,
            standing,
            stepper,
            watch,
            stop: false,
            lost_at: None,
            fruitless: 0,
            saved_us: 0,
            failed: None,
        };
        let result = run.work();
        run.board.doing(run.state.step, Activity::Ended);
        result
    }
}

/// A worker at work.
struct Run<'a, 'w> {
    trainer: Trainer,
    plan: Plan,
    saver: Option<Saver>,
    record: JobRecord,
    board: Board,
    state: State,
    link: Option<Link>,
    standing: Standing,
    stepper: Stepper<'a>,
    watch: &'w mut dyn FnMut(&Event) -> Control,
    /// Somebody here asked for a stop.
    stop: bool,
    /// When the last group was left.
    lost_at: Option<Instant>,
    /// Epochs in a row without a step.
    fruitless: usize,
    /// What the last checkpoint cost.
    saved_us: u64,
    /// The newest checkpoint that was not written, and why.
    failed: Option<(u64, String)>,
}

impl Run<'_, '_> {
    fn work(&mut self) -> Result<Finished, Error> {
        let mut agreed = false;
        loop {
            let tried = if !agreed {
                self.agree().map(|()| {
                    agreed = true;
                    None
                })
            } else if self.state.step >= self.plan.last() {
                return self.finish(Reason::Done);
            } else {
                self.step()
            };
            let left = match tried {
                Ok(None) => continue,
                Ok(Some(Turn::Stop)) => return self.finish(Reason::Asked),
                Ok(Some(Turn::Regroup)) => self.regroup(None),
                Err(Fail::Link { operation, error }) => self.regroup(Some((operation, error))),
                Err(Fail::Fatal(error)) => return Err(error),
            };
            agreed = false;
            if let Err(error) = left {
                return self.abandoned(error);
            }
        }
    }

    fn emit(&mut self, event: &Event) {
        self.stop |= (self.watch)(event) == Control::Stop;
    }

    /// Comes to the newest state of all workers.
    fn agree(&mut self) -> Result<(), Fail> {
        let Standing { epoch, rank, workers } = self.standing;
        self.board.standing(epoch, rank, workers);
        self.board.doing(self.state.step, Activity::Agreeing);
        let mut received_bytes = 0;
        if let Some(link) = &self.link {
            let Run { standing, record, state, trainer, board, .. } = self;
            received_bytes = state::agree(link, *standing, &record.identity, state, trainer, board)?;
        }
        if let Some(saver) = &mut self.saver {
            saver.members(rank, workers);
        }
        let took_us = self.lost_at.take().map_or(0, |lost| lost.elapsed().as_micros() as u64);
        let step = self.state.step;
        self.emit(&Event::Started { rank, workers, epoch, step, received_bytes, took_us });
        Ok(())
    }

    /// One step, and what comes behind it.
    fn step(&mut self) -> Result<Option<Turn>, Fail> {
        let busy = self.saver.as_mut().is_some_and(Saver::is_busy);
        let flags = if self.stop { STOP } else { 0 } | if busy { SAVING } else { 0 };
        let Run { trainer, state, link, standing, board, .. } = self;
        let outcome = match self.plan.outer {
            None => self.stepper.step(trainer, state, link.as_ref(), *standing, board, flags)?,
            Some(outer) => {
                self.stepper.round(outer, trainer, state, link.as_ref(), *standing, board, flags)?
            }
        };
        let Committed { events, stop, newcomers, store_lost, saving } = match outcome {
            Outcome::Redo => {
                let step = self.state.step;
                self.emit(&Event::Redone { step });
                return Ok(None);
            }
            Outcome::Committed(committed) => committed,
        };
        self.fruitless = 0;
        let taken = events.len() as u64;
        for event in events {
            let saved_us = std::mem::take(&mut self.saved_us);
            self.emit(&Event::Step(StepEvent { saved_us, ..event }));
        }
        let (step, last) = (self.state.step, self.state.step >= self.plan.last());
        // A round of local steps may pass the step that a checkpoint is due at.
        let due = self.plan.checkpoint_every.is_some_and(|every| step / every > (step - taken) / every);
        let end = last || stop || store_lost;
        if end {
            self.settle();
            self.save();
        } else if let Some(saver) = &mut self.saver
            && (due || saver.owes())
        {
            match saving {
                true => saver.skip(step),
                false => self.save(),
            }
        }
        let events = self.saver.as_mut().map(Saver::events).unwrap_or_default();
        self.saved(events);
        if stop && !last {
            return Ok(Some(Turn::Stop));
        }
        // Behind the last step too: a newcomer that nobody took in would take the job for one that has not begun.
        if newcomers > 0 {
            self.emit(&Event::Joining { step, newcomers });
        }
        Ok((newcomers > 0 || (store_lost && !last)).then_some(Turn::Regroup))
    }

    /// Leaves the group for the next one.
    fn regroup(&mut self, lost: Option<(String, Box<GroupError>)>) -> Result<(), Error> {
        self.lost_at.get_or_insert_with(Instant::now);
        self.trainer.discard()?;
        self.stepper.forget(&mut self.trainer);
        let Some(link) = &self.link else { return Ok(()) };
        let epoch = self.standing.epoch;
        self.board.doing(self.state.step, Activity::Joining);
        if let Some((operation, error)) = lost {
            self.fruitless += 1;
            let given_up = self.fruitless > FRUITLESS;
            let (ranks, reason) = (error.lost_rank().into_iter().collect(), error.to_string());
            let step = self.state.step;
            let recovered = link.recover(epoch);
            self.emit(&Event::Lost { step, epoch, ranks, operation, reason });
            if given_up {
                return Err(Error::Group(error));
            }
            self.standing = recovered?;
        } else {
            self.standing = link.recover(epoch)?;
        }
        Ok(())
    }

    /// Behind this there is no next time for a checkpoint that would be skipped.
    fn settle(&mut self) {
        self.board.doing(self.state.step, Activity::Saving);
        if let Some(saver) = &mut self.saver {
            saver.settle();
        }
    }

    fn save(&mut self) {
        let step = self.state.step;
        let job = self.record.state(step, self.trainer.steps(), &self.state.exponents());
        if let Some(saver) = &mut self.saver {
            self.board.doing(self.state.step, Activity::Saving);
            let begun = Instant::now();
            saver.save(step, &self.trainer, job);
            self.saved_us = begun.elapsed().as_micros() as u64;
        }
    }

    /// No other group can be formed. What this worker knows is written whole: the others may stand elsewhere.
    fn abandoned(&mut self, error: Error) -> Result<Finished, Error> {
        let Error::Group(lost) = &error else { return Err(error) };
        if let Some(finished) = outrun(lost) {
            return Ok(finished);
        }
        let gone = matches!(
            **lost,
            GroupError::StoreGone { .. } | GroupError::Rendezvous { .. } | GroupError::Refused { .. }
        );
        if !gone || !self.state.whole {
            return Err(error);
        }
        let step = self.state.step;
        let saved = match &mut self.saver {
            // Behind a step that all have taken: everyone has given its share already, or does so now.
            Some(saver) if saver.has(step) => "the checkpoint of this step",
            Some(saver) => {
                saver.members(0, 1);
                self.save();
                "a checkpoint of this step"
            }
            None => "no checkpoint, as no place for them was named",
        };
        let message =
            format!("{error}; stopped behind {step} steps with {saved}. Start the job again with --resume");
        self.finish(Reason::StoreGone { message })
    }

    fn finish(&mut self, ended: Reason) -> Result<Finished, Error> {
        self.board.doing(self.state.step, Activity::Saving);
        let mut hasher = blake3::Hasher::new();
        state::hash(self.trainer.weights(), &mut hasher);
        let (steps, weights_hash) = (self.state.step, hasher.finalize().to_hex().to_string());
        let samples = self.plan.cursor(steps);
        let finished = Finished { steps, reason: ended, weights_hash, samples };
        // Nobody needs this worker any more, and it needs nobody: who is lost from now on is no loss. Who was lost before
        // and comes back finds nobody, but the end.
        match (self.link.take(), serde_json::to_string(&finished)) {
            (Some(link), Ok(note)) if !matches!(finished.reason, Reason::StoreGone { .. }) => {
                link.conclude(self.standing.epoch, note);
            }
            (link, _) => drop(link),
        }
        if self.saver.as_ref().is_some_and(|saver| !saver.has(self.state.step)) {
            self.settle();
            self.save();
        }
        self.finish_saving();
        if finished.reason == Reason::Done && self.standing.rank == 0 {
            self.hold();
        }
        Ok(finished)
    }

    /// Passes on what became of checkpoints.
    fn saved(&mut self, events: Vec<checkpoint::Event>) {
        for event in events {
            match &event {
                checkpoint::Event::Complete { step, .. }
                    if self.failed.as_ref().is_some_and(|f| f.0 <= *step) =>
                {
                    self.failed = None;
                }
                checkpoint::Event::Failed { step, reason } => self.failed = Some((*step, reason.clone())),
                _ => {}
            }
            self.emit(&Event::Checkpoint(event));
        }
    }

    /// Waits until what was saved is written, or has failed.
    fn finish_saving(&mut self) {
        let events = self.saver.as_mut().map(Saver::finish).unwrap_or_default();
        self.saved(events);
    }

    /// Keeps weights that couldn't be written.
    fn hold(&mut self) {
        let Some((step, reason)) = self.failed.clone().filter(|(step, _)| *step == self.state.step) else {
            return;
        };
        let Some(bytes) = self.saver.as_ref().map(|saver| saver.bytes(&self.trainer)) else { return };
        keep(self, step, bytes, reason);
    }
}

impl Keeper for Run<'_, '_> {
    fn tell(&mut self, told: super::event::Holding) -> Control {
        self.emit(&Event::Holding(told));
        if self.stop { Control::Stop } else { Control::Go }
    }

    /// All of them, by itself: every worker has them.
    fn attempt(&mut self) -> Option<String> {
        if let Some(saver) = &mut self.saver {
            saver.members(0, 1);
        }
        self.save();
        self.finish_saving();
        self.failed.clone().filter(|(step, _)| *step == self.state.step).map(|(_, reason)| reason)
    }
}

/// What the others ended with, who have finished meanwhile.
fn outrun(error: &GroupError) -> Option<Finished> {
    let GroupError::Concluded { note } = error else { return None };
    serde_json::from_str(note).ok()
}

/// What comes behind a step.
enum Turn {
    Stop,
    Regroup,
}

//! A rollout: a candidate beside the incumbent of a model, given more and more of its requests, judged all the while,
//! and taken back by itself where it is worse.
//!
//! ```text
//! Fetching → Starting → Baking(0) → … → Baking(n) → Growing → Settling → Promoted
//!     └─────────┴──────────┴────────────────┴──────────┴─→ Withdrawing → Withdrawn
//! ```
//!
//! A pure state machine: the time, what both versions have done and what somebody asked for come in; what should run,
//! with which weights, is read off its state. So the same machine runs under a seed with a virtual clock, and after a
//! restart from what was written down: a step that was baking bakes anew, because what was counted is gone.
//!
//! *No stream is cut by a decision.* A version that gets nothing more (the candidate that is withdrawn, the incumbent
//! that was replaced) keeps its replicas until its requests are done, and for as long as a request may take at most.
//! Only its own death ends them.

mod book;
mod judge;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use book::{Book, Page, Promoted, Record, StartError};
pub use judge::{Judgement, Sample, Thresholds, judge};

/// Entries of a rollout's history; the oldest goes first.
const MOST_HISTORY: usize = 32;

/// What is to be rolled out, and how carefully.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The name that requests use.
    pub model: String,
    /// The candidate's name within the model.
    pub version: String,
    /// What it runs; `None` for what the incumbent runs, with other settings.
    pub source: Option<String>,
    /// Compute threads of a replica, where they differ from the incumbent's.
    #[serde(default)]
    pub threads: Option<u16>,
    /// The longest sequence, likewise.
    #[serde(default)]
    pub context: Option<u32>,
    /// Requests that a replica runs at once, likewise.
    #[serde(default)]
    pub max_running: Option<u32>,
    /// Replicas of the candidate until it is promoted.
    pub replicas: u32,
    /// Its share of requests in each step, in percent, ascending.
    pub steps: Vec<u32>,
    /// How long each step lasts at least.
    pub bake: Duration,
    /// Of the incumbent's answers, so many in a hundred are scored by the candidate; 0 for none.
    pub shadow: u32,
    /// What it may do worse.
    pub thresholds: Thresholds,
}

/// Why a rollout can't be what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// There is no step.
    #[error("a rollout needs at least one step; like --steps 5,25,50")]
    NoSteps,
    /// Steps that can't be.
    #[error("the steps {0:?} are not ascending shares of requests from 0 to 100 percent; like 5,25,50")]
    Steps(Vec<u32>),
    /// A name that can't be.
    #[error("{0:?} is no name for a version; use letters, digits, `-`, `_` and `.`, at most 48")]
    Version(String),
    /// A number that can't be.
    #[error("{what} must be {range}, not {got}")]
    Number {
        /// Which.
        what: &'static str,
        /// What it may be.
        range: &'static str,
        /// What it is.
        got: String,
    },
    /// It would change nothing.
    #[error("the candidate would be what runs already; name another --source, or another setting")]
    Same,
}

impl Spec {
    /// Checks what doesn't depend on what runs.
    ///
    /// # Errors
    /// [`SpecError`]
    pub fn check(&self) -> Result<(), SpecError> {
        if self.steps.is_empty() {
            return Err(SpecError::NoSteps);
        }
        let ascending = self.steps.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.steps.len() > 100 || self.steps.iter().any(|step| *step > 100) {
            return Err(SpecError::Steps(self.steps.iter().copied().take(100).collect()));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let begins = self.version.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !begins || self.version.len() > 48 || !self.version.bytes().all(plain) {
            return Err(SpecError::Version(self.version.chars().take(64).collect()));
        }
        let wrong = |what, range, got: String| Err(SpecError::Number { what, range, got });
        if !(1..=256).contains(&self.replicas) {
            return wrong("the number of replicas", "1 to 256", self.replicas.to_string());
        }
        if self.shadow > 100 {
            return wrong("the share of scored answers", "0 to 100 percent", self.shadow.to_string());
        }
        if self.bake > Duration::from_secs(30 * 86_400) {
            return wrong("the bake time", "at most 30 days", format!("{} s", self.bake.as_secs()));
        }
        let t = &self.thresholds;
        for (what, value) in [
            ("the allowed share of errors", t.errors),
            ("the allowed slowdown", t.slowdown),
            ("the allowed disagreement", t.disagreement),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return wrong(what, "0 or more", value.to_string());
            }
        }
        Ok(())
    }
}

/// How far a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "stage")]
pub enum Stage {
    /// The candidate's model is looked for, and fetched where it isn't here.
    Fetching,
    /// Its replicas start.
    Starting,
    /// It gets its share of a step.
    Baking {
        /// Which step, from 0.
        step: usize,
    },
    /// It passed: its replicas become as many as the incumbent's.
    Growing,
    /// It gets every request; the incumbent's replicas finish what they have.
    Settling,
    /// It is the model now.
    Promoted,
    /// It gets nothing more; its replicas finish what they have.
    Withdrawing,
    /// It is gone.
    Withdrawn,
}

impl Stage {
    /// Whether it is over.
    pub fn ended(self) -> bool {
        matches!(self, Stage::Promoted | Stage::Withdrawn)
    }

    /// One word for people.
    pub fn text(self) -> &'static str {
        match self {
            Stage::Fetching => "fetching",
            Stage::Starting => "starting",
            Stage::Baking { .. } => "baking",
            Stage::Growing => "growing",
            Stage::Settling => "settling",
            Stage::Promoted => "promoted",
            Stage::Withdrawing => "withdrawing",
            Stage::Withdrawn => "withdrawn",
        }
    }
}

/// Something that happened to a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// What, and why.
    pub text: String,
}

/// A rollout as it is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// What was asked for.
    pub spec: Spec,
    /// The incumbent's name.
    pub incumbent: String,
    /// How far it is.
    #[serde(flatten)]
    pub stage: Stage,
    /// Why it is where it is, or what it waits for.
    pub reason: String,
    /// Milliseconds since 1970: when it was started.
    pub started_ms: u64,
    /// The latest last.
    pub history: Vec<Entry>,
}

/// One version now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// What it has done since it was made.
    pub did: Sample,
    /// Replicas that are ready.
    pub ready: u32,
    /// Replicas that it should have.
    pub wanted: u32,
    /// Requests that its replicas have.
    pub running: u64,
    /// Replicas lost since it was made.
    pub lost: u64,
    /// Starts that failed in a row, where none is ready.
    pub failures: u32,
    /// Why a replica was lost last.
    pub last_failure: Option<String>,
}

/// What reaches a rollout.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<'a> {
    /// The candidate's model is here, or why it can't be.
    Located(Result<(), String>),
    /// A moment passed: the incumbent and the candidate as they are now.
    Tick(&'a Seen, &'a Seen),
    /// Somebody wants it to be the model, whatever the judge would say.
    Promote,
    /// It is to be taken back, for this reason.
    Abort(String),
}

/// Deadlines of what surrounds a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// A replica's start.
    pub start: Duration,
    /// A request in all: so long is the longest that a stream can go on.
    pub route: Duration,
}

/// A candidate's replicas may fail to start so often.
const MOST_FAILED_STARTS: u32 = 3;

/// A rollout at work: what is written down, and what is known only while the process runs.
#[derive(Clone, Debug)]
pub struct Runner {
    /// As it is written down.
    pub rollout: Rollout,
    /// When the stage was entered.
    since: Instant,
    /// The incumbent and the candidate when the rollout began, or at the restart.
    began: Option<(Sample, Sample)>,
    /// The candidate when the step began.
    step_began: Option<Sample>,
    /// Losses of the candidate before.
    lost_before: Option<u64>,
}

impl Runner {
    /// A new rollout.
    pub fn start(spec: Spec, incumbent: String, now: Instant, at_ms: u64) -> Runner {
        let rollout = Rollout {
            spec,
            incumbent,
            stage: Stage::Fetching,
            reason: String::new(),
            started_ms: at_ms,
            history: Vec::new(),
        };
        let mut runner = Runner::resume(rollout, now);
        runner.enter(now, at_ms, Stage::Fetching, "the candidate's model is looked for");
        runner
    }

    /// One that was written down, after a restart.
    pub fn resume(rollout: Rollout, now: Instant) -> Runner {
        Runner { rollout, since: now, began: None, step_began: None, lost_before: None }
    }

    /// The weights of the incumbent and the candidate, in percent.
    pub fn weights(&self) -> (u32, u32) {
        let steps = &self.rollout.spec.steps;
        let share = match self.rollout.stage {
            Stage::Fetching | Stage::Starting | Stage::Withdrawing | Stage::Withdrawn => 0,
            Stage::Baking { step } => steps.get(step).copied().unwrap_or(0),
            Stage::Growing => steps.last().copied().unwrap_or(0),
            Stage::Settling | Stage::Promoted => 100,
        };
        (100 - share.min(100), share.min(100))
    }

    /// Whether the candidate's replicas should run beside the incumbent's.
    pub fn runs_both(&self) -> bool {
        !matches!(self.rollout.stage, Stage::Fetching | Stage::Promoted | Stage::Withdrawn)
    }

    /// Whether the candidate should have as many replicas as the incumbent.
    pub fn grown(&self) -> bool {
        matches!(self.rollout.stage, Stage::Growing | Stage::Settling | Stage::Promoted)
    }

    /// What both did since the rollout began, and the candidate in this step: what the judge sees.
    pub fn evidence(&self, incumbent: &Seen, candidate: &Seen) -> (Sample, Sample) {
        let (own, theirs) = self.began.clone().unwrap_or_default();
        let step = self.step_began.as_ref().unwrap_or(&theirs);
        let whole = candidate.did.since(&theirs);
        // How it computes doesn't change from step to step, so what it scored counts throughout.
        let step = Sample {
            scored: whole.scored,
            refused: whole.refused,
            disagreement_sum: whole.disagreement_sum,
            disagreement_squares: whole.disagreement_squares,
            ..candidate.did.since(step)
        };
        (incumbent.did.since(&own), step)
    }

    /// Takes an event; true where what is written down has changed.
    pub fn step(&mut self, now: Instant, at_ms: u64, deadlines: Deadlines, event: &Event<'_>) -> bool {
        let before = (self.rollout.stage, self.rollout.reason.clone());
        match event {
            Event::Located(Ok(())) if self.rollout.stage == Stage::Fetching => {
                self.enter(now, at_ms, Stage::Starting, "the candidate's replicas start");
            }
            Event::Located(Ok(())) => {}
            Event::Located(Err(why)) => self.withdraw(now, at_ms, &format!("its model can't be had: {why}")),
            Event::Promote if !self.rollout.stage.ended() && self.rollout.stage != Stage::Withdrawing => {
                if self.rollout.stage != Stage::Settling {
                    self.enter(now, at_ms, Stage::Growing, "promoted by hand");
                }
            }
            Event::Promote => {}
            Event::Abort(why) => self.withdraw(now, at_ms, why),
            Event::Tick(incumbent, candidate) => self.tick(now, at_ms, deadlines, incumbent, candidate),
        }
        before != (self.rollout.stage, self.rollout.reason.clone())
    }

    fn tick(&mut self, now: Instant, at_ms: u64, deadlines: Deadlines, incumbent: &Seen, candidate: &Seen) {
        if self.began.is_none() {
            self.began = Some((incumbent.did.clone(), candidate.did.clone()));
        }
        let lost = candidate.lost.saturating_sub(*self.lost_before.get_or_insert(candidate.lost));
        let age = now.saturating_duration_since(self.since);
        let last = || candidate.last_failure.clone().unwrap_or_default();
        match self.rollout.stage {
            Stage::Fetching | Stage::Promoted | Stage::Withdrawn => {}
            Stage::Starting if candidate.failures >= MOST_FAILED_STARTS => {
                self.withdraw(now, at_ms, &format!("its replicas can't be started: {}", last()));
            }
            Stage::Starting if candidate.ready > 0 && candidate.ready >= candidate.wanted => {
                self.bake(now, at_ms, 0, candidate);
            }
            Stage::Starting if age > deadlines.start * 2 => {
                self.withdraw(now, at_ms, &format!("its replicas weren't ready in time: {}", last()));
            }
            Stage::Starting => {}
            Stage::Baking { .. } | Stage::Growing | Stage::Settling
                if lost > self.rollout.spec.thresholds.lost || candidate.failures >= MOST_FAILED_STARTS =>
            {
                let times = lost.max(u64::from(candidate.failures));
                self.withdraw(now, at_ms, &format!("its replicas were lost {times} times: {}", last()));
            }
            Stage::Baking { step } => self.baking(now, at_ms, step, age, incumbent, candidate),
            Stage::Growing if candidate.ready > 0 && candidate.ready >= candidate.wanted => {
                let reason =
                    format!("{} ready; {} finishes what it has", candidate.ready, self.rollout.incumbent);
                self.enter(now, at_ms, Stage::Settling, &reason);
            }
            Stage::Growing if age > deadlines.start * 2 => {
                let (ready, wanted) = (candidate.ready, candidate.wanted);
                self.withdraw(
                    now,
                    at_ms,
                    &format!("only {ready} of {wanted} replicas became ready: {}", last()),
                );
            }
            Stage::Growing => {}
            Stage::Settling if incumbent.running == 0 || age > deadlines.route => {
                self.enter(now, at_ms, Stage::Promoted, "it is the model now");
            }
            Stage::Settling => {}
            Stage::Withdrawing if candidate.running == 0 || age > deadlines.route => {
                let reason = self.rollout.reason.clone();
                self.enter(now, at_ms, Stage::Withdrawn, &reason);
            }
            Stage::Withdrawing => {}
        }
    }

    fn baking(
        &mut self,
        now: Instant,
        at_ms: u64,
        step: usize,
        age: Duration,
        incumbent: &Seen,
        candidate: &Seen,
    ) {
        if self.step_began.is_none() {
            // After a restart: what was counted before is gone.
            self.bake(now, at_ms, step, candidate);
            return;
        }
        let (own, theirs) = self.evidence(incumbent, candidate);
        let spec = &self.rollout.spec;
        let share = spec.steps.get(step).copied().unwrap_or(0);
        match judge(&spec.thresholds, share, spec.shadow > 0, &own, &theirs) {
            Judgement::Worse(reason) => self.withdraw(now, at_ms, &reason),
            Judgement::Waiting(missing) => {
                self.rollout.reason = format!("at {share} %, seen so far: {missing}")
            }
            Judgement::Fine if age < spec.bake => {
                self.rollout.reason = format!("at {share} %, fine so far; the step's time isn't over");
            }
            Judgement::Fine if step + 1 < spec.steps.len() => self.bake(now, at_ms, step + 1, candidate),
            Judgement::Fine => {
                let reason = format!("fine at {share} %, the last step");
                self.enter(now, at_ms, Stage::Growing, &reason);
            }
        }
    }

    fn bake(&mut self, now: Instant, at_ms: u64, step: usize, candidate: &Seen) {
        self.step_began = Some(candidate.did.clone());
        let share = self.rollout.spec.steps.get(step).copied().unwrap_or(0);
        self.enter(now, at_ms, Stage::Baking { step }, &format!("it gets {share} % of the requests"));
    }

    fn withdraw(&mut self, now: Instant, at_ms: u64, reason: &str) {
        match self.rollout.stage {
            Stage::Promoted | Stage::Withdrawn | Stage::Withdrawing => {}
            Stage::Fetching => self.enter(now, at_ms, Stage::Withdrawn, reason),
            _ => self.enter(now, at_ms, Stage::Withdrawing, reason),
        }
    }

    fn enter(&mut self, now: Instant, at_ms: u64, stage: Stage, reason: &str) {
        self.since = now;
        let rollout = &mut self.rollout;
        (rollout.stage, rollout.reason) = (stage, reason.to_owned());
        if rollout.history.len() == MOST_HISTORY {
            rollout.history.remove(0);
        }
        rollout.history.push(Entry { at_ms, text: format!("{}: {reason}", stage.text()) });
    }
}

#[cfg(test)]
mod tests;

//! What the supervisor has, for people and the page.

use std::time::Instant;

use consort_api::ReadyReport;
use serde::{Deserialize, Serialize};

use super::replica::{Phase, Replica};
use super::{Place, Supervisor};

/// One slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotView {
    /// `chat-0`.
    pub slot: String,
    /// The model's name.
    pub model: String,
    /// The version's name.
    pub version: String,
    /// How it is.
    pub state: SlotState,
    /// Compute threads of what is wanted here.
    pub threads: u16,
    /// Times that a replica here was lost.
    pub restarts: u64,
    /// Losses in a row.
    pub failures: u32,
    /// How the last one was lost.
    pub last_failure: Option<String>,
    /// Milliseconds until another is started, where one is waited with.
    pub retry_in_ms: Option<u64>,
    /// The processes: the one that gets requests first, then its successor, then those that leave.
    pub replicas: Vec<ReplicaView>,
}

/// How a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    /// A process loads the model.
    Starting,
    /// It answers.
    Ready,
    /// It answers, and its successor starts.
    Rolling,
    /// It was lost, and the next start is waited with.
    Waiting,
    /// It was lost too often in a row.
    CrashLoop,
    /// It is wanted no more.
    Leaving,
}

impl SlotState {
    /// As it is shown.
    pub fn text(self) -> &'static str {
        match self {
            SlotState::Starting => "starting",
            SlotState::Ready => "ready",
            SlotState::Rolling => "rolling",
            SlotState::Waiting => "waiting",
            SlotState::CrashLoop => "crash loop",
            SlotState::Leaving => "leaving",
        }
    }
}

/// One process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// `chat-0.3`.
    pub id: String,
    /// `starting`, `ready`, `draining` or `killed`.
    pub phase: String,
    /// The process.
    pub pid: Option<u32>,
    /// Where it listens.
    pub address: Option<String>,
    /// Milliseconds since it was started.
    pub age_ms: u64,
    /// What it last said of itself.
    pub report: Option<ReadyReport>,
}

impl Supervisor {
    /// Every slot, in order.
    pub fn view(&self, now: Instant) -> Vec<SlotView> {
        self.places
            .iter()
            .map(|(slot, place)| SlotView {
                slot: slot.to_string(),
                model: slot.model.clone(),
                version: slot.version.clone(),
                state: place.state(self.options.loop_after, self.stopping),
                threads: place
                    .all()
                    .next()
                    .map(|r| &r.launch)
                    .or(place.launch.as_ref())
                    .map_or(0, |l| l.threads),
                restarts: place.restarts,
                failures: place.failures,
                last_failure: place.last_failure.clone(),
                retry_in_ms: place
                    .retry_at
                    .filter(|_| place.launch.is_some())
                    .map(|at| at.saturating_duration_since(now).as_millis() as u64),
                replicas: place.all().map(|replica| replica.view(now)).collect(),
            })
            .collect()
    }
}

impl Place {
    fn state(&self, loop_after: u32, stopping: bool) -> SlotState {
        let looping = self.failures >= loop_after;
        match &self.current {
            _ if stopping || self.launch.is_none() => SlotState::Leaving,
            Some(current) if matches!(current.phase, Phase::Ready { .. }) => {
                if self.next.is_some() {
                    SlotState::Rolling
                } else {
                    SlotState::Ready
                }
            }
            _ if looping => SlotState::CrashLoop,
            Some(_) => SlotState::Starting,
            None => SlotState::Waiting,
        }
    }
}

impl Replica {
    fn view(&self, now: Instant) -> ReplicaView {
        let phase = match self.phase {
            Phase::Starting => "starting",
            Phase::Ready { .. } => "ready",
            Phase::Draining { .. } => "draining",
            Phase::Killed => "killed",
        };
        ReplicaView {
            id: self.id.to_string(),
            phase: phase.to_owned(),
            pid: self.pid,
            address: self.address.map(|a| a.to_string()),
            age_ms: now.saturating_duration_since(self.started).as_millis() as u64,
            report: self.report.clone(),
        }
    }
}

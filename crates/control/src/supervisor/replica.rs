//! One incarnation of a replica, and how long it may take over what it does.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use consort_api::ReadyReport;

use super::{Options, ReplicaId};
use crate::launch::{Launch, Slot};

/// A server that has drained closes its socket first and ends its last connections then; so long nobody answers.
const CLOSING: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The process loads its model.
    Starting,
    /// It answers.
    Ready { since: Instant },
    /// It was told to stop and finishes what it has.
    Draining { since: Instant },
    /// It was killed; the process may not be gone yet.
    Killed,
}

#[derive(Clone, Debug)]
pub(super) struct Replica {
    pub(super) id: ReplicaId,
    pub(super) slot: Slot,
    pub(super) launch: Launch,
    pub(super) phase: Phase,
    pub(super) pid: Option<u32>,
    pub(super) address: Option<SocketAddr>,
    pub(super) started: Instant,
    pub(super) last_answer: Instant,
    /// How long the engine had been at its step when it last answered.
    pub(super) stalled: Duration,
    pub(super) report: Option<ReadyReport>,
}

impl Replica {
    pub(super) fn new(id: ReplicaId, slot: Slot, launch: Launch, now: Instant) -> Replica {
        Replica {
            id,
            slot,
            launch,
            phase: Phase::Starting,
            pid: None,
            address: None,
            started: now,
            last_answer: now,
            stalled: Duration::ZERO,
            report: None,
        }
    }

    pub(super) fn ready_for(&self, now: Instant) -> Option<Duration> {
        match self.phase {
            Phase::Ready { since } => Some(now.saturating_duration_since(since)),
            _ => None,
        }
    }

    /// Why it must be killed, if it must.
    pub(super) fn overdue(&self, now: Instant, options: &Options) -> Option<String> {
        let silent = now.saturating_duration_since(self.last_answer);
        match self.phase {
            Phase::Starting if now.saturating_duration_since(self.started) >= options.start => {
                Some(format!("it was not ready within {} s", options.start.as_secs_f64()))
            }
            Phase::Ready { .. } if silent >= options.probe => {
                Some(format!("it hangs: no answer to a health check for {:.1} s", silent.as_secs_f64()))
            }
            Phase::Ready { .. } if self.stalled >= options.stalled => Some(format!(
                "it hangs: it has work and took no step for {:.1} s",
                self.stalled.as_secs_f64()
            )),
            Phase::Draining { since } if now.saturating_duration_since(since) >= options.drain => {
                Some(format!("it had {} s for it", options.drain.as_secs_f64()))
            }
            Phase::Draining { .. } if silent >= options.probe + CLOSING => {
                Some(format!("it hangs: no answer to a health check for {:.1} s", silent.as_secs_f64()))
            }
            _ => None,
        }
    }
}

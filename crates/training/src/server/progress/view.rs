//! What every worker does or waits for, in the coordinator's words.

use std::time::Duration;

use super::{Progress, WorkerId};
use crate::server::coordinator::{Waits, WorkerView};
use crate::server::spec::{Aggregate, Mode};

impl Progress {
    /// The workers that live, by number.
    pub(in crate::server) fn view(&self, now: Duration) -> Vec<WorkerView> {
        let ms = |since: Duration| now.saturating_sub(since).as_millis() as u64;
        let view = |(&worker, state): (&WorkerId, &super::Worker)| {
            let since = |claims: &[(WorkerId, Duration)]| {
                claims.iter().find(|(by, _)| *by == worker).map(|(_, since)| ms(*since))
            };
            WorkerView {
                worker,
                name: String::new(),
                clock: state.clock,
                silent_ms: ms(state.heard),
                computes: self.claimed.iter().find_map(|(group, claims)| Some((*group, since(claims)?))),
                waits: state.waits.map(|since| (self.waits(worker), ms(since))),
            }
        };
        self.live().map(view).collect()
    }

    /// Why a worker has nothing to do: the conditions of a grant, in its order.
    fn waits(&self, worker: WorkerId) -> Waits {
        let there = self.live().count() as u64;
        if !self.begun && there < self.spec.workers {
            return Waits::Workers { there, expected: self.spec.workers };
        }
        let mut by: Vec<WorkerId> = self.claimed.values().flatten().map(|(id, _)| *id).collect();
        by.retain(|id| *id != worker);
        by.sort_unstable();
        by.dedup();
        if self.is_on_hold() {
            return Waits::Held { by };
        }
        if let Mode::Bounded { staleness } = self.spec.mode {
            let slowest = self.slowest();
            let clock = self.workers.get(&worker).map_or(slowest, |worker| worker.clock);
            if clock + 1 > slowest + staleness {
                let slow = self.workers.iter().filter(|(_, w)| w.clock == slowest);
                return Waits::Slowest { by: slow.map(|(id, _)| *id).collect(), behind: clock - slowest };
            }
        }
        Waits::Groups { by, shared: self.spec.aggregate != Aggregate::Mean }
    }
}

//! Who gets which group next, and why somebody gets none.

use std::time::Duration;

use super::{Claim, Grant, Progress, WorkerId};
use crate::server::spec::{Aggregate, Mode};

impl Progress {
    /// A worker has nothing to do.
    pub fn claim(&mut self, now: Duration, id: WorkerId) -> Grant {
        let grant = self.grant(now, id);
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.waits = matches!(grant, Grant::Wait).then(|| worker.waits.unwrap_or(now));
        }
        grant
    }

    /// A worker that has nothing to do gets nothing for now, whatever there is.
    pub(in crate::server) fn wait(&mut self, now: Duration, id: WorkerId) -> Grant {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.waits.get_or_insert(now);
        }
        Grant::Wait
    }

    fn grant(&mut self, now: Duration, id: WorkerId) -> Grant {
        let Some(worker) = self.workers.get(&id).filter(|worker| worker.unfenced.is_empty()) else {
            return Grant::Wait;
        };
        if self.finished || self.failed {
            return Grant::Finished;
        }
        self.begun |= self.live().count() as u64 >= self.spec.workers;
        if !self.begun || self.is_on_hold() {
            return Grant::Wait;
        }
        if let Mode::Bounded { staleness } = self.spec.mode
            && worker.clock + 1 > self.slowest() + staleness
        {
            return Grant::Wait;
        }
        if self.spec.aggregate != Aggregate::Mean && self.share_is_full(id) {
            return Grant::Wait;
        }
        let end = match self.spec.mode {
            Mode::Synchronous => (self.step.step + 1) * self.spec.groups,
            _ => self.spec.total(),
        };
        // What came to no number on this worker is for another one, while there is one.
        let alone = self.live().count() <= 1;
        let mine = |group: &u64| !alone && self.step.not_finite.get(group) == Some(&id);
        let reopened = self.reopened.iter().copied().find(|group| !mine(group));
        let group = match reopened {
            Some(group) => {
                self.reopened.remove(&group);
                group
            }
            None if self.next < end => {
                self.next += 1;
                self.next - 1
            }
            None => match self.slow(now, id) {
                Some(group) => group,
                None => return Grant::Wait,
            },
        };
        self.claimed.entry(group).or_default().push((id, now));
        let synchronous = self.spec.mode == Mode::Synchronous;
        if synchronous && let Some(by) = self.step.by.get_mut((group % self.spec.groups) as usize) {
            *by = Some(id);
        }
        Grant::Work(Claim {
            group,
            step: group / self.spec.groups,
            attempt: self.step.attempt,
            exponents: match (synchronous, self.spec.aggregate) {
                (true, Aggregate::Mean) => self.step.exponents.clone(),
                _ => Vec::new(),
            },
        })
    }

    pub(super) fn is_on_hold(&self) -> bool {
        self.hold.is_some_and(|hold| self.holds(hold))
    }

    /// Whether everything before step `hold` is handed out.
    pub(super) fn holds(&self, hold: u64) -> bool {
        match self.spec.mode {
            Mode::Synchronous => self.step.step >= hold,
            _ => self.reopened.is_empty() && self.next >= hold.saturating_mul(self.spec.groups),
        }
    }

    /// Where gradients are compared, no worker gives more of a step's than its share: one that is wrong stays one.
    fn share_is_full(&self, id: WorkerId) -> bool {
        let live = self.live().count().max(1);
        let share = (self.spec.groups as usize).div_ceil(live);
        self.step.by.iter().filter(|by| **by == Some(id)).count() >= share
    }

    /// A group that somebody else computes for too long.
    fn slow(&self, now: Duration, id: WorkerId) -> Option<u64> {
        let patience = Duration::from_millis(self.spec.speculate_ms);
        let useful = self.spec.exact();
        if patience.is_zero() || !useful {
            return None;
        }
        let late = |claims: &Vec<(WorkerId, Duration)>| {
            claims.len() == 1 && claims[0].0 != id && now.saturating_sub(claims[0].1) >= patience
        };
        let mine = |group: &u64| self.step.not_finite.get(group) == Some(&id);
        let late = self.claimed.iter().filter(|(group, claims)| late(claims) && !mine(group));
        late.min_by_key(|(_, claims)| claims[0].1).map(|(group, _)| *group)
    }
}

//! Requests that leave the version they began with.
//!
//! A version on trial must cost nobody an answer: what it can't do before an answer has begun, another version does, and
//! it counts as the trial's failure. A refusal may be right, so it counts only where the other version takes the request.
//! And what its client has nothing of may begin anew wherever somebody is left, which is every answer that is told as a
//! whole.

use std::sync::Arc;
use std::time::Instant;

use super::Session;
use crate::fleet::Replica;
use crate::proxy::progress::Progress;
use crate::telemetry::Place;

impl Session {
    /// Gives a request that hasn't begun to another version, where its own is on trial and there is one; whether it did.
    pub(super) fn leave_version(&mut self) -> bool {
        let Some(left) = self.leave() else { return false };
        self.count_diverted(&left);
        true
    }

    /// A version on trial refuses the request. Whether that is the request's fault, another version is asked; whether one
    /// is.
    pub(super) fn doubt(&mut self) -> bool {
        self.doubted = self.leave();
        self.doubted.is_some()
    }

    /// Another version takes what was refused.
    pub(super) fn confirm_doubt(&mut self) {
        if let Some(left) = self.doubted.take() {
            self.count_diverted(&left);
        }
    }

    /// Lets go of what was said, where nobody is left who could go on with it and its client has nothing of it; whether
    /// it did.
    pub(super) fn begin_anew(&mut self) -> bool {
        let now = Instant::now();
        if self.call.stream || !self.progress.begun() || self.tries >= self.settings.retries.attempts {
            return false;
        }
        let class = self.fingerprint();
        let on_trial = self.version().on_trial;
        let may = |replica: &Arc<Replica>| {
            let same = class.is_none_or(|class| replica.fingerprint().as_deref() == Some(class));
            // One that is on trial and failed the request isn't asked to go on with it.
            same && !(on_trial && self.failed.contains(&replica.id))
        };
        let mut up = self.version().replicas.iter().filter(|replica| replica.is_up(now)).peekable();
        let anybody = up.peek().is_some() || on_trial;
        if !anybody || up.any(may) {
            return false;
        }
        self.progress = Progress::new(self.call.choices, self.call.emitted.clone());
        self.anew = true;
        self.leave_version();
        true
    }

    /// The version that it left.
    fn leave(&mut self) -> Option<Place> {
        if self.progress.begun() || !self.version().on_trial {
            return None;
        }
        let others =
            self.model.versions.iter().enumerate().filter(|(_, v)| !v.on_trial && !v.replicas.is_empty());
        let (other, _) = others.max_by_key(|(_, v)| v.weight)?;
        let left = self.place();
        self.version = other;
        self.failed.clear();
        self.last_refusal = None;
        // Another version's prefix cache holds other keys and values.
        self.beginnings.clear();
        Some(left)
    }

    fn count_diverted(&self, left: &Place) {
        let version = left.version();
        self.gateway.telemetry.diverted(&left.model.name, &version.name, &version.stats);
        let _ = self.tally.diverted.set(self.place());
    }
}

//! What a checkpoint says of its job, beside weights and optimizer: how far it is, and what it computes.

use serde_json::{Map, Value, json};

use super::plan::Plan;
use crate::checkpoint::JobState;

/// A job's name for itself. Who keeps the job's state elsewhere (parameter servers) writes the same checkpoints with it.
#[derive(Clone, Debug)]
pub struct JobRecord {
    pub(super) plan: Plan,
    /// What must be equal for a checkpoint to be this job's.
    pub(super) identity: Map<String, Value>,
}

impl JobRecord {
    /// Behind `steps` steps, `updates` of which moved the weights; `exponents` are the grids, one a bucket.
    pub fn state(&self, steps: u64, updates: u64, exponents: &[i32]) -> JobState {
        json!({
            "step": steps,
            "cursor": self.plan.cursor(steps),
            "optimizer_steps": updates,
            "grids": exponents,
            "plan": self.identity,
        })
    }

    /// The place in the data behind `steps` steps: samples seen.
    pub fn cursor(&self, steps: u64) -> u64 {
        self.plan.cursor(steps)
    }
}

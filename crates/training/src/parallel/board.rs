//! What a worker is doing right now, for another thread to read: who waits for whom, in what, since when.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// What the computing thread does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "doing", rename_all = "snake_case")]
pub enum Activity {
    /// Nothing yet.
    #[default]
    Starting,
    /// Waits for a group to be formed.
    Joining,
    /// Agrees with the others on where they stand.
    Agreeing,
    /// Gets the state from another worker.
    Receiving {
        /// The other worker.
        from: usize,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Sends the state to others.
    Sending {
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Forward and backward.
    Computing {
        /// The micro-batch of the step.
        micro_batch: usize,
    },
    /// Has computed its share and waits for the others' gradients.
    Waiting,
    /// Moves the weights.
    Applying,
    /// Copies its share for a checkpoint, or finishes the last one.
    Saving,
    /// Done.
    Ended,
}

/// What the thread that talks to the others does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Talking {
    /// What for: `bucket 3 of step 17`.
    pub what: String,
    /// The call's number in its epoch: a rank whose number is lower is the one that the others wait for.
    pub sequence: u64,
    /// For how long, in milliseconds.
    pub since_ms: u64,
}

/// What a worker is doing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// This worker's number.
    pub rank: usize,
    /// Workers in all.
    pub workers: usize,
    /// The epoch.
    pub epoch: u64,
    /// The step under way.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// What is computed.
    #[serde(flatten)]
    pub activity: Activity,
    /// For how long, in milliseconds.
    pub since_ms: u64,
    /// The collective call under way, if one is.
    pub talking: Option<Talking>,
}

#[derive(Debug)]
struct Notes {
    status: Status,
    since: Instant,
    talking: Option<(String, u64, Instant)>,
}

/// Where a worker notes it.
#[derive(Clone, Debug)]
pub struct Board(Arc<Mutex<Notes>>);

impl Board {
    pub(super) fn new(steps: u64) -> Board {
        let status = Status { steps, workers: 1, ..Status::default() };
        Board(Arc::new(Mutex::new(Notes { status, since: Instant::now(), talking: None })))
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the worker is doing now.
    pub fn status(&self) -> Status {
        let notes = self.lock();
        let ms = |since: Instant| since.elapsed().as_millis() as u64;
        let talking = notes.talking.as_ref().map(|(what, sequence, since)| Talking {
            what: what.clone(),
            sequence: *sequence,
            since_ms: ms(*since),
        });
        Status { since_ms: ms(notes.since), talking, ..notes.status.clone() }
    }

    pub(super) fn standing(&self, epoch: u64, rank: usize, workers: usize) {
        let status = &mut self.lock().status;
        (status.epoch, status.rank, status.workers) = (epoch, rank, workers);
    }

    pub(super) fn doing(&self, step: u64, activity: Activity) {
        let mut notes = self.lock();
        (notes.status.step, notes.status.activity, notes.since) = (step, activity, Instant::now());
    }

    pub(super) fn talking(&self, what: Option<(&str, u64)>) {
        self.lock().talking = what.map(|(what, sequence)| (what.to_owned(), sequence, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_elsewhere() {
        let board = Board::new(9);
        board.standing(2, 1, 3);
        board.doing(4, Activity::Computing { micro_batch: 5 });
        board.talking(Some(("bucket 3 of step 4", 17)));
        let other = board.clone();
        let status = std::thread::spawn(move || other.status()).join().unwrap();
        assert_eq!((status.epoch, status.rank, status.workers, status.step, status.steps), (2, 1, 3, 4, 9));
        assert_eq!(status.talking.as_ref().map(|t| t.sequence), Some(17));
        let text = serde_json::to_string(&status).unwrap();
        assert!(text.contains("\"doing\":\"computing\",\"micro_batch\":5"), "{text}");
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
    }
}

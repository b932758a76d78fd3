//! What a worker says of its work.

use serde::{Deserialize, Serialize};

use crate::checkpoint;

/// Something that happened, in the order in which it did. Every worker sees its own; a step's numbers are the same on
/// all, but for times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// This worker has a rank in an epoch, and the state that the workers agreed on. Comes first, and after every change
    /// of the members.
    Started {
        /// This worker's number, from 0.
        rank: usize,
        /// Workers in all.
        workers: usize,
        /// The epoch: how often members changed.
        epoch: u64,
        /// The next step.
        step: u64,
        /// What was received from another worker, in bytes; 0 where this one had it all.
        received_bytes: u64,
        /// From losing the last epoch to this moment, in microseconds; 0 at first.
        took_us: u64,
    },
    /// A step is done, by all.
    Step(StepEvent),
    /// A step is done again: its gradients grew or shrank so much that they need another grid.
    Redone {
        /// The step.
        step: u64,
    },
    /// A worker is lost, or the group can't go on as it is. The step is done again by those who are left.
    Lost {
        /// The step.
        step: u64,
        /// The epoch that ended.
        epoch: u64,
        /// Who is gone, where that is known; a rank of the epoch that ended.
        ranks: Vec<usize>,
        /// What this worker was doing.
        operation: String,
        /// The error.
        reason: String,
    },
    /// Newcomers wait: the members change behind this step.
    Joining {
        /// The next step.
        step: u64,
        /// How many.
        newcomers: usize,
    },
    /// What became of a checkpoint.
    Checkpoint(checkpoint::Event),
    /// The last checkpoint can't be written. The first worker keeps the weights and tries again; it says this once a second,
    /// and a [`Control::Stop`] gives them up.
    Holding(Holding),
}

/// Weights that are trained and not yet written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The step.
    pub step: u64,
    /// Why the last attempt failed.
    pub reason: String,
    /// Bytes that the whole checkpoint takes.
    pub bytes: u64,
    /// Until the next attempt, in milliseconds.
    pub again_ms: u64,
    /// Until it is given up, in milliseconds.
    pub left_ms: u64,
}

/// A step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// Its number, from 0.
    pub step: u64,
    /// The mean loss, in nats a token.
    pub loss: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The mean gradient's length before clipping.
    pub gradient_norm: f64,
    /// Rows of all workers: tokens that were predicted.
    pub rows: u64,
    /// Samples of all workers.
    pub samples: u64,
    /// A sum over the numbers of these samples in the data ([`seen`]): who adds up those of an epoch's steps knows
    /// whether each came once.
    pub seen: u64,
    /// The place in the data behind this step.
    pub cursor: u64,
    /// Workers.
    pub workers: usize,
    /// The epoch.
    pub epoch: u64,
    /// Wall time of the step, in microseconds.
    pub took_us: u64,
    /// Of it, computing: forward and backward.
    pub computed_us: u64,
    /// Of it, waiting for other workers when nothing was left to compute.
    pub waited_us: u64,
    /// Of the time that buckets were on their way, what was behind computing.
    pub overlapped_us: u64,
    /// What copying the last checkpoint's share took before this step began, in microseconds; 0 where there was none.
    pub saved_us: u64,
    /// When each bucket was on its way.
    pub spans: Vec<Span>,
    /// Each worker's own computing time, in microseconds.
    pub computed_by_rank_us: Vec<u64>,
}

/// A bucket on its way, in microseconds since the step began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Which bucket, in the layout's order.
    pub bucket: usize,
    /// Its values.
    pub values: usize,
    /// When its last gradient was added.
    pub ready_us: u64,
    /// When its reduction began.
    pub start_us: u64,
    /// When it was over.
    pub end_us: u64,
}

/// What whoever watches wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Go,
    /// All workers finish the step, write a checkpoint and stop.
    Stop,
}

/// What one sample adds to [`StepEvent::seen`]: `index` is its number in the data.
pub fn seen(index: u64) -> u64 {
    let [a, b, ..] = consort_base::philox4x32([index as u32, (index >> 32) as u32, 0, 0], [0x5ee4, 0]);
    u64::from(a) << 32 | u64::from(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_from_json() {
        let took = std::time::Duration::from_millis(3);
        for event in [
            Event::Started { rank: 1, workers: 4, epoch: 2, step: 7, received_bytes: 9, took_us: 1 },
            Event::Step(StepEvent { step: 3, loss: 1.5, spans: vec![Span::default()], ..Default::default() }),
            Event::Redone { step: 1 },
            Event::Lost {
                step: 1,
                epoch: 1,
                ranks: vec![2],
                operation: "bucket 3".into(),
                reason: "gone".into(),
            },
            Event::Checkpoint(checkpoint::Event::Complete { step: 1, bytes: 2, took }),
            Event::Checkpoint(checkpoint::Event::Skipped { step: 1 }),
            Event::Holding(Holding { step: 9, reason: "full".into(), bytes: 1, again_ms: 2, left_ms: 3 }),
        ] {
            let text = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event, "{text}");
        }
    }
}

//! What a job says of itself: a record for every step and every event, one JSON object a line, and a page made of them.
//!
//! The file of records (`metrics.jsonl`) is for programs: it is appended to while the job runs, and a resumed job goes on
//! in it. The page ([`html`]) is for people: one file without anything outside it, readable in ten years.

mod page;
mod plots;

use serde::{Deserialize, Serialize};

pub use page::{Page, Sample, html};

/// A line of the metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A job began, or was resumed.
    Start(Start),
    /// A step was taken.
    Step(Step),
    /// Something happened.
    Event(Event),
    /// The job ended, or was stopped.
    End(End),
}

/// The beginning of a job, or of its next part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Steps in all.
    pub steps: u64,
    /// The step it goes on behind; `None` where it began at the beginning.
    pub resumed: Option<u64>,
    /// Processes that train.
    pub workers: usize,
    /// Trainable values.
    pub parameters: u64,
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// Seconds since the job or its part began, at the step's end.
    pub at: f64,
    /// How long it took.
    pub seconds: f64,
    /// Mean loss of its tokens, before it moved the weights.
    pub loss: f64,
    /// Predicted tokens.
    pub tokens: f64,
    /// The length of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Workers that took it.
    pub workers: usize,
    /// Epochs of membership so far: it grows whenever workers are lost or join.
    #[serde(default)]
    pub epoch: u64,
    /// Seconds that gradients were under way, on the worker that says so.
    #[serde(default)]
    pub communication: f64,
    /// Seconds of them in which that worker waited, because its backward was done.
    #[serde(default)]
    pub exposed: f64,
}

impl Step {
    /// The share of communication that backward hid; `None` where there was none.
    pub fn overlap(&self) -> Option<f64> {
        (self.communication > 0.0).then(|| (1.0 - self.exposed / self.communication).clamp(0.0, 1.0))
    }

    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the job or its part began.
    pub at: f64,
    /// The step that was under way, or was taken last.
    pub step: u64,
    /// Which kind of thing.
    pub what: What,
    /// In a sentence.
    pub text: String,
}

/// Kinds of things that happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A worker is gone.
    Lost,
    /// A worker came.
    Joined,
    /// A checkpoint is complete.
    Checkpoint,
    /// A checkpoint was not written, or left out.
    CheckpointFailed,
    /// The job was told to stop.
    Stopped,
    /// Anything else.
    Note,
}

/// The end of a job or of a part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Seconds since the job or its part began.
    pub at: f64,
    /// Steps taken, over all parts.
    pub step: u64,
    /// All steps are taken.
    pub complete: bool,
    /// BLAKE3 of the weights, 32-bit floats in the layout's order.
    pub weights: Option<String>,
}

/// Records of a file's text. A line that is none, such as the last one of a process that was killed, is passed over.
pub fn read(text: &str) -> Vec<Record> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Puts the parts of a resumed job behind each other: times go on, and steps that were taken again after a resumption
/// count once, as they were taken last.
pub fn joined(records: &[Record]) -> Vec<Record> {
    let (mut joined, mut offset, mut last) = (Vec::new(), 0.0, 0.0f64);
    for record in records {
        let mut record = record.clone();
        match &mut record {
            Record::Start(start) => {
                offset = last;
                let behind = start.resumed.unwrap_or(0);
                if behind == 0 && start.resumed.is_none() {
                    // A new job in the same folder.
                    joined.clear();
                    (offset, last) = (0.0, 0.0);
                }
                joined.retain(|r| !matches!(r, Record::Step(step) if step.step > behind));
            }
            Record::Step(step) => step.at += offset,
            Record::Event(event) => event.at += offset,
            Record::End(end) => end.at += offset,
        }
        let at = match &record {
            Record::Start(_) => offset,
            Record::Step(step) => step.at,
            Record::Event(event) => event.at,
            Record::End(end) => end.at,
        };
        last = last.max(at);
        joined.push(record);
    }
    joined
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn step(number: u64, at: f64, loss: f64) -> Record {
        Record::Step(Step {
            step: number,
            at,
            seconds: 0.5,
            loss,
            tokens: 1000.0,
            gradient_norm: 1.0,
            learning_rate: 1e-3,
            workers: 2,
            epoch: 1,
            communication: 0.2,
            exposed: 0.05,
        })
    }

    pub(crate) fn start(resumed: Option<u64>) -> Record {
        Record::Start(Start { unix_ms: 1, steps: 10, resumed, workers: 2, parameters: 1_000_000 })
    }

    #[test]
    fn a_record_is_a_line_and_torn_lines_are_passed_over() {
        let records = [start(None), step(1, 0.5, 3.0)];
        let mut text: String = records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
        assert!(text.starts_with("{\"kind\":\"start\""), "{text}");
        text.push_str("{\"kind\":\"step\",\"st");
        assert_eq!(read(&text), records);
    }

    #[test]
    fn parts_of_a_job_are_put_behind_each_other() {
        let records = [
            start(None),
            step(1, 0.5, 3.0),
            step(2, 1.0, 2.9),
            step(3, 1.5, 2.8),
            start(Some(2)),
            step(3, 0.5, 2.8),
        ];
        let joined = joined(&records);
        let steps: Vec<(u64, f64)> = joined
            .iter()
            .filter_map(|r| if let Record::Step(s) = r { Some((s.step, s.at)) } else { None })
            .collect();
        assert_eq!(steps, [(1, 0.5), (2, 1.0), (3, 2.0)]);
        let again = super::joined(&[&records[..], &[start(None), step(1, 0.1, 3.0)]].concat());
        assert_eq!(again.len(), 2, "a new job forgets the one before it");
    }

    #[test]
    fn overlap_is_what_was_not_waited_for() {
        let Record::Step(step) = step(1, 1.0, 1.0) else { panic!() };
        assert!((step.overlap().unwrap() - 0.75).abs() < 1e-12);
        assert_eq!(Step { communication: 0.0, ..step }.overlap(), None);
        assert_eq!(step.rate(), 2000.0);
    }
}

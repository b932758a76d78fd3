//! What a worker tells its launcher: one JSON object a line on its standard output.

use consort_training::parallel::{Event, Finished, Status};
use serde::{Deserialize, Serialize};

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "said", content = "what", rename_all = "snake_case")]
pub(crate) enum Said {
    /// It goes on from a checkpoint.
    Resumed {
        /// Steps taken.
        step: u64,
        /// Newer checkpoints that are no good.
        refused: Vec<String>,
    },
    /// Something happened.
    Event(Event),
    /// What it is doing right now, a few times a second.
    Status(Status),
    /// It has ended as it should.
    Finished(Finished),
    /// It has ended because of something that another worker would run into too.
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        for said in [
            Said::Resumed { step: 3, refused: vec!["a: torn".into()] },
            Said::Event(Event::Redone { step: 7 }),
            Said::Status(Status { rank: 2, workers: 3, ..Status::default() }),
            Said::Failed("no".into()),
        ] {
            let line = serde_json::to_string(&said).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Said>(&line).unwrap(), said, "{line}");
        }
    }
}

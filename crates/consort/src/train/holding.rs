//! What people are told while trained weights wait for a place that takes them.

use std::path::Path;
use std::time::{Duration, Instant};

use consort_training::parallel::Holding;

use super::show::duration;
use crate::terminal::bytes;

/// Says it once an attempt: a worker tells of it each second, which is more than people want to read.
#[derive(Debug, Default)]
pub(crate) struct Teller {
    /// When the next attempt is.
    until: Option<Instant>,
}

impl Teller {
    /// Whether weights have waited.
    pub(crate) fn has_told(&self) -> bool {
        self.until.is_some()
    }

    /// What is to be said, if it is news. `location` is where checkpoints go.
    pub(crate) fn news(&mut self, holding: &Holding, location: &str) -> Option<String> {
        if holding.again_ms == 0 || self.until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        self.until = Some(Instant::now() + Duration::from_millis(holding.again_ms));
        Some(words(holding, location))
    }
}

/// What is wrong, how long it is tried, and the cure.
fn words(holding: &Holding, location: &str) -> String {
    let Holding { step, reason, bytes: needed, again_ms, left_ms } = holding;
    let free = match free_bytes(location) {
        Some(free) => format!(", and {} are free there", bytes(free)),
        None => String::new(),
    };
    format!(
        "the last checkpoint, of step {step}, can't be written: {reason}. It takes {} at {location}{free}. The weights are \
         kept and it is tried again in {}, for {} in all: make room there or mend that place, or give them up with Ctrl-C",
        bytes(*needed),
        duration(*again_ms as f64 / 1e3),
        duration(*left_ms as f64 / 1e3),
    )
}

/// What a folder's file system has left for this user; `None` for a bucket.
fn free_bytes(location: &str) -> Option<u64> {
    if location.contains("://") {
        return None;
    }
    // A folder that isn't there yet is made where its parent is.
    let there = Path::new(location).ancestors().find(|path| path.exists())?;
    let stat = rustix::fs::statvfs(there).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cure_has_its_numbers() {
        let holding = Holding {
            step: 12,
            reason: "x: full".into(),
            bytes: 3_200_000,
            again_ms: 2000,
            left_ms: 599_000,
        };
        let text = words(&holding, "s3://bucket/a");
        assert!(text.starts_with("the last checkpoint, of step 12, can't be written: x: full. "), "{text}");
        assert!(text.contains("It takes 3.20 MB at s3://bucket/a. "), "{text}");
        assert!(text.contains("tried again in 2 s, for 10 min in all"), "{text}");
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("not/yet").display().to_string();
        let mut teller = Teller::default();
        assert!(
            !teller.has_told() && teller.news(&Holding { again_ms: 0, ..holding.clone() }, &inside).is_none()
        );
        assert!(teller.news(&holding, &inside).unwrap().contains(" are free there"), "{inside}");
        assert!(teller.has_told() && teller.news(&holding, &inside).is_none(), "it was just said");
    }
}

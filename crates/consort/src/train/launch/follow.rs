//! A process that another one leads: srun, mpirun or torchrun started both.

use std::time::Duration;

use anyhow::Result;

use crate::train::meeting::Meeting;
use crate::train::ranks::Rank;
use crate::train::worker::{self, Attached};
use crate::train::{Source, served, work};

/// How long other processes may wait for the first one to prepare the job.
const PREPARING: Duration = Duration::from_secs(3600);

/// What the file is called in which workers of this run meet.
pub(super) fn meeting_name(rank: Option<&Rank>) -> String {
    rank.map_or_else(|| "meeting.json".to_owned(), |rank| format!("meeting-{}.json", rank.run))
}

/// A process that another one leads.
pub(super) fn follow(source: &Source, rank: &Rank) -> Result<()> {
    let path = work(&source.job).join(meeting_name(Some(rank)));
    let mut meeting = Meeting::wait(&path, None, PREPARING)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = source.job.threads.unwrap_or(cores) / rank.local_world_size.unwrap_or(1).max(1);
    if meeting.served {
        return served::learn(&meeting, rank.rank, Some(threads.max(1)), |_| ());
    }
    loop {
        match worker::work(&meeting, Attached::Alone, Some(threads.max(1))) {
            // A file of an earlier run whose first process was killed: the right one comes.
            Err(error)
                if no_store(&error) && Meeting::read(&path).is_ok_and(|m| m.token == meeting.token) =>
            {
                meeting = Meeting::wait(&path, Some(&meeting.token), PREPARING).map_err(|_| error)?;
            }
            ended => return ended.map(|_| ()),
        }
    }
}

fn no_store(error: &anyhow::Error) -> bool {
    use consort_collectives::Error as Group;
    use consort_training::Error;
    let Some(Error::Group(error)) = error.downcast_ref::<Error>() else { return false };
    matches!(**error, Group::Rendezvous { .. } | Group::Refused { .. })
}

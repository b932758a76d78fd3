//! Calls in the background: a thread that owns a group, and handles on what it is doing.
//!
//! Buffers move into a call and come back from [`Pending::wait`], so that nobody can touch one while it is reduced;
//! borrowed buffers would need a promise that handles are never leaked. Calls run in the order in which they were
//! started, which must be the same on all ranks.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use crate::element::{Reduce, ReduceOp};
use crate::error::Error;
use crate::group::Group;

type Job = Box<dyn FnOnce(&mut Group) + Send>;

/// A group that works in the background.
pub struct Queue {
    jobs: SyncSender<Job>,
    thread: JoinHandle<Group>,
}

/// A call under way.
#[must_use = "the result, and the buffer with it, is lost unless it is waited for"]
pub struct Pending<T> {
    result: Receiver<Result<T, Error>>,
}

impl Queue {
    /// Starts the thread. At most `depth` calls wait in line; starting another one blocks.
    ///
    /// # Errors
    /// [`Error::System`] where no thread can be started.
    pub fn new(mut group: Group, depth: usize) -> Result<Self, Error> {
        let (jobs, inbox) = mpsc::sync_channel::<Job>(depth.max(1));
        let body = move || {
            while let Ok(job) = inbox.recv() {
                job(&mut group);
            }
            group
        };
        let thread = std::thread::Builder::new()
            .name("collectives-queue".into())
            .spawn(body)
            .map_err(|e| Error::system("start the queue's thread", &e))?;
        Ok(Self { jobs, thread })
    }

    /// Runs `call` on the group when its turn comes.
    pub fn start<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Group) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let (done, result) = mpsc::sync_channel(1);
        let job: Job = Box::new(move |group| {
            // Nobody may be waiting for it any more.
            let _ = done.send(call(group));
        });
        // If the thread is gone, `done` is dropped with the job and the wait says so.
        let _ = self.jobs.send(job);
        Pending { result }
    }

    /// Starts [`Group::all_reduce`] of `buffer`, which comes back reduced.
    pub fn all_reduce<T: Reduce>(&self, mut buffer: Vec<T>, op: ReduceOp) -> Pending<Vec<T>> {
        self.start(move |group| group.all_reduce(&mut buffer, op).map(|()| buffer))
    }

    /// Finishes what is in line and gives the group back.
    ///
    /// # Errors
    /// [`Error::Broken`] if a call panicked.
    pub fn into_group(self) -> Result<Group, Error> {
        drop(self.jobs);
        self.thread.join().map_err(|_| Error::Broken { reason: "a call in the queue panicked".into() })
    }
}

impl<T> Pending<T> {
    /// Waits for the call; its own deadline bounds the wait.
    ///
    /// # Errors
    /// Those of the call; [`Error::Broken`] if an earlier call of the queue panicked.
    pub fn wait(self) -> Result<T, Error> {
        let gone = |_| Error::Broken { reason: "the queue's thread ended before this call".into() };
        self.result.recv().map_err(gone)?
    }

    /// The result if the call is done.
    pub fn poll(&mut self) -> Option<Result<T, Error>> {
        self.result.try_recv().ok()
    }
}

//! A worker's connection to the others: a thread that owns the group, runs its calls, and keeps it standing.
//!
//! Computing a micro-batch takes seconds, in which a worker calls nothing. It must notice all the same that another one
//! is lost, and come to the next epoch before it is itself taken for lost; so this thread looks after the group while
//! the other one computes. After any error it rejoins at once, without being told; calls that were meant for the epoch
//! before fail, and the worker learns of the new one when it asks ([`Link::recover`]).

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use consort_collectives::{Algorithm, Error, Group, JoinOptions};

use super::board::Board;
use super::worker::Fail;

/// How often the group is looked after while nothing is called.
const LOOK: Duration = Duration::from_millis(20);
/// Calls that may wait in line: more than a step has.
const DEPTH: usize = 4096;

/// Which epoch a worker is in, and as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) epoch: u64,
    pub(super) rank: usize,
    pub(super) workers: usize,
}

/// Runs with the group of its epoch, or with the reason why that is gone, and says how the group broke, if it did.
type Call = Box<dyn FnOnce(Result<&mut Group, Error>) -> Option<Error> + Send>;

enum Order {
    Call {
        epoch: u64,
        what: String,
        call: Call,
    },
    /// Leave this epoch, if it is still the one, and say which one comes.
    Recover {
        epoch: u64,
        reply: SyncSender<Result<Standing, Error>>,
    },
}

/// A call under way.
pub(super) struct Pending<T> {
    result: Receiver<Result<T, Error>>,
    what: String,
}

impl<T> Pending<T> {
    /// Waits for the call; its own deadline bounds the wait.
    pub(super) fn wait(self) -> Result<T, Fail> {
        let result = self.result.recv().unwrap_or_else(|_| Err(ended()));
        result.map_err(|error| Fail::Link { operation: self.what, error: Box::new(error) })
    }
}

fn ended() -> Error {
    Error::Broken { reason: "the thread that talks to the other workers has ended".into() }
}

/// The handle.
pub(super) struct Link {
    orders: Option<SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Joins the job.
    pub(super) fn join(
        options: JoinOptions,
        algorithm: Option<Algorithm>,
        board: Board,
    ) -> Result<(Link, Standing), Error> {
        let mut group = Group::join(options)?;
        group.set_algorithm(algorithm);
        let standing = standing(&group);
        let (orders, inbox) = mpsc::sync_channel(DEPTH);
        let keeper = Keeper { group: Ok(group), algorithm, lost: None, inbox, board };
        let thread = std::thread::Builder::new().name("parallel-link".into()).spawn(move || keeper.run());
        let thread = thread.map_err(|e| Error::System {
            what: "start the thread that talks to the other workers".into(),
            reason: e.to_string(),
        })?;
        Ok((Link { orders: Some(orders), thread: Some(thread) }, standing))
    }

    /// Runs `call` on the group of `epoch` when its turn comes. `what` is for whoever asks what is going on.
    pub(super) fn start<T: Send + 'static>(
        &self,
        epoch: u64,
        what: String,
        call: impl FnOnce(&mut Group) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let (done, result) = mpsc::sync_channel(1);
        let call: Call = Box::new(move |group| {
            let answer = group.and_then(call);
            // Nothing that a caller did wrong breaks the group.
            let broken = answer.as_ref().err().filter(|e| !matches!(e, Error::Invalid { .. })).cloned();
            // Nobody may be waiting any more.
            let _ = done.send(answer);
            broken
        });
        if let Some(orders) = &self.orders {
            // If the thread is gone, `done` is dropped with the order and the wait says so.
            let _ = orders.send(Order::Call { epoch, what: what.clone(), call });
        }
        Pending { result, what }
    }

    /// Leaves `epoch` and waits for the next one; if it has been left already, says which one came.
    pub(super) fn recover(&self, epoch: u64) -> Result<Standing, Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        if let Some(orders) = &self.orders {
            let _ = orders.send(Order::Recover { epoch, reply });
        }
        answer.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl Link {
    /// Leaves `epoch` with a word for whoever comes later; nobody is let in any more.
    pub(super) fn conclude(self, epoch: u64, note: String) {
        let told = self.start(epoch, "the end".into(), move |group| group.conclude(&note));
        if let Err(Fail::Link { error, .. }) = told.wait() {
            // Who comes later waits in vain, as long as it may take to join.
            tracing::debug!(%error, "nobody knows that the job is over");
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported as it happened.
            let _ = thread.join();
        }
    }
}

fn standing(group: &Group) -> Standing {
    Standing { epoch: group.epoch(), rank: group.rank(), workers: group.world_size() }
}

struct Keeper {
    group: Result<Group, Error>,
    algorithm: Option<Algorithm>,
    /// How the epoch before ended.
    lost: Option<Error>,
    inbox: Receiver<Order>,
    board: Board,
}

impl Keeper {
    fn run(mut self) {
        loop {
            match self.inbox.recv_timeout(LOOK) {
                Ok(Order::Call { epoch, what, call }) => {
                    let broken = match &mut self.group {
                        Ok(group) if group.epoch() == epoch => {
                            self.board.talking(Some((&what, group.sequence())));
                            let broken = call(Ok(group));
                            self.board.talking(None);
                            broken
                        }
                        Ok(_) => {
                            let error = self.lost.clone().unwrap_or_else(ended);
                            call(Err(error));
                            None
                        }
                        Err(error) => {
                            call(Err(error.clone()));
                            None
                        }
                    };
                    if let Some(error) = broken {
                        self.rejoin(error);
                    }
                }
                Ok(Order::Recover { epoch, reply }) => {
                    if self.group.as_ref().is_ok_and(|group| group.epoch() == epoch) {
                        self.rejoin(Error::Broken { reason: "this worker left the epoch".into() });
                    }
                    let answer = self.group.as_ref().map(standing).map_err(Clone::clone);
                    // Nobody may be waiting any more.
                    let _ = reply.send(answer);
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(error) = self.group.as_ref().ok().and_then(Group::fault) {
                        self.rejoin(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn rejoin(&mut self, lost: Error) {
        tracing::info!(%lost, "leaving an epoch");
        let old = std::mem::replace(&mut self.group, Err(lost.clone()));
        self.lost = Some(lost);
        if let Ok(group) = old {
            self.group = group.rejoin().map(|mut group| {
                group.set_algorithm(self.algorithm);
                group
            });
        }
    }
}

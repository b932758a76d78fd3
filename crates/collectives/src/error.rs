//! What can go wrong, named for what a caller can do about it.

use std::time::Duration;

use crate::call::Call;

/// Where a call stood when it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Where {
    /// This process's rank.
    pub rank: usize,
    /// The epoch of its group.
    pub epoch: u64,
    /// What it had called, with its sequence number; `None` outside a call.
    pub call: Option<Call>,
    /// Bytes this rank had sent and received for the call.
    pub bytes_done: u64,
}

impl std::fmt::Display for Where {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of epoch {}", self.rank, self.epoch)?;
        match &self.call {
            Some(call) => write!(f, ", in {call}, after {} bytes", self.bytes_done),
            None => write!(f, ", outside a call"),
        }
    }
}

/// Why a collective, or the meeting before it, failed.
///
/// After any of these but [`Error::Invalid`] the group is broken and every further call says so;
/// [`crate::Group::rejoin`] forms the next epoch of those who are left. Buffers that the failed call wrote are then
/// unspecified.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A peer is gone: its process ended, or its connection broke.
    #[error("rank {peer} is lost ({how}); {at}")]
    PeerLost {
        /// Who is gone.
        peer: usize,
        /// How that was noticed.
        how: String,
        /// Where this rank stood.
        at: Where,
    },
    /// A peer's connection is open, and nothing has come from it for longer than the limit (stopped, or cut off).
    #[error("rank {peer} is silent for {silent_ms} ms; {at}")]
    PeerSilent {
        /// Who is silent.
        peer: usize,
        /// For how long.
        silent_ms: u64,
        /// Where this rank stood.
        at: Where,
    },
    /// The call's deadline passed while every peer was alive: some rank hasn't called, or is slow.
    #[error("deadline of {limit_ms} ms passed, waiting for {waiting_for}; {at}")]
    Deadline {
        /// The deadline.
        limit_ms: u64,
        /// Which ranks, and what is known of what they do.
        waiting_for: String,
        /// Where this rank stood.
        at: Where,
    },
    /// Two ranks called different things.
    #[error("rank {} called {mine}, but rank {peer} called {theirs}", .at.rank)]
    Mismatch {
        /// The other rank.
        peer: usize,
        /// What this rank called.
        mine: String,
        /// What the other called.
        theirs: String,
        /// Where this rank stood.
        at: Where,
    },
    /// A peer sent bytes that make no sense here.
    #[error("rank {peer} sent what it should not: {what}; {at}")]
    Corrupt {
        /// From whom.
        peer: usize,
        /// What was wrong with it.
        what: String,
        /// Where this rank stood.
        at: Where,
    },
    /// Another rank met an error and told everyone.
    #[error("rank {by} gave up: {reason}; {at}")]
    Aborted {
        /// Who met it.
        by: usize,
        /// Its error.
        reason: String,
        /// Where this rank stood.
        at: Where,
    },
    /// The group broke in an earlier call.
    #[error("the group is broken since an earlier call ({reason}); form the next epoch with rejoin")]
    Broken {
        /// The first error.
        reason: String,
    },
    /// The arguments cannot be right. Nothing was sent; the group still works.
    #[error("{what}")]
    Invalid {
        /// What, and what would be right.
        what: String,
    },
    /// A group could not be formed in time.
    #[error("no group within {limit_ms} ms: {what}")]
    Rendezvous {
        /// The limit.
        limit_ms: u64,
        /// What was still missing.
        what: String,
    },
    /// Nobody listens where the store was: the process that held it has ended. A group that is formed goes on without it,
    /// and cannot form another epoch.
    #[error("the store at {address} is gone: its process has ended")]
    StoreGone {
        /// Where it was.
        address: String,
    },
    /// The members of the last epoch have finished ([`crate::Group::conclude`]); who comes later comes too late.
    #[error("the others have finished")]
    Concluded {
        /// What they left for whoever comes.
        note: String,
    },
    /// The other side does not know this job's token, or speaks another version.
    #[error("refused by {address}: {what}")]
    Refused {
        /// Who refused.
        address: String,
        /// Why.
        what: String,
    },
    /// The operating system said no.
    #[error("cannot {what}: {reason}")]
    System {
        /// What was tried.
        what: String,
        /// The system's words.
        reason: String,
    },
}

impl Error {
    pub(crate) fn system(what: impl Into<String>, error: &std::io::Error) -> Self {
        Self::System { what: what.into(), reason: error.to_string() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// The rank that is gone or silent, where this error knows one.
    pub fn lost_rank(&self) -> Option<usize> {
        match self {
            Self::PeerLost { peer, .. } | Self::PeerSilent { peer, .. } => Some(*peer),
            _ => None,
        }
    }
}

/// What a transport or the control plane reports, before it is known which call it struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A peer's connection is closed.
    Lost {
        /// The peer.
        peer: usize,
        /// How it was noticed.
        how: String,
    },
    /// A peer said that it leaves, with nothing wrong.
    Left {
        /// The peer.
        peer: usize,
    },
    /// A peer says nothing any more.
    Silent {
        /// The peer.
        peer: usize,
        /// For how long.
        silent: Duration,
    },
    /// A peer sent nonsense.
    Corrupt {
        /// The peer.
        peer: usize,
        /// Which nonsense.
        what: String,
    },
    /// A peer met an error and told us.
    Aborted {
        /// The peer.
        by: usize,
        /// Its words.
        reason: String,
        /// The rank it lost, where it lost one.
        lost: Option<usize>,
    },
}

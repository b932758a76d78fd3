//! Ordered bytes between each pair of ranks, and where the transport can, from one rank to all others at once; without
//! blocking.
//!
//! A transport knows nothing of operations. For each call and each [`Line`] that is used in it there is one stream:
//! a header, then bytes. A call never blocks: it moves what it can and says how much. Waiting is one separate method
//! over a set of lines, so that one thread serves all of them. The same conformance suite runs on every transport.

#[cfg(target_os = "linux")]
pub(crate) mod mixed;
#[cfg(target_os = "linux")]
pub(crate) mod shm;
pub(crate) mod tcp;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Fault;

/// What the bytes go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TransportKind {
    /// Memory that all ranks of one host map.
    SharedMemory,
    /// TCP connections between each pair, in the clear.
    Tcp,
    /// TCP connections between each pair, encrypted, with certificates of the job's own authority at both ends.
    Tls,
    /// Shared memory between ranks of one host, TLS between hosts.
    Mixed,
}

impl TransportKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::SharedMemory, Self::Tcp, Self::Tls, Self::Mixed];

    /// The transport of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::SharedMemory => "shm",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Mixed => "mixed",
        }
    }
}

/// Ends a [`Transport::wait`] from another thread.
pub(crate) type Waker = Arc<dyn Fn() + Send + Sync>;

/// `into[i] = into[i] ∘ from[i]` over bytes that hold whole elements.
pub(crate) type ReduceFn = fn(into: &mut [u8], from: &[u8]);

/// What streams go over, seen from one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Between this rank and that one alone, each way.
    Pair(usize),
    /// From that rank to all others of its host: its own to send on, another's to receive from. Every stream on it must be
    /// taken by all of them, so only calls of the whole epoch may use it; and only where [`Transport::shares`].
    Shared(usize),
}

impl Line {
    /// The rank that is named.
    pub(crate) fn rank(self) -> usize {
        match self {
            Self::Pair(rank) | Self::Shared(rank) => rank,
        }
    }
}

/// Ordered streams of bytes between this rank and each other one.
pub(crate) trait Transport: Send {
    /// Which it is.
    fn kind(&self) -> TransportKind;

    /// Whether there are lines of [`Line::Shared`].
    fn shares(&self) -> bool {
        false
    }

    /// A call over a vector of `bytes` begins: whether it will come through the caches.
    fn begin(&mut self, _bytes: usize) {}

    /// Begins a stream on `to`. `false`: no room now, ask again.
    ///
    /// # Errors
    /// A [`Fault`] of the peer, as from every method here.
    fn open_send(&mut self, to: Line, header: &[u8; 64]) -> Result<bool, Fault>;

    /// The header of the next stream from `from`, once it is here.
    ///
    /// # Errors
    /// A [`Fault`]; bytes of an earlier stream that nobody took are one.
    fn open_recv(&mut self, from: Line) -> Result<Option<[u8; 64]>, Fault>;

    /// The header of the next stream from `from` if it is here, without taking it. Only where lines are shared: there a
    /// header may lie on another line than the one that is waited for.
    fn peek(&mut self, _from: Line) -> Option<[u8; 64]> {
        None
    }

    /// Takes up to `bytes.len()` bytes of the open stream and says how many. Those not taken must be offered again
    /// first: a transport may already have sent some of them.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn send(&mut self, to: Line, bytes: &[u8]) -> Result<usize, Fault>;

    /// Fills up to `into.len()` bytes of the open stream and says how many.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn recv(&mut self, from: Line, into: &mut [u8]) -> Result<usize, Fault>;

    /// As [`Transport::recv`], reducing into the buffer whole elements of `width` bytes.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn recv_reduce(
        &mut self,
        from: Line,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault>;

    /// Whether all bytes taken for `to` are on their way without further calls.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn flush(&mut self, to: Line) -> Result<bool, Fault>;

    /// Whom a stream that has no room waits for.
    fn behind(&self, to: Line) -> Vec<usize> {
        vec![to.rank()]
    }

    /// Waits until a stream to one of `sends` may have room, or one from `recvs` bytes, or the waker was called since
    /// the last wait, or `timeout` has passed. May return early.
    fn wait(&mut self, sends: &[Line], recvs: &[Line], timeout: Duration);

    /// Ends the current or the next wait.
    fn waker(&self) -> Waker;
}

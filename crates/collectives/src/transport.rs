//! Ordered bytes between each pair of ranks, without blocking.
//!
//! A transport knows nothing of operations. For each call and each ordered pair that talks in it there is one stream:
//! a header, then bytes. A call never blocks: it moves what it can and says how much. Waiting is one separate method
//! over a set of peers, so that one thread serves all of them. The same conformance suite runs on every transport.

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

/// Ordered streams of bytes between this rank and each other one.
pub(crate) trait Transport: Send {
    /// Which it is.
    fn kind(&self) -> TransportKind;

    /// A call over a vector of `bytes` begins: whether it will come through the caches.
    fn begin(&mut self, _bytes: usize) {}

    /// Begins a stream to `to`. `false`: no room now, ask again.
    ///
    /// # Errors
    /// A [`Fault`] of the peer, as from every method here.
    fn open_send(&mut self, to: usize, header: &[u8; 64]) -> Result<bool, Fault>;

    /// The header of the next stream from `from`, once it is here.
    ///
    /// # Errors
    /// A [`Fault`]; bytes of an earlier stream that nobody took are one.
    fn open_recv(&mut self, from: usize) -> Result<Option<[u8; 64]>, Fault>;

    /// Takes up to `bytes.len()` bytes of the open stream and says how many. Those not taken must be offered again
    /// first: a transport may already have sent some of them.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<usize, Fault>;

    /// Fills up to `into.len()` bytes of the open stream and says how many.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Fault>;

    /// As [`Transport::recv`], reducing into the buffer whole elements of `width` bytes.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn recv_reduce(
        &mut self,
        from: usize,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault>;

    /// Whether all bytes taken for `to` are on their way without further calls.
    ///
    /// # Errors
    /// A [`Fault`] of the peer.
    fn flush(&mut self, to: usize) -> Result<bool, Fault>;

    /// Waits until a stream to one of `sends` may have room, or one from `recvs` bytes, or the waker was called since
    /// the last wait, or `timeout` has passed. May return early.
    fn wait(&mut self, sends: &[usize], recvs: &[usize], timeout: Duration);

    /// Ends the current or the next wait.
    fn waker(&self) -> Waker;
}

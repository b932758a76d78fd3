//! Shared memory between ranks of one host, TLS to those of others: two transports, and one wait for both.
//!
//! The memory is that of the host alone, so its ranks have numbers of their own there. What is special is the sleep: a
//! futex and a poll can't be waited for at once, so a rank that has looked for a while in vain sleeps in a poll, and its
//! neighbours wake it with a byte on a local socket ([`super::shm::Bells`]).

use std::time::Duration;

use super::shm::SharedMemory;
use super::tcp::Tcp;
use super::{ReduceFn, Transport, TransportKind, Waker};
use crate::error::Fault;
use crate::net::poll;

/// Both transports of one rank.
pub(crate) struct Mixed {
    memory: SharedMemory,
    net: Tcp,
    /// For each rank, its number in the memory; `None` for those on other hosts.
    local: Vec<Option<usize>>,
}

impl Mixed {
    /// `memory` has bells; its rank i is rank `here[i]` of `world_size`. `net` has the others.
    pub(crate) fn new(memory: SharedMemory, net: Tcp, here: &[usize], world_size: usize) -> Self {
        let mut local = vec![None; world_size];
        here.iter().enumerate().for_each(|(number, rank)| local[*rank] = Some(number));
        Self { memory, net, local }
    }

    /// Where `peer` is reached, and by which number.
    fn route(&mut self, peer: usize) -> (&mut dyn Transport, usize) {
        match self.local[peer] {
            Some(number) => (&mut self.memory, number),
            None => (&mut self.net, peer),
        }
    }

    fn with<T>(
        &mut self,
        peer: usize,
        call: impl FnOnce(&mut dyn Transport, usize) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let (transport, number) = self.route(peer);
        call(transport, number).map_err(|fault| match fault {
            // In terms of the group's ranks.
            Fault::Corrupt { what, .. } => Fault::Corrupt { peer, what },
            Fault::Lost { how, .. } => Fault::Lost { peer, how },
            other => other,
        })
    }

    /// Numbers in the memory of those who are there, and the others.
    fn split(&self, peers: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let far = peers.iter().filter(|peer| self.local[**peer].is_none()).copied().collect();
        (peers.iter().filter_map(|peer| self.local[*peer]).collect(), far)
    }
}

impl Transport for Mixed {
    fn kind(&self) -> TransportKind {
        TransportKind::Mixed
    }

    fn begin(&mut self, bytes: usize) {
        self.memory.begin(bytes);
    }

    fn open_send(&mut self, to: usize, header: &[u8; 64]) -> Result<bool, Fault> {
        self.with(to, |transport, number| transport.open_send(number, header))
    }

    fn open_recv(&mut self, from: usize) -> Result<Option<[u8; 64]>, Fault> {
        self.with(from, |transport, number| transport.open_recv(number))
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<usize, Fault> {
        self.with(to, |transport, number| transport.send(number, bytes))
    }

    fn recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Fault> {
        self.with(from, |transport, number| transport.recv(number, into))
    }

    fn recv_reduce(
        &mut self,
        from: usize,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault> {
        self.with(from, |transport, number| transport.recv_reduce(number, into, width, reduce))
    }

    fn flush(&mut self, to: usize) -> Result<bool, Fault> {
        self.with(to, |transport, number| transport.flush(number))
    }

    fn wait(&mut self, sends: &[usize], recvs: &[usize], timeout: Duration) {
        let ((near_sends, far_sends), (near_recvs, far_recvs)) = (self.split(sends), self.split(recvs));
        let mut interests = Vec::new();
        self.net.interests(&far_sends, &far_recvs, &mut interests);
        let mut ready = Vec::new();
        let mut look = || {
            poll(&interests, Duration::ZERO, &mut ready);
            ready.contains(&true)
        };
        // Who waits for nobody here has nothing to look at, and spins for nothing.
        let near = !near_sends.is_empty() || !near_recvs.is_empty();
        if near && self.memory.spin(&near_sends, &near_recvs, &mut look) {
            return;
        }
        self.memory.sleeps_in_poll(true);
        if !self.memory.is_ready(&near_sends, &near_recvs) {
            self.memory.bell_interests(&mut interests);
            poll(&interests, timeout, &mut ready);
            if ready.first() == Some(&true) {
                self.net.awake();
            }
        }
        self.memory.sleeps_in_poll(false);
        self.memory.silence_bells();
    }

    fn waker(&self) -> Waker {
        self.net.waker()
    }
}

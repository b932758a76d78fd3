//! Shared memory between ranks of one host, TLS to those of others: two transports, and one wait for both.
//!
//! The memory is that of the host alone, so its ranks have numbers of their own there. What is special is the sleep: a
//! futex and a poll can't be waited for at once, so a rank that has looked for a while in vain sleeps in a poll, and its
//! neighbours wake it with a byte on a local socket ([`super::shm::Bells`]).

use std::time::Duration;

use super::shm::SharedMemory;
use super::tcp::Tcp;
use super::{Line, ReduceFn, Transport, TransportKind, Waker};
use crate::error::Fault;
use crate::net::poll;

/// Both transports of one rank.
pub(crate) struct Mixed {
    memory: SharedMemory,
    net: Tcp,
    /// For each rank, its number in the memory; `None` for those on other hosts.
    local: Vec<Option<usize>>,
    /// For each number in the memory, its rank.
    here: Vec<usize>,
}

impl Mixed {
    /// `memory` has bells; its rank i is rank `here[i]` of `world_size`. `net` has the others.
    pub(crate) fn new(memory: SharedMemory, net: Tcp, here: &[usize], world_size: usize) -> Self {
        let mut local = vec![None; world_size];
        here.iter().enumerate().for_each(|(number, rank)| local[*rank] = Some(number));
        Self { memory, net, local, here: here.to_vec() }
    }

    /// The line of the memory, if it goes over that.
    fn near(&self, line: Line) -> Option<Line> {
        let number = self.local[line.rank()]?;
        Some(match line {
            Line::Pair(_) => Line::Pair(number),
            Line::Shared(_) => Line::Shared(number),
        })
    }

    /// Where the other end of `line` is reached, and by which line there.
    fn route(&mut self, line: Line) -> (&mut dyn Transport, Line) {
        match self.near(line) {
            Some(near) => (&mut self.memory, near),
            None => (&mut self.net, line),
        }
    }

    fn with<T>(
        &mut self,
        line: Line,
        call: impl FnOnce(&mut dyn Transport, Line) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let near = self.near(line).is_some();
        let (transport, there) = self.route(line);
        let result = call(transport, there);
        // In terms of the group's ranks.
        let rank = |peer: usize| if near { self.here[peer] } else { peer };
        result.map_err(|fault| match fault {
            Fault::Corrupt { peer, what } => Fault::Corrupt { peer: rank(peer), what },
            Fault::Lost { peer, how } => Fault::Lost { peer: rank(peer), how },
            other => other,
        })
    }

    /// Lines in the memory, and the others.
    fn split(&self, lines: &[Line]) -> (Vec<Line>, Vec<Line>) {
        let near = |line: &Line| self.near(*line);
        let far = lines.iter().filter(|line| near(line).is_none()).copied().collect();
        (lines.iter().filter_map(near).collect(), far)
    }
}

impl Transport for Mixed {
    fn kind(&self) -> TransportKind {
        TransportKind::Mixed
    }

    fn shares(&self) -> bool {
        true
    }

    fn begin(&mut self, bytes: usize) {
        self.memory.begin(bytes);
    }

    fn open_send(&mut self, to: Line, header: &[u8; 64]) -> Result<bool, Fault> {
        self.with(to, |transport, line| transport.open_send(line, header))
    }

    fn open_recv(&mut self, from: Line) -> Result<Option<[u8; 64]>, Fault> {
        self.with(from, |transport, line| transport.open_recv(line))
    }

    fn send(&mut self, to: Line, bytes: &[u8]) -> Result<usize, Fault> {
        self.with(to, |transport, line| transport.send(line, bytes))
    }

    fn recv(&mut self, from: Line, into: &mut [u8]) -> Result<usize, Fault> {
        self.with(from, |transport, line| transport.recv(line, into))
    }

    fn recv_reduce(
        &mut self,
        from: Line,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault> {
        self.with(from, |transport, line| transport.recv_reduce(line, into, width, reduce))
    }

    fn flush(&mut self, to: Line) -> Result<bool, Fault> {
        self.with(to, |transport, line| transport.flush(line))
    }

    fn peek(&mut self, from: Line) -> Option<[u8; 64]> {
        let (transport, line) = self.route(from);
        transport.peek(line)
    }

    fn behind(&self, to: Line) -> Vec<usize> {
        match self.near(to) {
            Some(near) => self.memory.behind(near).into_iter().map(|number| self.here[number]).collect(),
            None => self.net.behind(to),
        }
    }

    fn wait(&mut self, sends: &[Line], recvs: &[Line], timeout: Duration) {
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

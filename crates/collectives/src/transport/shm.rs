//! Shared memory on one host: a ring of bytes for each ordered pair of ranks, in a memory file that all ranks map.
//!
//! The sender copies into the ring, the receiver adds straight out of it into its buffer: one copy and one read a byte
//! and hop. Rings are small enough to stay in a core's cache, so main memory is touched for the callers' buffers
//! alone. Single-copy through the kernel (`process_vm_readv`, CMA; XPMEM in Open MPI's `coll/xhc`) saves the copy for
//! large messages, but asks for the right to read another process's memory, which containers deny; and the copy into
//! cache is cheap next to the two passes over main memory that any all-reduce makes.
//!
//! One producer and one consumer a ring: a head and a tail, each written by one side and on a cache line of its own.
//! A waiter spins for some microseconds, then sleeps on a futex, its *doorbell*; who moves a head or tail rings it if
//! the other side says that it sleeps.
//!
//! Peers are trusted as far as the memory goes (they have the job's token and this file): a wrong head or tail is an
//! error, wrong bytes are wrong sums. Nobody can make the file shorter (it is sealed), so no access can fault.
//!
//! Memory: n·(n−1) rings, of which a page counts once it is used.

mod bells;
mod mapping;
mod stream;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use bells::Bells;
use mapping::Sleep;
pub(crate) use mapping::{Mapping, receive_fd, send_fd};

use super::{ReduceFn, Transport, TransportKind, Waker};
use crate::error::{Error, Fault};
use crate::net::{Interest, Stream};

/// Streams begin at multiples of this, so that elements never straddle a ring's end.
const ALIGN: u64 = 64;
/// Bytes copied before the other side is told: small enough that both work at once.
const PIECE: usize = 128 << 10;
/// Turns given to a rank on the same core before this one sleeps.
const STACKED_YIELDS: u32 = 2000;
/// What comes into a vector of more bytes than this goes past the caches.
const STREAM: usize = 4 << 20;

#[derive(Default, Clone, Copy)]
struct Out {
    /// Bytes ever written, and how many of them the receiver was told of.
    head: u64,
    published: u64,
    /// The receiver's position when last looked at.
    tail: u64,
}

#[derive(Default, Clone, Copy)]
struct In {
    tail: u64,
    head: u64,
}

/// One rank's end of the shared memory.
pub(crate) struct SharedMemory {
    map: Arc<Mapping>,
    rank: usize,
    outs: Vec<Out>,
    ins: Vec<In>,
    /// The doorbell's count when the last wait ended.
    heard: u32,
    spins: u32,
    yields: u32,
    /// Whether this call's vector is longer than [`STREAM`].
    large: bool,
    /// How to wake who sleeps in a poll, where ranks also listen to sockets.
    bells: Option<Bells>,
}

impl SharedMemory {
    /// Creates the memory file of an epoch; its descriptor goes to the other ranks.
    pub(crate) fn create(epoch: u64, world_size: usize) -> Result<(Self, OwnedFd), Error> {
        let (map, fd) = Mapping::create(epoch, world_size)?;
        Ok((Self::over(map, 0), fd))
    }

    /// Maps the file that rank 0 made.
    pub(crate) fn open(fd: OwnedFd, epoch: u64, rank: usize, world_size: usize) -> Result<Self, Error> {
        Ok(Self::over(Mapping::open(fd, epoch, world_size)?, rank))
    }

    fn over(map: Mapping, rank: usize) -> Self {
        let world_size = map.world_size();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Spinning pays where the peer runs meanwhile. With more ranks than cores it steals the peer's time.
        let (spins, yields) = if world_size <= cores { (4000, 0) } else { (60, 4) };
        Self {
            map: Arc::new(map),
            rank,
            outs: vec![Out::default(); world_size],
            ins: vec![In::default(); world_size],
            heard: 0,
            spins,
            yields,
            large: false,
            bells: None,
        }
    }

    /// Gives a socket to each of the other ranks, over which those who sleep in a poll are woken.
    ///
    /// # Errors
    /// [`Error::System`] where a socket can't be set up.
    pub(crate) fn hang_bells(&mut self, sockets: Vec<Option<Stream>>) -> Result<(), Error> {
        self.bells = Some(Bells::new(sockets)?);
        Ok(())
    }

    /// What ends a sleep in a poll.
    pub(super) fn bell_interests(&self, interests: &mut Vec<Interest>) {
        interests.extend(self.bells.iter().flat_map(Bells::interests));
    }

    /// After a sleep in a poll.
    pub(super) fn silence_bells(&mut self) {
        if let Some(bells) = &mut self.bells {
            bells.silence();
        }
    }

    fn capacity(&self) -> u64 {
        self.map.ring_bytes() as u64
    }

    /// Free bytes towards `to`, looking at the receiver's position if fewer than `want` are known.
    fn room(&mut self, to: usize, want: u64) -> Result<u64, Fault> {
        let capacity = self.capacity();
        let out = &mut self.outs[to];
        if capacity - (out.head - out.tail) < want {
            let tail = self.map.tail(self.rank, to).load(Ordering::Acquire);
            if tail < out.tail || tail > out.published {
                let what =
                    format!("position {tail} outside {}..={} of the shared ring", out.tail, out.published);
                return Err(Fault::Corrupt { peer: to, what });
            }
            out.tail = tail;
        }
        Ok(capacity - (out.head - out.tail))
    }

    /// Bytes that are here from `from`, looking at the sender's position if fewer than `want` are known.
    fn available(&mut self, from: usize, want: u64) -> Result<u64, Fault> {
        let capacity = self.capacity();
        let inn = &mut self.ins[from];
        if inn.head.saturating_sub(inn.tail) < want {
            let head = self.map.head(from, self.rank).load(Ordering::Acquire);
            if head < inn.head || head.saturating_sub(inn.tail) > capacity + ALIGN {
                let what = format!("position {head} of the shared ring, after {}", inn.tail);
                return Err(Fault::Corrupt { peer: from, what });
            }
            inn.head = head;
        }
        Ok(inn.head.saturating_sub(inn.tail))
    }

    fn publish(&mut self, to: usize) {
        let out = &mut self.outs[to];
        if out.published != out.head {
            out.published = out.head;
            self.map.head(self.rank, to).store(out.head, Ordering::Release);
            self.tell(to);
        }
    }

    fn consume(&mut self, from: usize, bytes: usize) {
        self.ins[from].tail += bytes as u64;
        self.map.tail(from, self.rank).store(self.ins[from].tail, Ordering::Release);
        self.tell(from);
    }

    /// After a store of a head or tail that `peer` may wait for: wakes it if it sleeps.
    fn tell(&self, peer: usize) {
        match (self.map.sleeps(peer), &self.bells) {
            (Sleep::Awake, _) => {}
            (Sleep::Poll, Some(bells)) => bells.ring(&self.map, peer),
            _ => self.map.ring(peer),
        }
    }

    fn write(&mut self, to: usize, bytes: &[u8]) {
        let out = &mut self.outs[to];
        self.map.write(self.rank, to, out.head, bytes);
        out.head += bytes.len() as u64;
    }

    /// Waits without sleeping, for some microseconds. `true` where a stream is ready; `woken` ends it too.
    pub(super) fn spin(&self, sends: &[usize], recvs: &[usize], mut woken: impl FnMut() -> bool) -> bool {
        // Two ranks that take turns sleeping can end up on one core, where the scheduler sees nothing to balance and
        // every spin keeps the other from its work. So there both stay runnable and take turns by yielding, until one
        // of them is moved.
        let core = self.map.core(self.rank);
        let here = mapping::current_core();
        core.store(here, Ordering::Relaxed);
        let stacked =
            sends.iter().chain(recvs).any(|peer| self.map.core(*peer).load(Ordering::Relaxed) == here);
        if stacked && self.yields == 0 {
            for _ in 0..STACKED_YIELDS {
                std::thread::yield_now();
                if self.is_ready(sends, recvs) || woken() {
                    break;
                }
            }
            core.store(mapping::current_core(), Ordering::Relaxed);
        }
        for spin in 0..self.spins {
            if self.is_ready(sends, recvs) {
                return true;
            }
            if spin % 64 == 63 && woken() {
                break;
            }
            std::hint::spin_loop();
        }
        for _ in 0..self.yields {
            std::thread::yield_now();
            if self.is_ready(sends, recvs) {
                return true;
            }
        }
        false
    }

    /// Says that this rank sleeps in a poll from now on, or doesn't any more.
    pub(super) fn sleeps_in_poll(&self, sleeps: bool) {
        let state = if sleeps { Sleep::Poll } else { Sleep::Awake };
        self.map.asleep(self.rank).store(state as u32, Ordering::SeqCst);
        // Pairs with the fence in `sleeps`, as in `wait`.
        fence(Ordering::SeqCst);
    }

    /// Whether a stream to one of `sends` has room, or one from `recvs` bytes.
    pub(super) fn is_ready(&self, sends: &[usize], recvs: &[usize]) -> bool {
        recvs
            .iter()
            .any(|from| self.map.head(*from, self.rank).load(Ordering::Acquire) > self.ins[*from].tail)
            || sends.iter().any(|to| {
                let out = &self.outs[*to];
                let tail = self.map.tail(self.rank, *to).load(Ordering::Acquire);
                out.head.saturating_sub(tail) + 2 * ALIGN <= self.capacity()
            })
    }
}

impl Transport for SharedMemory {
    fn kind(&self) -> TransportKind {
        TransportKind::SharedMemory
    }

    fn begin(&mut self, bytes: usize) {
        self.large = bytes > STREAM;
    }

    fn open_send(&mut self, to: usize, header: &[u8; 64]) -> Result<bool, Fault> {
        if self.room(to, 2 * ALIGN)? < 2 * ALIGN {
            return Ok(false);
        }
        let out = &mut self.outs[to];
        out.head = out.head.next_multiple_of(ALIGN);
        // The receiver is told together with the first bytes, or by a flush: one message for short vectors.
        self.write(to, header);
        Ok(true)
    }

    fn open_recv(&mut self, from: usize) -> Result<Option<[u8; 64]>, Fault> {
        let inn = &mut self.ins[from];
        inn.tail = inn.tail.next_multiple_of(ALIGN);
        if self.available(from, ALIGN)? < ALIGN {
            return Ok(None);
        }
        let mut header = [0; 64];
        header.copy_from_slice(self.map.readable(from, self.rank, self.ins[from].tail, ALIGN as usize));
        self.ins[from].tail += ALIGN;
        let tail = self.ins[from].tail;
        self.map.tail(from, self.rank).store(tail, Ordering::Release);
        // The bytes that follow will ring the bell; a run of empty streams does it now and then.
        if tail % (self.capacity() / 4) < ALIGN {
            self.tell(from);
        }
        Ok(Some(header))
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<usize, Fault> {
        let want = bytes.len().min(PIECE);
        let room = self.room(to, want as u64)? as usize;
        let len = want.min(room);
        if len > 0 {
            self.write(to, &bytes[..len]);
        }
        self.publish(to);
        Ok(len)
    }

    fn recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Fault> {
        let want = into.len().min(PIECE);
        let here = self.available(from, want as u64)? as usize;
        let bytes = self.map.readable(from, self.rank, self.ins[from].tail, want.min(here));
        let len = bytes.len();
        if len > 0 {
            if self.large {
                stream::copy(&mut into[..len], bytes);
            } else {
                into[..len].copy_from_slice(bytes);
            }
            self.consume(from, len);
        }
        Ok(len)
    }

    fn recv_reduce(
        &mut self,
        from: usize,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault> {
        let want = into.len().min(PIECE);
        let here = self.available(from, want as u64)? as usize;
        let len = want.min(here) / width * width;
        let bytes = self.map.readable(from, self.rank, self.ins[from].tail, len);
        let len = bytes.len();
        if len > 0 {
            reduce(&mut into[..len], bytes);
            self.consume(from, len);
        }
        Ok(len)
    }

    fn flush(&mut self, to: usize) -> Result<bool, Fault> {
        self.publish(to);
        Ok(true)
    }

    fn wait(&mut self, sends: &[usize], recvs: &[usize], timeout: Duration) {
        let bell = self.map.doorbell(self.rank);
        if self.spin(sends, recvs, || bell.load(Ordering::Acquire) != self.heard) {
            return;
        }
        let asleep = self.map.asleep(self.rank);
        asleep.store(Sleep::Futex as u32, Ordering::SeqCst);
        // Pairs with the fence in `sleeps`: either we see the new position, or the peer sees that we sleep.
        fence(Ordering::SeqCst);
        if !self.is_ready(sends, recvs) && bell.load(Ordering::SeqCst) == self.heard {
            self.map.sleep(self.rank, self.heard, timeout);
        }
        asleep.store(Sleep::Awake as u32, Ordering::Relaxed);
        self.heard = bell.load(Ordering::SeqCst);
    }

    fn waker(&self) -> Waker {
        let (map, rank) = (Arc::clone(&self.map), self.rank);
        Arc::new(move || map.ring(rank))
    }
}

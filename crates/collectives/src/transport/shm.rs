//! Shared memory on one host: a ring of bytes for each ordered pair of ranks, and one of each rank that all others read,
//! in a memory file that all ranks map.
//!
//! The sender copies into the ring, the receiver adds straight out of it into its buffer: one copy and one read a byte
//! and hop. Rings are small enough to stay in a core's cache, so main memory is touched for the callers' buffers
//! alone. Single-copy through the kernel (`process_vm_readv`, CMA; XPMEM in Open MPI's `coll/xhc`) saves the copy for
//! large messages, but asks for the right to read another process's memory, which containers deny; and the copy into
//! cache is cheap next to the two passes over main memory that any all-reduce makes.
//!
//! One producer and one consumer a ring: a head and a tail, each written by one side and on a cache line of its own. What
//! all others are to get goes into the sender's *shared* ring, once: it has a tail for every reader, and the slowest one
//! decides how much is free. Of three readers on two cores the second on a core finds the bytes in its cache; out of a
//! ring for each of them every byte would be written three times and cross to the other core twice.
//!
//! A waiter spins for some microseconds, then sleeps on a futex, its *doorbell*; who moves a head or tail rings it if
//! the other side says that it sleeps.
//!
//! Peers are trusted as far as the memory goes (they have the job's token and this file): a wrong head or tail is an
//! error, wrong bytes are wrong sums. Nobody can make the file shorter (it is sealed), so no access can fault.
//!
//! Memory: n·(n−1) rings of pairs and n shared ones, 64 MB in all where n is small, of which a page counts once it is used.

mod bells;
mod mapping;
mod stream;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use bells::Bells;
use mapping::{Mapping, Ring, Sleep};
pub(crate) use mapping::{receive_fd, send_fd};

use super::{Line, ReduceFn, Transport, TransportKind, Waker};
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

/// One of those who read what this rank writes.
#[derive(Clone, Copy)]
struct Reader {
    rank: usize,
    /// Which of the ring's tails is its.
    number: usize,
    /// Its position when last looked at.
    tail: u64,
}

/// A ring that this rank writes.
struct Out {
    ring: Ring,
    readers: Vec<Reader>,
    /// Bytes ever written, and how many of them the readers were told of.
    head: u64,
    published: u64,
    /// The slowest reader's position, as far as is known.
    tail: u64,
}

impl Out {
    fn new(ring: Ring, readers: Vec<Reader>) -> Self {
        Self { ring, readers, head: 0, published: 0, tail: 0 }
    }

    fn free(&self) -> u64 {
        (self.ring.bytes() as u64).saturating_sub(self.head - self.tail)
    }
}

/// A ring that this rank reads.
struct In {
    ring: Ring,
    from: usize,
    /// Which of the ring's tails is this rank's.
    number: usize,
    tail: u64,
    head: u64,
}

/// One rank's end of the shared memory.
pub(crate) struct SharedMemory {
    map: Arc<Mapping>,
    rank: usize,
    /// To each rank alone, and last what all others read.
    outs: Vec<Out>,
    /// From each rank to this one alone, and then what each gives to all others.
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
        let ranks = 0..world_size;
        let alone = |to| Out::new(map.pair(rank, to), vec![Reader { rank: to, number: 0, tail: 0 }]);
        let others = ranks.clone().filter(|other| *other != rank);
        let readers = others.map(|other| Reader { rank: other, number: other, tail: 0 }).collect();
        let shared = Out::new(map.shared(rank), readers);
        let from = |ring, from, number| In { ring, from, number, tail: 0, head: 0 };
        let pairs = ranks.clone().map(|other| from(map.pair(other, rank), other, 0));
        let heard = ranks.clone().map(|other| from(map.shared(other), other, rank));
        Self {
            rank,
            outs: ranks.clone().map(alone).chain([shared]).collect(),
            ins: pairs.chain(heard).collect(),
            map: Arc::new(map),
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

    /// The ring that streams on `line` are written to.
    fn out(&self, line: Line) -> usize {
        match line {
            Line::Pair(to) => to,
            Line::Shared(_) => self.outs.len() - 1,
        }
    }

    /// The ring that streams on `line` are read from.
    fn inn(&self, line: Line) -> usize {
        match line {
            Line::Pair(from) => from,
            Line::Shared(from) => self.outs.len() - 1 + from,
        }
    }

    /// Free bytes of a ring, looking at the readers' positions if fewer than `want` are known.
    fn room(&mut self, out: usize, want: u64) -> Result<u64, Fault> {
        let out = &mut self.outs[out];
        if out.free() >= want {
            return Ok(out.free());
        }
        let mut slowest = out.head;
        for reader in &mut out.readers {
            let tail = self.map.tail(&out.ring, reader.number).load(Ordering::Acquire);
            if tail < reader.tail || tail > out.published {
                let what =
                    format!("position {tail} outside {}..={} of the shared ring", reader.tail, out.published);
                return Err(Fault::Corrupt { peer: reader.rank, what });
            }
            reader.tail = tail;
            slowest = slowest.min(tail);
        }
        out.tail = slowest;
        Ok(out.free())
    }

    /// Bytes that are here, looking at the sender's position if fewer than `want` are known.
    fn available(&mut self, inn: usize, want: u64) -> Result<u64, Fault> {
        let inn = &mut self.ins[inn];
        if inn.head.saturating_sub(inn.tail) < want {
            let head = self.map.head(&inn.ring).load(Ordering::Acquire);
            if head < inn.head || head.saturating_sub(inn.tail) > inn.ring.bytes() as u64 + ALIGN {
                let what = format!("position {head} of the shared ring, after {}", inn.tail);
                return Err(Fault::Corrupt { peer: inn.from, what });
            }
            inn.head = head;
        }
        Ok(inn.head.saturating_sub(inn.tail))
    }

    fn publish(&mut self, out: usize) {
        let Out { head, published, ring, .. } = &mut self.outs[out];
        if published == head {
            return;
        }
        *published = *head;
        self.map.head(ring).store(*head, Ordering::Release);
        self.tell(self.outs[out].readers.iter().map(|reader| reader.rank));
    }

    /// The header of the next stream, if it is here.
    fn look(&mut self, from: Line) -> Result<Option<[u8; 64]>, Fault> {
        let inn = self.inn(from);
        let next = self.ins[inn].tail.next_multiple_of(ALIGN);
        self.ins[inn].tail = next;
        if self.available(inn, ALIGN)? < ALIGN {
            return Ok(None);
        }
        let mut header = [0; 64];
        header.copy_from_slice(self.map.readable(&self.ins[inn].ring, next, ALIGN as usize));
        Ok(Some(header))
    }

    /// Says how far this rank has read.
    fn took(&mut self, inn: usize, bytes: usize) {
        let inn = &mut self.ins[inn];
        inn.tail += bytes as u64;
        self.map.tail(&inn.ring, inn.number).store(inn.tail, Ordering::Release);
    }

    fn consume(&mut self, inn: usize, bytes: usize) {
        self.took(inn, bytes);
        self.tell([self.ins[inn].from]);
    }

    /// After a store of a head or tail that `peers` may wait for: wakes those who sleep.
    fn tell(&self, peers: impl IntoIterator<Item = usize>) {
        self.map.settle();
        for peer in peers {
            match (self.map.sleeps(peer), &self.bells) {
                (Sleep::Awake, _) => {}
                (Sleep::Poll, Some(bells)) => bells.ring(&self.map, peer),
                _ => self.map.ring(peer),
            }
        }
    }

    fn write(&mut self, out: usize, bytes: &[u8]) {
        let out = &mut self.outs[out];
        self.map.write(&out.ring, out.head, bytes);
        out.head += bytes.len() as u64;
    }

    /// Waits without sleeping, for some microseconds. `true` where a stream is ready; `woken` ends it too.
    pub(super) fn spin(&self, sends: &[Line], recvs: &[Line], mut woken: impl FnMut() -> bool) -> bool {
        // Two ranks that take turns sleeping can end up on one core, where the scheduler sees nothing to balance and
        // every spin keeps the other from its work. So there both stay runnable and take turns by yielding, until one
        // of them is moved.
        let core = self.map.core(self.rank);
        let here = mapping::current_core();
        core.store(here, Ordering::Relaxed);
        let beside = |peer: usize| self.map.core(peer).load(Ordering::Relaxed) == here;
        let readers = sends.iter().flat_map(|to| self.outs[self.out(*to)].readers.iter());
        let stacked =
            readers.map(|reader| reader.rank).chain(recvs.iter().map(|from| from.rank())).any(beside);
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
    pub(super) fn is_ready(&self, sends: &[Line], recvs: &[Line]) -> bool {
        let here = |from: &Line| {
            let inn = &self.ins[self.inn(*from)];
            self.map.head(&inn.ring).load(Ordering::Acquire) > inn.tail
        };
        recvs.iter().any(here) || sends.iter().any(|to| self.late(*to).next().is_none())
    }

    /// Those readers who leave no room to write.
    fn late(&self, to: Line) -> impl Iterator<Item = usize> + '_ {
        let out = &self.outs[self.out(to)];
        let most = (out.ring.bytes() as u64).saturating_sub(2 * ALIGN);
        let tail = |reader: &Reader| self.map.tail(&out.ring, reader.number).load(Ordering::Acquire);
        let late = out.readers.iter().filter(move |reader| out.head.saturating_sub(tail(reader)) > most);
        late.map(|reader| reader.rank)
    }
}

impl Transport for SharedMemory {
    fn kind(&self) -> TransportKind {
        TransportKind::SharedMemory
    }

    fn shares(&self) -> bool {
        true
    }

    fn begin(&mut self, bytes: usize) {
        self.large = bytes > STREAM;
    }

    fn open_send(&mut self, to: Line, header: &[u8; 64]) -> Result<bool, Fault> {
        let out = self.out(to);
        if self.room(out, 2 * ALIGN)? < 2 * ALIGN {
            return Ok(false);
        }
        let head = &mut self.outs[out].head;
        *head = head.next_multiple_of(ALIGN);
        // The receiver is told together with the first bytes, or by a flush: one message for short vectors.
        self.write(out, header);
        Ok(true)
    }

    fn open_recv(&mut self, from: Line) -> Result<Option<[u8; 64]>, Fault> {
        let Some(header) = self.look(from)? else { return Ok(None) };
        let inn = self.inn(from);
        self.took(inn, ALIGN as usize);
        // The bytes that follow will ring the bell; a run of empty streams does it now and then.
        let In { tail, ring, from, .. } = &self.ins[inn];
        if tail % (ring.bytes() as u64 / 4) < ALIGN {
            self.tell([*from]);
        }
        Ok(Some(header))
    }

    fn peek(&mut self, from: Line) -> Option<[u8; 64]> {
        self.look(from).ok().flatten()
    }

    fn send(&mut self, to: Line, bytes: &[u8]) -> Result<usize, Fault> {
        let out = self.out(to);
        let want = bytes.len().min(PIECE);
        let room = self.room(out, want as u64)? as usize;
        // The end of an earlier stream may lie anywhere. A part of an element is nothing that a receiver could add: it would
        // look for the rest without sleeping.
        let len = if room < want { room / ALIGN as usize * ALIGN as usize } else { want };
        if len > 0 {
            self.write(out, &bytes[..len]);
        }
        self.publish(out);
        Ok(len)
    }

    fn recv(&mut self, from: Line, into: &mut [u8]) -> Result<usize, Fault> {
        let inn = self.inn(from);
        let want = into.len().min(PIECE);
        let here = self.available(inn, want as u64)? as usize;
        let bytes = self.map.readable(&self.ins[inn].ring, self.ins[inn].tail, want.min(here));
        let len = bytes.len();
        if len > 0 {
            if self.large {
                stream::copy(&mut into[..len], bytes);
            } else {
                into[..len].copy_from_slice(bytes);
            }
            self.consume(inn, len);
        }
        Ok(len)
    }

    fn recv_reduce(
        &mut self,
        from: Line,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault> {
        let inn = self.inn(from);
        let want = into.len().min(PIECE);
        let here = self.available(inn, want as u64)? as usize;
        let len = want.min(here) / width * width;
        let bytes = self.map.readable(&self.ins[inn].ring, self.ins[inn].tail, len);
        let len = bytes.len();
        if len > 0 {
            reduce(&mut into[..len], bytes);
            self.consume(inn, len);
        }
        Ok(len)
    }

    fn flush(&mut self, to: Line) -> Result<bool, Fault> {
        self.publish(self.out(to));
        Ok(true)
    }

    fn behind(&self, to: Line) -> Vec<usize> {
        self.late(to).collect()
    }

    fn wait(&mut self, sends: &[Line], recvs: &[Line], timeout: Duration) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(n: usize) -> Vec<SharedMemory> {
        let (first, fd) = SharedMemory::create(1, n).unwrap();
        let open = |rank| SharedMemory::open(fd.try_clone().unwrap(), 1, rank, n).unwrap();
        std::iter::once(first).chain((1..n).map(open)).collect()
    }

    /// Sends until there is no room; how many bytes went.
    fn fill(rank: &mut SharedMemory, to: Line) -> usize {
        let bytes = [7u8; 1000];
        let (mut sent, mut more) = (0, true);
        while more {
            let n = rank.send(to, &bytes).unwrap();
            (sent, more) = (sent + n, n > 0);
        }
        sent
    }

    fn drain(rank: &mut SharedMemory, from: Line, mut bytes: usize) {
        let mut into = [0u8; 1000];
        while bytes > 0 {
            let most = bytes.min(into.len());
            let n = rank.recv(from, &mut into[..most]).unwrap();
            assert!(n > 0 && into[..n].iter().all(|b| *b == 7));
            bytes -= n;
        }
    }

    #[test]
    fn what_one_shares_waits_for_the_slowest_and_comes_to_all() {
        let mut ranks = ranks(3);
        let line = Line::Shared(0);
        assert!(ranks[0].open_send(line, &[5; 64]).unwrap());
        let sent = fill(&mut ranks[0], line);
        assert_eq!((sent + 64, ranks[0].behind(line)), (ranks[0].map.shared(0).bytes(), vec![1, 2]));
        for (reader, behind) in [(2, vec![1]), (1, vec![])] {
            assert!(!ranks[0].is_ready(&[line], &[]));
            assert_eq!(fill(&mut ranks[0], line), 0);
            assert_eq!(ranks[reader].peek(line), Some([5; 64]));
            assert_eq!(ranks[reader].open_recv(line).unwrap(), Some([5; 64]));
            drain(&mut ranks[reader], line, sent);
            assert_eq!(ranks[0].behind(line), behind);
        }
        assert!(ranks[0].is_ready(&[line], &[]));
        assert_eq!(fill(&mut ranks[0], line), (sent + 64) / 64 * 64);
        // Nobody's pair is touched by it.
        assert_eq!(ranks[1].open_recv(Line::Pair(0)).unwrap(), None);
    }

    #[test]
    fn positions_that_cannot_be_are_named_with_their_rank() {
        let mut ranks = ranks(3);
        let line = Line::Shared(0);
        assert!(ranks[0].open_send(line, &[5; 64]).unwrap());
        let sent = fill(&mut ranks[0], line) as u64 + 64;
        let ring = ranks[0].map.shared(0);
        // Rank 2 says that it has read more than there is, or less than before.
        ranks[0].map.tail(&ring, 2).store(sent + 1, Ordering::Release);
        let said = ranks[0].send(line, &[1; 8]);
        assert!(
            matches!(&said, Err(Fault::Corrupt { peer: 2, what }) if what.contains("outside")),
            "{said:?}"
        );
        ranks[0].map.tail(&ring, 2).store(128, Ordering::Release);
        assert_eq!(ranks[0].send(line, &[1; 8]), Ok(0), "rank 1 has taken nothing yet");
        ranks[0].map.tail(&ring, 2).store(64, Ordering::Release);
        assert!(matches!(ranks[0].send(line, &[1; 8]), Err(Fault::Corrupt { peer: 2, .. })));
        // Rank 0 says that it has written more than the ring holds.
        assert!(ranks[1].open_recv(line).unwrap().is_some());
        ranks[0].map.head(&ring).store(2 * sent + 4096, Ordering::Release);
        let mut into = vec![0; ring.bytes() + 1];
        let said = loop {
            match ranks[1].recv(line, &mut into) {
                Ok(n) if n > 0 => {}
                said => break said,
            }
        };
        assert!(matches!(said, Err(Fault::Corrupt { peer: 0, .. })), "{said:?}");
    }

    /// A stream of one byte left the receiver's position odd; the next one's sender filled the ring to the last byte, and
    /// the receiver, who can't add a quarter of a number, looked for the rest without sleeping until the sender ran again.
    #[test]
    fn no_part_of_an_element_is_sent_because_a_ring_is_full() {
        let mut ranks = ranks(3);
        let line = (Line::Pair(1), Line::Pair(0));
        assert!(ranks[0].open_send(line.0, &[5; 64]).unwrap());
        assert_eq!(ranks[0].send(line.0, &[7]), Ok(1));
        assert!(ranks[1].open_recv(line.1).unwrap().is_some());
        drain(&mut ranks[1], line.1, 1);
        assert!(ranks[0].open_send(line.0, &[5; 64]).unwrap());
        let whole = vec![7u8; ranks[0].map.pair(0, 1).bytes()];
        let mut sent = 0;
        loop {
            let n = ranks[0].send(line.0, &whole[sent..]).unwrap();
            assert!(n.is_multiple_of(8), "{n} bytes after {sent}");
            if n == 0 {
                break;
            }
            sent += n;
        }
        assert!(sent > 0 && sent < whole.len());
    }
}

//! The memory file: its layout, its bounds, and every unsafe line of the transport.
//!
//! ```text
//! 0                 identity: magic, world size, epoch
//! 128 + 256·r       rank r: its doorbell, and on the next line pair whether it sleeps and its core
//! then, for each ordered pair (from, to):
//!                   head (bytes ever written), tail (bytes ever taken), 128 bytes apart
//!                   the ring
//! then, for each rank:
//!                   head, and for every rank the tail of what it took, 128 bytes apart
//!                   the ring that all others read
//! ```
//!
//! Lines that different sides write are 128 bytes apart, since cores fetch cache lines in pairs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::error::Error;

const LINE: usize = 128;
const MAGIC: u64 = 0x3148_534d_4353_4e43;

/// Whether a rank sleeps, and what wakes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Sleep {
    /// It looks by itself.
    Awake = 0,
    /// Its doorbell.
    Futex = 1,
    /// A byte on a socket.
    Poll = 2,
}

/// A mapped memory file.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    world_size: usize,
    layout: Layout,
}

// SAFETY: the mapping is plain shared memory at a fixed place until the drop. Words that two sides touch are accessed
// through atomics alone; ring bytes are touched by one side at a time, as head and tail say.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Where one ring lies in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    /// The head, and on the lines after it the tails.
    head: usize,
    tails: usize,
    start: usize,
    bytes: usize,
}

impl Ring {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Bytes of all rings of a small world. Of a large one, whose rings are as short as they may be, there are more.
const BUDGET: usize = 64 << 20;
/// The shortest ring.
const LEAST: usize = 16 << 10;
/// The longest ring that all others read. Among four ranks gathering 64 MB takes 8.2 ms over a megabyte, 11.2 over half of
/// it and 13.5 over a quarter, against 15.7 over rings of pairs.
const MOST_SHARED: usize = 1 << 20;

/// Bytes of the ring of a pair: all of them take at most seven eighths of [`BUDGET`]. A megabyte lets a sender run so
/// far ahead that neither side waits for the other's every piece: two ranks reduce 1 MB twice as fast as over 256 KB.
/// All rings of a host go through the same caches: among four ranks 4 MB take a third less time over half a megabyte each
/// than over one, and over a quarter the senders wait again.
fn pair_bytes(world_size: usize) -> usize {
    let most = if world_size > 2 { 512 << 10 } else { 1 << 20 };
    share_of(BUDGET / 8 * 7, world_size * world_size, most)
}

/// Bytes of the ring that all others read: all of them take at most an eighth of [`BUDGET`].
fn shared_bytes(world_size: usize) -> usize {
    share_of(BUDGET / 8, world_size, MOST_SHARED)
}

/// The largest power of two of which `rings` fit into `budget`, within bounds.
fn share_of(budget: usize, rings: usize, most: usize) -> usize {
    let each = budget / rings.max(1);
    (1usize << each.max(1).ilog2()).clamp(LEAST, most)
}

/// Where the rings of a file begin, and its length.
#[derive(Clone, Copy, Debug)]
struct Layout {
    pairs: usize,
    shared: usize,
    len: usize,
}

impl Layout {
    fn new(world_size: usize) -> Self {
        let pairs = LINE + world_size * 2 * LINE;
        let shared = pairs + world_size * world_size * (2 * LINE + pair_bytes(world_size));
        let len = shared + world_size * (LINE + world_size * LINE + shared_bytes(world_size));
        Self { pairs, shared, len }
    }
}

impl Mapping {
    /// Makes the file of an epoch and maps it.
    pub(crate) fn create(epoch: u64, world_size: usize) -> Result<(Self, OwnedFd), Error> {
        let fail =
            |what: &str| Error::system(format!("{what} for shared memory"), &io::Error::last_os_error());
        let len = Layout::new(world_size).len;
        // SAFETY: the name is a C string; the result is checked.
        let fd = unsafe {
            libc::memfd_create(c"consort-collectives".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(fail("create a memory file"));
        }
        // SAFETY: a fresh descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system calls on a descriptor that we own.
        let sized = unsafe {
            libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) == 0
                && libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
                    == 0
        };
        if !sized {
            return Err(fail("size a memory file"));
        }
        let map = Self::map(&fd, world_size)?;
        map.word(8).store(world_size as u64, Ordering::Relaxed);
        map.word(16).store(epoch, Ordering::Relaxed);
        map.word(0).store(MAGIC, Ordering::Release);
        Ok((map, fd))
    }

    /// Maps a file that another rank made, if it is the right one.
    pub(crate) fn open(fd: OwnedFd, epoch: u64, world_size: usize) -> Result<Self, Error> {
        let wrong = |what: &str| Error::Refused { address: "shared memory".into(), what: what.into() };
        let len = Layout::new(world_size).len;
        // SAFETY: a descriptor that we own; the seals are asked for, nothing is changed.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(wrong("the file can still be made shorter"));
        }
        let file = std::fs::File::from(fd);
        let metadata = file.metadata().map_err(|e| Error::system("look at the shared memory file", &e))?;
        if metadata.len() != len as u64 {
            return Err(wrong(&format!("{} bytes long instead of {len}", metadata.len())));
        }
        let map = Self::map(&OwnedFd::from(file), world_size)?;
        let identity = [0, 8, 16].map(|at| map.word(at).load(Ordering::Acquire));
        if identity != [MAGIC, world_size as u64, epoch] {
            return Err(wrong("it belongs to another group"));
        }
        Ok(map)
    }

    fn map(fd: &OwnedFd, world_size: usize) -> Result<Self, Error> {
        let layout = Layout::new(world_size);
        let len = layout.len;
        // SAFETY: a new mapping at a place that the system picks; the file has `len` bytes and is sealed to keep them.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        let base = NonNull::new(base.cast::<u8>()).filter(|_| base != libc::MAP_FAILED);
        let base = base.ok_or_else(|| {
            Error::system(format!("map {len} bytes of shared memory"), &io::Error::last_os_error())
        })?;
        Ok(Self { base, len, world_size, layout })
    }

    pub(crate) fn world_size(&self) -> usize {
        self.world_size
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len);
        // SAFETY: within the mapping, aligned to 8 (the base is page-aligned), and only ever accessed as an atomic.
        unsafe { &*self.base.as_ptr().add(at).cast::<AtomicU64>() }
    }

    fn half(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len);
        // SAFETY: within the mapping, aligned to 4, and only ever accessed as an atomic.
        unsafe { &*self.base.as_ptr().add(at).cast::<AtomicU32>() }
    }

    /// What `from` writes for `to` alone.
    pub(crate) fn pair(&self, from: usize, to: usize) -> Ring {
        assert!(from < self.world_size && to < self.world_size);
        let bytes = pair_bytes(self.world_size);
        let head = self.layout.pairs + (from * self.world_size + to) * (2 * LINE + bytes);
        Ring { head, tails: 1, start: head + 2 * LINE, bytes }
    }

    /// What `from` writes for all others. Rank r's tail is number r.
    pub(crate) fn shared(&self, from: usize) -> Ring {
        assert!(from < self.world_size);
        let (bytes, lines) = (shared_bytes(self.world_size), LINE + self.world_size * LINE);
        let head = self.layout.shared + from * (lines + bytes);
        Ring { head, tails: self.world_size, start: head + lines, bytes }
    }

    /// Bytes ever written.
    pub(crate) fn head(&self, ring: &Ring) -> &AtomicU64 {
        self.word(ring.head)
    }

    /// Bytes ever taken by one of those who read the ring.
    pub(crate) fn tail(&self, ring: &Ring, number: usize) -> &AtomicU64 {
        assert!(number < ring.tails);
        self.word(ring.head + LINE + number * LINE)
    }

    /// How often rank `rank` was woken.
    pub(crate) fn doorbell(&self, rank: usize) -> &AtomicU32 {
        self.half(LINE + rank * 2 * LINE)
    }

    /// How rank `rank` sleeps, or is about to: a [`Sleep`].
    pub(crate) fn asleep(&self, rank: usize) -> &AtomicU32 {
        self.half(LINE + rank * 2 * LINE + LINE)
    }

    /// The core that rank `rank` was on when it last waited, and one more; 0 before.
    pub(crate) fn core(&self, rank: usize) -> &AtomicU32 {
        self.half(LINE + rank * 2 * LINE + LINE + 4)
    }

    /// Copies `bytes` into the ring from position `at` on. The caller has seen that so many bytes are free.
    pub(crate) fn write(&self, ring: &Ring, at: u64, bytes: &[u8]) {
        assert!(bytes.len() <= ring.bytes && ring.start + ring.bytes <= self.len);
        let start = (at % ring.bytes as u64) as usize;
        let first = bytes.len().min(ring.bytes - start);
        // SAFETY: both parts lie inside the ring (start < ring, first ≤ ring − start, rest ≤ start by the assertion and
        // the caller's room), which lies inside the mapping. No receiver touches any of it: all were told that these
        // positions are empty, and only learn of them by the release store of the head that follows.
        unsafe {
            let ring = self.base.as_ptr().add(ring.start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), ring.add(start), first);
            std::ptr::copy_nonoverlapping(bytes.as_ptr().add(first), ring, bytes.len() - first);
        }
    }

    /// Up to `len` bytes of the ring from position `at` on, to the ring's end at most. The caller has seen that so
    /// many are written, and has not said that it took them.
    pub(crate) fn readable(&self, ring: &Ring, at: u64, len: usize) -> &[u8] {
        assert!(ring.start + ring.bytes <= self.len);
        let start = (at % ring.bytes as u64) as usize;
        let len = len.min(ring.bytes - start);
        // SAFETY: inside the ring, so inside the mapping. The sender doesn't touch these positions again before this
        // rank's tail has come past them, which happens after this slice's last use (`consume` takes `&mut self`).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(ring.start + start), len) }
    }

    /// Between a store of a head or tail and asking how those sleep who may wait for it.
    pub(super) fn settle(&self) {
        fence(Ordering::SeqCst);
    }

    /// How `rank` sleeps. To be asked after [`Mapping::settle`].
    pub(super) fn sleeps(&self, rank: usize) -> Sleep {
        match self.asleep(rank).load(Ordering::Relaxed) {
            0 => Sleep::Awake,
            2 => Sleep::Poll,
            _ => Sleep::Futex,
        }
    }

    /// Ends the current or next sleep of `rank`.
    pub(crate) fn ring(&self, rank: usize) {
        let bell = self.doorbell(rank);
        bell.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the word lives as long as the mapping; a wake reads no memory of ours.
        unsafe {
            libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0usize, 0usize, 0);
        }
    }

    /// Sleeps until the doorbell differs from `heard`, or `timeout` has passed, or a signal came.
    pub(crate) fn sleep(&self, rank: usize, heard: u32, timeout: Duration) {
        let time = libc::timespec {
            tv_sec: timeout.as_secs().min(3600) as libc::time_t,
            tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
        };
        let bell = self.doorbell(rank).as_ptr();
        // SAFETY: word and time outlive the call; the kernel compares and sleeps atomically.
        unsafe {
            libc::syscall(libc::SYS_futex, bell, libc::FUTEX_WAIT, heard, &raw const time, 0usize, 0);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference outlives `self`.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// The core that this thread is on, and one more; 0 where the system doesn't say.
pub(super) fn current_core() -> u32 {
    // SAFETY: the call takes nothing and touches no memory of ours.
    let core = unsafe { libc::sched_getcpu() };
    u32::try_from(core).map_or(0, |core| core + 1)
}

/// Sends a descriptor over a Unix socket, with one byte.
pub(crate) fn send_fd(socket: i32, fd: &OwnedFd) -> io::Result<()> {
    let mut control = Control::default();
    let mut byte = [1u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: every pointer leads to a local that outlives the call; the control buffer is aligned and large enough
    // for one descriptor, which CMSG_SPACE and CMSG_LEN measure.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_raw_fd());
        libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL)
    };
    if sent == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives a descriptor that [`send_fd`] sent. The socket's own read timeout bounds the wait.
pub(crate) fn receive_fd(socket: i32) -> io::Result<OwnedFd> {
    let mut control = Control::default();
    let mut byte = [0u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: as in `send_fd`; the header is read only where the kernel says that it wrote one, and the descriptor in it
    // is ours from then on.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let got = libc::recvmsg(socket, &raw mut message, libc::MSG_CMSG_CLOEXEC);
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if got == 1
            && !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
            && (*header).cmsg_len >= libc::CMSG_LEN(4) as _
        {
            let fd = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
            return Ok(OwnedFd::from_raw_fd(fd));
        }
    }
    Err(io::Error::other("no descriptor came"))
}

#[derive(Default)]
struct Control([u64; 8]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_of_a_small_world_fit_the_budget_and_none_lies_on_another() {
        for n in 1..=70 {
            let layout = Layout::new(n);
            assert!(n > 58 || layout.len <= BUDGET, "{n} ranks: {} bytes", layout.len);
            let (pair, shared) = (pair_bytes(n), shared_bytes(n));
            assert!(pair >= LEAST && shared >= LEAST && pair.is_power_of_two() && shared.is_power_of_two());
        }
        let (map, _fd) = Mapping::create(1, 5).unwrap();
        let pairs = (0..5).flat_map(|from| (0..5).map(move |to| (from, to)));
        let rings = pairs.map(|(from, to)| map.pair(from, to)).chain((0..5).map(|from| map.shared(from)));
        let mut end = LINE + 5 * 2 * LINE;
        for ring in rings {
            assert_eq!((ring.head, ring.start), (end, end + LINE + ring.tails * LINE));
            end = ring.start + ring.bytes;
        }
        assert_eq!(end, map.len);
    }
}

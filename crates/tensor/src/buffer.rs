//! Large aligned memory, on huge pages where the system has them.
//!
//! A token reads all weights once, so address translation is part of the cost: with 2 MiB pages one thread of a
//! Zen 4 reads a third more bytes a second than with 4 KiB ones. One matrix of a small model is less than such a
//! page; so small buffers share regions of 64 MiB, one after the other, and a region goes back to the
//! system when its last buffer is dropped. Memory comes zeroed from the system and is touched only when used.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;

/// Every buffer starts on a multiple of this: a cache line, and the widest register.
pub const ALIGN: usize = 64;

/// A huge page.
const PAGE_BYTES: usize = 2 << 20;

/// Address space of a shared region; only what is written becomes memory.
const REGION_BYTES: usize = 64 << 20;

/// The region that small buffers are taken from.
static CURRENT: Mutex<Option<Shared>> = Mutex::new(None);

/// Numbers for which all bits zero is a value and any bits are.
///
/// # Safety
/// Plain numbers without padding, alignment at most [`ALIGN`].
pub unsafe trait Number: Copy + Send + Sync + 'static {}

macro_rules! numbers {
    ($($number:ty)+) => {$(
        // SAFETY: a primitive number.
        unsafe impl Number for $number {}
    )+};
}
numbers!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64);

/// A fixed number of values, zero at first, at a multiple of [`ALIGN`]; a slice to its user.
pub struct Buffer<T: Number> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory that `start` points into.
    _region: Option<Arc<Region>>,
}

// SAFETY: it owns its part of the region as a `Box<[T]>` would.
unsafe impl<T: Number> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for Buffer<T> {}

impl<T: Number> Buffer<T> {
    /// `len` zeros. Costs no time and no memory until they are touched.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn zeroed(len: usize) -> Result<Buffer<T>, Error> {
        let refused = Error::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) };
        let Some(bytes) = len.checked_mul(size_of::<T>()).filter(|&b| b <= isize::MAX as usize / 2) else {
            return Err(refused);
        };
        if bytes == 0 {
            return Ok(Buffer { start: NonNull::dangling(), len, _region: None });
        }
        let (region, offset) = take(bytes).ok_or(refused)?;
        // SAFETY: `take` gave `bytes` bytes at `offset` of the region to us alone.
        let start = unsafe { region.start.add(offset) }.cast::<T>();
        Ok(Buffer { start, len, _region: Some(region) })
    }

    /// Has the system put memory behind the values in `range` now rather than when they are first touched. No value
    /// changes; a system that can't do it leaves things as they are.
    pub(crate) fn populate(&self, range: Range<usize>) {
        let values = &self[range];
        if !values.is_empty() {
            populate(values.as_ptr().cast(), size_of_val(values));
        }
    }
}

/// [`Buffer::populate`] for the bytes at `start`.
#[cfg(target_os = "linux")]
fn populate(start: *const u8, bytes: usize) {
    /// Of Linux 5.14; older ones refuse it.
    const MADV_POPULATE_WRITE: libc::c_int = 23;
    /// The smallest page there is: where it is larger, the system refuses the odd start, and nothing is lost.
    const SMALL_PAGE: usize = 4096;
    let before = start.addr() % SMALL_PAGE;
    // SAFETY: the range is part of a mapping that the caller's borrow keeps; faulting pages in changes no value.
    unsafe { libc::madvise(start.sub(before).cast_mut().cast(), bytes + before, MADV_POPULATE_WRITE) };
}

#[cfg(not(target_os = "linux"))]
fn populate(_start: *const u8, _bytes: usize) {}

impl<T: Number> Default for Buffer<T> {
    /// No values, no memory.
    fn default() -> Buffer<T> {
        Buffer { start: NonNull::dangling(), len: 0, _region: None }
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values that live as long as the region, initialised (zero or written), ours alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Number> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer of {} values", self.len)
    }
}

/// A shared region and how much of it is given away.
struct Shared {
    region: Arc<Region>,
    used: usize,
}

/// `bytes` fresh zeros, at a multiple of [`ALIGN`], and where they are.
fn take(bytes: usize) -> Option<(Arc<Region>, usize)> {
    if bytes > REGION_BYTES / 4 {
        return Some((Arc::new(Region::map(bytes)?), 0));
    }
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let shared = match current.as_mut() {
        Some(shared) if shared.used + bytes <= REGION_BYTES => shared,
        _ => current.insert(Shared { region: Arc::new(Region::map(REGION_BYTES)?), used: 0 }),
    };
    let offset = shared.used;
    shared.used = (offset + bytes).next_multiple_of(ALIGN);
    Some((Arc::clone(&shared.region), offset))
}

/// Memory from the system, zeroed.
struct Region {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory; who may touch which part is the buffers' business.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

#[cfg(target_os = "linux")]
impl Region {
    /// At least `bytes` bytes that start on a huge page.
    fn map(bytes: usize) -> Option<Region> {
        let bytes = bytes.checked_next_multiple_of(PAGE_BYTES)?;
        // One page more, so that an aligned start is inside; what lies around it goes back at once.
        let mapped = bytes.checked_add(PAGE_BYTES)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping wherever the system likes.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), mapped, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return None;
        }
        let address = address.cast::<u8>();
        let before = address.align_offset(PAGE_BYTES);
        // SAFETY: all three ranges are inside the mapping, which is ours; nothing points into the parts that go.
        unsafe {
            let start = address.add(before);
            if before > 0 {
                libc::munmap(address.cast(), before);
            }
            libc::munmap(start.add(bytes).cast(), PAGE_BYTES - before);
            // Advice: where the system has no huge pages, small ones do.
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            Some(Region { start: NonNull::new(start)?, bytes })
        }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and the last buffer in it is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(not(target_os = "linux"))]
impl Region {
    fn layout(bytes: usize) -> Option<std::alloc::Layout> {
        std::alloc::Layout::from_size_align(bytes, PAGE_BYTES).ok()
    }

    fn map(bytes: usize) -> Option<Region> {
        // SAFETY: no buffer and so no region has 0 bytes.
        let start = unsafe { std::alloc::alloc_zeroed(Region::layout(bytes)?) };
        Some(Region { start: NonNull::new(start)?, bytes })
    }
}

#[cfg(not(target_os = "linux"))]
impl Drop for Region {
    fn drop(&mut self) {
        if let Some(layout) = Region::layout(self.bytes) {
            // SAFETY: `map` allocated it with this layout, and the last buffer in it is gone.
            unsafe { std::alloc::dealloc(self.start.as_ptr(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_apart() {
        let mut buffers: Vec<Buffer<u16>> = (0..200)
            .map(|i| Buffer::zeroed(i * 4001).unwrap())
            .chain([Buffer::zeroed(40 << 20).unwrap()])
            .collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            // An empty slice may point anywhere.
            assert!(buffer.is_empty() || (buffer.as_ptr() as usize).is_multiple_of(ALIGN));
            assert!(buffer.iter().all(|&x| x == 0));
            buffer.fill(i as u16 + 1);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|&x| x == i as u16 + 1));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn populated_memory_is_there_and_unchanged() {
        let mut buffer: Buffer<u8> = Buffer::zeroed(40 << 20).unwrap();
        let pages = |bytes: &[u8]| {
            let mut there = vec![0u8; bytes.len() / 4096];
            // SAFETY: the range is mapped and whole pages; `there` has a byte for each.
            let code =
                unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), there.as_mut_ptr()) };
            assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
            there.iter().filter(|&&page| page & 1 == 1).count()
        };
        buffer[5] = 7;
        assert_eq!(pages(&buffer[4 << 20..40 << 20]), 0, "nothing is touched by itself");
        buffer.populate(3..20 << 20);
        assert_eq!(pages(&buffer[..20 << 20]), (20 << 20) / 4096);
        assert_eq!(pages(&buffer[22 << 20..40 << 20]), 0);
        assert!(buffer.iter().enumerate().all(|(i, &x)| x == if i == 5 { 7 } else { 0 }));
        buffer.populate(9..9);
    }

    #[test]
    fn a_region_outlives_every_order_of_drops() {
        let mut buffers: Vec<Buffer<f32>> = (0..20).map(|_| Buffer::zeroed(3 << 20).unwrap()).collect();
        while !buffers.is_empty() {
            buffers.swap_remove(buffers.len() / 2);
            buffers.iter_mut().for_each(|b| b[0] += 1.0);
        }
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 8] {
            assert!(matches!(Buffer::<u32>::zeroed(len), Err(Error::OutOfMemory { .. })), "{len}");
        }
    }
}

//! The compute thread pool: persistent threads that run one closure each and meet again (fork and join).
//!
//! A token of a small model takes 3 ms and about 150 operations, so a fork and join has to cost well under a
//! microsecond. Hence one shared epoch instead of a queue: the caller writes the closure's address, adds one to
//! the epoch and takes part itself; workers that are still spinning see the new epoch after one cache-line
//! transfer. Who finds nothing to do for 60 µs parks, so an idle pool burns nothing, and a pool with more
//! threads than the machine has cores parks at once, so that nobody spins on the core that another one needs.
//!
//! A share belongs to nobody until somebody takes it. A caller that has finished its own share takes those of workers
//! that have not come yet: on a busy machine a thread may wait milliseconds for its core, and 150 times a token the
//! others would wait with it.
//!
//! Cost, two threads on one socket: about 0.2 µs for an empty run while hot, one futex wake more when parked.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::Cpu;

/// How long a thread looks for work, or for the others to finish, before it parks.
const SPIN: Duration = Duration::from_micros(60);

/// Persistent compute threads. The caller's thread is one of them (rank 0).
///
/// Runs from several threads take turns. A run started inside another one's closure has that thread to itself:
/// it executes inline, with `count` 1.
pub struct Pool {
    cpu: Cpu,
    threads: usize,
    shared: Arc<Shared>,
    turn: Mutex<()>,
    handles: Vec<JoinHandle<()>>,
}

/// One share of a [`Pool::run`].
pub struct Worker<'a> {
    /// This share's number, `0..count`.
    pub rank: usize,
    /// Shares in all.
    pub count: usize,
    /// Next index that [`Worker::claim`] hands out.
    next: &'a AtomicUsize,
}

type Work = *const (dyn Fn(&Worker<'_>) + Sync);

/// On its own pair of cache lines, so that threads waiting on one field are not disturbed by writes to another.
#[repr(align(128))]
struct Padded<T>(T);

/// One worker's share of the current run, by epochs: who first moves `taken` to the epoch computes it.
#[derive(Default)]
struct Share {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl Share {
    /// Whether the caller of this is the one to compute the share of run `epoch`.
    fn take(&self, epoch: usize) -> bool {
        // SeqCst: the winner sees what was written before the run began.
        self.taken.compare_exchange(epoch.wrapping_sub(1), epoch, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

struct Shared {
    /// Runs so far; a change tells workers that `work` is new.
    epoch: Padded<AtomicUsize>,
    work: UnsafeCell<Option<Work>>,
    /// One for each worker.
    shares: Vec<Padded<Share>>,
    /// Next index that [`Worker::claim`] hands out.
    next: Padded<AtomicUsize>,
    /// One flag a worker: it parks, or is about to.
    parked: Vec<Padded<AtomicBool>>,
    /// The caller parks, or is about to.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    threads: usize,
    spin: Duration,
}

// SAFETY: `work` is the one field that isn't Sync. It is written by the thread that holds `turn` while every share of
// the last run is done, and read by workers that have taken a share of the current one, which keeps the run from ending
// and came after the write. What it points to is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is dereferenced only during the run that wrote it.
unsafe impl Send for Shared {}

thread_local! {
    /// This thread is inside some run's closure.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// Starts `threads - 1` threads (at least one thread runs: the caller's). Where the system refuses a thread,
    /// the pool has as many as it got: results don't depend on the number.
    pub fn new(threads: usize, cpu: Cpu) -> Pool {
        let threads = threads.max(1);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let spin = if threads > cores { Duration::ZERO } else { SPIN };
        // Threads are asked for before `Shared` is complete, because it holds how many there are.
        let (senders, started): (Vec<_>, Vec<_>) = (1..threads)
            .map_while(|rank| {
                let (sender, receiver) = std::sync::mpsc::channel::<Arc<Shared>>();
                let body = move || {
                    if let Ok(shared) = receiver.recv() {
                        shared.serve(rank);
                    }
                };
                let handle = thread::Builder::new().name(format!("compute-{rank}")).spawn(body).ok()?;
                Some((sender, handle))
            })
            .unzip();
        let threads = started.len() + 1;
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicUsize::new(0)),
            work: UnsafeCell::new(None),
            shares: (1..threads).map(|_| Padded(Share::default())).collect(),
            next: Padded(AtomicUsize::new(0)),
            parked: (1..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            threads,
            spin,
        });
        for sender in senders {
            // The receiving thread waits for exactly this message; if it is gone there is nobody to tell.
            let _ = sender.send(Arc::clone(&shared));
        }
        Pool { cpu, threads, shared, turn: Mutex::new(()), handles: started }
    }

    /// Threads that [`Pool::run`] uses, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The kernels this pool's operations use.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// Runs `work` once for every share and returns when all have finished. Shares mostly run on as many threads at the
    /// same time, but one thread may run several in turn, so none may wait for another.
    ///
    /// # Panics
    /// With the first panic of any share, after all have finished. The pool stays usable.
    pub fn run(&self, work: impl Fn(&Worker<'_>) + Sync) {
        if self.threads == 1 || INSIDE.get() {
            return work(&Worker { rank: 0, count: 1, next: &AtomicUsize::new(0) });
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        let work: &(dyn Fn(&Worker<'_>) + Sync) = &work;
        // SAFETY: we hold `turn` and the last run has ended, so no worker reads `work`. Its lifetime is hidden, but it is
        // used only by whom took a share, and `run` waits for those before it returns or unwinds.
        unsafe {
            *shared.work.get() = Some(std::mem::transmute::<&(dyn Fn(&Worker<'_>) + Sync), Work>(work))
        };
        shared.next.0.store(0, Ordering::Relaxed);
        let epoch = shared.epoch.0.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        for (parked, handle) in shared.parked.iter().zip(&self.handles) {
            // SeqCst on both sides: either we see the flag, or the worker sees the epoch before it parks.
            if parked.0.load(Ordering::SeqCst) {
                handle.thread().unpark();
            }
        }
        INSIDE.set(true);
        shared.attempt(0, work);
        for (index, share) in shared.shares.iter().enumerate() {
            if share.0.take(epoch) {
                shared.attempt(index + 1, work);
                share.0.done.store(epoch, Ordering::SeqCst);
            }
        }
        INSIDE.set(false);
        shared.wait_for_workers(epoch);
        if shared.panicked.load(Ordering::SeqCst) {
            let panic = lock(&shared.panic).take();
            shared.panicked.store(false, Ordering::SeqCst);
            drop(turn);
            if let Some(panic) = panic {
                resume_unwind(panic);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker's panics are caught and handed to the caller of `run`; there is nothing left to report.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// A worker's life: wait for a new epoch, compute its share unless the caller has taken it, say so.
    fn serve(&self, rank: usize) {
        INSIDE.set(true);
        let share = &self.shares[rank - 1].0;
        let mut seen = 0;
        loop {
            seen = self.wait_for_epoch(rank, seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if !share.take(seen) {
                continue;
            }
            // SAFETY: the run whose share we took cannot end before we say so; its caller wrote `work` before it began
            // and keeps both the pointer and the closure alive and unchanged until it has ended.
            if let Some(work) = unsafe { *self.work.get() } {
                // SAFETY: as above.
                self.attempt(rank, unsafe { &*work });
            }
            share.done.store(seen, Ordering::SeqCst);
            if self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = lock(&self.caller).as_ref()
            {
                caller.unpark();
            }
        }
    }

    fn attempt(&self, rank: usize, work: &(dyn Fn(&Worker<'_>) + Sync)) {
        let worker = Worker { rank, count: self.threads, next: &self.next.0 };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&worker))) {
            let mut first = lock(&self.panic);
            if !self.panicked.swap(true, Ordering::SeqCst) {
                *first = Some(panic);
            }
        }
    }

    /// Returns the first epoch after `seen` that it sees.
    fn wait_for_epoch(&self, rank: usize, seen: usize) -> usize {
        let changed = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if !spin_until(self.spin, changed) {
            let parked = &self.parked[rank - 1].0;
            parked.store(true, Ordering::SeqCst);
            while !changed() {
                thread::park();
            }
            parked.store(false, Ordering::SeqCst);
        }
        self.epoch.0.load(Ordering::SeqCst)
    }

    fn wait_for_workers(&self, epoch: usize) {
        let finished = || self.shares.iter().all(|share| share.0.done.load(Ordering::SeqCst) == epoch);
        if spin_until(self.spin, finished) {
            return;
        }
        *lock(&self.caller) = Some(thread::current());
        self.caller_parked.store(true, Ordering::SeqCst);
        while !finished() {
            thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

impl Worker<'_> {
    /// This worker's share of `0..len`: contiguous, whole multiples of `grain` but for the last, as even as those
    /// allow; the shares of all ranks cover `0..len` once.
    ///
    /// # Panics
    /// If `grain` is 0.
    pub fn split(&self, len: usize, grain: usize) -> Range<usize> {
        let grains = len.div_ceil(grain);
        let (each, more) = (grains / self.count, grains % self.count);
        let first = self.rank * each + self.rank.min(more);
        let last = first + each + usize::from(self.rank < more);
        (first * grain).min(len)..(last * grain).min(len)
    }

    /// The next index below `len` that no worker has claimed in this run, for work of uneven size. One counter a
    /// run: every claim of a run counts on it, so a run has one claimed loop.
    pub fn claim(&self, len: usize) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < len).then_some(index)
    }
}

/// Looks at `ready` for at most `limit`; whether it came true. A zero limit looks once.
fn spin_until(limit: Duration, ready: impl Fn() -> bool) -> bool {
    if ready() {
        return true;
    }
    if limit.is_zero() {
        return false;
    }
    let start = Instant::now();
    loop {
        // A clock read costs as much as a few pauses; between two of them many looks at the flag.
        for _ in 0..64 {
            std::hint::spin_loop();
            if ready() {
                return true;
            }
        }
        if start.elapsed() >= limit {
            return false;
        }
    }
}

/// A pool's state is consistent whenever one of its locks is free, so a panic under a lock poisons nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mutable slice whose disjoint parts the workers of one run write at the same time.
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, and `part`'s contract keeps the parts of different threads apart.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows `slice` for as long as parts of it are used.
    pub fn new(slice: &'a mut [T]) -> Disjoint<'a, T> {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// Values in the whole slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where value `index` is, or would be; an address to prefetch, not to use.
    pub(crate) fn at(&self, index: usize) -> *const T {
        self.start.wrapping_add(index)
    }

    /// The values of `range`.
    ///
    /// # Safety
    /// While the returned slice lives, no other part that overlaps `range` does, on any thread.
    ///
    /// # Panics
    /// If `range` leaves the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} leaves 0..{}", self.len);
        // SAFETY: inside the borrowed slice by the assertion; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    fn pool(threads: usize) -> Pool {
        Pool::new(threads, Cpu::force(Family::Scalar).unwrap())
    }

    #[test]
    fn every_rank_runs_once_and_sees_the_callers_memory() {
        for threads in [1, 2, 3, 7] {
            let pool = pool(threads);
            let mut counts = vec![0u32; threads];
            for round in 1..=200 {
                let parts = Disjoint::new(&mut counts);
                pool.run(|w| {
                    assert_eq!(w.count, threads);
                    // SAFETY: one element a rank.
                    unsafe { parts.part(w.rank..w.rank + 1)[0] += 1 };
                });
                assert!(counts.iter().all(|&c| c == round), "{counts:?} after {round} runs");
            }
        }
    }

    #[test]
    fn parked_threads_wake() {
        let pool = pool(2);
        for _ in 0..3 {
            // Longer than SPIN whatever the load: the worker's own flag says that it parks.
            while !pool.shared.parked[0].0.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            let ran = AtomicUsize::new(0);
            pool.run(|_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 2);
        }
    }

    #[test]
    fn a_caller_that_parked_is_woken() {
        let pool = pool(2);
        let begun = AtomicBool::new(false);
        pool.run(|w| {
            begun.fetch_or(w.rank == 1, Ordering::SeqCst);
            if w.rank == 0 {
                // Or the caller would do the other share itself.
                while !begun.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            } else {
                while !pool.shared.caller_parked.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_have_finished_and_the_pool_lives_on() {
        let pool = pool(3);
        for bad in 0..3 {
            let finished = AtomicUsize::new(0);
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|w| {
                    if w.rank == bad {
                        panic!("rank {bad}");
                    }
                    finished.fetch_add(1, Ordering::SeqCst);
                })
            }));
            assert_eq!(panic.unwrap_err().downcast_ref::<String>().unwrap(), &format!("rank {bad}"));
            assert_eq!(finished.load(Ordering::SeqCst), 2);
            pool.run(|_| {});
        }
    }

    #[test]
    fn a_share_is_taken_once() {
        let share = Share::default();
        assert!(!share.take(2), "of a run whose predecessor is not over");
        assert!(share.take(1));
        assert!(!share.take(1), "by a worker that comes late");
        assert!(share.take(2));
        assert!(!share.take(1), "by one that comes later still");
    }

    #[test]
    fn the_caller_does_the_shares_of_those_who_do_not_come() {
        let mut pool = pool(2);
        // The worker ends, and the pool doesn't know.
        pool.shared.stop.store(true, Ordering::SeqCst);
        let epoch = pool.shared.epoch.0.fetch_add(1, Ordering::SeqCst) + 1;
        for handle in pool.handles.drain(..) {
            handle.thread().unpark();
            handle.join().unwrap();
        }
        pool.shared.shares[0].0.taken.store(epoch, Ordering::SeqCst);
        let ranks = Mutex::new(Vec::new());
        for _ in 0..3 {
            lock(&ranks).clear();
            pool.run(|w| lock(&ranks).push((w.rank, w.count, thread::current().id())));
            let me = thread::current().id();
            assert_eq!(*lock(&ranks), [(0, 2, me), (1, 2, me)]);
        }
    }

    #[test]
    fn concurrent_runs_take_turns_and_nested_ones_run_inline() {
        let pool = pool(2);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(|_| {
                            pool.run(|inner| {
                                assert_eq!(inner.count, 1);
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 100 * 2);
    }

    #[test]
    fn claims_hand_out_each_index_once() {
        let pool = pool(3);
        for len in [0, 1, 2, 100] {
            let hits: Vec<_> = (0..len).map(|_| AtomicUsize::new(0)).collect();
            pool.run(|w| {
                while let Some(i) = w.claim(len) {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn splits_cover_the_range_once_in_whole_grains() {
        let next = AtomicUsize::new(0);
        for (len, grain, count) in
            [(0, 16, 2), (1, 16, 2), (576, 16, 2), (100, 7, 3), (5, 1, 8), (49152, 32, 3)]
        {
            let mut at = 0;
            for rank in 0..count {
                let part = Worker { rank, count, next: &next }.split(len, grain);
                assert_eq!(part.start, at);
                assert!(part.end == len || part.end.is_multiple_of(grain));
                at = part.end;
            }
            assert_eq!(at, len);
        }
    }
}

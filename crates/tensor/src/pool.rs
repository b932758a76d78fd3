//! The compute thread pool: persistent threads that run one closure each and meet again (fork and join).
//!
//! A token of a small model takes 3 ms and about 150 operations, so a fork and join has to cost well under a
//! microsecond. Hence one shared epoch instead of a queue: the caller writes the closure's address, adds one to
//! the epoch and takes part itself; workers that are still spinning see the new epoch after one cache-line
//! transfer. Who finds nothing to do for 60 µs parks, so an idle pool burns nothing, and a pool with more
//! threads than the machine has cores parks at once, so that nobody spins on the core that another one needs.
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

/// One thread's place in a [`Pool::run`].
pub struct Worker<'a> {
    /// This thread's number, `0..count`.
    pub rank: usize,
    /// Threads that run this closure.
    pub count: usize,
    meeting: &'a Meeting,
}

type Work = *const (dyn Fn(&Worker<'_>) + Sync);

/// On its own pair of cache lines, so that threads waiting on one field are not disturbed by writes to another.
#[repr(align(128))]
struct Padded<T>(T);

/// What a run's threads share beside the closure.
struct Meeting {
    /// Next index that [`Worker::claim`] hands out.
    next: Padded<AtomicUsize>,
    /// Threads that stand at the barrier.
    arrived: Padded<AtomicUsize>,
    /// Barriers passed so far.
    passed: Padded<AtomicUsize>,
    /// Some thread panicked: nobody may wait for it.
    broken: AtomicBool,
    spin: Duration,
}

struct Shared {
    /// Runs so far; a change tells workers that `work` is new.
    epoch: Padded<AtomicUsize>,
    work: UnsafeCell<Option<Work>>,
    /// Workers that have not finished the current run.
    remaining: Padded<AtomicUsize>,
    meeting: Meeting,
    /// One flag a worker: it parks, or is about to.
    parked: Vec<Padded<AtomicBool>>,
    /// The caller parks, or is about to.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    threads: usize,
    spin: Duration,
}

// SAFETY: `work` is the one field that isn't Sync. It is written by the thread that holds `turn` while `remaining`
// is 0, so no worker reads it then, and read by workers after they acquired the epoch that was released after the
// write. What it points to is Sync.
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
            remaining: Padded(AtomicUsize::new(0)),
            meeting: Meeting::new(spin),
            parked: (1..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
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

    /// Runs `work` once on every thread and returns when all have finished.
    ///
    /// # Panics
    /// With the first panic of any thread, after all have finished. The pool stays usable.
    pub fn run(&self, work: impl Fn(&Worker<'_>) + Sync) {
        if self.threads == 1 || INSIDE.get() {
            let meeting = Meeting::new(Duration::ZERO);
            return work(&Worker { rank: 0, count: 1, meeting: &meeting });
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        let work: &(dyn Fn(&Worker<'_>) + Sync) = &work;
        // SAFETY: we hold `turn` and the last run has ended, so no worker reads `work`. Its lifetime is hidden,
        // but it is used only until `remaining` is 0, which `run` waits for before it returns or unwinds.
        unsafe {
            *shared.work.get() = Some(std::mem::transmute::<&(dyn Fn(&Worker<'_>) + Sync), Work>(work))
        };
        shared.meeting.reset();
        shared.remaining.0.store(self.threads - 1, Ordering::Relaxed);
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for (parked, handle) in shared.parked.iter().zip(&self.handles) {
            // SeqCst on both sides: either we see the flag, or the worker sees the epoch before it parks.
            if parked.0.load(Ordering::SeqCst) {
                handle.thread().unpark();
            }
        }
        INSIDE.set(true);
        shared.attempt(0, work);
        INSIDE.set(false);
        shared.wait_for_workers();
        if shared.meeting.broken.load(Ordering::Relaxed) {
            let panic = lock(&shared.panic).take();
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
    /// A worker's life: wait for a new epoch, run its work, say so.
    fn serve(&self, rank: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        loop {
            self.wait_for_epoch(rank, seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            seen += 1;
            // SAFETY: written before the epoch that we acquired; the caller keeps both the pointer and the closure
            // alive and unchanged until we decrement `remaining`.
            if let Some(work) = unsafe { *self.work.get() } {
                // SAFETY: as above.
                self.attempt(rank, unsafe { &*work });
            }
            if self.remaining.0.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = lock(&self.caller).as_ref()
            {
                caller.unpark();
            }
        }
    }

    fn attempt(&self, rank: usize, work: &(dyn Fn(&Worker<'_>) + Sync)) {
        let worker = Worker { rank, count: self.threads, meeting: &self.meeting };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&worker))) {
            // The first to break the meeting is the one whose panic counts: later ones may follow from it.
            let mut first = lock(&self.panic);
            if !self.meeting.broken.swap(true, Ordering::SeqCst) {
                *first = Some(panic);
            }
        }
    }

    fn wait_for_epoch(&self, rank: usize, seen: usize) {
        let changed = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if spin_until(self.spin, changed) {
            return;
        }
        let parked = &self.parked[rank - 1].0;
        parked.store(true, Ordering::SeqCst);
        while !changed() {
            thread::park();
        }
        parked.store(false, Ordering::SeqCst);
    }

    fn wait_for_workers(&self) {
        let finished = || self.remaining.0.load(Ordering::SeqCst) == 0;
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

impl Meeting {
    fn new(spin: Duration) -> Meeting {
        Meeting {
            next: Padded(AtomicUsize::new(0)),
            arrived: Padded(AtomicUsize::new(0)),
            passed: Padded(AtomicUsize::new(0)),
            broken: AtomicBool::new(false),
            spin,
        }
    }

    fn reset(&self) {
        self.next.0.store(0, Ordering::Relaxed);
        self.arrived.0.store(0, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
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
        let index = self.meeting.next.0.fetch_add(1, Ordering::Relaxed);
        (index < len).then_some(index)
    }

    /// Waits until every worker of this run stands here. What each wrote before is visible to all after.
    ///
    /// # Panics
    /// If another worker panicked, since it will never come.
    pub fn barrier(&self) {
        if self.count == 1 {
            return;
        }
        let meeting = self.meeting;
        let passed = meeting.passed.0.load(Ordering::Acquire);
        if meeting.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            meeting.arrived.0.store(0, Ordering::Relaxed);
            meeting.passed.0.store(passed.wrapping_add(1), Ordering::Release);
            return;
        }
        let through = || meeting.passed.0.load(Ordering::Acquire) != passed;
        let broken = || meeting.broken.load(Ordering::Relaxed);
        if !spin_until(meeting.spin, || through() || broken()) {
            while !through() && !broken() {
                thread::yield_now();
            }
        }
        assert!(through(), "another worker panicked before the barrier");
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
        pool.run(|w| {
            if w.rank == 1 {
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
    fn nobody_waits_at_a_barrier_for_a_thread_that_panicked() {
        let pool = pool(2);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            pool.run(|w| {
                assert!(w.rank == 1, "the cause");
                w.barrier();
            })
        }));
        assert_eq!(panic.unwrap_err().downcast_ref::<&str>().unwrap(), &"the cause");
        pool.run(|w| w.barrier());
    }

    #[test]
    fn barriers_order_writes_before_reads() {
        let pool = pool(3);
        let slots: Vec<_> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        pool.run(|w| {
            for round in 1..=100 {
                slots[w.rank].store(round, Ordering::Relaxed);
                w.barrier();
                assert!(slots.iter().all(|s| s.load(Ordering::Relaxed) == round));
                w.barrier();
            }
        });
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
        let meeting = Meeting::new(Duration::ZERO);
        for (len, grain, count) in
            [(0, 16, 2), (1, 16, 2), (576, 16, 2), (100, 7, 3), (5, 1, 8), (49152, 32, 3)]
        {
            let mut at = 0;
            for rank in 0..count {
                let part = Worker { rank, count, meeting: &meeting }.split(len, grain);
                assert_eq!(part.start, at);
                assert!(part.end == len || part.end.is_multiple_of(grain));
                at = part.end;
            }
            assert_eq!(at, len);
        }
    }
}

//! The compute thread pool: persistent threads that run one closure each and meet again (fork and join).

use crate::Cpu;

/// Persistent compute threads. The caller's thread is one of them (rank 0).
pub struct Pool {
    cpu: Cpu,
    threads: usize,
}

/// One thread's place in a [`Pool::run`].
pub struct Worker<'a> {
    /// This thread's number, `0..count`.
    pub rank: usize,
    /// Threads that run this closure.
    pub count: usize,
    _pool: &'a Pool,
}

impl Pool {
    /// Starts `threads - 1` threads (at least one thread runs: the caller's).
    pub fn new(threads: usize, cpu: Cpu) -> Pool {
        Pool { cpu, threads: threads.max(1) }
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
    /// With the first panic of any thread, after all have finished.
    pub fn run(&self, work: impl Fn(&Worker<'_>) + Sync) {
        let _ = &work;
        todo!()
    }
}

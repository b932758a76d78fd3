//! The connections that are open, and which one goes when there is no room.
//!
//! A bound alone would let idle connections, half-open handshakes among them, lock everyone out until their timeouts. So a newcomer past the bound
//! takes the place of the one that has been without a request for longest. Only where every connection is busy with
//! one does the newcomer wait, in the kernel's queue.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// All open connections of a server.
#[derive(Default)]
pub struct Connections {
    table: Mutex<Table>,
    /// Wakes those who wait for a connection to end or to become idle.
    changed: Notify,
}

#[derive(Default)]
struct Table {
    next: u64,
    open: HashMap<u64, Arc<Entry>>,
}

/// What is known of one connection. Its requests change it without the table's lock.
struct Entry {
    /// Requests being answered; HTTP/1 has at most one, and its body may still be read when the next one starts.
    requests: AtomicUsize,
    origin: Instant,
    /// Since when it has been without a request, in microseconds since its opening.
    idle_since: AtomicU64,
    close: Notify,
    closing: AtomicBool,
}

/// One open connection; dropping it takes it off the table.
pub struct Connection {
    id: u64,
    all: Arc<Connections>,
    entry: Arc<Entry>,
}

/// Marks a connection busy, from within its requests.
#[derive(Clone)]
pub struct ConnectionHandle {
    all: Arc<Connections>,
    entry: Arc<Entry>,
}

/// A request under way on a connection, until dropped.
pub struct Busy(ConnectionHandle);

impl Entry {
    fn idle_since(&self) -> Instant {
        self.origin + Duration::from_micros(self.idle_since.load(Ordering::Relaxed))
    }
}

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.table().open.len()
    }

    /// Waits until fewer than `max` are open, asking the longest idle to close.
    pub async fn make_room(&self, max: usize) {
        loop {
            let changed = self.changed.notified();
            {
                let table = self.table();
                if table.open.len() < max {
                    return;
                }
                let idle = table.open.values().filter(|entry| {
                    entry.requests.load(Ordering::Relaxed) == 0 && !entry.closing.load(Ordering::Relaxed)
                });
                if let Some(entry) = idle.min_by_key(|entry| entry.idle_since()) {
                    entry.closing.store(true, Ordering::Relaxed);
                    entry.close.notify_one();
                }
            }
            changed.await;
        }
    }

    /// Waits until none is open.
    pub async fn none_left(&self) {
        loop {
            let changed = self.changed.notified();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Puts a connection on the table.
    pub fn open(self: &Arc<Connections>) -> Connection {
        let entry = Arc::new(Entry {
            requests: AtomicUsize::new(0),
            origin: Instant::now(),
            idle_since: AtomicU64::new(0),
            close: Notify::new(),
            closing: AtomicBool::new(false),
        });
        let mut table = self.table();
        let id = table.next;
        table.next += 1;
        table.open.insert(id, entry.clone());
        Connection { id, all: self.clone(), entry }
    }
}

impl Connection {
    /// What a request on this connection holds to mark it busy.
    pub fn handle(&self) -> ConnectionHandle {
        ConnectionHandle { all: self.all.clone(), entry: self.entry.clone() }
    }

    /// Returns when the connection must go at once.
    pub async fn closed(&self) {
        self.entry.close.notified().await;
    }
}

impl ConnectionHandle {
    /// A request began.
    pub fn busy(&self) -> Busy {
        self.entry.requests.fetch_add(1, Ordering::Relaxed);
        Busy(self.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let entry = &self.0.entry;
        let micros = u64::try_from(entry.origin.elapsed().as_micros()).unwrap_or(u64::MAX);
        entry.idle_since.store(micros, Ordering::Relaxed);
        entry.requests.fetch_sub(1, Ordering::Relaxed);
        self.0.all.changed.notify_waiters();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.table().open.remove(&self.id);
        self.all.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_idle_goes_and_the_busy_stay() {
        let all = Arc::new(Connections::default());
        let (first, second) = (all.open(), all.open());
        let busy = first.handle().busy();
        let room = tokio::spawn({
            let all = all.clone();
            async move { all.make_room(2).await }
        });
        second.closed().await;
        drop(second);
        room.await.unwrap();
        assert_eq!(all.count(), 1);
        drop(busy);
        all.make_room(2).await;
    }
}

//! The connections that are open, and which one goes when there is no room.
//!
//! A bound alone would let 512 idle connections lock everyone out until their timeouts. So a newcomer past the bound
//! takes the place of the one that has been without a request for longest. Only where every connection is busy with
//! one does the newcomer wait, in the kernel's queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

/// All open connections of a server.
#[derive(Default)]
pub(crate) struct Connections {
    table: Mutex<Table>,
    /// Wakes those who wait for a connection to end or to become idle.
    changed: Notify,
}

#[derive(Default)]
struct Table {
    next: u64,
    open: HashMap<u64, Entry>,
}

struct Entry {
    /// Requests being answered; HTTP/1 has at most one, and its body may still be read when the next one starts.
    requests: usize,
    idle_since: Instant,
    close: Arc<Notify>,
    closing: bool,
}

/// One open connection; dropping it takes it off the table.
pub(crate) struct Connection {
    id: u64,
    all: Arc<Connections>,
    /// Notified when the connection must go at once.
    pub(crate) close: Arc<Notify>,
}

/// A request under way on a connection.
pub(crate) struct Busy {
    id: u64,
    all: Arc<Connections>,
}

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are open.
    pub(crate) fn count(&self) -> usize {
        self.table().open.len()
    }

    /// Waits until fewer than `max` are open, asking the longest idle to close.
    pub(crate) async fn make_room(&self, max: usize) {
        loop {
            let changed = self.changed.notified();
            {
                let mut table = self.table();
                if table.open.len() < max {
                    return;
                }
                let idle = table.open.values_mut().filter(|e| e.requests == 0 && !e.closing);
                if let Some(entry) = idle.min_by_key(|e| e.idle_since) {
                    entry.closing = true;
                    entry.close.notify_one();
                }
            }
            changed.await;
        }
    }

    /// Waits until none is open.
    pub(crate) async fn none_left(&self) {
        loop {
            let changed = self.changed.notified();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Puts a connection on the table.
    pub(crate) fn open(self: &Arc<Connections>) -> Connection {
        let close = Arc::new(Notify::new());
        let mut table = self.table();
        let id = table.next;
        table.next += 1;
        let entry = Entry { requests: 0, idle_since: Instant::now(), close: close.clone(), closing: false };
        table.open.insert(id, entry);
        Connection { id, all: self.clone(), close }
    }
}

impl Connection {
    /// What a request on this connection holds to mark it busy.
    pub(crate) fn handle(&self) -> ConnectionHandle {
        ConnectionHandle { id: self.id, all: self.all.clone() }
    }
}

/// Marks a connection busy, from within its requests.
#[derive(Clone)]
pub(crate) struct ConnectionHandle {
    id: u64,
    all: Arc<Connections>,
}

impl ConnectionHandle {
    /// A request began.
    pub(crate) fn busy(&self) -> Busy {
        if let Some(entry) = self.all.table().open.get_mut(&self.id) {
            entry.requests += 1;
        }
        Busy { id: self.id, all: self.all.clone() }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(entry) = self.all.table().open.get_mut(&self.id) {
            entry.requests -= 1;
            entry.idle_since = Instant::now();
        }
        self.all.changed.notify_waiters();
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
        second.close.notified().await;
        drop(second);
        room.await.unwrap();
        assert_eq!(all.count(), 1);
        drop(busy);
        all.make_room(2).await;
    }
}

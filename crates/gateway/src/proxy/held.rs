//! Streams whose clients are gone, kept for a while: a client that comes back with `Last-Event-ID` gets the next event.
//!
//! Nothing runs for a stream that is kept. Its replica was told that nobody listens; what stays is the request, the
//! ids that were said, and the last events (the client may not have seen those that were on their way). To go on is then
//! to continue the answer, as if its replica had died.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::stream::Stream;

/// Bytes of a stream's last events.
const TAIL_BYTES: usize = 32 << 10;
/// Bytes that all streams which are kept may have.
const MAX_BYTES: usize = 64 << 20;
/// How many are kept.
const MAX_STREAMS: usize = 4096;

/// The last events of a stream, with the first one's number.
#[derive(Default)]
pub(crate) struct Tail {
    events: VecDeque<Bytes>,
    first: u64,
    bytes: usize,
}

impl Tail {
    pub(crate) fn push(&mut self, event: Bytes) {
        self.bytes += event.len();
        self.events.push_back(event);
        while self.bytes > TAIL_BYTES && self.events.len() > 1 {
            if let Some(oldest) = self.events.pop_front() {
                self.bytes -= oldest.len();
                self.first += 1;
            }
        }
    }

    /// The number of the next event.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// Events from number `from` on; none where one of them is gone, or was never there.
    pub(crate) fn since(&self, from: u64) -> Option<Vec<Bytes>> {
        let skip = from.checked_sub(self.first).filter(|_| from <= self.next())?;
        Some(self.events.iter().skip(skip as usize).cloned().collect())
    }
}

struct Kept {
    stream: Box<Stream>,
    bytes: usize,
    until: Instant,
}

#[derive(Default)]
struct State {
    kept: HashMap<String, Kept>,
    order: VecDeque<String>,
    bytes: usize,
    /// Streams that run: told to stop where their client comes back before its old connection is known to be dead.
    running: HashMap<String, Arc<Notify>>,
}

/// All streams that are kept.
#[derive(Default)]
pub(crate) struct Held {
    state: Mutex<State>,
    changed: Notify,
}

impl State {
    fn remove(&mut self, id: &str) -> Option<Box<Stream>> {
        let kept = self.kept.remove(id)?;
        self.bytes -= kept.bytes;
        self.order.retain(|other| other != id);
        Some(kept.stream)
    }

    fn sweep(&mut self, now: Instant) {
        while let Some(id) = self.order.front().cloned() {
            let late = self.kept.get(&id).is_none_or(|kept| kept.until <= now);
            if !late && self.bytes <= MAX_BYTES && self.kept.len() <= MAX_STREAMS {
                return;
            }
            if self.remove(&id).is_none() {
                self.order.pop_front();
            }
        }
    }
}

impl Held {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream runs; it is to stop when told.
    pub(crate) fn running(&self, id: &str) -> Arc<Notify> {
        let stop = Arc::new(Notify::new());
        self.state().running.insert(id.to_owned(), stop.clone());
        stop
    }

    /// It doesn't any more; kept for its client to come back.
    pub(crate) fn keep(&self, id: &str, stream: Box<Stream>, window: Duration) {
        let (now, bytes) = (Instant::now(), stream.bytes());
        let mut state = self.state();
        state.running.remove(id);
        state.remove(id);
        state.bytes += bytes;
        state.order.push_back(id.to_owned());
        state.kept.insert(id.to_owned(), Kept { stream, bytes, until: now + window });
        state.sweep(now);
        drop(state);
        self.changed.notify_waiters();
    }

    /// The stream with this id, for its client; waits a moment for one that still runs to stop.
    pub(crate) async fn take(&self, id: &str) -> Option<Box<Stream>> {
        let give_up = Instant::now() + Duration::from_secs(2);
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state();
                state.sweep(Instant::now());
                if let Some(stream) = state.remove(id) {
                    return Some(stream);
                }
                state.running.get(id)?.notify_one();
            }
            tokio::time::timeout_at(give_up.into(), changed).await.ok()?;
        }
    }

    /// Gives back a stream that was taken by somebody whose it isn't.
    pub(crate) fn give_back(&self, id: &str, stream: Box<Stream>, window: Duration) {
        self.keep(id, stream, window);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_holds_the_last_events_within_its_bytes() {
        let mut tail = Tail::default();
        for i in 0..100u8 {
            tail.push(Bytes::from(vec![i; 1024]));
        }
        assert_eq!((tail.first, tail.next()), (68, 100));
        let numbers: Vec<u8> = tail.since(97).unwrap().iter().map(|event| event[0]).collect();
        assert_eq!(numbers, [97, 98, 99]);
        assert_eq!(tail.since(100), Some(Vec::new()), "all was seen");
        assert_eq!(tail.since(101), None, "nobody was told that");
        assert_eq!(tail.since(67), None, "too long ago");
    }
}

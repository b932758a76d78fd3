//! Who is alive, and who has given up: one thread a group, with one connection to each peer that carries no data.
//!
//! A process that dies, however it dies, closes its connection, and the system tells us at once. One that is stopped or
//! cut off sends no heartbeats. One that has met an error says so, and why. Each is a [`Fault`], kept until the group
//! ends, and wakes the thread that waits in a call. While a call waits for long, its rank tells the others what it has
//! called: so two ranks that never exchange a byte still find that they called different things.
//!
//! The judgement ([`Board`]) is plain state with the time as an argument; the thread only moves bytes.

mod board;
mod wire;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use board::Board;
use wire::{Inbox, Message};

use crate::call::Call;
use crate::error::{Error, Fault};
use crate::net::{Interest, Stream, poll};
use crate::transport::Waker;

/// How long the last words may take.
const FAREWELL: Duration = Duration::from_millis(200);
/// Words that wait for a peer's socket; a peer that doesn't read for so long is judged by its silence.
const OUTBOX_BYTES: usize = 64 << 10;

struct Shared {
    board: Mutex<Board>,
    /// Grows with every change of the board, so that a call need not lock to see that nothing happened.
    changes: AtomicU64,
    orders: Mutex<Orders>,
}

#[derive(Default)]
struct Orders {
    call: Option<Call>,
    say: Vec<Message>,
    leave: bool,
}

/// The control plane's end in a group.
pub(crate) struct Control {
    shared: Arc<Shared>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Starts the thread. `peers[r]` is the connection to rank r; `silence` is how long a peer may say nothing.
    pub(crate) fn start(peers: Vec<Option<Stream>>, silence: Duration, waker: Waker) -> Result<Self, Error> {
        let (wake, listen) = UnixStream::pair().map_err(|e| Error::system("make a socket pair", &e))?;
        let setup = |e| Error::system("set up a control connection", &e);
        for end in [&wake, &listen] {
            end.set_nonblocking(true).map_err(setup)?;
        }
        for stream in peers.iter().flatten() {
            stream.set_nonblocking(true).map_err(setup)?;
        }
        let shared = Arc::new(Shared {
            board: Mutex::new(Board::new(peers.iter().map(Option::is_some), silence, Instant::now())),
            changes: AtomicU64::new(0),
            orders: Mutex::default(),
        });
        let watcher = Watcher {
            shared: Arc::clone(&shared),
            links: peers.into_iter().map(|p| p.map(Link::new)).collect(),
            listen,
            waker,
            heartbeat: (silence / 5).clamp(Duration::from_millis(5), Duration::from_secs(1)),
        };
        let thread = std::thread::Builder::new()
            .name("collectives-control".into())
            .spawn(move || watcher.run())
            .map_err(|e| Error::system("start the control thread", &e))?;
        Ok(Self { shared, wake, thread: Some(thread) })
    }

    /// A number that changes whenever something happened.
    pub(crate) fn changes(&self) -> u64 {
        self.shared.changes.load(Ordering::Acquire)
    }

    /// The first thing that ended the group, if one did.
    pub(crate) fn fault(&self) -> Option<Fault> {
        lock(&self.shared.board).fault.clone()
    }

    /// Whether `peer` has left with a word.
    pub(crate) fn has_left(&self, peer: usize) -> bool {
        lock(&self.shared.board).peers[peer].left
    }

    /// What the peers said they are calling.
    pub(crate) fn calls(&self) -> Vec<Option<Call>> {
        lock(&self.shared.board).peers.iter().map(|peer| peer.call).collect()
    }

    /// Tells everyone what this rank has called (`None`: it is done).
    pub(crate) fn announce(&self, call: Option<Call>) {
        let mut orders = lock(&self.shared.orders);
        orders.call = call;
        orders.say.retain(|message| !matches!(message, Message::Alive { .. }));
        orders.say.push(Message::Alive { call });
        drop(orders);
        self.nudge();
    }

    /// Tells everyone that this rank has given up.
    pub(crate) fn abort(&self, lost: Option<usize>, reason: &str) {
        lock(&self.shared.orders).say.push(Message::abort(lost, reason));
        self.nudge();
    }

    fn nudge(&self) {
        // A full socket means that a wake is pending already.
        let _ = (&self.wake).write(&[1]);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        lock(&self.shared.orders).leave = true;
        self.nudge();
        if let Some(thread) = self.thread.take() {
            // It ends within FAREWELL; if it panicked, the peers see the connections close.
            let _ = thread.join();
        }
    }
}

struct Link {
    stream: Stream,
    inbox: Inbox,
    outbox: Vec<u8>,
    closed: bool,
}

impl Link {
    fn new(stream: Stream) -> Self {
        Self { stream, inbox: Inbox::default(), outbox: Vec::new(), closed: false }
    }

    fn say(&mut self, message: &Message) {
        let bytes = message.encode();
        if self.outbox.len() + bytes.len() <= OUTBOX_BYTES {
            self.outbox.extend_from_slice(&bytes);
        }
        self.push();
    }

    fn push(&mut self) {
        while !self.outbox.is_empty() && !self.closed {
            match (&self.stream).write(&self.outbox) {
                // A connection that takes nothing more is noticed as closed where it is read.
                Ok(0) => break,
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => self.outbox.clear(),
            }
        }
        // An error is found again where the connection is read.
        let _ = self.stream.push();
    }
}

struct Watcher {
    shared: Arc<Shared>,
    links: Vec<Option<Link>>,
    listen: UnixStream,
    waker: Waker,
    heartbeat: Duration,
}

impl Watcher {
    fn run(mut self) {
        let mut next_heartbeat = Instant::now();
        let mut leaving: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let orders = {
                let mut orders = lock(&self.shared.orders);
                (orders.call, std::mem::take(&mut orders.say), orders.leave)
            };
            for message in &orders.1 {
                self.say(message);
            }
            if now >= next_heartbeat {
                next_heartbeat = now + self.heartbeat;
                self.say(&Message::Alive { call: orders.0 });
            }
            if orders.2 && leaving.is_none() {
                self.say(&Message::Goodbye);
                leaving = Some(now + FAREWELL);
            }
            if let Some(until) = leaving {
                // Closing with unread bytes would reset the connection and take the last words with it.
                for link in self
                    .links
                    .iter()
                    .flatten()
                    .filter(|link| link.outbox.is_empty() && !link.stream.pending())
                {
                    link.stream.shutdown_write();
                }
                if now >= until || self.links.iter().all(Option::is_none) {
                    return;
                }
            }
            self.wait(leaving.unwrap_or(next_heartbeat).min(next_heartbeat));
            if self.read() {
                self.shared.changes.fetch_add(1, Ordering::Release);
                (self.waker)();
            }
        }
    }

    fn say(&mut self, message: &Message) {
        for link in self.links.iter_mut().flatten() {
            link.say(message);
        }
    }

    fn wait(&mut self, until: Instant) {
        let mut interests = vec![Interest { fd: self.listen.as_raw_fd(), read: true, write: false }];
        for link in self.links.iter().flatten() {
            let write = !link.outbox.is_empty() || link.stream.pending();
            interests.push(Interest { fd: link.stream.as_raw_fd(), read: true, write });
        }
        let mut ready = Vec::new();
        poll(&interests, until.saturating_duration_since(Instant::now()), &mut ready);
        let mut bytes = [0; 64];
        while matches!((&self.listen).read(&mut bytes), Ok(n) if n > 0) {}
    }

    /// Reads everything that has come, then judges who is silent. Says whether the group's thread should look.
    ///
    /// In this order: a process that was itself stopped finds its peers' heartbeats waiting, and must not blame them.
    fn read(&mut self) -> bool {
        let mut changed = false;
        for (peer, slot) in self.links.iter_mut().enumerate() {
            let Some(link) = slot else { continue };
            link.push();
            let mut bytes = [0; 4096];
            loop {
                match (&link.stream).read(&mut bytes) {
                    Ok(0) => {
                        link.closed = true;
                        changed |= lock(&self.shared.board).closed(peer, "its process ended");
                    }
                    Ok(n) => {
                        let mut board = lock(&self.shared.board);
                        match link.inbox.take(&bytes[..n]) {
                            Ok(messages) => {
                                for message in messages {
                                    changed |= board.heard(peer, message, Instant::now());
                                }
                            }
                            Err(what) => {
                                link.closed = true;
                                changed |= board.failed(Fault::Corrupt { peer, what });
                            }
                        }
                        if !link.closed {
                            continue;
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        link.closed = true;
                        changed |= lock(&self.shared.board).closed(peer, &error.to_string());
                    }
                }
                break;
            }
            if link.closed {
                // The other side may be waiting to see our end close.
                *slot = None;
            }
        }
        changed | lock(&self.shared.board).tick(Instant::now())
    }
}

//! The connections between all members of a new epoch.
//!
//! Each rank listens, and connects to every lower rank. Both ends prove the token and state epoch, ranks and the
//! connection's number, so a member of an old epoch, a stranger or a port scanner ends in a log line and nothing else.
//! Cost: n−1 handshakes a connection number and rank, in parallel.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::auth::{self, Key, Purpose, STATEMENT};
use crate::error::Error;
use crate::net::{Interest, Listener, Stream, poll};

/// Handshakes that may run at once; more connections wait in the system's queue.
const HANDSHAKES: usize = 64;
/// How long one handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What a mesh is made of.
pub(crate) struct Mesh<'a> {
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Connections with each peer; number 0 is the control plane's.
    pub(crate) connections: usize,
    pub(crate) listener: &'a Listener,
    pub(crate) key: &'a Key,
    pub(crate) deadline: Instant,
}

/// For each rank, its connections in the order of their numbers; `None` for this rank.
pub(crate) type Links = Vec<Option<Vec<Stream>>>;

impl Mesh<'_> {
    /// Connects to everyone. `dial` opens a socket to a rank.
    pub(crate) fn connect(&self, dial: impl Fn(usize) -> std::io::Result<Stream>) -> Result<Links, Error> {
        let mut slots: Vec<Vec<Option<Stream>>> =
            (0..self.world_size).map(|_| (0..self.connections).map(|_| None).collect()).collect();
        let mut missing = (self.world_size - 1 - self.rank) * self.connections;
        for (rank, slots) in slots.iter_mut().enumerate().take(self.rank) {
            for (number, slot) in slots.iter_mut().enumerate() {
                let stream = dial(rank).and_then(|stream| {
                    let statement = self.statement(self.rank, rank, number);
                    auth::connect(&stream, self.key, Purpose::Mesh, &statement, self.deadline)?;
                    Ok(stream)
                });
                let stream = stream.map_err(|e| self.late(format!("rank {rank} cannot be reached: {e}")))?;
                *slot = Some(stream);
            }
        }
        self.listener.set_nonblocking().map_err(|e| Error::system("listen for peers", &e))?;
        let (done, arrivals) = mpsc::sync_channel::<Option<(Stream, [u8; STATEMENT])>>(HANDSHAKES);
        std::thread::scope(|scope| {
            let mut running = 0;
            while missing > 0 {
                let left = self.deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let absent: Vec<String> = (self.rank + 1..self.world_size)
                        .filter(|rank| slots[*rank].iter().any(Option::is_none))
                        .map(|rank| rank.to_string())
                        .collect();
                    return Err(self.late(format!("no connection from rank {}", absent.join(", "))));
                }
                let interest =
                    Interest { fd: std::os::fd::AsRawFd::as_raw_fd(self.listener), read: true, write: false };
                let mut ready = Vec::new();
                // While handshakes run, their ends are looked at often.
                let nap = if running == 0 { left } else { Duration::from_millis(1) };
                poll(&[interest], nap.min(left), &mut ready);
                if running < HANDSHAKES
                    && let Ok(stream) = self.listener.accept()
                {
                    running += 1;
                    let done = done.clone();
                    scope.spawn(move || {
                        // The scope's end closes the channel's other side at the earliest after this.
                        let _ = done.send(self.greet(stream));
                    });
                }
                while let Ok(arrival) = arrivals.try_recv() {
                    running -= 1;
                    let Some((stream, statement)) = arrival else { continue };
                    let place = (self.rank + 1..self.world_size).find_map(|rank| {
                        let number = (0..self.connections)
                            .find(|number| statement == self.statement(rank, self.rank, *number))?;
                        Some((rank, number))
                    });
                    match place {
                        Some((rank, number)) if slots[rank][number].is_none() => {
                            slots[rank][number] = Some(stream);
                            missing -= 1;
                        }
                        _ => tracing::warn!(peer = %stream.peer(), "refused a member of another epoch"),
                    }
                }
            }
            Ok(())
        })?;
        let links = slots.into_iter().enumerate();
        Ok(links
            .map(|(rank, slots)| (rank != self.rank).then(|| slots.into_iter().flatten().collect()))
            .collect())
    }

    fn greet(&self, stream: Stream) -> Option<(Stream, [u8; STATEMENT])> {
        let deadline = self.deadline.min(Instant::now() + HANDSHAKE);
        let greeted = stream
            .set_nonblocking(false)
            .and_then(|()| auth::accept(&stream, self.key, Purpose::Mesh, deadline));
        match greeted {
            Ok(statement) => {
                if let Stream::Tcp(tcp) = &stream {
                    // Short messages go at once; where this fails they are only slower.
                    let _ = tcp.set_nodelay(true);
                }
                Some((stream, statement))
            }
            Err(error) => {
                tracing::warn!(peer = %stream.peer(), %error, "refused a connection to this worker");
                None
            }
        }
    }

    fn statement(&self, from: usize, to: usize, number: usize) -> [u8; STATEMENT] {
        let mut statement = [0; STATEMENT];
        statement[..8].copy_from_slice(&self.epoch.to_le_bytes());
        for (at, value) in [(8, from), (12, to), (16, number), (20, self.world_size)] {
            statement[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        statement
    }

    fn late(&self, what: String) -> Error {
        Error::Rendezvous { limit_ms: 0, what: format!("epoch {}: {what}", self.epoch) }
    }
}

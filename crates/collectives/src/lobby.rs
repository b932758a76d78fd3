//! Those who have connected and not yet proved that they belong to the job.
//!
//! Each costs a thread and a socket for as long as a handshake may take, so there is room for [`ROOM`] of them. Where it is
//! full, whoever came first makes room for the one who comes now: a process of the job proves itself within milliseconds,
//! one that says nothing, or a byte at a time, doesn't. Closing newcomers instead would let 64 silent connections, renewed
//! every five seconds, lock the job's own workers out for good.
//!
//! Strangers may knock as often as they like, so only every tenth, hundredth, … line of what is said of them is logged.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::net::{Listener, Stream, without_descriptors};

/// Connections that have proved nothing yet.
pub(crate) const ROOM: usize = 64;

/// The connections of one listener that are yet to prove themselves.
#[derive(Debug, Default)]
pub(crate) struct Lobby {
    waiting: Mutex<VecDeque<(u64, Stream)>>,
    entered: AtomicU64,
    refused: AtomicU64,
}

/// One of them. Dropped when it has proved itself, or is gone.
#[derive(Debug)]
pub(crate) struct Stranger {
    lobby: Arc<Lobby>,
    number: u64,
}

impl Lobby {
    /// Lets a connection in, in the place of the one that waits for longest where there is none left.
    ///
    /// # Errors
    /// Where the system has no second descriptor for it.
    fn enter(self: &Arc<Self>, stream: &Stream) -> io::Result<Stranger> {
        let handle = match stream {
            Stream::Tcp(tcp) => Stream::Tcp(tcp.try_clone()?),
            Stream::Unix(unix) => Stream::Unix(unix.try_clone()?),
            Stream::Tls(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        let mut waiting = self.waiting();
        if waiting.len() >= ROOM
            && let Some((_, oldest)) = waiting.pop_front()
        {
            // Its thread wakes up and ends.
            oldest.hang_up();
        }
        waiting.push_back((number, handle));
        Ok(Stranger { lobby: Arc::clone(self), number })
    }

    /// Accepts whoever knocks. `None` where that fails: they have gone, or there are no descriptors, for which it waits a
    /// moment.
    pub(crate) fn accept(self: &Arc<Self>, listener: &Listener) -> Option<(Stranger, Stream)> {
        let entered = listener.accept().and_then(|stream| Ok((self.enter(&stream)?, stream)));
        entered.inspect_err(without_descriptors).ok()
    }

    /// Counts somebody who was turned away; whether it is worth a line in the log.
    pub(crate) fn worth_a_line(&self) -> bool {
        let times = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        times.is_multiple_of(10u64.pow(times.ilog10()))
    }

    /// Sends everybody away.
    pub(crate) fn clear(&self) {
        self.waiting().drain(..).for_each(|(_, stream)| stream.hang_up());
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<(u64, Stream)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.lobby.waiting().retain(|(number, _)| *number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_one_that_waits_for_longest_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let lobby = Arc::new(Lobby::default());
        let mut guests: VecDeque<(TcpStream, Stream, Stranger)> = VecDeque::new();
        let enter = || {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let stream = Stream::Tcp(listener.accept().unwrap().0);
            let stranger = lobby.enter(&stream).unwrap();
            (client, stream, stranger)
        };
        guests.extend((0..ROOM).map(|_| enter()));
        // The second one proves itself, so that there is room for one more; then the first has to go.
        guests.remove(1);
        for _ in 0..2 {
            guests.push_back(enter());
            assert_eq!(lobby.waiting().len(), ROOM);
        }
        let (mut first, ..) = guests.pop_front().unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0, "the first one is closed");
        let (second, ..) = &guests[0];
        second.set_nonblocking(true).unwrap();
        assert!((&*second).read(&mut [0]).is_err(), "the next one is open");
        guests.clear();
        assert!(lobby.waiting().is_empty());
    }

    #[test]
    fn a_flood_is_a_few_lines() {
        let lobby = Lobby::default();
        let lines = (0..100_000).filter(|_| lobby.worth_a_line()).count();
        assert_eq!(lines, 9 * 5 + 1);
    }
}

//! The connections between all members of a new epoch.
//!
//! Each rank listens, and connects to every lower rank. Both ends prove the token (and,
//! over TLS, their certificates) and state epoch, ranks and the
//! connection's number, so a member of an old epoch, a stranger or a port scanner ends in a log line and nothing else.
//! Cost: n−1 handshakes a connection number and rank, in parallel.

use std::io::ErrorKind;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::auth::{self, Key, Purpose, STATEMENT};
use crate::error::Error;
use crate::lobby::{self, Lobby};
use crate::net::{Interest, Listener, Stream, TlsStream, poll};
use crate::tls::{self, Identity};

/// Threads that greet: some of those whom the lobby has sent away are yet to end.
const GREETERS: usize = 4 * lobby::ROOM;
/// How long one handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What a mesh is made of.
pub(crate) struct Mesh<'a> {
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// With whom: all ranks, or those of one host, or of the others. All of them have this rank among theirs.
    pub(crate) peers: &'a [usize],
    /// Connections with each peer; number 0 is the control plane's.
    pub(crate) connections: usize,
    pub(crate) listener: &'a Listener,
    pub(crate) key: &'a Key,
    /// How to encrypt, where that is wanted.
    pub(crate) identity: Option<&'a Identity>,
    pub(crate) deadline: Instant,
}

/// For each rank, its connections in the order of their numbers; `None` for this rank, and where there are none.
pub(crate) type Links = Vec<Option<Vec<Stream>>>;

/// Sends everybody away who is still in the lobby, in the end.
struct Leaving<'a>(&'a Lobby);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl Mesh<'_> {
    /// Connects to everyone. `dial` opens a socket to a rank.
    pub(crate) fn connect(&self, dial: impl Fn(usize) -> std::io::Result<Stream>) -> Result<Links, Error> {
        let mut slots: Vec<Vec<Option<Stream>>> =
            (0..self.world_size).map(|_| (0..self.connections).map(|_| None).collect()).collect();
        let above: Vec<usize> = self.peers.iter().copied().filter(|peer| *peer > self.rank).collect();
        let mut missing = above.len() * self.connections;
        for rank in self.peers.iter().copied().filter(|peer| *peer < self.rank) {
            let slots = &mut slots[rank];
            for (number, slot) in slots.iter_mut().enumerate() {
                let stream = dial(rank).and_then(|stream| self.encrypt(stream, rank)).and_then(|stream| {
                    let statement = self.statement(self.rank, rank, number);
                    auth::connect(&stream, self.key, Purpose::Mesh, &statement, self.deadline)?;
                    Ok(stream)
                });
                let stream = stream.map_err(|e| self.late(format!("rank {rank} cannot be reached: {e}")))?;
                *slot = Some(stream);
            }
        }
        self.listener.set_nonblocking().map_err(|e| Error::system("listen for peers", &e))?;
        let (done, arrivals) = mpsc::sync_channel::<Option<(Stream, [u8; STATEMENT])>>(GREETERS);
        let lobby = Arc::new(Lobby::default());
        std::thread::scope(|scope| {
            // Whoever says nothing isn't waited for, once those who matter are here or the time is over.
            let _leaving = Leaving(&lobby);
            let mut running = 0;
            while missing > 0 {
                let left = self.deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let absent: Vec<String> = above
                        .iter()
                        .filter(|rank| slots[**rank].iter().any(Option::is_none))
                        .map(usize::to_string)
                        .collect();
                    return Err(self.late(format!("no connection from rank {}", absent.join(", "))));
                }
                let interest =
                    Interest { fd: std::os::fd::AsRawFd::as_raw_fd(self.listener), read: true, write: false };
                let mut ready = Vec::new();
                // While handshakes run, their ends are looked at often.
                let nap = if running == 0 { left } else { Duration::from_millis(1) };
                poll(&[interest], nap.min(left), &mut ready);
                let entered = if running < GREETERS { lobby.accept(self.listener) } else { None };
                if let Some((stranger, stream)) = entered {
                    running += 1;
                    let (done, lobby) = (done.clone(), &lobby);
                    scope.spawn(move || {
                        let welcomed = self.greet(stream, lobby);
                        drop(stranger);
                        // There is room for the words of all of them, so the scope's end waits for nobody.
                        let _ = done.send(welcomed);
                    });
                }
                while let Ok(arrival) = arrivals.try_recv() {
                    running -= 1;
                    let Some((stream, statement)) = arrival else { continue };
                    let place = above.iter().find_map(|rank| {
                        let number = (0..self.connections)
                            .find(|number| statement == self.statement(*rank, self.rank, *number))?;
                        Some((*rank, number))
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
            .map(|(rank, slots)| {
                let peer = rank != self.rank && self.peers.contains(&rank);
                peer.then(|| slots.into_iter().flatten().collect())
            })
            .collect())
    }

    /// Wraps a connection that this rank has made to `rank`, where TLS is wanted.
    fn encrypt(&self, stream: Stream, rank: usize) -> std::io::Result<Stream> {
        match (stream, self.identity) {
            (Stream::Tcp(tcp), Some(identity)) => {
                let (config, name) = (Arc::clone(&identity.client), tls::name(self.epoch, rank));
                TlsStream::connect(tcp, config, name, self.deadline).map(|tls| Stream::Tls(Box::new(tls)))
            }
            (stream, _) => Ok(stream),
        }
    }

    /// As the side that was called: who is there must have a certificate of this epoch, and say the same rank.
    fn welcome(&self, stream: Stream, deadline: Instant) -> std::io::Result<(Stream, [u8; STATEMENT])> {
        stream.set_nonblocking(false)?;
        let stream = match (stream, self.identity) {
            (Stream::Tcp(tcp), Some(identity)) => {
                tcp.set_nodelay(true)?;
                Stream::Tls(Box::new(TlsStream::accept(tcp, Arc::clone(&identity.server), deadline)?))
            }
            (Stream::Tcp(tcp), None) => {
                tcp.set_nodelay(true)?;
                Stream::Tcp(tcp)
            }
            (stream, _) => stream,
        };
        let statement = auth::accept(&stream, self.key, Purpose::Mesh, deadline)?;
        if let Stream::Tls(tls) = &stream {
            let rank = u32::from_le_bytes(std::array::from_fn(|i| statement[8 + i])) as usize;
            if !tls.peer_is(&tls::name(self.epoch, rank)) {
                let what = format!("it says that it is rank {rank}, and its certificate doesn't");
                return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, what));
            }
        }
        Ok((stream, statement))
    }

    fn greet(&self, stream: Stream, lobby: &Lobby) -> Option<(Stream, [u8; STATEMENT])> {
        let deadline = self.deadline.min(Instant::now() + HANDSHAKE);
        let peer = stream.peer();
        match self.welcome(stream, deadline) {
            Ok(welcomed) => Some(welcomed),
            Err(error) => {
                let stranger = matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidData);
                if stranger && lobby.worth_a_line() {
                    tracing::warn!(%peer, %error, "refused a connection to this worker");
                }
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;
    use crate::tls::{Authority, MemberKey};

    fn identity(authority: &Authority, epoch: u64, rank: usize) -> Identity {
        let key = MemberKey::new().unwrap();
        let certificate = authority.issue(key.public(), epoch, rank).unwrap();
        key.identity(&certificate, authority.certificate()).unwrap()
    }

    /// Rank 0 of two, in the clear.
    fn first_of_two<'a>(listener: &'a Listener, key: &'a Key, deadline: Instant) -> Mesh<'a> {
        Mesh {
            epoch: 1,
            rank: 0,
            world_size: 2,
            peers: &[0, 1],
            connections: 1,
            listener,
            key,
            identity: None,
            deadline,
        }
    }

    /// Rank 0 of two waits for rank 1. Before that one come: garbage; a connection that says nothing; one that hangs up
    /// at once; the right token with a certificate of another job, of another epoch, and of another rank; and another
    /// token with the right certificate. Each is refused, and rank 1 is still let in.
    #[test]
    fn only_the_rank_itself_is_let_in() {
        let authority = Authority::new().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (listener, address) = Listener::tcp("127.0.0.1:0").unwrap();
        let key = Key::new(b"the token");
        let mine = identity(&authority, 7, 0);
        let mesh = Mesh { epoch: 7, identity: Some(&mine), ..first_of_two(&listener, &key, deadline) };
        let call = |identity: &Identity, token: &[u8]| -> std::io::Result<Stream> {
            let tcp = TcpStream::connect(address)?;
            let tls = TlsStream::connect(tcp, Arc::clone(&identity.client), tls::name(7, 0), deadline)?;
            let stream = Stream::Tls(Box::new(tls));
            let statement = Mesh { rank: 1, ..mesh }.statement(1, 0, 0);
            auth::connect(&stream, &Key::new(token), Purpose::Mesh, &statement, deadline)?;
            Ok(stream)
        };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| mesh.connect(|_| Err(std::io::ErrorKind::Unsupported.into())));
            let silent = TcpStream::connect(address).unwrap();
            drop(TcpStream::connect(address).unwrap());
            let mut garbage = TcpStream::connect(address).unwrap();
            garbage.write_all(&[0x16; 3000]).unwrap();
            // It is hung up on, with or without a word.
            let _ = garbage.read_to_end(&mut Vec::new());
            let other_job = Authority::new().unwrap();
            assert!(call(&identity(&other_job, 7, 1), b"the token").is_err(), "another authority");
            assert!(call(&identity(&authority, 6, 1), b"the token").and_then(heard).is_err(), "an old epoch");
            assert!(call(&identity(&authority, 7, 5), b"the token").and_then(heard).is_err(), "another rank");
            assert!(call(&identity(&authority, 7, 1), b"a guess").is_err(), "another token");
            let rank_1 = call(&identity(&authority, 7, 1), b"the token").unwrap();
            let links = waiting.join().unwrap().unwrap();
            assert!(links[1].as_ref().is_some_and(|link| link.len() == 1));
            drop((silent, rank_1));
        });
    }

    /// Once 64 connections that said nothing made everybody wait behind them, and each of them the whole epoch, for the time
    /// of a handshake: this is over long before.
    #[test]
    fn silent_strangers_hold_no_rank_up() {
        let deadline = Instant::now() + 2 * HANDSHAKE;
        let (listener, address) = Listener::tcp("127.0.0.1:0").unwrap();
        let key = Key::new(b"the token");
        let mesh = first_of_two(&listener, &key, deadline);
        let silent: Vec<TcpStream> = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| mesh.connect(|_| Err(ErrorKind::Unsupported.into())));
            let silent = (0..4 * lobby::ROOM).map(|_| TcpStream::connect(address).unwrap()).collect();
            let rank_1 = Stream::Tcp(TcpStream::connect(address).unwrap());
            let statement = Mesh { rank: 1, ..mesh }.statement(1, 0, 0);
            auth::connect(&rank_1, &key, Purpose::Mesh, &statement, deadline).unwrap();
            assert!(waiting.join().unwrap().unwrap()[1].is_some());
            silent
        });
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "who said nothing is hung up on");
        }
    }

    /// An error if the other side has hung up.
    fn heard(stream: Stream) -> std::io::Result<Stream> {
        stream.read_all(&mut [0], Some(Instant::now() + Duration::from_secs(10)))?;
        Ok(stream)
    }
}

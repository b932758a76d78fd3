//! Questions and answers between processes of a job: TLS, the job's token, one answer for each question.
//!
//! Collectives need ranks; a parameter server doesn't. A [`Service`] listens, any process that knows the token asks
//! ([`Link::ask`]), and strangers are refused and logged, as at the store. A message is a short head and a body of
//! numbers; both lengths are checked against the listener's [`Limits`] before they are believed, and memory grows only
//! as bytes arrive. A connection answers one question at a time, in a thread of its own; whoever wants several at once
//! opens several links. Every wait ends: handshakes and writes after fixed times, questions at the asker's deadline,
//! and a connection that asks nothing for [`Limits::idle`] is closed.
//!
//! ```text
//! message → head bytes (u32), body bytes (u64), head, body; little endian
//! ```

use std::collections::HashMap;
use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::ServerConfig;

use crate::auth::{self, Key, Purpose, STATEMENT};
use crate::element::{Element, bytes_of, bytes_of_mut};
use crate::error::Error;
use crate::lobby::{Lobby, Stranger};
use crate::net::{Interest, Listener, Stream, TlsStream, connect_tcp, poll};
use crate::tls::{self, Authority};

const HANDSHAKE: Duration = Duration::from_secs(5);
/// Bytes of a head, at most.
const HEAD_BYTES: usize = 1 << 20;
/// Memory that a promised body gets before its bytes are there.
const ADVANCE: usize = 1 << 20;
/// How long an answer may take to be written, for each started 64 MiB of it.
const WRITING: Duration = Duration::from_secs(20);

/// A head, which says what it is about, and a body of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// What it is about.
    pub head: Vec<u8>,
    /// Numbers.
    pub body: Vec<u8>,
}

/// What a listener believes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a body, at most.
    pub body_bytes: usize,
    /// Connections at once; more are closed.
    pub connections: usize,
    /// How long a connection may ask nothing.
    pub idle: Duration,
}

impl Limits {
    /// 1024 connections that may be idle for ten minutes.
    pub fn new(body_bytes: usize) -> Limits {
        Limits { body_bytes, connections: 1024, idle: Duration::from_secs(600) }
    }
}

/// Who answers.
pub trait Service: Send + Sync + 'static {
    /// The answer to a question that came over `connection`; a reason closes it. Called from that connection's thread.
    ///
    /// # Errors
    /// Why whoever asks that is hung up on.
    fn answer(&self, connection: u64, question: Message) -> Result<Message, String>;

    /// Somebody was refused: a stranger, a process that breaks the rules of messages, or one whose question made no sense.
    /// It was logged.
    fn refused(&self, peer: &str, reason: &str) {
        let _ = (peer, reason);
    }

    /// The connection is closed: the other process ended, or hung up, or broke the rules.
    fn closed(&self, connection: u64) {
        let _ = connection;
    }
}

/// Connections that were let in; `None` once the listener ends.
type Open = Arc<Mutex<Option<HashMap<u64, Arc<Stream>>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A listening service. Dropping it closes its connections and waits for their threads.
pub struct Answering {
    address: SocketAddr,
    wake: UnixStream,
    open: Open,
    door: Option<JoinHandle<()>>,
}

impl Answering {
    /// Listens on `address` (port 0: any) and answers those who know `token`.
    ///
    /// # Errors
    /// [`Error::System`] where the address cannot be bound.
    pub fn listen(
        address: &str,
        token: &[u8],
        limits: Limits,
        service: Arc<dyn Service>,
    ) -> Result<Self, Error> {
        let (listener, bound) =
            Listener::tcp(address).map_err(|e| Error::system(format!("listen on {address}"), &e))?;
        listener.set_nonblocking().map_err(|e| Error::system("set up a listening socket", &e))?;
        let (wake, woken) = UnixStream::pair().map_err(|e| Error::system("make a socket pair", &e))?;
        let open = Arc::new(Mutex::new(Some(HashMap::new())));
        let tls = Authority::new()?.store_config()?;
        let door =
            Door { listener, woken, key: Key::new(token), tls, limits, service, open: Arc::clone(&open) };
        let door = std::thread::Builder::new()
            .name("link-accepts".into())
            .spawn(move || door.run())
            .map_err(|e| Error::system("start a listening thread", &e))?;
        Ok(Self { address: bound, wake, open, door: Some(door) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes a connection; whoever asks over it gets an error.
    pub fn close(&self, connection: u64) {
        if let Some(stream) = lock(&self.open).as_ref().and_then(|open| open.get(&connection)) {
            stream.hang_up();
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        // If the thread has ended, there is nobody to wake.
        let _ = (&self.wake).write(&[1]);
        if let Some(door) = self.door.take() {
            let _ = door.join();
        }
    }
}

struct Door {
    listener: Listener,
    woken: UnixStream,
    key: Key,
    tls: Arc<ServerConfig>,
    limits: Limits,
    service: Arc<dyn Service>,
    open: Open,
}

impl Door {
    fn run(self) {
        let lobby = Arc::new(Lobby::default());
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let mut next = 1;
        let mut ready = Vec::new();
        loop {
            let fds = [self.listener.as_raw_fd(), self.woken.as_raw_fd()];
            let interests = fds.map(|fd| Interest { fd, read: true, write: false });
            poll(&interests, Duration::from_secs(60), &mut ready);
            threads.retain(|thread| !thread.is_finished());
            if ready.get(1) == Some(&true) {
                break;
            }
            let Some((stranger, stream)) = lobby.accept(&self.listener) else { continue };
            if threads.len() >= self.limits.connections {
                if lobby.worth_a_line() {
                    tracing::warn!(peer = %stream.peer(), "closed a connection: too many at once");
                }
                continue;
            }
            let guest = Guest {
                id: next,
                key: self.key.clone(),
                tls: Arc::clone(&self.tls),
                limits: self.limits,
                service: Arc::clone(&self.service),
                open: Arc::clone(&self.open),
                lobby: Arc::clone(&lobby),
                stranger,
            };
            next += 1;
            match std::thread::Builder::new().name("link-answers".into()).spawn(move || guest.run(stream)) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%error, "cannot serve a connection"),
            }
        }
        lobby.clear();
        lock(&self.open).take().iter().flat_map(HashMap::values).for_each(|stream| stream.hang_up());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

struct Guest {
    id: u64,
    key: Key,
    tls: Arc<ServerConfig>,
    limits: Limits,
    service: Arc<dyn Service>,
    open: Open,
    lobby: Arc<Lobby>,
    stranger: Stranger,
}

impl Guest {
    fn run(self, stream: Stream) {
        let Guest { id, key, tls, limits, service, open, lobby, stranger } = self;
        let (peer, deadline) = (stream.peer(), Instant::now() + HANDSHAKE);
        let greet = || {
            stream.set_nonblocking(false)?;
            let Stream::Tcp(tcp) = stream else { return Err(io::ErrorKind::Unsupported.into()) };
            tcp.set_nodelay(true)?;
            let stream = Stream::Tls(Box::new(TlsStream::accept(tcp, tls, deadline)?));
            auth::accept(&stream, &key, Purpose::Link, deadline)?;
            Ok::<_, io::Error>(Arc::new(stream))
        };
        let stream = match greet() {
            Ok(stream) => stream,
            // Who gave up by itself wasn't refused: one of ours that waited too long, for instance.
            Err(error) if !matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidData) => {
                tracing::debug!(%peer, %error, "a connection came to nothing");
                return;
            }
            Err(error) => {
                if lobby.worth_a_line() {
                    tracing::warn!(%peer, %error, "refused a stranger");
                }
                let reason = format!("it didn't prove that it belongs to the job ({error})");
                service.refused(&peer, &reason);
                return;
            }
        };
        drop(stranger);
        match lock(&open).as_mut() {
            Some(open) => open.insert(id, Arc::clone(&stream)),
            None => return,
        };
        loop {
            let question = match read(&stream, limits.body_bytes, Instant::now() + limits.idle) {
                Ok(question) => question,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!(%peer, %error, "hung up");
                    service.refused(&peer, &error.to_string());
                    break;
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::UnexpectedEof {
                        tracing::debug!(%peer, %error, "a connection broke");
                    }
                    break;
                }
            };
            let answer = match service.answer(id, question) {
                Ok(answer) => answer,
                Err(reason) => {
                    tracing::warn!(%peer, reason, "hung up");
                    service.refused(&peer, &reason);
                    break;
                }
            };
            let limit = WRITING * (answer.body.len() >> 26).saturating_add(1) as u32;
            if let Err(error) = write(&stream, &answer.head, &[&answer.body], Instant::now() + limit) {
                tracing::debug!(%peer, %error, "cannot answer");
                break;
            }
        }
        lock(&open).as_mut().map(|open| open.remove(&id));
        stream.hang_up();
        service.closed(id);
    }
}

/// A connection on which this process asks. An error breaks it; connect again.
#[derive(Debug)]
pub struct Link {
    stream: Stream,
    address: String,
    body_bytes: usize,
}

impl Link {
    /// Connects to a service once; `body_bytes` is the most that an answer may hold.
    ///
    /// # Errors
    /// [`Error::Refused`] where the other side has another token, [`Error::System`] where it cannot be reached.
    pub fn connect(address: &str, token: &[u8], body_bytes: usize, deadline: Instant) -> Result<Link, Error> {
        let config = tls::store_client()?;
        let stream = connect_tcp(address, deadline).and_then(|stream| {
            let Stream::Tcp(tcp) = stream else { return Err(io::ErrorKind::Unsupported.into()) };
            let deadline = deadline.min(Instant::now() + HANDSHAKE);
            let tls = TlsStream::connect(tcp, config, "store.consort".into(), deadline)?;
            let stream = Stream::Tls(Box::new(tls));
            auth::connect(&stream, &Key::new(token), Purpose::Link, &[0; STATEMENT], deadline)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => Ok(Link { stream, address: address.to_owned(), body_bytes }),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData) =>
            {
                Err(Error::Refused { address: address.to_owned(), what: error.to_string() })
            }
            Err(error) => Err(Error::system(format!("reach {address}"), &error)),
        }
    }

    /// Asks, and waits for the answer. `parts` one after the other are the question's body.
    ///
    /// # Errors
    /// [`Error::System`]: the other process is gone, or the deadline passed. The link is of no more use.
    pub fn ask(&mut self, head: &[u8], parts: &[&[u8]], deadline: Instant) -> Result<Message, Error> {
        write(&self.stream, head, parts, deadline)
            .and_then(|()| read(&self.stream, self.body_bytes, deadline))
            .map_err(|error| {
                self.stream.hang_up();
                Error::system(format!("get an answer from {}", self.address), &error)
            })
    }

    /// Writes bytes as they are, for whoever tests what a service makes of nonsense.
    ///
    /// # Errors
    /// [`Error::System`] where they can't be written in time.
    #[doc(hidden)]
    pub fn write_raw(&self, bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        let written = self.stream.write_whole(bytes, deadline);
        written.map_err(|error| Error::system(format!("write to {}", self.address), &error))
    }

    /// Where it leads.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This machine's address on the way there.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn local_ip(&self) -> Result<std::net::IpAddr, Error> {
        self.stream.local_ip().map_err(|e| Error::system("read a socket's address", &e))
    }
}

fn write(stream: &Stream, head: &[u8], parts: &[&[u8]], deadline: Instant) -> io::Result<()> {
    let body: usize = parts.iter().map(|part| part.len()).sum();
    if head.len() > HEAD_BYTES {
        return Err(io::Error::other(format!("a head of {} bytes; at most {HEAD_BYTES}", head.len())));
    }
    let mut first = Vec::with_capacity(12 + head.len());
    first.extend_from_slice(&(head.len() as u32).to_le_bytes());
    first.extend_from_slice(&(body as u64).to_le_bytes());
    first.extend_from_slice(head);
    stream.write_whole(&first, deadline)?;
    parts.iter().try_for_each(|part| stream.write_whole(part, deadline))
}

fn read(stream: &Stream, body_bytes: usize, deadline: Instant) -> io::Result<Message> {
    let mut lengths = [0; 12];
    stream.read_all(&mut lengths, Some(deadline))?;
    let [h0, h1, h2, h3, body @ ..] = lengths;
    let (head, body) = (u32::from_le_bytes([h0, h1, h2, h3]) as usize, u64::from_le_bytes(body));
    if head > HEAD_BYTES || body > body_bytes as u64 {
        let what = format!("a message of {head} and {body} bytes; at most {HEAD_BYTES} and {body_bytes}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(Message {
        head: read_bytes(stream, head, deadline)?,
        body: read_bytes(stream, body as usize, deadline)?,
    })
}

/// Memory doubles as bytes come, so that a promise alone costs nothing.
fn read_bytes(stream: &Stream, len: usize, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let have = bytes.len();
        let next = len.min((have * 2).max(have + ADVANCE));
        bytes.reserve_exact(next - have);
        bytes.resize(next, 0);
        stream.read_all(&mut bytes[have..], Some(deadline))?;
    }
    Ok(bytes)
}

/// The bytes of numbers, as a body has them.
pub fn bytes<T: Element>(numbers: &[T]) -> &[u8] {
    bytes_of(numbers)
}

/// The numbers of a body's bytes; `None` where the bytes don't come out even.
pub fn numbers<T: Element + Default>(bytes: &[u8]) -> Option<Vec<T>> {
    let mut numbers = vec![T::default(); bytes.len() / size_of::<T>()];
    let room = bytes_of_mut(&mut numbers);
    (room.len() == bytes.len()).then(|| room.copy_from_slice(bytes))?;
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const TOKEN: &[u8] = b"a token of some length";

    #[derive(Default)]
    struct Echo {
        closed: AtomicUsize,
        refused: Mutex<Vec<String>>,
    }

    impl Service for Echo {
        fn answer(&self, _: u64, mut question: Message) -> Result<Message, String> {
            question.head.reverse();
            if question.head == b"bye" { Err("it said bye".into()) } else { Ok(question) }
        }

        fn refused(&self, _: &str, reason: &str) {
            self.refused.lock().unwrap().push(reason.to_owned());
        }

        fn closed(&self, _: u64) {
            self.closed.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn questions_get_their_answers_however_long() {
        let echo = Arc::new(Echo::default());
        let service =
            Answering::listen("127.0.0.1:0", TOKEN, Limits::new(8 << 20), Arc::clone(&echo) as _).unwrap();
        let address = service.address().to_string();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let address = &address;
                scope.spawn(move || {
                    let mut link = Link::connect(address, TOKEN, 8 << 20, soon()).unwrap();
                    for len in [0, 1, 1000, 3_000_000 / 8] {
                        let values: Vec<i64> = (0..len).map(|i| i * 7 - thread as i64).collect();
                        let (a, b) = bytes(&values).split_at(values.len() / 3);
                        let answer = link.ask(b"abc", &[a, b], soon()).unwrap();
                        assert_eq!(answer.head, b"cba");
                        assert_eq!(numbers::<i64>(&answer.body).unwrap(), values);
                    }
                    assert!(link.ask(b"eyb", &[], soon()).is_err(), "the service hangs up");
                    assert!(link.ask(b"abc", &[], soon()).is_err(), "and stays so");
                });
            }
        });
        drop(service);
        assert_eq!(echo.closed.load(Ordering::SeqCst), 4);
        assert!(matches!(Link::connect(&address, TOKEN, 1, soon()), Err(Error::System { .. })));
    }

    #[test]
    fn strangers_and_liars_are_refused() {
        let echo = Arc::new(Echo::default());
        let service =
            Answering::listen("127.0.0.1:0", TOKEN, Limits::new(100), Arc::clone(&echo) as _).unwrap();
        let address = service.address().to_string();
        let guess = Link::connect(&address, b"another token", 1, soon());
        assert!(matches!(guess, Err(Error::Refused { what, .. }) if what.contains("token")));
        let mut garbage = TcpStream::connect(&address).unwrap();
        let _ = garbage.write_all(b"GET / HTTP/1.1\r\n\r\n");
        let mut link = Link::connect(&address, TOKEN, 100, soon()).unwrap();
        assert!(link.ask(b"abc", &[&[0; 101]], soon()).is_err(), "more than the listener takes");
        let link = Link::connect(&address, TOKEN, 100, soon()).unwrap();
        link.stream.write_whole(&[0xff; 12], soon()).unwrap();
        assert!(link.stream.read_all(&mut [0], Some(soon())).is_err(), "a length that nobody believes");
        assert!(Link::connect(&address, TOKEN, 100, soon()).unwrap().ask(b"abc", &[], soon()).is_ok());
        drop(service);
        let refused = echo.refused.lock().unwrap();
        assert_eq!(refused.iter().filter(|r| r.contains("didn't prove")).count(), 2, "{refused:?}");
        assert_eq!(refused.iter().filter(|r| r.contains("at most")).count(), 2, "{refused:?}");
        assert!(numbers::<f32>(&[0; 7]).is_none());
    }

    /// Once 64 connections that said nothing kept everybody else out for five seconds, and could begin anew then.
    #[test]
    fn silent_strangers_keep_nobody_out() {
        let echo = Arc::new(Echo::default());
        let service =
            Answering::listen("127.0.0.1:0", TOKEN, Limits::new(100), Arc::clone(&echo) as _).unwrap();
        let address = service.address().to_string();
        let silent: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(&address).unwrap()).collect();
        for _ in 0..3 {
            assert!(Link::connect(&address, TOKEN, 100, soon()).unwrap().ask(b"abc", &[], soon()).is_ok());
        }
        // Those who had to go were closed; who came last waits still.
        (&silent[0]).read_exact(&mut [0]).unwrap_err();
        silent[199].set_nonblocking(true).unwrap();
        assert_eq!((&silent[199]).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(service);
        assert_eq!(echo.refused.lock().unwrap().len(), 0, "who says nothing isn't worth a word");
    }

    #[test]
    fn dropping_ends_a_connection_that_waits() {
        let service =
            Answering::listen("127.0.0.1:0", TOKEN, Limits::new(100), Arc::new(Echo::default())).unwrap();
        let mut link = Link::connect(&service.address().to_string(), TOKEN, 100, soon()).unwrap();
        link.ask(b"abc", &[], soon()).unwrap();
        drop(service);
        assert!(link.ask(b"abc", &[], soon()).is_err());
    }
}

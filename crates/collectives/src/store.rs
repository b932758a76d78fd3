//! Where members meet: a small TCP service, usually in the launcher, and the member's side of it.
//!
//! A member keeps its connection open for as long as it lives; when the process ends, however it ends, the system
//! closes it and the store knows. Messages are JSON after a length, at most a megabyte. Who may connect is decided by
//! the token ([`crate::auth`]); strangers are refused and logged. The decisions are [`Rendezvous`]'s.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use serde::{Deserialize, Serialize};

use crate::auth::{self, Key, Purpose, STATEMENT};
use crate::error::Error;
use crate::lobby::{Lobby, Stranger};
use crate::net::{Interest, Listener, Stream, TlsStream, connect_tcp, poll};
use crate::rendezvous::{Command, Event, MemberId, Policy, Rendezvous};
use crate::tls::{self, Authority};
use crate::transport::TransportKind;

const MESSAGE_BYTES: usize = 1 << 20;
const HANDSHAKE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(20);
/// How long a host may say that nobody is at the store's port before that is believed.
const ABSENT: Duration = Duration::from_secs(1);
/// How long telling one member of its epoch may take.
const TELLING: Duration = Duration::from_secs(1);
/// Bytes of what members leave for those who come too late.
const NOTE_BYTES: usize = 64 << 10;

/// How a [`Store`] forms epochs.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Members of the first epoch.
    pub world_size: usize,
    /// Fewer than this many never form an epoch.
    pub min_world_size: usize,
    /// How long a member that is connected, but doesn't come to the next epoch, is waited for.
    pub settle: Duration,
    /// Connections at once; more are closed.
    pub max_connections: usize,
}

impl StoreOptions {
    /// `world_size` members at first, survivors down to one, five seconds for those who don't come.
    pub fn new(world_size: usize) -> Self {
        let settle = Duration::from_secs(5);
        Self { world_size, min_world_size: 1, settle, max_connections: 1024 }
    }
}

/// What a member tells about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Introduction {
    /// Equal for processes that can share memory.
    pub(crate) host: String,
    pub(crate) tcp: String,
    pub(crate) local: Option<String>,
    /// The public half of its key for this epoch; empty where others are told of it.
    pub(crate) key: Vec<u8>,
    /// The only transport it will use.
    pub(crate) only: Option<TransportKind>,
    /// How long it would give the epoch to come to stand.
    pub(crate) forming_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Join(Introduction),
    Begin {
        epoch: u64,
        rank: usize,
        members: Vec<Introduction>,
        certificate: Vec<u8>,
        authority: Vec<u8>,
        /// How long connecting may take.
        forming_ms: u64,
    },
    /// So many newcomers wait. Rank 0 is told, whenever it changes.
    Waiting {
        newcomers: usize,
    },
    /// From a member: what they came for is done, and this is for whoever comes later. From the store: just that.
    Concluded {
        note: String,
    },
}

fn write_message(stream: &Stream, message: &Message, deadline: Instant) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len as usize <= MESSAGE_BYTES);
    let len = len.ok_or_else(|| io::Error::other("a message over a megabyte"))?;
    stream.write_whole(&[&len.to_le_bytes(), &body[..]].concat(), deadline)
}

fn read_message(stream: &Stream, deadline: Option<Instant>) -> io::Result<Message> {
    let mut len = [0; 4];
    stream.read_all(&mut len, deadline)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MESSAGE_BYTES {
        return Err(io::Error::other(format!("a message of {len} bytes")));
    }
    let mut body = vec![0; len];
    stream.read_all(&mut body, deadline)?;
    serde_json::from_slice(&body).map_err(io::Error::other)
}

enum News {
    Arrived(MemberId, Arc<Stream>),
    Said(MemberId, Introduction),
    Gone(MemberId),
    Concluded(MemberId, String),
    Reopen,
    Stop,
}

/// The meeting place of one job's members. Ends when dropped; groups that are formed go on without it, but cannot form
/// another epoch.
pub struct Store {
    address: SocketAddr,
    waiting: Arc<AtomicUsize>,
    wake: UnixStream,
    news: SyncSender<News>,
    threads: Vec<JoinHandle<()>>,
}

impl Store {
    /// Listens on `address` (port 0: any) for members that know `token`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options that nobody can meet, [`Error::System`] where the address cannot be bound.
    pub fn listen(address: &str, token: &[u8], options: StoreOptions) -> Result<Self, Error> {
        let StoreOptions { world_size, min_world_size, settle, max_connections } = options;
        if world_size == 0 || min_world_size > world_size || max_connections < world_size || world_size > 4096
        {
            return Err(Error::invalid(format!(
                "a store for {world_size} members, at least {min_world_size}, over {max_connections} connections: \
                 it must be 1 ≤ min_world_size ≤ world_size ≤ max_connections, and at most 4096 members"
            )));
        }
        let (listener, bound) =
            Listener::tcp(address).map_err(|e| Error::system(format!("listen on {address}"), &e))?;
        listener.set_nonblocking().map_err(|e| Error::system("set up the store's socket", &e))?;
        let (wake, woken) = UnixStream::pair().map_err(|e| Error::system("make a socket pair", &e))?;
        let (news, inbox) = mpsc::sync_channel(max_connections);
        let policy = Policy { world_size, min_world_size, settle };
        let key = Key::new(token);
        let authority = Authority::new()?;
        let tls = authority.store_config()?;
        let waiting = Arc::new(AtomicUsize::new(0));
        let shown = Arc::clone(&waiting);
        let for_members = news.clone();
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(body)
                .map_err(|e| Error::system("start the store's thread", &e))
        };
        let door = Door { listener, woken, key, tls, news: for_members, max_connections };
        let threads = vec![
            spawn("store-decides", Box::new(move || decide(policy, &authority, &inbox, &shown)))?,
            spawn("store-accepts", Box::new(move || door.run()))?,
        ];
        Ok(Self { address: bound, waiting, wake, news, threads })
    }

    /// How many members wait for the next epoch: newcomers, for whom those who run would have to rejoin too.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Where members find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets members in again though earlier ones have finished ([`crate::Group::conclude`]): what they did was lost.
    pub fn reopen(&self) {
        // If the thread is gone, so is everything.
        let _ = self.news.send(News::Reopen);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Both threads end at these words; if they are gone already, there is nobody to tell.
        let _ = (&self.wake).write(&[1]);
        let _ = self.news.send(News::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Door {
    listener: Listener,
    woken: UnixStream,
    key: Key,
    tls: Arc<ServerConfig>,
    news: SyncSender<News>,
    max_connections: usize,
}

impl Door {
    fn run(self) {
        let inside = Arc::new(());
        let lobby = Arc::new(Lobby::default());
        let mut next: MemberId = 1;
        let mut ready = Vec::new();
        loop {
            let fds = [self.listener.as_raw_fd(), self.woken.as_raw_fd()];
            poll(
                &fds.map(|fd| Interest { fd, read: true, write: false }),
                Duration::from_secs(60),
                &mut ready,
            );
            if ready.get(1) == Some(&true) {
                return lobby.clear();
            }
            let Some((stranger, stream)) = lobby.accept(&self.listener) else { continue };
            if Arc::strong_count(&inside) > self.max_connections {
                if lobby.worth_a_line() {
                    tracing::warn!(peer = %stream.peer(), "closed a connection to the store: too many at once");
                }
                continue;
            }
            let greeting = Greeting {
                key: self.key.clone(),
                tls: Arc::clone(&self.tls),
                lobby: Arc::clone(&lobby),
                stranger,
            };
            let (id, news, inside) = (next, self.news.clone(), Arc::clone(&inside));
            next += 1;
            let spawned = std::thread::Builder::new().name("store-member".into()).spawn(move || {
                let _inside = inside;
                if let Some(stream) = greeting.run(stream) {
                    serve(id, stream, &news);
                }
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "cannot serve a member");
            }
        }
    }
}

/// What a connection goes through before it is a member's.
struct Greeting {
    key: Key,
    tls: Arc<ServerConfig>,
    lobby: Arc<Lobby>,
    stranger: Stranger,
}

impl Greeting {
    fn run(self, stream: Stream) -> Option<Stream> {
        let _stranger = self.stranger;
        let lobby = self.lobby;
        let (peer, deadline) = (stream.peer(), Instant::now() + HANDSHAKE);
        let greet = || {
            stream.set_nonblocking(false)?;
            let stream = match stream {
                Stream::Tcp(tcp) => Stream::Tls(Box::new(TlsStream::accept(tcp, self.tls, deadline)?)),
                other => other,
            };
            auth::accept(&stream, &self.key, Purpose::Store, deadline)?;
            Ok::<_, io::Error>(stream)
        };
        match greet() {
            Ok(stream) => Some(stream),
            Err(error) => {
                if lobby.worth_a_line() {
                    tracing::warn!(%peer, %error, "refused a stranger at the store");
                }
                None
            }
        }
    }
}

/// Reads what one member says, for as long as it is there.
fn serve(id: MemberId, stream: Stream, news: &SyncSender<News>) {
    let stream = Arc::new(stream);
    if news.send(News::Arrived(id, Arc::clone(&stream))).is_err() {
        return;
    }
    loop {
        match read_message(&stream, None) {
            Ok(Message::Join(introduction)) => {
                if news.send(News::Said(id, introduction)).is_err() {
                    return;
                }
            }
            Ok(Message::Concluded { note }) if note.len() <= NOTE_BYTES => {
                if news.send(News::Concluded(id, note)).is_err() {
                    return;
                }
            }
            Ok(Message::Begin { .. } | Message::Waiting { .. } | Message::Concluded { .. }) => break,
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::debug!(%error, id, "a member's connection to the store broke");
                }
                break;
            }
        }
    }
    // The decider may have ended before.
    let _ = news.send(News::Gone(id));
}

/// Drives the state machine.
fn decide(policy: Policy, authority: &Authority, inbox: &mpsc::Receiver<News>, shown: &AtomicUsize) {
    let start = Instant::now();
    let mut rendezvous = Rendezvous::new(policy);
    let mut streams: HashMap<MemberId, Arc<Stream>> = HashMap::new();
    let mut introductions: HashMap<MemberId, Introduction> = HashMap::new();
    let mut told = None;
    // What the first one said that had finished.
    let mut note = String::new();
    loop {
        let event = match inbox.recv_timeout(TICK) {
            Ok(News::Arrived(id, stream)) => {
                streams.insert(id, stream);
                continue;
            }
            Ok(News::Said(id, introduction)) => {
                let forming = Duration::from_millis(introduction.forming_ms);
                introductions.insert(id, introduction);
                Event::Join { id, forming }
            }
            Ok(News::Gone(id)) => {
                streams.remove(&id);
                introductions.remove(&id);
                Event::Gone(id)
            }
            Ok(News::Concluded(id, text)) => {
                if note.is_empty() {
                    note = text;
                }
                Event::Conclude(id)
            }
            Ok(News::Reopen) => {
                note.clear();
                Event::Reopen
            }
            Err(RecvTimeoutError::Timeout) => Event::Tick,
            Ok(News::Stop) | Err(RecvTimeoutError::Disconnected) => break,
        };
        let commands = rendezvous.step(start.elapsed(), event);
        shown.store(rendezvous.waiting(), Ordering::Relaxed);
        for command in commands {
            match command {
                Command::Fence(id) => {
                    tracing::info!(id, "a member did not come back in time and is fenced");
                    if let Some(stream) = streams.get(&id) {
                        stream.hang_up();
                    }
                }
                Command::TurnAway(id) => {
                    let message = Message::Concluded { note: note.clone() };
                    let sent = streams
                        .get(&id)
                        .map(|stream| (stream, write_message(stream, &message, Instant::now() + TELLING)));
                    if let Some((stream, Err(error))) = sent {
                        tracing::debug!(%error, id, "cannot tell a member that all is done");
                        stream.hang_up();
                    }
                }
                Command::Begin { epoch, members, forming } => {
                    begin(epoch, &members, forming, authority, &streams, &introductions);
                }
            }
        }
        let newcomers = rendezvous.lead().map(|lead| (lead, rendezvous.newcomers()));
        if told != newcomers {
            // A lead that nobody waits for needs no word: that is what it believes.
            let news =
                newcomers.filter(|(lead, count)| *count > 0 || told.is_some_and(|(to, _)| to == *lead));
            if let Some((stream, newcomers)) =
                news.and_then(|(lead, count)| Some((streams.get(&lead)?, count)))
            {
                let message = Message::Waiting { newcomers };
                if let Err(error) = write_message(stream, &message, Instant::now() + TELLING) {
                    tracing::debug!(%error, "cannot tell rank 0 who waits");
                }
            }
            told = newcomers;
        }
    }
    for stream in streams.values() {
        stream.hang_up();
    }
}

/// Tells every member of a new epoch who is in it, and gives it its certificate. Who cannot be told is hung up on.
fn begin(
    epoch: u64,
    members: &[MemberId],
    forming: Duration,
    authority: &Authority,
    streams: &HashMap<MemberId, Arc<Stream>>,
    introductions: &HashMap<MemberId, Introduction>,
) {
    tracing::info!(epoch, world_size = members.len(), "an epoch begins");
    let known = members.iter().filter_map(|id| introductions.get(id));
    let all: Vec<Introduction> = known.map(|i| Introduction { key: Vec::new(), ..i.clone() }).collect();
    for (rank, id) in members.iter().enumerate() {
        let (Some(stream), Some(introduction)) = (streams.get(id), introductions.get(id)) else { continue };
        let told = authority.issue(&introduction.key, epoch, rank).map_err(io::Error::other).and_then(
            |certificate| {
                let (members, authority) = (all.clone(), authority.certificate().to_vec());
                let forming_ms = forming.as_millis() as u64;
                let message = Message::Begin { epoch, rank, members, certificate, authority, forming_ms };
                write_message(stream, &message, Instant::now() + TELLING)
            },
        );
        if let Err(error) = told {
            tracing::warn!(%error, id, epoch, rank, "cannot tell a member of its epoch");
            stream.hang_up();
        }
    }
}

/// An epoch as a member learns of it.
pub(crate) struct Begin {
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
    pub(crate) members: Vec<Introduction>,
    pub(crate) certificate: Vec<u8>,
    pub(crate) authority: Vec<u8>,
    /// How long connecting to the others may take: the same for all.
    pub(crate) forming: Duration,
}

/// A member's connection to the store.
pub(crate) struct Membership {
    stream: Stream,
    address: String,
    /// What came and is no whole message yet.
    inbox: Vec<u8>,
    newcomers: usize,
}

impl Membership {
    /// Connects and proves the token. A store that isn't there yet is tried again until `deadline`; where it is known
    /// to have been there (`known`), a host that has nobody at that port is believed after [`ABSENT`].
    pub(crate) fn connect(address: &str, key: &Key, known: bool, deadline: Instant) -> Result<Self, Error> {
        let started = Instant::now();
        let config = tls::store_client()?;
        let mut pause = Duration::from_millis(5);
        loop {
            let tried = connect_tcp(address, deadline).and_then(|stream| {
                let Stream::Tcp(tcp) = stream else { return Err(io::ErrorKind::Unsupported.into()) };
                let tls = TlsStream::connect(tcp, Arc::clone(&config), "store.consort".into(), deadline)?;
                let stream = Stream::Tls(Box::new(tls));
                auth::connect(&stream, key, Purpose::Store, &[0; STATEMENT], deadline)?;
                Ok(stream)
            });
            let error = match tried {
                Ok(stream) => {
                    return Ok(Self { stream, address: address.to_owned(), inbox: Vec::new(), newcomers: 0 });
                }
                // What is certain. A connection that was closed may only say that the store has too many guests.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData
                    ) =>
                {
                    return Err(Error::Refused { address: address.to_owned(), what: error.to_string() });
                }
                Err(error) => error,
            };
            let absent = known && error.kind() == io::ErrorKind::ConnectionRefused;
            if absent && started.elapsed() >= ABSENT {
                return Err(Error::StoreGone { address: address.to_owned() });
            }
            if Instant::now() + pause >= deadline {
                let limit_ms = started.elapsed().as_millis() as u64;
                let what = format!("no store with this token at {address}: {error}");
                return Err(Error::Rendezvous { limit_ms, what });
            }
            // Nothing tells when a port opens; the pause doubles up to a fifth of a second.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// This machine's address towards the store.
    pub(crate) fn local_address(&self) -> io::Result<std::net::IpAddr> {
        self.stream.local_ip()
    }

    /// Asks to be in the next epoch, and waits for it.
    pub(crate) fn join(&mut self, introduction: &Introduction, deadline: Instant) -> Result<Begin, Error> {
        let started = Instant::now();
        let asked = write_message(&self.stream, &Message::Join(introduction.clone()), deadline);
        let answer = asked.and_then(|()| {
            loop {
                match self.next(Some(deadline))? {
                    Some(Message::Waiting { .. }) | None => {}
                    Some(message) => return Ok(message),
                }
            }
        });
        self.newcomers = 0;
        match answer {
            Ok(Message::Begin { epoch, rank, members, certificate, authority, forming_ms })
                if rank < members.len() =>
            {
                let forming = Duration::from_millis(forming_ms);
                Ok(Begin { epoch, rank, members, certificate, authority, forming })
            }
            Ok(Message::Concluded { note }) => Err(Error::Concluded { note }),
            Ok(_) => Err(Error::Refused {
                address: self.address.clone(),
                what: "it answers something else".into(),
            }),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let limit_ms = started.elapsed().as_millis() as u64;
                Err(Error::Rendezvous { limit_ms, what: "not enough members came".into() })
            }
            Err(error) => {
                let what =
                    format!("it closed the connection ({error}): the store ended, or this member was fenced");
                Err(Error::Refused { address: self.address.clone(), what })
            }
        }
    }

    /// Says that what members came for is done, and waits until that is heard.
    pub(crate) fn conclude(&mut self, note: &str, deadline: Instant) -> Result<(), Error> {
        if note.len() > NOTE_BYTES {
            return Err(Error::invalid(format!("a note of {} bytes; at most {NOTE_BYTES}", note.len())));
        }
        let said = write_message(&self.stream, &Message::Concluded { note: note.to_owned() }, deadline);
        let heard = said.and_then(|()| {
            loop {
                if let Some(Message::Concluded { .. }) = self.next(Some(deadline))? {
                    return Ok(());
                }
            }
        });
        heard.map_err(|error| Error::system(format!("tell the store at {} of the end", self.address), &error))
    }

    /// How many newcomers wait, as far as the store has said; it tells rank 0 alone. Doesn't wait.
    pub(crate) fn newcomers(&mut self) -> Result<usize, Error> {
        loop {
            match self.next(None) {
                Ok(Some(Message::Waiting { newcomers })) => self.newcomers = newcomers,
                Ok(None) => return Ok(self.newcomers),
                // It is closed, or it says what makes no sense outside a meeting.
                Ok(Some(_)) | Err(_) => return Err(Error::StoreGone { address: self.address.clone() }),
            }
        }
    }

    /// The next message; without a deadline, `None` where none is here.
    fn next(&mut self, deadline: Option<Instant>) -> io::Result<Option<Message>> {
        loop {
            if let Some((len, rest)) = self.inbox.split_first_chunk::<4>() {
                let len = u32::from_le_bytes(*len) as usize;
                if len > MESSAGE_BYTES {
                    return Err(io::Error::other(format!("a message of {len} bytes")));
                }
                if let Some(body) = rest.get(..len) {
                    let message = serde_json::from_slice(body).map_err(io::Error::other)?;
                    self.inbox.drain(..4 + len);
                    return Ok(Some(message));
                }
            }
            let mut bytes = [0; 4096];
            let read = match deadline {
                Some(deadline) => self.stream.read_some(&mut bytes, deadline),
                None => {
                    self.stream.set_nonblocking(true)?;
                    let read = (&mut &self.stream).read(&mut bytes);
                    self.stream.set_nonblocking(false)?;
                    read
                }
            };
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.inbox.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && deadline.is_none() => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &[u8] = b"a token of some length";

    fn member(store: &Store) -> Membership {
        let deadline = Instant::now() + Duration::from_secs(10);
        Membership::connect(&store.address().to_string(), &Key::new(TOKEN), false, deadline).unwrap()
    }

    #[test]
    fn who_comes_when_all_is_done_gets_what_was_left() {
        let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(1)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let introduction = || Introduction {
            host: "h".into(),
            tcp: "127.0.0.1:1".into(),
            local: None,
            key: crate::tls::MemberKey::new().unwrap().public().to_vec(),
            only: None,
            forming_ms: 500,
        };
        let mut first = member(&store);
        assert!(first.join(&introduction(), deadline).is_ok());
        assert!(first.conclude(&"x".repeat(NOTE_BYTES + 1), deadline).is_err());
        first.conclude("all is well", deadline).unwrap();
        drop(first);
        for _ in 0..2 {
            let late = member(&store).join(&introduction(), deadline);
            assert!(matches!(late, Err(Error::Concluded { note }) if note == "all is well"));
        }
        store.reopen();
        assert!(member(&store).join(&introduction(), deadline).is_ok());
    }

    /// Once 64 connections that said nothing kept members out for five seconds, and could begin anew then.
    #[test]
    fn silent_strangers_keep_no_member_out() {
        let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(1)).unwrap();
        let silent: Vec<_> =
            (0..200).map(|_| std::net::TcpStream::connect(store.address()).unwrap()).collect();
        member(&store);
        // It took the place of the first of them, and didn't wait for the end of the others' time.
        let last = &silent[199];
        last.set_nonblocking(true).unwrap();
        assert_eq!((&*last).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    /// A member that knows the token and lies: it is hung up on, and nothing is allocated by its numbers.
    #[test]
    fn a_member_that_lies_is_hung_up_on() {
        let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(1)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let introduction = |key: Vec<u8>| Introduction {
            host: "h".into(),
            tcp: "127.0.0.1:1".into(),
            local: None,
            key,
            only: None,
            forming_ms: 500,
        };
        for lie in [&u32::MAX.to_le_bytes()[..], b"\x05\0\0\0{\"a\":", b"\x02\0\0\0[]"] {
            let member = member(&store);
            member.stream.write_whole(lie, deadline).unwrap();
            assert!(
                matches!(read_message(&member.stream, Some(deadline)), Err(e) if e.kind() != io::ErrorKind::WouldBlock)
            );
        }
        let wrong_key = member(&store).join(&introduction(vec![4; 1000]), deadline);
        assert!(matches!(wrong_key, Err(Error::Refused { .. })));
        let key = crate::tls::MemberKey::new().unwrap();
        let begin = member(&store).join(&introduction(key.public().to_vec()), deadline).unwrap();
        assert_eq!((begin.rank, begin.members.len()), (0, 1));
    }
}

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
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::auth::{self, Key, Purpose, STATEMENT};
use crate::error::Error;
use crate::net::{Interest, Listener, Stream, connect_tcp, poll};
use crate::rendezvous::{Command, Event, MemberId, Policy, Rendezvous};
use crate::transport::TransportKind;

const MESSAGE_BYTES: usize = 1 << 20;
const HANDSHAKE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(20);

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
    /// The only transport it will use.
    pub(crate) only: Option<TransportKind>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Join(Introduction),
    Begin { epoch: u64, rank: usize, members: Vec<Introduction> },
}

fn write_message(mut stream: &Stream, message: &Message) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len as usize <= MESSAGE_BYTES);
    let len = len.ok_or_else(|| io::Error::other("a message over a megabyte"))?;
    stream.write_all(&[&len.to_le_bytes(), &body[..]].concat())
}

fn read_message(mut stream: &Stream) -> io::Result<Message> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MESSAGE_BYTES {
        return Err(io::Error::other(format!("a message of {len} bytes")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(io::Error::other)
}

enum News {
    Arrived(MemberId, Arc<Stream>),
    Said(MemberId, Introduction),
    Gone(MemberId),
    Stop,
}

/// The meeting place of one job's members. Ends when dropped; groups that are formed go on without it, but cannot form
/// another epoch.
pub struct Store {
    address: SocketAddr,
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
        let for_members = news.clone();
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(body)
                .map_err(|e| Error::system("start the store's thread", &e))
        };
        let door = Door { listener, woken, key, news: for_members, max_connections };
        let threads = vec![
            spawn("store-decides", Box::new(move || decide(policy, &inbox)))?,
            spawn("store-accepts", Box::new(move || door.run()))?,
        ];
        Ok(Self { address: bound, wake, news, threads })
    }

    /// Where members find it.
    pub fn address(&self) -> SocketAddr {
        self.address
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
    news: SyncSender<News>,
    max_connections: usize,
}

impl Door {
    fn run(self) {
        let inside = Arc::new(());
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
                return;
            }
            let Ok(stream) = self.listener.accept() else { continue };
            if Arc::strong_count(&inside) > self.max_connections {
                tracing::warn!(peer = %stream.peer(), limit = self.max_connections, "too many connections to the store");
                continue;
            }
            let (id, key, news, token) = (next, self.key.clone(), self.news.clone(), Arc::clone(&inside));
            next += 1;
            let spawned = std::thread::Builder::new().name("store-member".into()).spawn(move || {
                let _inside = token;
                serve(id, stream, &key, &news);
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "cannot serve a member");
            }
        }
    }
}

/// Reads what one member says, for as long as it is there.
fn serve(id: MemberId, stream: Stream, key: &Key, news: &SyncSender<News>) {
    let greeted = stream
        .set_nonblocking(false)
        .and_then(|()| auth::accept(&stream, key, Purpose::Store, Instant::now() + HANDSHAKE));
    if let Err(error) = greeted {
        tracing::warn!(peer = %stream.peer(), %error, "refused a stranger at the store");
        return;
    }
    let stream = Arc::new(stream);
    let unbounded = match &*stream {
        Stream::Tcp(tcp) => tcp.set_read_timeout(None),
        Stream::Unix(unix) => unix.set_read_timeout(None),
    };
    if unbounded.is_err() || news.send(News::Arrived(id, Arc::clone(&stream))).is_err() {
        return;
    }
    loop {
        match read_message(&stream) {
            Ok(Message::Join(introduction)) => {
                if news.send(News::Said(id, introduction)).is_err() {
                    return;
                }
            }
            Ok(Message::Begin { .. }) => break,
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

fn hang_up(stream: &Stream) {
    // Closing a socket that is closed is no loss.
    let _ = match stream {
        Stream::Tcp(tcp) => tcp.shutdown(std::net::Shutdown::Both),
        Stream::Unix(unix) => unix.shutdown(std::net::Shutdown::Both),
    };
}

/// Drives the state machine.
fn decide(policy: Policy, inbox: &mpsc::Receiver<News>) {
    let start = Instant::now();
    let mut rendezvous = Rendezvous::new(policy);
    let mut streams: HashMap<MemberId, Arc<Stream>> = HashMap::new();
    let mut introductions: HashMap<MemberId, Introduction> = HashMap::new();
    loop {
        let event = match inbox.recv_timeout(TICK) {
            Ok(News::Arrived(id, stream)) => {
                streams.insert(id, stream);
                continue;
            }
            Ok(News::Said(id, introduction)) => {
                introductions.insert(id, introduction);
                Event::Join(id)
            }
            Ok(News::Gone(id)) => {
                streams.remove(&id);
                introductions.remove(&id);
                Event::Gone(id)
            }
            Err(RecvTimeoutError::Timeout) => Event::Tick,
            Ok(News::Stop) | Err(RecvTimeoutError::Disconnected) => break,
        };
        for command in rendezvous.step(start.elapsed(), event) {
            match command {
                Command::Fence(id) => {
                    tracing::info!(id, "a member did not come back in time and is fenced");
                    if let Some(stream) = streams.get(&id) {
                        hang_up(stream);
                    }
                }
                Command::Begin { epoch, members } => {
                    let all: Vec<Introduction> =
                        members.iter().filter_map(|id| introductions.get(id).cloned()).collect();
                    tracing::info!(epoch, world_size = members.len(), "an epoch begins");
                    for (rank, id) in members.iter().enumerate() {
                        let Some(stream) = streams.get(id) else { continue };
                        let message = Message::Begin { epoch, rank, members: all.clone() };
                        let told = stream
                            .set_deadline(Instant::now() + Duration::from_secs(1))
                            .and_then(|()| write_message(stream, &message));
                        if told.is_err() {
                            hang_up(stream);
                        }
                        if let Stream::Tcp(tcp) = &**stream {
                            // The member's own thread reads without a limit; the limit was for this write.
                            let _ = tcp.set_read_timeout(None);
                        }
                    }
                }
            }
        }
    }
    for stream in streams.values() {
        hang_up(stream);
    }
}

/// An epoch as a member learns of it.
pub(crate) struct Begin {
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
    pub(crate) members: Vec<Introduction>,
}

/// A member's connection to the store.
pub(crate) struct Membership {
    stream: Stream,
    address: String,
}

impl Membership {
    /// Connects and proves the token. A store that isn't there yet is tried again until `deadline`.
    pub(crate) fn connect(address: &str, key: &Key, deadline: Instant) -> Result<Self, Error> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(5);
        loop {
            let tried = connect_tcp(address, deadline);
            let error = match tried {
                Ok(stream) => match auth::connect(&stream, key, Purpose::Store, &[0; STATEMENT], deadline) {
                    Ok(()) => return Ok(Self { stream, address: address.to_owned() }),
                    Err(error) => {
                        return Err(Error::Refused { address: address.to_owned(), what: refusal(&error) });
                    }
                },
                Err(error) => error,
            };
            if Instant::now() + pause >= deadline {
                let limit_ms = started.elapsed().as_millis() as u64;
                return Err(Error::Rendezvous { limit_ms, what: format!("no store at {address}: {error}") });
            }
            // Nothing tells when a port opens; the pause doubles up to a fifth of a second.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// This machine's address towards the store.
    pub(crate) fn local_address(&self) -> io::Result<std::net::IpAddr> {
        match &self.stream {
            Stream::Tcp(tcp) => Ok(tcp.local_addr()?.ip()),
            Stream::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Asks to be in the next epoch, and waits for it.
    pub(crate) fn join(&self, introduction: &Introduction, deadline: Instant) -> Result<Begin, Error> {
        let started = Instant::now();
        let answer = self
            .stream
            .set_deadline(deadline)
            .and_then(|()| write_message(&self.stream, &Message::Join(introduction.clone())))
            .and_then(|()| read_message(&self.stream));
        match answer {
            Ok(Message::Begin { epoch, rank, members }) if rank < members.len() => {
                Ok(Begin { epoch, rank, members })
            }
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
}

fn refusal(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            "it hung up: the token is another one, or it is no store".into()
        }
        _ => error.to_string(),
    }
}

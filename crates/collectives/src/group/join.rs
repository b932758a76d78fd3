//! From a store's address to a group: meet, choose a transport, connect, start.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Core, Group};
use crate::auth::Key;
use crate::control::Control;
use crate::error::Error;
use crate::mesh::{Links, Mesh};
use crate::net::{Listener, Stream, connect_tcp};
use crate::store::{Begin, Introduction, Membership};
use crate::tls::MemberKey;
use crate::transport::tcp::Tcp;
use crate::transport::{Transport, TransportKind};

/// How to join a job.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// The store's `host:port`.
    pub store: String,
    /// The job's secret. At least 16 random bytes, since a stranger can test guesses.
    pub token: Vec<u8>,
    /// The only transport to use; `None` takes shared memory where all members are on one host, else TLS.
    pub transport: Option<TransportKind>,
    /// Where to listen for peers, over TCP or TLS; `None` takes a free port of this machine's address towards the store.
    pub listen: Option<SocketAddr>,
    /// The `host:port` by which peers find this member, where it isn't the one that it listens on: a port that a container
    /// or a router passes on. With `listen`.
    pub advertise: Option<String>,
    /// Data connections with each peer, over TCP or TLS.
    pub connections: usize,
    /// How long a call may take, from the moment when it first has to wait.
    pub deadline: Duration,
    /// How long a peer may say nothing before it is lost. Heartbeats come five times as often.
    pub silence: Duration,
    /// How long joining may take.
    pub join_deadline: Duration,
}

impl JoinOptions {
    /// Two connections a peer over TCP, 60 s for a call or for joining, 5 s of silence.
    pub fn new(store: impl Into<String>, token: &[u8]) -> Self {
        Self {
            store: store.into(),
            token: token.to_vec(),
            transport: None,
            listen: None,
            advertise: None,
            connections: 2,
            deadline: Duration::from_secs(60),
            silence: Duration::from_secs(5),
            join_deadline: Duration::from_secs(60),
        }
    }
}

/// What a member keeps from epoch to epoch.
pub(super) struct Ticket {
    options: JoinOptions,
    key: Key,
    pub(super) membership: Membership,
}

pub(super) fn join(options: JoinOptions) -> Result<Group, Error> {
    if !(1..=64).contains(&options.connections) {
        let what = format!("{} connections a peer: it must be 1 to 64", options.connections);
        return Err(Error::invalid(what));
    }
    let deadline = Instant::now() + options.join_deadline;
    let key = Key::new(&options.token);
    let membership = Membership::connect(&options.store, &key, false, deadline)?;
    form(Ticket { options, key, membership }, deadline)
}

pub(super) fn rejoin(ticket: Ticket) -> Result<Group, Error> {
    let deadline = Instant::now() + ticket.options.join_deadline;
    form(ticket, deadline)
}

/// Asks for epochs until one of them comes to stand: a member may die while it is formed.
fn form(mut ticket: Ticket, deadline: Instant) -> Result<Group, Error> {
    let mut reconnected = false;
    loop {
        let meeting = Meeting::open(&ticket)?;
        let begin = match ticket.membership.join(&meeting.introduction, deadline) {
            Ok(begin) => begin,
            Err(Error::Refused { .. }) if !reconnected => {
                // Fenced while it slept: it comes back as new.
                reconnected = true;
                ticket.membership = Membership::connect(&ticket.options.store, &ticket.key, true, deadline)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        // Connecting takes milliseconds. A member that died meanwhile must not cost the whole time for joining.
        let patience = Instant::now() + ticket.options.silence.max(Duration::from_millis(500));
        match meeting.connect(&ticket, &begin, patience.min(deadline)) {
            Ok((transport, control)) => return Ok(stand(ticket, &begin, transport, control)),
            Err(error @ Error::Invalid { .. }) => return Err(error),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => {
                tracing::warn!(epoch = begin.epoch, %error, "an epoch did not come to stand; trying the next")
            }
        }
    }
}

fn stand(ticket: Ticket, begin: &Begin, transport: Box<dyn Transport>, control: Control) -> Group {
    let n = begin.members.len();
    let kind = transport.kind();
    let core = Core {
        transport,
        control,
        scratch: Vec::new(),
        plans: Vec::new(),
        broken: None,
        earlier: Vec::new(),
        calls: 0,
    };
    Group {
        core: Arc::new(Mutex::new(core)),
        members: (0..n).collect(),
        rank: begin.rank,
        id: begin.epoch,
        epoch: begin.epoch,
        sequence: 0,
        splits: 0,
        sent: vec![0; n],
        received: vec![0; n],
        limit: ticket.options.deadline,
        forced: None,
        kind,
        ticket: Some(ticket),
    }
}

/// The sockets that this member listens on for one epoch.
struct Meeting {
    introduction: Introduction,
    key: MemberKey,
    tcp: Listener,
    #[cfg(target_os = "linux")]
    local: Listener,
}

impl Meeting {
    fn open(ticket: &Ticket) -> Result<Self, Error> {
        let fail = |e: std::io::Error| Error::system("listen for peers", &e);
        let address: SocketAddr = match ticket.options.listen {
            Some(address) => address,
            None => (ticket.membership.local_address().map_err(fail)?, 0).into(),
        };
        let (tcp, tcp_address) = Listener::tcp(address)
            .map_err(|error| Error::system(format!("listen for peers on {address}"), &error))?;
        #[cfg(target_os = "linux")]
        let (local, name) = Listener::local().map(|(listener, name)| (listener, Some(name))).map_err(fail)?;
        #[cfg(not(target_os = "linux"))]
        let name = None;
        let key = MemberKey::new()?;
        let introduction = Introduction {
            key: key.public().to_vec(),
            host: host(),
            tcp: ticket.options.advertise.clone().unwrap_or_else(|| tcp_address.to_string()),
            local: name,
            only: ticket.options.transport,
        };
        Ok(Self {
            introduction,
            key,
            tcp,
            #[cfg(target_os = "linux")]
            local,
        })
    }

    fn connect(
        &self,
        ticket: &Ticket,
        begin: &Begin,
        deadline: Instant,
    ) -> Result<(Box<dyn Transport>, Control), Error> {
        let silence = ticket.options.silence;
        let kind = choose(&begin.members)?;
        let identity = match kind {
            TransportKind::Tls => Some(self.key.identity(&begin.certificate, &begin.authority)?),
            _ => None,
        };
        let mesh = |listener, connections| Mesh {
            epoch: begin.epoch,
            rank: begin.rank,
            world_size: begin.members.len(),
            connections,
            listener,
            key: &ticket.key,
            identity: identity.as_ref(),
            deadline,
        };
        match kind {
            #[cfg(target_os = "linux")]
            TransportKind::SharedMemory => {
                let links = mesh(&self.local, 1).connect(|rank| {
                    let name = begin.members[rank].local.as_deref().unwrap_or_default();
                    crate::net::connect_local(name)
                })?;
                let transport = share_memory(begin, &links, deadline)?;
                let control = Control::start(first(links), silence, transport.waker())?;
                Ok((Box::new(transport), control))
            }
            _ => {
                let connections = 1 + ticket.options.connections;
                let mut links = mesh(&self.tcp, connections)
                    .connect(|rank| connect_tcp(&begin.members[rank].tcp, deadline))?;
                let data = links.iter_mut().map(|link| link.as_mut().map(|link| link.split_off(1))).collect();
                let transport = Tcp::new(kind, data)?;
                let control = Control::start(first(links), silence, transport.waker())?;
                Ok((Box::new(transport), control))
            }
        }
    }
}

fn first(links: Links) -> Vec<Option<Stream>> {
    links.into_iter().map(|link| link.and_then(|link| link.into_iter().next())).collect()
}

/// Rank 0 makes the memory file and gives its descriptor to the others, so it has no name and needs no cleaning up.
#[cfg(target_os = "linux")]
fn share_memory(
    begin: &Begin,
    links: &Links,
    deadline: Instant,
) -> Result<crate::transport::shm::SharedMemory, Error> {
    use std::os::fd::AsRawFd;

    use crate::transport::shm::{SharedMemory, receive_fd, send_fd};

    let n = begin.members.len();
    if begin.rank == 0 {
        let (memory, fd) = SharedMemory::create(begin.epoch, n)?;
        for link in links.iter().flatten().flatten() {
            send_fd(link.as_raw_fd(), &fd).map_err(|e| Error::system("hand out shared memory", &e))?;
        }
        return Ok(memory);
    }
    let root = links.first().and_then(|link| link.as_ref()).and_then(|link| link.first());
    let fd = root.ok_or_else(|| std::io::Error::other("no connection to rank 0")).and_then(|root| {
        root.set_read_limit(Some(
            deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)),
        ))?;
        receive_fd(root.as_raw_fd())
    });
    let fd = fd.map_err(|e| Error::system("get the shared memory from rank 0", &e))?;
    SharedMemory::open(fd, begin.epoch, begin.rank, n)
}

/// Every member sees the same list, so all choose the same: what is asked for; else shared memory where all are on one
/// host, and TLS where they aren't.
fn choose(members: &[Introduction]) -> Result<TransportKind, Error> {
    let one_host = members.iter().all(|m| m.local.is_some() && m.host == members[0].host);
    let mut wishes = members.iter().enumerate().filter_map(|(rank, m)| m.only.map(|kind| (rank, kind)));
    let Some((first, kind)) = wishes.next() else {
        return Ok(if one_host { TransportKind::SharedMemory } else { TransportKind::Tls });
    };
    if let Some((other, wish)) = wishes.find(|(_, wish)| *wish != kind) {
        let (kind, wish) = (kind.name(), wish.name());
        return Err(Error::invalid(format!(
            "rank {first} insists on {kind} and rank {other} on {wish}: they must agree"
        )));
    }
    if kind == TransportKind::SharedMemory && !one_host {
        return Err(Error::invalid(format!(
            "rank {first} insists on shared memory, but not all members are on one host (with one network namespace)"
        )));
    }
    Ok(kind)
}

/// Equal for processes of one boot of one machine in one network namespace, which can reach each other's local sockets.
fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network =
        std::fs::read_link("/proc/self/ns/net").map(|p| p.display().to_string()).unwrap_or_default();
    format!("{} {network}", boot.trim())
}

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
use crate::rendezvous::MOST_FORMING;
use crate::store::{Begin, Introduction, Membership};
use crate::tls::MemberKey;
#[cfg(target_os = "linux")]
use crate::transport::mixed::Mixed;
use crate::transport::tcp::Tcp;
use crate::transport::{Transport, TransportKind};

/// How to join a job.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// The store's `host:port`.
    pub store: String,
    /// The job's secret. At least 16 random bytes, since a stranger can test guesses.
    pub token: Vec<u8>,
    /// The only transport to use; `None` takes shared memory where all members are on one host, TLS where no two are,
    /// and both where some are.
    pub transport: Option<TransportKind>,
    /// Where to listen for peers, over TCP or TLS; `None` takes a free port of this machine's address towards the store.
    pub listen: Option<SocketAddr>,
    /// The `host:port` by which peers find this member, where it isn't the one that it listens on: a port that a container
    /// or a router passes on. With `listen`.
    pub advertise: Option<String>,
    /// A name for this process's host: members of one machine that give different ones are taken to be on different
    /// hosts (to try a layout out, or to keep sockets of a machine apart).
    pub host: Option<String>,
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
            host: None,
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

/// The least that an epoch is given to come to stand.
const FORMING: Duration = Duration::from_millis(500);

/// Asks for epochs until one of them comes to stand: a member may die while it is formed, or the machine may be so busy
/// that connecting takes its time. So each attempt is given twice as long as the one before.
fn form(mut ticket: Ticket, deadline: Instant) -> Result<Group, Error> {
    let mut reconnected = false;
    // Connecting takes milliseconds. A member that died meanwhile must not cost the whole time for joining.
    let mut forming = ticket.options.silence.max(FORMING).min(MOST_FORMING);
    loop {
        let meeting = Meeting::open(&ticket, forming)?;
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
        let forming_ends = Instant::now() + begin.forming.min(MOST_FORMING);
        match meeting.connect(&ticket, &begin, forming_ends.min(deadline)) {
            Ok((transport, control)) => return Ok(stand(ticket, &begin, transport, control)),
            Err(error @ Error::Invalid { .. }) => return Err(error),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => {
                tracing::warn!(
                    epoch = begin.epoch, forming = ?begin.forming, %error, "an epoch did not come to stand; trying the next"
                );
                forming = begin.forming.saturating_mul(2).min(MOST_FORMING);
            }
        }
    }
}

fn stand(ticket: Ticket, begin: &Begin, transport: Box<dyn Transport>, control: Control) -> Group {
    let n = begin.members.len();
    let kind = transport.kind();
    let hosts = hosts(&begin.members);
    let core = Core {
        transport,
        control,
        world_size: n,
        scratch: Vec::new(),
        plans: Vec::new(),
        broken: None,
        earlier: Vec::new(),
        calls: 0,
    };
    Group {
        core: Arc::new(Mutex::new(core)),
        members: (0..n).collect(),
        hosts,
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
    fn open(ticket: &Ticket, forming: Duration) -> Result<Self, Error> {
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
            host: host(ticket.options.host.as_deref()),
            tcp: ticket.options.advertise.clone().unwrap_or_else(|| tcp_address.to_string()),
            local: name,
            only: ticket.options.transport,
            forming_ms: forming.as_millis() as u64,
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
            TransportKind::Tls | TransportKind::Mixed => {
                Some(self.key.identity(&begin.certificate, &begin.authority)?)
            }
            _ => None,
        };
        let (n, rank) = (begin.members.len(), begin.rank);
        let mesh = |listener, peers, connections| Mesh {
            epoch: begin.epoch,
            rank,
            world_size: n,
            peers,
            connections,
            listener,
            key: &ticket.key,
            identity: identity.as_ref(),
            deadline,
        };
        let all: Vec<usize> = (0..n).collect();
        let to_tcp = |rank: usize| connect_tcp(&begin.members[rank].tcp, deadline);
        match kind {
            #[cfg(target_os = "linux")]
            TransportKind::SharedMemory => {
                let to_local = |rank: usize| connect_local(&begin.members[rank]);
                let links = mesh(&self.local, &all, 1).connect(to_local)?;
                let transport = share_memory(begin, &all, &links, deadline)?;
                let control = Control::start(first(links), silence, transport.waker())?;
                Ok((Box::new(transport), control))
            }
            #[cfg(target_os = "linux")]
            TransportKind::Mixed => {
                let mine = &begin.members[rank].host;
                let (here, mut away): (Vec<usize>, Vec<usize>) =
                    all.iter().partition(|other| begin.members[**other].host == *mine);
                // All of a host finish with each other before they turn to the others.
                let to_local = |rank: usize| connect_local(&begin.members[rank]);
                let mut near = mesh(&self.local, &here, 2).connect(to_local)?;
                let mut memory = share_memory(begin, &here, &near, deadline)?;
                let mut bell = |rank: &usize| near[*rank].as_mut().and_then(Vec::pop);
                memory.hang_bells(here.iter().map(&mut bell).collect())?;
                away.push(rank);
                let mut far = mesh(&self.tcp, &away, 1 + ticket.options.connections).connect(to_tcp)?;
                let net = Tcp::new(TransportKind::Mixed, data(&mut far))?;
                let transport = Mixed::new(memory, net, &here, n);
                let links = near.into_iter().zip(far).map(|(near, far)| near.or(far)).collect();
                let control = Control::start(first(links), silence, transport.waker())?;
                Ok((Box::new(transport), control))
            }
            _ => {
                let mut links = mesh(&self.tcp, &all, 1 + ticket.options.connections).connect(to_tcp)?;
                let transport = Tcp::new(kind, data(&mut links))?;
                let control = Control::start(first(links), silence, transport.waker())?;
                Ok((Box::new(transport), control))
            }
        }
    }
}

/// All connections but the first of each peer, which is the control plane's.
fn data(links: &mut Links) -> Vec<Option<Vec<Stream>>> {
    links.iter_mut().map(|link| link.as_mut().map(|link| link.split_off(1))).collect()
}

#[cfg(target_os = "linux")]
fn connect_local(member: &Introduction) -> std::io::Result<Stream> {
    crate::net::connect_local(member.local.as_deref().unwrap_or_default())
}

fn first(links: Links) -> Vec<Option<Stream>> {
    links.into_iter().map(|link| link.and_then(|link| link.into_iter().next())).collect()
}

/// The first of the ranks `here` makes the memory file and gives its descriptor to the others, so it has no name and needs
/// no cleaning up.
#[cfg(target_os = "linux")]
fn share_memory(
    begin: &Begin,
    here: &[usize],
    links: &Links,
    deadline: Instant,
) -> Result<crate::transport::shm::SharedMemory, Error> {
    use std::os::fd::AsRawFd;

    use crate::transport::shm::{SharedMemory, receive_fd, send_fd};

    let link = |rank: &usize| links.get(*rank).and_then(Option::as_ref).and_then(|link| link.first());
    let n = here.len();
    let number = here.iter().position(|rank| *rank == begin.rank).unwrap_or(0);
    if number == 0 {
        let (memory, fd) = SharedMemory::create(begin.epoch, n)?;
        for link in here.iter().filter_map(link) {
            send_fd(link.as_raw_fd(), &fd).map_err(|e| Error::system("hand out shared memory", &e))?;
        }
        return Ok(memory);
    }
    let root = here.first().and_then(link);
    let fd = root.ok_or_else(|| std::io::Error::other("no connection to who makes it")).and_then(|root| {
        root.set_read_limit(Some(
            deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)),
        ))?;
        receive_fd(root.as_raw_fd())
    });
    let fd = fd.map_err(|e| Error::system("get the host's shared memory", &e))?;
    SharedMemory::open(fd, begin.epoch, number, n)
}

/// Every member sees the same list, so all choose the same: what is asked for; else shared memory where all are on one
/// host, TLS where no two are, and both where some are.
fn choose(members: &[Introduction]) -> Result<TransportKind, Error> {
    let one_host = members.iter().all(|m| m.local.is_some() && m.host == members[0].host);
    let mut wishes = members.iter().enumerate().filter_map(|(rank, m)| m.only.map(|kind| (rank, kind)));
    let Some((first, kind)) = wishes.next() else {
        return Ok(match members {
            _ if one_host => TransportKind::SharedMemory,
            _ if members.iter().enumerate().any(|(rank, m)| shares(&members[..rank], m)) => {
                TransportKind::Mixed
            }
            _ => TransportKind::Tls,
        });
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

/// Whether a member could share memory with one of `others`.
fn shares(others: &[Introduction], member: &Introduction) -> bool {
    cfg!(target_os = "linux")
        && member.local.is_some()
        && others.iter().any(|other| other.local.is_some() && other.host == member.host)
}

/// A number for each member's host.
fn hosts(members: &[Introduction]) -> Vec<usize> {
    let first = |member: &Introduction| members.iter().position(|other| other.host == member.host);
    members.iter().map(|member| first(member).unwrap_or(0)).collect()
}

/// Equal for processes of one boot of one machine in one network namespace, which can reach each other's local sockets,
/// if they also give the same `name`.
fn host(name: Option<&str>) -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network =
        std::fs::read_link("/proc/self/ns/net").map(|p| p.display().to_string()).unwrap_or_default();
    format!("{} {network} {}", boot.trim(), name.unwrap_or_default())
}

//! Stream sockets, TCP, Unix or TLS, behind one type: the mesh and the control plane don't care which.

mod tls;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
pub(crate) use tls::TlsStream;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

/// The time left until `deadline`; an error when there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left.max(Duration::from_millis(1))),
    }
}

impl Stream {
    pub(crate) fn set_nonblocking(&self, yes: bool) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_nonblocking(yes),
            Self::Unix(s) => s.set_nonblocking(yes),
            Self::Tls(s) => s.tcp.set_nonblocking(yes),
        }
    }

    /// Bounds every single read from now on; `None` lets it wait for ever.
    pub(crate) fn set_read_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(limit),
            Self::Unix(s) => s.set_read_timeout(limit),
            Self::Tls(s) => s.tcp.set_read_timeout(limit),
        }
    }

    /// Bounds every single write from now on. Reads have a limit of their own: another thread may be in one.
    fn set_write_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_write_timeout(limit),
            Self::Unix(s) => s.set_write_timeout(limit),
            Self::Tls(s) => s.tcp.set_write_timeout(limit),
        }
    }

    /// Reads all of `buf`, however many reads it takes, before `deadline` if there is one.
    pub(crate) fn read_all(&self, mut buf: &mut [u8], deadline: Option<Instant>) -> io::Result<()> {
        while !buf.is_empty() {
            self.set_read_limit(deadline.map(left).transpose()?)?;
            match (&mut &*self).read(buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => buf = &mut buf[n..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there, once something is.
    pub(crate) fn read_some(&self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        self.set_read_limit(Some(left(deadline)?))?;
        (&mut &*self).read(buf)
    }

    /// Writes all of `buf` before `deadline`.
    pub(crate) fn write_whole(&self, mut buf: &[u8], deadline: Instant) -> io::Result<()> {
        while !buf.is_empty() {
            self.set_write_limit(Some(left(deadline)?))?;
            match (&mut &*self).write(buf) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => buf = &buf[n..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        (&mut &*self).flush()
    }

    /// Bytes that this connection's two ends have in common with nobody else; zeros where it is not encrypted.
    pub(crate) fn binding(&self) -> io::Result<[u8; 32]> {
        match self {
            Self::Tls(s) => s.binding(),
            _ => Ok([0; 32]),
        }
    }

    /// Whether bytes that were taken wait for the socket.
    pub(crate) fn pending(&self) -> bool {
        matches!(self, Self::Tls(s) if s.pending())
    }

    /// Hands such bytes to the socket; `false` if some are left.
    pub(crate) fn push(&self) -> io::Result<bool> {
        match self {
            Self::Tls(s) => s.push(),
            _ => Ok(true),
        }
    }

    /// Closes both directions; whoever waits in a read returns.
    pub(crate) fn hang_up(&self) {
        let how = std::net::Shutdown::Both;
        // Closing a socket that is closed is no loss.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
            Self::Tls(s) => s.tcp.shutdown(how),
        };
    }

    /// This end's address.
    pub(crate) fn local_ip(&self) -> io::Result<std::net::IpAddr> {
        match self {
            Self::Tcp(s) => Ok(s.local_addr()?.ip()),
            Self::Tls(s) => Ok(s.tcp.local_addr()?.ip()),
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    pub(crate) fn shutdown_write(&self) {
        let how = std::net::Shutdown::Write;
        // The other side may be gone already; then there is nothing to close.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
            Self::Tls(s) => s.close().and_then(|()| s.tcp.shutdown(how)),
        };
    }

    pub(crate) fn peer(&self) -> String {
        match self {
            Self::Tcp(s) => s.peer_addr().map_or_else(|_| "a closed connection".into(), |a| a.to_string()),
            Self::Tls(s) => {
                s.tcp.peer_addr().map_or_else(|_| "a closed connection".into(), |a| a.to_string())
            }
            Self::Unix(_) => "a local process".into(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(s) => s.as_raw_fd(),
            Self::Unix(s) => s.as_raw_fd(),
            Self::Tls(s) => s.tcp.as_raw_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&*s).read(buf),
            Stream::Unix(s) => (&*s).read(buf),
            Stream::Tls(s) => s.read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&*s).write(buf),
            Stream::Unix(s) => (&*s).write(buf),
            Stream::Tls(s) => s.write_vectored(&[io::IoSlice::new(buf)]),
        }
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => (&*s).write_vectored(parts),
            Stream::Unix(s) => (&*s).write_vectored(parts),
            Stream::Tls(s) => s.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Tls(s) => s.flush(),
            _ => Ok(()),
        }
    }
}

/// A listening socket and the address by which peers find it.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(crate) fn tcp(address: impl std::net::ToSocketAddrs) -> io::Result<(Self, SocketAddr)> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        // Connections that it accepts inherit it.
        unpaced(&listener, address.ip());
        Ok((Self::Tcp(listener), address))
    }

    /// A Unix socket with a random name in the abstract namespace: it leaves no file behind, however a process ends.
    #[cfg(target_os = "linux")]
    pub(crate) fn local() -> io::Result<(Self, String)> {
        use std::os::linux::net::SocketAddrExt;
        let mut random = [0u8; 16];
        getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
        let name = format!("consort-collectives-{:032x}", u128::from_le_bytes(random));
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
        Ok((Self::Unix(UnixListener::bind_addr(&address)?), name))
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
            Self::Unix(l) => l.accept().map(|(s, _)| Stream::Unix(s)),
        }
    }

    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(l) => l.set_nonblocking(true),
            Self::Unix(l) => l.set_nonblocking(true),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(l) => l.as_raw_fd(),
            Self::Unix(l) => l.as_raw_fd(),
        }
    }
}

/// Over the loopback there is no path whose speed must be found out. A congestion control that paces (BBR, the default of
/// some systems) starts a timer for every few segments there, and lets both cores idle between them: an all-reduce of 64 MB
/// takes 1.3 to 1.5 times as long. Reno sends what the receiver has room for, and every Linux lets every process choose
/// it. Between hosts the system's choice stands.
fn unpaced(socket: &impl AsFd, address: IpAddr) {
    #[cfg(target_os = "linux")]
    if address.is_loopback()
        && let Err(error) = SockRef::from(socket).set_tcp_congestion(b"reno")
    {
        tracing::debug!(%error, "a connection over the loopback keeps the system's congestion control");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, address);
}

/// Connects to a TCP address, trying each that the name stands for.
pub(crate) fn connect_tcp(address: &str, deadline: Instant) -> io::Result<Stream> {
    use std::net::ToSocketAddrs;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
    for candidate in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // By hand what `TcpStream::connect_timeout` does, as the option must be there before the handshake.
        let socket = Socket::new(Domain::for_address(candidate), Type::STREAM, Some(Protocol::TCP))?;
        unpaced(&socket, candidate.ip());
        match socket.connect_timeout(&candidate.into(), left) {
            Ok(()) => {
                let stream = TcpStream::from(socket);
                stream.set_nodelay(true)?;
                return Ok(Stream::Tcp(stream));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// What an accept that fails costs: nothing, where a client was gone already; a pause, where the process has no descriptors
/// left. The connection stays at the door then, and asking again at once would take a core until one is closed.
pub(crate) fn without_descriptors(error: &io::Error) {
    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) {
        return;
    }
    tracing::debug!(%error, "a connection can't be taken");
    std::thread::sleep(Duration::from_millis(50));
}

/// Connects to a Unix socket of the abstract namespace.
#[cfg(target_os = "linux")]
pub(crate) fn connect_local(name: &str) -> io::Result<Stream> {
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    UnixStream::connect_addr(&address).map(Stream::Unix)
}

/// One descriptor to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interest {
    pub(crate) fd: RawFd,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// Waits until one of the descriptors is ready; says which are (closed ones are).
pub(crate) fn poll(interests: &[Interest], timeout: Duration, ready: &mut Vec<bool>) {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|i| {
            let events = if i.read { libc::POLLIN } else { 0 } | if i.write { libc::POLLOUT } else { 0 };
            libc::pollfd { fd: i.fd, events, revents: 0 }
        })
        .collect();
    let ms = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: pointer and length describe one live vector; poll writes its `revents` alone.
    let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) };
    ready.clear();
    ready.extend(fds.iter().map(|fd| count > 0 && fd.revents != 0));
}

//! A TLS session over a TCP socket, with a socket's manners: reads and writes that move what they can and say how much.
//!
//! Two locks, since the store reads a member's connection in one thread and writes it in another: one over bytes that
//! came and are not decrypted, held while a read waits, and one over the session, held only while it works (and while
//! what it made is written).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustls::pki_types::ServerName;
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

/// Bytes of one read of the socket: a few records.
const INPUT: usize = 64 << 10;
/// The exporter's label. Both ends must have this very session.
const LABEL: &[u8] = b"EXPORTER-consort-collectives";

/// A TLS session over a connected socket.
pub(crate) struct TlsStream {
    pub(super) tcp: TcpStream,
    input: Mutex<Input>,
    session: Mutex<Connection>,
}

struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("TLS: {error}"))
}

impl std::fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TlsStream({:?})", self.tcp)
    }
}

impl TlsStream {
    /// Calls as `config` says, and wants a certificate of `name`. The socket blocks.
    pub(crate) fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        name: String,
        deadline: Instant,
    ) -> io::Result<Self> {
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let session = ClientConnection::new(config, name).map_err(|e| refused(&e))?;
        Self::shake_hands(tcp, session.into(), deadline)
    }

    /// Answers as `config` says. The socket blocks.
    pub(crate) fn accept(tcp: TcpStream, config: Arc<ServerConfig>, deadline: Instant) -> io::Result<Self> {
        let session = ServerConnection::new(config).map_err(|e| refused(&e))?;
        Self::shake_hands(tcp, session.into(), deadline)
    }

    fn shake_hands(tcp: TcpStream, mut session: Connection, deadline: Instant) -> io::Result<Self> {
        let mut timed = Timed { tcp: &tcp, deadline };
        while session.is_handshaking() {
            session.complete_io(&mut timed)?;
        }
        // Whoever spoke last has said its last word only now.
        while session.wants_write() {
            session.write_tls(&mut timed)?;
        }
        let input = Input { bytes: vec![0; INPUT].into(), start: 0, end: 0 };
        Ok(Self { tcp, input: Mutex::new(input), session: Mutex::new(session) })
    }

    /// 32 bytes that the two ends of this session have in common with nobody else.
    pub(crate) fn binding(&self) -> io::Result<[u8; 32]> {
        lock(&self.session).export_keying_material([0; 32], LABEL, None).map_err(|e| refused(&e))
    }

    /// Whether the peer's certificate is one of `name`.
    pub(crate) fn peer_is(&self, name: &str) -> bool {
        let session = lock(&self.session);
        let Some(certificate) = session.peer_certificates().and_then(<[_]>::first) else { return false };
        let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(certificate), ServerName::try_from(name))
        else {
            return false;
        };
        rustls::client::verify_server_name(&parsed, &name).is_ok()
    }

    /// Whether the session holds bytes that the socket hasn't taken.
    pub(crate) fn pending(&self) -> bool {
        lock(&self.session).wants_write()
    }

    /// Writes such bytes; `false` if some are left.
    pub(crate) fn push(&self) -> io::Result<bool> {
        self.push_session(&mut lock(&self.session))
    }

    fn push_session(&self, session: &mut Connection) -> io::Result<bool> {
        while session.wants_write() {
            match session.write_tls(&mut &self.tcp) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut input = lock(&self.input);
        let input = &mut *input;
        loop {
            {
                let mut session = lock(&self.session);
                loop {
                    match session.reader().read(buf) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        result => return result,
                    }
                    if input.start == input.end {
                        break;
                    }
                    let mut left = &input.bytes[input.start..input.end];
                    input.start += session.read_tls(&mut left)?;
                    session.process_new_packets().map_err(|e| refused(&e))?;
                }
            }
            input.end = (&self.tcp).read(&mut input.bytes)?;
            input.start = 0;
            if input.end == 0 {
                // Whether that is the end or a cut, the messages' own lengths say.
                return Ok(0);
            }
        }
    }

    pub(super) fn write_vectored(&self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let mut session = lock(&self.session);
        if !self.push_session(&mut session)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = session.writer().write_vectored(parts)?;
        self.push_session(&mut session)?;
        Ok(taken)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        if self.push()? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    /// Says that nothing more comes.
    pub(super) fn close(&self) -> io::Result<()> {
        let mut session = lock(&self.session);
        session.send_close_notify();
        self.push_session(&mut session).map(|_| ())
    }
}

/// A blocking socket all of whose waits together end at a deadline.
struct Timed<'a> {
    tcp: &'a TcpStream,
    deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(Some(super::left(self.deadline)?))?;
        self.tcp.read(buf)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(Some(super::left(self.deadline)?))?;
        self.tcp.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

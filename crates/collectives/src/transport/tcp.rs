//! TCP, in the clear or within TLS: several connections between each pair, over which frames go in turn.
//!
//! A frame is a header (magic, kind, length, number) and its bytes. Frame i goes over connection i modulo their count,
//! so the receiver knows which to read next and order needs no buffer; meanwhile the system fills the buffers of the
//! others, and one slow connection's window does not cap the pair (NCCL's socket transport and MPWide do the same).
//! Bytes go from the caller's buffer to the socket and, where nothing is added, from the socket to the caller's
//! buffer, without a copy between. Lengths and numbers are checked before anything is read into place.
//!
//! Silence is not noticed here but by the control plane, whose connections are others.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::{Line, ReduceFn, Transport, TransportKind, Waker};
use crate::error::{Error, Fault};
use crate::net::{Interest, Stream, poll};

const FRAME_BYTES: usize = 256 << 10;
const HEAD: usize = 20;
const MAGIC: u32 = 0x4652_4143;
const OPEN: u8 = 1;
const DATA: u8 = 2;
/// Bytes read ahead of a reduction: a piece of a chunk, which stays in the second cache.
const STAGE: usize = 128 << 10;

fn frame_head(kind: u8, len: usize, number: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    head[4] = kind;
    head[8..12].copy_from_slice(&(len as u32).to_le_bytes());
    head[12..20].copy_from_slice(&number.to_le_bytes());
    head
}

/// A frame on its way out.
struct Frame {
    connection: usize,
    head: [u8; HEAD],
    head_sent: usize,
    /// The call header of an opening frame.
    body: Option<[u8; 64]>,
    /// Where a data frame's bytes begin, counted from the first byte that the caller will offer next.
    start: usize,
    len: usize,
    sent: usize,
}

struct Peer {
    connections: Vec<Stream>,
    out_number: u64,
    /// Frames that are not wholly sent, oldest first; at most one a connection.
    out: VecDeque<Frame>,
    in_number: u64,
    in_head: [u8; HEAD],
    in_head_got: usize,
    /// Kind and bytes left of the frame being read.
    frame: Option<(u8, usize)>,
    open: [u8; 64],
    /// Bytes of `stage` not yet reduced (less than an element between calls).
    staged: usize,
}

/// One rank's connections to all others.
pub(crate) struct Tcp {
    kind: TransportKind,
    peers: Vec<Option<Peer>>,
    stage: Vec<u8>,
    wake: (UnixStream, Arc<UnixStream>),
}

impl Tcp {
    /// Takes the data connections of each peer (`None` for this rank itself).
    pub(crate) fn new(kind: TransportKind, peers: Vec<Option<Vec<Stream>>>) -> Result<Self, Error> {
        let nonblocking = |stream: &Stream| stream.set_nonblocking(true);
        for stream in peers.iter().flatten().flatten() {
            nonblocking(stream).map_err(|e| Error::system("set up a connection", &e))?;
        }
        let peer = |connections| Peer {
            connections,
            out_number: 0,
            out: VecDeque::new(),
            in_number: 0,
            in_head: [0; HEAD],
            in_head_got: 0,
            frame: None,
            open: [0; 64],
            staged: 0,
        };
        let (listen, ring) = UnixStream::pair().map_err(|e| Error::system("make a socket pair", &e))?;
        for end in [&listen, &ring] {
            end.set_nonblocking(true).map_err(|e| Error::system("set up a socket pair", &e))?;
        }
        Ok(Self {
            kind,
            peers: peers.into_iter().map(|p| p.map(peer)).collect(),
            stage: vec![0; STAGE],
            wake: (listen, Arc::new(ring)),
        })
    }
}

impl Tcp {
    /// What a wait is about: first the waker, then the sockets.
    pub(super) fn interests(&self, sends: &[Line], recvs: &[Line], interests: &mut Vec<Interest>) {
        interests.push(Interest { fd: self.wake.0.as_raw_fd(), read: true, write: false });
        for to in sends {
            let Some(peer) = &self.peers[to.rank()] else { continue };
            // With frames under way, only their connections matter: a free one would be writable at once.
            let framed = peer.out.iter().map(|frame| &peer.connections[frame.connection]);
            let pending = peer.connections.iter().filter(|connection| connection.pending());
            let fds = framed.chain(pending).map(Stream::as_raw_fd);
            interests.extend(fds.map(|fd| Interest { fd, read: false, write: true }));
        }
        for from in recvs {
            let Some(peer) = &self.peers[from.rank()] else { continue };
            let connection = (peer.in_number % peer.connections.len() as u64) as usize;
            let fd = peer.connections[connection].as_raw_fd();
            interests.push(Interest { fd, read: true, write: false });
        }
    }

    /// Takes what the waker wrote.
    pub(super) fn awake(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.wake.0).read(&mut bytes), Ok(n) if n > 0) {}
    }
}

fn lost(peer: usize, error: &io::Error) -> Fault {
    Fault::Lost { peer, how: error.to_string() }
}

/// Whether an error only says "not now".
fn later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Who is at the other end of a line.
fn peer(peers: &mut [Option<Peer>], line: Line) -> Result<(&mut Peer, usize), Fault> {
    let what = match line {
        Line::Pair(rank) => match &mut peers[rank] {
            Some(peer) => return Ok((peer, rank)),
            None => "a rank has no connection to itself",
        },
        Line::Shared(_) => "over sockets each rank is told by itself",
    };
    Err(Fault::Corrupt { peer: line.rank(), what: what.into() })
}

impl Peer {
    /// Starts a frame on the next connection in turn, if that one is free.
    fn begin(&mut self, kind: u8, body: Option<[u8; 64]>, start: usize, len: usize) -> bool {
        let connection = (self.out_number % self.connections.len() as u64) as usize;
        if self.out.iter().any(|frame| frame.connection == connection) {
            return false;
        }
        let head = frame_head(kind, len, self.out_number);
        self.out_number += 1;
        self.out.push_back(Frame { connection, head, head_sent: 0, body, start, len, sent: 0 });
        true
    }

    /// Writes what the sockets take. Bytes of data frames come from `bytes`, which begins where the caller stands.
    /// Returns how many bytes from its beginning are sent without a gap.
    fn push(&mut self, me: usize, bytes: &[u8]) -> Result<usize, Fault> {
        // What a TLS session took and the socket didn't.
        for connection in &self.connections {
            connection.push().map_err(|error| lost(me, &error))?;
        }
        for frame in &mut self.out {
            let body = match &frame.body {
                Some(body) => &body[..],
                // A frame that was begun with more bytes than are offered now waits for the rest.
                None => bytes.get(frame.start..(frame.start + frame.len).min(bytes.len())).unwrap_or(&[]),
            };
            while frame.head_sent < HEAD || frame.sent < body.len() {
                let parts = [IoSlice::new(&frame.head[frame.head_sent..]), IoSlice::new(&body[frame.sent..])];
                match (&self.connections[frame.connection]).write_vectored(&parts) {
                    Ok(0) => return Err(lost(me, &io::ErrorKind::WriteZero.into())),
                    Ok(n) => {
                        let head = n.min(HEAD - frame.head_sent);
                        frame.head_sent += head;
                        frame.sent += n - head;
                    }
                    Err(error) if later(&error) => break,
                    Err(error) => return Err(lost(me, &error)),
                }
            }
        }
        let mut taken = 0;
        while let Some(front) = self.out.front() {
            if front.body.is_none() {
                taken = front.start + front.sent;
            }
            if front.head_sent < HEAD || front.sent < front.len {
                break;
            }
            self.out.pop_front();
        }
        // What is taken will not be offered again.
        for frame in &mut self.out {
            if frame.body.is_none() {
                if frame.start < taken {
                    let gone = taken - frame.start;
                    frame.len -= gone;
                    frame.sent -= gone;
                    frame.start = 0;
                } else {
                    frame.start -= taken;
                }
            }
        }
        Ok(taken)
    }

    /// Reads until a frame's head is known: its kind and the bytes left of it.
    fn frame(&mut self, me: usize) -> Result<Option<(u8, usize)>, Fault> {
        if let Some(frame) = self.frame {
            return Ok(Some(frame));
        }
        let connection = (self.in_number % self.connections.len() as u64) as usize;
        while self.in_head_got < HEAD {
            match (&self.connections[connection]).read(&mut self.in_head[self.in_head_got..]) {
                Ok(0) => return Err(Fault::Lost { peer: me, how: "connection closed".into() }),
                Ok(n) => self.in_head_got += n,
                Err(error) if later(&error) => return Ok(None),
                Err(error) => return Err(lost(me, &error)),
            }
        }
        let head = &self.in_head;
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let kind = head[4];
        let expected = frame_head(kind, len, self.in_number);
        let sane = match kind {
            OPEN => len == 64,
            DATA => len > 0 && len <= FRAME_BYTES,
            _ => false,
        };
        if *head != expected || !sane {
            let what = format!("a frame head that reads {head:02x?} instead of frame {}", self.in_number);
            return Err(Fault::Corrupt { peer: me, what });
        }
        self.frame = Some((kind, len));
        Ok(self.frame)
    }

    fn read(&mut self, me: usize, into: &mut [u8]) -> Result<usize, Fault> {
        let Some((kind, left)) = self.frame else { return Ok(0) };
        let connection = (self.in_number % self.connections.len() as u64) as usize;
        let len = into.len().min(left);
        match (&self.connections[connection]).read(&mut into[..len]) {
            Ok(0) => Err(Fault::Lost { peer: me, how: "connection closed inside a frame".into() }),
            Ok(n) => {
                self.frame = Some((kind, left - n));
                if left == n {
                    self.frame = None;
                    self.in_head_got = 0;
                    self.in_number += 1;
                }
                Ok(n)
            }
            Err(error) if later(&error) => Ok(0),
            Err(error) => Err(lost(me, &error)),
        }
    }

    fn data_frame(&mut self, me: usize) -> Result<bool, Fault> {
        match self.frame(me)? {
            None => Ok(false),
            Some((DATA, _)) => Ok(true),
            Some(_) => Err(Fault::Corrupt { peer: me, what: "a new call before the end of this one".into() }),
        }
    }
}

impl Transport for Tcp {
    fn kind(&self) -> TransportKind {
        self.kind
    }

    fn open_send(&mut self, to: Line, header: &[u8; 64]) -> Result<bool, Fault> {
        let (peer, to) = peer(&mut self.peers, to)?;
        if !peer.begin(OPEN, Some(*header), 0, 64) {
            peer.push(to, &[])?;
            return Ok(false);
        }
        Ok(true)
    }

    fn open_recv(&mut self, from: Line) -> Result<Option<[u8; 64]>, Fault> {
        let (peer, from) = peer(&mut self.peers, from)?;
        match peer.frame(from)? {
            None => return Ok(None),
            Some((OPEN, _)) => {}
            Some(_) => {
                let what = "bytes of an earlier call that nobody took".into();
                return Err(Fault::Corrupt { peer: from, what });
            }
        }
        while let Some((OPEN, left)) = peer.frame {
            let mut part = [0; 64];
            let n = peer.read(from, &mut part[..left])?;
            if n == 0 {
                return Ok(None);
            }
            peer.open[64 - left..64 - left + n].copy_from_slice(&part[..n]);
        }
        Ok(Some(peer.open))
    }

    fn send(&mut self, to: Line, bytes: &[u8]) -> Result<usize, Fault> {
        let (peer, to) = peer(&mut self.peers, to)?;
        let mut begun =
            peer.out.iter().filter(|f| f.body.is_none()).map(|f| f.start + f.len).max().unwrap_or(0);
        while begun < bytes.len() {
            let len = (bytes.len() - begun).min(FRAME_BYTES);
            if !peer.begin(DATA, None, begun, len) {
                break;
            }
            begun += len;
        }
        peer.push(to, bytes)
    }

    fn recv(&mut self, from: Line, into: &mut [u8]) -> Result<usize, Fault> {
        let (peer, from) = peer(&mut self.peers, from)?;
        if into.is_empty() || !peer.data_frame(from)? {
            return Ok(0);
        }
        peer.read(from, into)
    }

    fn recv_reduce(
        &mut self,
        from: Line,
        into: &mut [u8],
        width: usize,
        reduce: ReduceFn,
    ) -> Result<usize, Fault> {
        let (peer, from) = peer(&mut self.peers, from)?;
        // At most one element of another peer's could be staged: it is kept in that peer's frame head's place below.
        let mut carry = [0; 8];
        let carried = peer.staged;
        carry[..carried].copy_from_slice(&peer.open[..carried]);
        self.stage[..carried].copy_from_slice(&carry[..carried]);
        let mut filled = carried;
        let want = into.len().min(STAGE);
        while filled < want && peer.data_frame(from)? {
            let n = peer.read(from, &mut self.stage[filled..want])?;
            if n == 0 {
                break;
            }
            filled += n;
        }
        let whole = filled / width * width;
        reduce(&mut into[..whole], &self.stage[..whole]);
        // The start of an element that is cut waits where the call header was; that has been read.
        peer.staged = filled - whole;
        peer.open[..peer.staged].copy_from_slice(&self.stage[whole..filled]);
        Ok(whole)
    }

    fn flush(&mut self, to: Line) -> Result<bool, Fault> {
        let (peer, to) = peer(&mut self.peers, to)?;
        peer.push(to, &[])?;
        Ok(peer.out.is_empty() && !peer.connections.iter().any(Stream::pending))
    }

    fn wait(&mut self, sends: &[Line], recvs: &[Line], timeout: Duration) {
        let mut interests = Vec::new();
        self.interests(sends, recvs, &mut interests);
        let mut ready = Vec::new();
        poll(&interests, timeout, &mut ready);
        if ready.first() == Some(&true) {
            self.awake();
        }
    }

    fn waker(&self) -> Waker {
        let ring = Arc::clone(&self.wake.1);
        // A full socket means that a wake is pending already.
        Arc::new(move || drop((&*ring).write(&[1])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Tcp, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Tcp::new(TransportKind::Tcp, vec![None, Some(vec![Stream::Unix(ours)])]).unwrap(), theirs)
    }

    /// What a liar may send: every one is named, and nothing is read or allocated by its lengths.
    #[test]
    fn frames_that_lie_are_named() {
        let lies = [
            [0xff; HEAD],
            frame_head(OPEN, 65, 0),
            frame_head(OPEN, 64, 1),
            frame_head(DATA, 100, 0),
            frame_head(9, 64, 0),
        ];
        for lie in lies {
            let (mut tcp, mut theirs) = pair();
            theirs.write_all(&lie).unwrap();
            let said = tcp.open_recv(Line::Pair(1));
            assert!(matches!(said, Err(Fault::Corrupt { peer: 1, .. })), "{lie:02x?}: {said:?}");
        }
        for len in [0, FRAME_BYTES + 1, u32::MAX as usize] {
            let (mut tcp, mut theirs) = pair();
            theirs.write_all(&frame_head(OPEN, 64, 0)).unwrap();
            theirs.write_all(&[1; 64]).unwrap();
            theirs.write_all(&frame_head(DATA, len, 1)).unwrap();
            assert_eq!(tcp.open_recv(Line::Pair(1)), Ok(Some([1; 64])));
            let said = tcp.recv(Line::Pair(1), &mut [0; 8]);
            assert!(matches!(said, Err(Fault::Corrupt { peer: 1, .. })), "{len}: {said:?}");
        }
    }
}

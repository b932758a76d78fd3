//! HTTP/1.1 to a replica: one request and its response at a time, read where they are wanted.
//!
//! Not hyper's client: that one is a task a connection, and each request and each piece of an answer goes to it and back
//! through a channel. A gateway's whole work is such requests, and on its one thread the hand-overs cost as much as
//! reading the JSON. Here whoever wants the next bytes reads them from the socket. A connection that nobody reads is
//! at rest; that its server has closed it is seen when it is next taken. Whoever drops one in the middle of an answer
//! closes it, which is how a replica learns that nobody wants the rest.
//!
//! A request leaves in one write where it is small, and after all else that is ready has had its turn ([`turn`]). While it is on its way, the response is read already: a server
//! that refuses a long body may answer before it has all of it.
//!
//! What a server may do is bounded: bytes of a head ([`head::MOST`]), of a chunk's line and of trailers
//! ([`framing`]); how long is the caller's to bound. A response that leaves any doubt where it ends closes its
//! connection. (RFC 9112; heads and sizes of chunks are read by httparse.)

mod framing;
mod head;

use std::future::{Future as _, poll_fn};
use std::io::{self, ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use framing::{Framing, Step};
use head::Reader;
pub(crate) use head::{Asked, Head};

/// Bytes were searched or parsed. Tests count them: what a server sends byte by byte must not be read for each of them.
fn looked_at(bytes: usize) {
    #[cfg(test)]
    LOOKED_AT.set(LOOKED_AT.get() + bytes);
    let _ = bytes;
}

#[cfg(test)]
thread_local! {
    static LOOKED_AT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Bytes that are read at a time, at least; twice as many each time that all of them were there, up to [`MOST_READ`].
const LEAST_READ: usize = 4 << 10;
const MOST_READ: usize = 64 << 10;
/// A read with less room than this is a read too many.
const ROOM: usize = 1 << 10;
/// A body up to this many bytes is copied behind its head, which is cheaper than to tell the kernel of two pieces.
const TOGETHER: usize = 16 << 10;

/// What bytes go over.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that carries no request, or one.
pub(crate) struct Connection {
    stream: Stream,
    /// Read, and nobody's yet.
    buffer: BytesMut,
    /// Bytes that the next read makes room for.
    read: usize,
    heads: Reader,
    framing: Framing,
    /// Another request may follow, once this one's response was read.
    keep: bool,
    /// It has carried a request before.
    pub(crate) used: bool,
}

/// What of a request is yet to be sent.
struct Rest {
    head: BytesMut,
    body: Bytes,
    /// All of it was written, and is to be pushed out.
    flush: bool,
}

impl Connection {
    pub(crate) fn new(stream: Stream) -> Connection {
        Connection {
            stream,
            buffer: BytesMut::new(),
            read: LEAST_READ,
            heads: Reader::default(),
            framing: Framing::Done,
            keep: true,
            used: false,
        }
    }

    /// Sends a request and waits for the head of its response; [`Connection::data`] is its body.
    ///
    /// # Errors
    /// Where the connection breaks, or what comes is no response. It is of no use then.
    pub(crate) async fn exchange(&mut self, asked: &Asked<'_>) -> io::Result<Head> {
        let together = asked.body.len() <= TOGETHER;
        let mut head = BytesMut::with_capacity(512 + if together { asked.body.len() } else { 0 });
        asked.encode(&mut head);
        let body = if together {
            head.extend_from_slice(&asked.body);
            Bytes::new()
        } else {
            asked.body.clone()
        };
        let mut rest = Rest { head, body, flush: true };
        self.used = true;
        turn().await;
        poll_fn(|cx| self.poll_exchange(cx, &mut rest)).await
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>, rest: &mut Rest) -> Poll<io::Result<Head>> {
        // A server that has answered needs no more of the request, and may close while it comes.
        let sent = rest.poll_send(&mut self.stream, cx);
        let head = match self.poll_head(cx) {
            Poll::Ready(Ok(head)) => head,
            Poll::Ready(Err(error)) => {
                return Poll::Ready(Err(if let Poll::Ready(Err(error)) = sent { error } else { error }));
            }
            Poll::Pending => {
                return match sent {
                    // It can't be heard any more; what it said until then would be here.
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    _ => Poll::Pending,
                };
            }
        };
        self.keep = head.keep && matches!(sent, Poll::Ready(Ok(())));
        self.framing = head.framing.clone();
        Poll::Ready(Ok(head))
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Head>> {
        loop {
            while let Some(head) = self.heads.take(&mut self.buffer)? {
                // 100 Continue and its like announce the response.
                if !head.status.is_informational() {
                    return Poll::Ready(Ok(head));
                }
            }
            if ready!(self.poll_fill(cx))? == 0 {
                let message = "the connection was closed before a response";
                return Poll::Ready(Err(io::Error::new(ErrorKind::UnexpectedEof, message)));
            }
        }
    }

    /// The next bytes of the body; none where it has ended. A poll that isn't waited for loses nothing.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            match self.framing.next(&mut self.buffer)? {
                Step::Data(bytes) => return Poll::Ready(Ok(Some(bytes))),
                Step::Ended => return Poll::Ready(Ok(None)),
                Step::More => {}
            }
            if ready!(self.poll_fill(cx))? == 0 {
                self.keep = false;
                return Poll::Ready(match self.framing.closed() {
                    true => Ok(None),
                    false => Err(io::Error::new(
                        ErrorKind::UnexpectedEof,
                        "the connection was closed in an answer",
                    )),
                });
            }
        }
    }

    /// [`Connection::poll_data`], waited for.
    pub(crate) async fn data(&mut self) -> io::Result<Option<Bytes>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// The rest of the body, of at most `most` bytes.
    ///
    /// # Errors
    /// Where the connection breaks, or there is more.
    pub(crate) async fn collect(&mut self, most: usize) -> io::Result<Bytes> {
        let first = self.data().await?.unwrap_or_default();
        if self.ended() && first.len() <= most {
            return Ok(first);
        }
        let mut all = BytesMut::from(first);
        while let Some(more) = self.data().await? {
            if all.len() + more.len() > most {
                return Err(io::Error::other(format!("the answer has more than {most} bytes")));
            }
            all.extend_from_slice(&more);
        }
        Ok(all.freeze())
    }

    /// Bytes of the body that are yet to come, where it was said.
    pub(crate) fn left(&self) -> usize {
        match self.framing {
            Framing::Length(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    /// The body's last byte was read.
    pub(crate) fn ended(&self) -> bool {
        matches!(self.framing, Framing::Done)
    }

    /// Another request may follow: the response was read to its end, and nothing else came.
    pub(crate) fn reusable(&self) -> bool {
        self.keep && self.ended() && self.buffer.is_empty()
    }

    /// Whether its server has left it alone since. What is known without asking the kernel.
    pub(crate) async fn alive(&mut self) -> bool {
        // Anything that came (a farewell, the end) came unasked.
        poll_fn(|cx| Poll::Ready(self.poll_fill(cx).is_pending())).await
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < ROOM {
            self.buffer.reserve(self.read);
        }
        let room = self.buffer.capacity() - self.buffer.len();
        let count = ready!(pin!(self.stream.read_buf(&mut self.buffer)).poll(cx))?;
        if count == room {
            self.read = (2 * self.read).min(MOST_READ);
        }
        Poll::Ready(Ok(count))
    }
}

/// Lets everything else that is ready go first. Requests that came together so leave together, and so do answers: who
/// gets them, on this machine or the next, is woken once for some of them, and not for each. Waking is the dearest part
/// of a small write.
pub(crate) async fn turn() {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Rest {
    fn poll_send(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.head.has_remaining() || self.body.has_remaining() {
            let count = if self.body.is_empty() {
                ready!(Pin::new(&mut *stream).poll_write(cx, &self.head))?
            } else {
                let both = [IoSlice::new(&self.head), IoSlice::new(&self.body)];
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &both))?
            };
            if count == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            let of_head = count.min(self.head.len());
            self.head.advance(of_head);
            self.body.advance(count - of_head);
        }
        if self.flush {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.flush = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

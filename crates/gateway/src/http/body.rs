//! Response bodies: all at once, or as events come.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;

use crate::telemetry::Record;

/// Bytes of one write, where events are ready together.
const WRITE_BYTES: usize = 16 << 10;

/// A response's body.
pub struct Body {
    kind: Kind,
    /// The request's, until the body is gone.
    #[expect(dead_code, reason = "held to be dropped")]
    record: Option<Box<Record>>,
}

enum Kind {
    Full(Bytes),
    Events(tokio::sync::mpsc::Receiver<Bytes>),
    Boxed(UnsyncBoxBody<Bytes, Infallible>),
}

impl Body {
    /// No bytes.
    pub fn empty() -> Body {
        Body::from(Bytes::new())
    }

    /// Bytes that come as they come.
    pub fn stream(body: impl http_body::Body<Data = Bytes, Error = Infallible> + Send + 'static) -> Body {
        Body::of(Kind::Boxed(UnsyncBoxBody::new(body)))
    }

    fn of(kind: Kind) -> Body {
        Body { kind, record: None }
    }

    /// The request is over when the body is.
    pub(crate) fn recorded(self, record: Box<Record>) -> Body {
        Body { record: Some(record), ..self }
    }

    pub(crate) fn events(receiver: tokio::sync::mpsc::Receiver<Bytes>) -> Body {
        Body::of(Kind::Events(receiver))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        Body::of(Kind::Full(bytes))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Body {
        Body::from(Bytes::from(text))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.get_mut().kind {
            Kind::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Kind::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Events(receiver) => poll_events(receiver, cx),
            Kind::Boxed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Events(_) => false,
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Events(_) => SizeHint::default(),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}

/// The events that are ready, in one frame.
fn poll_events(
    receiver: &mut tokio::sync::mpsc::Receiver<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
    let Poll::Ready(first) = receiver.poll_recv(cx) else { return Poll::Pending };
    let Some(first) = first else { return Poll::Ready(None) };
    let Ok(second) = receiver.try_recv() else { return Poll::Ready(Some(Ok(Frame::data(first)))) };
    let mut together = BytesMut::with_capacity(first.len() + second.len() + 1024);
    together.extend_from_slice(&first);
    together.extend_from_slice(&second);
    while together.len() < WRITE_BYTES {
        match receiver.try_recv() {
            Ok(event) => together.extend_from_slice(&event),
            Err(_) => break,
        }
    }
    Poll::Ready(Some(Ok(Frame::data(together.freeze()))))
}

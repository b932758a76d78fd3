//! A streamed answer as the body of a response.
//!
//! hyper polls the body when the socket has room, and the body polls the engine's channels; there is no task and no
//! buffer between. Events that are ready together leave in one write; a client that doesn't read is polled no more,
//! its channel fills, and the engine stops computing for it.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use consort_inference::TokenEvent;
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use super::chunk::{self, ChunkWriter};
use super::{Envelope, Shape, UsageSum};
use crate::answer::{AnswerSet, Out};

/// Bytes of one write, where events are ready together.
const WRITE_BYTES: usize = 16 << 10;

/// The body of a streamed answer.
pub(crate) struct SseBody {
    envelope: Envelope,
    set: AnswerSet,
    writer: ChunkWriter,
    usage: UsageSum,
    /// Which choices have had their first chunk.
    opened: Vec<bool>,
    silent_since: Instant,
    keep_alive: Pin<Box<Sleep>>,
    ended: bool,
}

impl SseBody {
    pub(crate) fn new(envelope: Envelope, set: AnswerSet) -> SseBody {
        let writer = ChunkWriter::new(&envelope);
        let keep_alive = Box::pin(tokio::time::sleep(envelope.keep_alive));
        SseBody {
            opened: envelope.resumed.clone(),
            writer,
            set,
            usage: UsageSum::default(),
            silent_since: Instant::now(),
            keep_alive,
            ended: false,
            envelope,
        }
    }

    /// What comes before a choice's first piece: who speaks, or the prompt.
    fn open(&mut self, out: &mut BytesMut, choice: usize, prompt: Option<&[TokenEvent]>) {
        if std::mem::replace(&mut self.opened[choice], true) {
            return;
        }
        match self.envelope.shape {
            Shape::Chat => self.writer.role(out, choice),
            Shape::Completion => {
                let Some(echo) = self.envelope.echo.as_ref().map(|e| &e[choice / self.envelope.n]) else {
                    return;
                };
                let tokens = self.envelope.logprobs.then(|| super::whole::prompt_tokens(&echo.ids, prompt));
                self.writer.echo(out, &self.envelope, choice, &echo.text, tokens.as_deref());
            }
        }
    }

    fn write(&mut self, out: &mut BytesMut, choice: usize, event: Out) {
        match event {
            Out::Prompt(tokens) => self.open(out, choice, Some(&tokens)),
            Out::Piece(piece) => {
                self.open(out, choice, None);
                self.writer.piece(out, &self.envelope, choice, &piece, None);
            }
            Out::Done { piece, finish, usage } => {
                self.open(out, choice, None);
                // Text that was held back has no token of its own, so it goes out with the reason or not at all: a
                // client that has one without the other could not have the answer continued.
                self.writer.piece(out, &self.envelope, choice, &piece, Some(finish));
                self.usage.add(choice, self.envelope.n, usage);
            }
            Out::Failed(error) => {
                chunk::error(out, &error);
                self.ended = true;
            }
        }
    }

    /// Writes a comment where the stream has been silent for long.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) {
        let every = self.envelope.keep_alive.max(Duration::from_millis(1));
        while self.keep_alive.as_mut().poll(cx).is_ready() {
            // The timer isn't moved at each token, which would cost a lock; when it rings, it is asked for how long
            // there really was silence.
            let due = self.silent_since + every;
            if Instant::now() >= due {
                out.put_slice(b": keep-alive\n\n");
                self.silent_since = Instant::now();
            }
            let next = self.silent_since + every;
            self.keep_alive.as_mut().reset(next);
        }
    }
}

impl http_body::Body for SseBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let mut out = BytesMut::with_capacity(512);
        while !this.ended && out.len() < WRITE_BYTES {
            match this.set.poll_next(cx) {
                Poll::Ready(Some((choice, event))) => this.write(&mut out, choice, event),
                Poll::Ready(None) => {
                    if this.envelope.include_usage {
                        this.writer.usage(&mut out, &this.usage.wire());
                    }
                    out.put_slice(b"data: [DONE]\n\n");
                    this.ended = true;
                }
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            this.poll_keep_alive(cx, &mut out);
        } else {
            this.silent_since = Instant::now();
        }
        if out.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(Frame::data(out.freeze())))) }
    }
}

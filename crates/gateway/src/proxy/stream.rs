//! The client's side of a streamed answer: events as they are to be seen, and comments while nothing comes.
//!
//! Each event bears an id, the answer's and its own number, so that a client whose connection broke can say how far it
//! got. A stream whose client is gone is kept for a while ([`super::held`]) instead of being thrown away.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::sync::mpsc;

use super::call::Call;
use super::chunk::{Chunk, Edit};
use super::held::{Held, Tail};
use super::recording::Recording;
use super::session::{Next, Session};

/// Events on their way to a client; further ones wait at the replica.
pub(super) const AHEAD: usize = 16;

/// The channel a streamed body reads.
pub(crate) type Receiver = mpsc::Receiver<Bytes>;

/// A streamed answer.
pub(crate) struct Stream {
    pub(crate) session: Session,
    /// Whose it is, and the hash of the request's body.
    pub(crate) owner: (String, [u8; 32]),
    tail: Tail,
    buffer: BytesMut,
    ended: bool,
}

/// What there is to do for a stream's client.
enum Step {
    Event(Bytes),
    /// Nothing follows.
    End,
}

impl Stream {
    pub(crate) fn new(session: Session, owner: (String, [u8; 32])) -> Stream {
        Stream { session, owner, tail: Tail::default(), buffer: BytesMut::new(), ended: false }
    }

    /// Bytes of memory it keeps, about.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Stream>() + self.session.bytes() + (32 << 10)
    }

    /// Events from number `from` on that were sent before; none where they are gone.
    pub(crate) fn since(&self, from: u64) -> Option<Vec<Bytes>> {
        self.tail.since(from)
    }

    /// Runs in a task of its own; the receiver gets the events, those of `before` first. When the receiver is dropped
    /// the stream is kept for `window`.
    pub(crate) fn start(
        mut self: Box<Self>,
        held: Arc<Held>,
        before: Vec<Bytes>,
        window: Duration,
    ) -> Receiver {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let id = self.session.call.id.clone();
        let stop = (!window.is_zero()).then(|| held.running(&id));
        tokio::spawn(async move {
            let stopped = async {
                match &stop {
                    Some(stop) => stop.notified().await,
                    None => std::future::pending().await,
                }
            };
            let gone = sender.clone();
            tokio::select! {
                () = gone.closed() => {}
                () = stopped => {}
                () = self.run(&sender, before) => {}
            }
            if !window.is_zero() {
                self.session.suspend();
                held.keep(&id, self, window);
            }
        });
        receiver
    }

    /// Gives all events to a recording; true where the answer is complete.
    pub(crate) async fn record(mut self: Box<Self>, recording: &Recording) -> bool {
        loop {
            match self.step(None).await {
                Step::Event(event) => recording.push(event),
                Step::End => return self.session.is_complete(),
            }
        }
    }

    async fn run(&mut self, sender: &mpsc::Sender<Bytes>, before: Vec<Bytes>) {
        for event in before {
            if sender.send(event).await.is_err() {
                return;
            }
        }
        loop {
            let sent = match self.step(Some(sender)).await {
                Step::Event(event) => sender.send(event).await,
                Step::End => return,
            };
            if sent.is_err() {
                return;
            }
        }
    }

    /// What comes next. While nothing does, comments go to `listener`.
    async fn step(&mut self, listener: Option<&mpsc::Sender<Bytes>>) -> Step {
        loop {
            if self.ended {
                return Step::End;
            }
            let keep_alive = self.session.keep_alive();
            let next = {
                // Never given up half-way: it may hold a place in a queue.
                let mut next = std::pin::pin!(self.session.next());
                loop {
                    tokio::select! {
                        biased;
                        next = &mut next => break next,
                        () = tokio::time::sleep(keep_alive) => {
                            if let Some(listener) = listener
                                && listener.send(Bytes::from_static(b": keep-alive\n\n")).await.is_err()
                            {
                                return Step::End;
                            }
                        }
                    }
                }
            };
            let event = match next {
                Next::Chunk(chunk) => match self.event(&chunk) {
                    Some(event) => event,
                    None => continue,
                },
                Next::Done => {
                    self.session.completed();
                    self.ended = true;
                    self.framed(b"data: [DONE]\n\n")
                }
                // A stream's client has what it was told.
                Next::Anew => continue,
                Next::Failed(refusal) => {
                    self.session.failed();
                    self.ended = true;
                    self.framed(&refusal.event())
                }
            };
            self.tail.push(event.clone());
            return Step::Event(event);
        }
    }

    /// An event with its id.
    fn framed(&mut self, event: &[u8]) -> Bytes {
        self.put_id();
        self.buffer.put_slice(event);
        self.buffer.split().freeze()
    }

    fn put_id(&mut self) {
        use std::fmt::Write as _;
        self.buffer.reserve(self.session.call.id.len() + 32);
        // Writing to memory doesn't fail.
        let _ = writeln!(self.buffer, "id: {}:{}", self.session.call.id, self.tail.next());
    }

    /// A chunk as the client is to see it; none where it is to see nothing of it.
    fn event(&mut self, chunk: &Chunk) -> Option<Bytes> {
        let call: Arc<Call> = self.session.call.clone();
        if chunk.choice.is_none() && !call.include_usage {
            return None;
        }
        let classes = &self.session.progress.classes;
        let last = chunk.choice.is_none() || chunk.finish_reason().is_some();
        let crossed = (last && classes.len() > 1).then(|| {
            let classes = serde_json::to_string(classes).unwrap_or_default();
            format!("\"consort\":{{\"continued_across\":{classes}}}")
        });
        self.put_id();
        let model = self.session.model.clone();
        let edit = Edit {
            token_ids: call.return_token_ids,
            usage: call.include_usage,
            model: Some(model.literal.as_str()).filter(|model| chunk.model() != Some(*model)),
            extra: crossed.as_deref(),
        };
        self.buffer.reserve(chunk.len() + 64);
        self.buffer.put_slice(b"data: ");
        chunk.write(&mut self.buffer, &edit);
        self.buffer.put_slice(b"\n\n");
        Some(self.buffer.split().freeze())
    }
}

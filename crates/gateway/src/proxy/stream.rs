//! The client's side of a streamed answer: events as they are to be seen, and comments while nothing comes.

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::sync::mpsc;

use super::call::Call;
use super::chunk::{Chunk, Edit};
use super::session::{Next, Session};

/// Events on their way to a client; further ones wait at the replica.
const AHEAD: usize = 16;

/// The channel a streamed body reads.
pub(crate) type Receiver = mpsc::Receiver<Bytes>;

/// Runs the answer in a task of its own; the receiver gets its events, and dropping it ends the answer.
pub(crate) fn start(session: Session) -> Receiver {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let gone = sender.clone();
        tokio::select! {
            () = gone.closed() => {}
            () = run(session, sender) => {}
        }
    });
    receiver
}

async fn run(mut session: Session, sender: mpsc::Sender<Bytes>) {
    let keep_alive = session.keep_alive();
    let mut writer = Writer::default();
    loop {
        let next = {
            let mut next = std::pin::pin!(session.next());
            loop {
                tokio::select! {
                    next = &mut next => break next,
                    () = tokio::time::sleep(keep_alive) => {
                        if sender.send(Bytes::from_static(b": keep-alive\n\n")).await.is_err() {
                            return;
                        }
                    }
                }
            }
        };
        let (event, last) = match next {
            Next::Chunk(data) => match writer.event(&session, &data) {
                Some(event) => (event, false),
                None => continue,
            },
            Next::Done => {
                session.completed();
                (Bytes::from_static(b"data: [DONE]\n\n"), true)
            }
            Next::Failed(refusal) => {
                session.failed();
                (refusal.event(), true)
            }
        };
        if sender.send(event).await.is_err() || last {
            return;
        }
    }
}

/// Writes events.
#[derive(Default)]
struct Writer {
    buffer: BytesMut,
}

impl Writer {
    /// A chunk as the client is to see it; none where it is to see nothing of it.
    fn event(&mut self, session: &Session, data: &Bytes) -> Option<Bytes> {
        let call: &Call = &session.call;
        // Read before, so it is one.
        let chunk = Chunk::read(std::str::from_utf8(data).ok()?).ok()?;
        if chunk.choice.is_none() && !call.include_usage {
            return None;
        }
        let classes = &session.progress.classes;
        let last = chunk.choice.as_ref().is_none_or(|choice| choice.finish_reason.is_some());
        let crossed = (last && classes.len() > 1).then(|| {
            let classes = serde_json::to_string(classes).unwrap_or_default();
            format!("\"consort\":{{\"continued_across\":{classes}}}")
        });
        let edit = Edit {
            token_ids: call.return_token_ids,
            usage: call.include_usage,
            model: Some(session.model.literal.as_str()).filter(|model| chunk.model() != Some(*model)),
            extra: crossed.as_deref(),
        };
        self.buffer.reserve(data.len() + 64);
        self.buffer.put_slice(b"data: ");
        chunk.write(&mut self.buffer, &edit);
        self.buffer.put_slice(b"\n\n");
        Some(self.buffer.split().freeze())
    }
}

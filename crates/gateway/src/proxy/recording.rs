//! An answer that is kept while it is given, so that a repeat of its request can have it too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::HeaderMap;
use tokio::sync::{Notify, mpsc};

use super::stream::Receiver;

/// Bytes of one answer that are kept; a longer one is given, and not kept for repeats.
const MAX_BYTES: usize = 8 << 20;

/// The head of a response.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
}

#[derive(Default)]
struct State {
    head: Option<Head>,
    pieces: Vec<Bytes>,
    bytes: usize,
    ended: bool,
}

/// A response, as far as it is there.
#[derive(Default)]
pub(crate) struct Recording {
    state: Mutex<State>,
    changed: Notify,
}

impl Recording {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, head: Head) {
        self.state().head = Some(head);
        self.changed.notify_waiters();
    }

    pub(crate) fn push(&self, piece: Bytes) {
        let mut state = self.state();
        state.bytes += piece.len();
        state.pieces.push(piece);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Nothing follows. Its bytes, where it is not too long to be kept.
    pub(crate) fn end(&self) -> Option<usize> {
        let mut state = self.state();
        state.ended = true;
        let bytes = state.bytes;
        drop(state);
        self.changed.notify_waiters();
        (bytes <= MAX_BYTES).then_some(bytes)
    }

    /// The head, once it is there; none where it never comes.
    pub(crate) async fn head(&self) -> Option<Head> {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                if state.head.is_some() || state.ended {
                    return state.head.clone();
                }
            }
            changed.await;
        }
    }

    /// The pieces from number `from` on, as they come.
    pub(crate) fn read(self: &Arc<Recording>, from: usize) -> Receiver {
        let (sender, receiver) = mpsc::channel(16);
        let recording = Arc::clone(self);
        tokio::spawn(async move {
            let mut at = from;
            loop {
                let changed = recording.changed.notified();
                let (piece, ended) = {
                    let state = recording.state();
                    (state.pieces.get(at).cloned(), state.ended)
                };
                match piece {
                    Some(piece) => {
                        at += 1;
                        if sender.send(piece).await.is_err() {
                            return;
                        }
                    }
                    None if ended => return,
                    None => tokio::select! {
                        () = changed => {}
                        () = sender.closed() => return,
                    },
                }
            }
        });
        receiver
    }
}

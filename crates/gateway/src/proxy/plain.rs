//! Answers of servers that speak OpenAI's API and nothing else: passed on as they are.
//!
//! Such a server gets the client's request byte for byte, a stream only where the client wants one, and no field that
//! it may not know. So its answers have no token ids, and one that breaks off can't go on elsewhere. What can be kept is:
//! nothing reaches the client before the answer is known to be one (a whole answer is read to its end first, of a stream
//! the first bytes), so a failure up to there is tried elsewhere; and a stream is passed on in whole events, so that one
//! that breaks ends with an error event that the client can read.
//!
//! Costs one scan of a whole answer for its `usage`, no copy of a stream whose reads end where events do.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use consort_api::Usage;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use tokio::sync::mpsc;

use super::attempt::Failure;
use super::events::WholeEvents;
use super::session::Session;
use super::stream::{AHEAD, Receiver};
use super::vigil::Vigil;
use super::wire::{Connection, turn};
use crate::error::Refusal;
use crate::fleet::{Ticket, Went};
use crate::json::Object;
use crate::telemetry::Tally;

/// Bytes of a whole answer.
const MAX_WHOLE: usize = 32 << 20;

/// A response under way.
pub(crate) struct Plain {
    pub(super) ticket: Ticket,
    pub(super) headers: HeaderMap,
    pub(super) connection: Connection,
    pub(super) vigil: Vigil,
}

/// A response that is an answer, as far as can be known.
pub(crate) struct PlainAnswer {
    pub(crate) kind: Option<HeaderValue>,
    pub(crate) body: PlainBody,
    usage: Option<Usage>,
}

/// Its body.
pub(crate) enum PlainBody {
    Whole(Bytes),
    /// The first bytes, and where more come from.
    Stream(Bytes, Box<Plain>),
}

/// A stream on its way to its client.
pub(crate) struct PlainStream {
    session: Session,
    plain: Option<Box<Plain>>,
    events: WholeEvents,
    first: Option<Bytes>,
}

impl Plain {
    async fn data(&mut self, deadline: Instant) -> Result<Option<Bytes>, Failure> {
        let replica = &self.ticket.replica;
        let mut data = std::pin::pin!(self.connection.data());
        match self.vigil.wait(&mut data, replica, deadline).await? {
            Ok(data) => {
                if data.is_some() {
                    replica.seen_alive();
                }
                Ok(data)
            }
            Err(error) => Err(Failure::Broken(error.to_string())),
        }
    }

    /// Reads on until it is known to be an answer.
    ///
    /// # Errors
    /// Where it is none, or breaks before that; whoever called notes how it went.
    pub(super) async fn open(
        mut self: Box<Self>,
        stream: bool,
        deadline: Instant,
    ) -> Result<PlainAnswer, Failure> {
        let opened = self.read(stream, deadline).await;
        self.ticket.settled = true;
        let (first, usage) = opened?;
        self.ticket.replica.went(Instant::now(), Went::Well, true);
        let kind = self.headers.remove(CONTENT_TYPE);
        let body = match usage {
            Read::Whole(_) => {
                self.give_back();
                turn().await;
                PlainBody::Whole(first)
            }
            Read::Begun => PlainBody::Stream(first, self),
        };
        let usage = if let Read::Whole(usage) = usage { usage } else { None };
        Ok(PlainAnswer { kind, body, usage })
    }

    async fn read(&mut self, stream: bool, deadline: Instant) -> Result<(Bytes, Read), Failure> {
        let kind = self.headers.get(CONTENT_TYPE);
        let streams = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let first = self.data(deadline).await?.ok_or(Failure::Garbage)?;
        if stream && streams {
            return Ok((first, Read::Begun));
        }
        let mut whole = first;
        if !self.connection.ended() {
            let left = self.connection.left().min(1 << 20);
            let mut all = BytesMut::with_capacity(whole.len() + left.max(whole.len()));
            all.extend_from_slice(&whole);
            while let Some(more) = self.data(deadline).await? {
                if all.len() + more.len() > MAX_WHOLE {
                    return Err(Failure::Garbage);
                }
                all.extend_from_slice(&more);
            }
            whole = all.freeze();
        }
        let usage = usage_of(&whole).ok_or(Failure::Garbage)?;
        Ok((whole, Read::Whole(usage)))
    }

    /// All of it was read: the connection may serve another.
    fn give_back(self) {
        self.ticket.replica.upstream.put_back(self.connection);
    }
}

/// How far a response was read.
#[derive(Clone, Copy)]
enum Read {
    Whole(Option<Usage>),
    Begun,
}

impl PlainAnswer {
    /// Notes what it used.
    pub(super) fn count(&self, tally: &Tally) {
        if let Some(usage) = &self.usage {
            note(tally, usage);
        }
    }
}

fn note(tally: &Tally, usage: &Usage) {
    tally.prompt_tokens.store(usage.prompt_tokens as u64, Ordering::Relaxed);
    tally.answer_tokens.store(usage.completion_tokens as u64, Ordering::Relaxed);
}

/// What a whole answer says that it used; none where it isn't a JSON object.
#[expect(clippy::option_option, reason = "no answer, and an answer that doesn't say, are two things")]
fn usage_of(bytes: &[u8]) -> Option<Option<Usage>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (mut object, mut usage) = (Object::new(text).ok()?, None);
    while let Some(member) = object.next().ok()? {
        if member.key == "usage" {
            usage = serde_json::from_str(&text[member.value]).ok();
        }
    }
    Some(usage)
}

impl PlainStream {
    pub(crate) fn new(session: Session, first: Bytes, plain: Box<Plain>) -> PlainStream {
        PlainStream { session, plain: Some(plain), events: WholeEvents::default(), first: Some(first) }
    }

    /// Runs in a task of its own; when the receiver is dropped, so is the server's response.
    pub(crate) fn start(mut self: Box<Self>) -> Receiver {
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            let gone = sender.clone();
            let giving = async {
                while let Some(events) = self.next().await {
                    if sender.send(events).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = gone.closed() => {}
                () = giving => {}
            }
        });
        receiver
    }

    /// Whether all of it was there.
    pub(crate) fn is_complete(&self) -> bool {
        self.session.is_complete()
    }

    /// The next whole events; none where nothing follows.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            let plain = self.plain.as_mut()?;
            let frame = match self.first.take() {
                Some(first) => Ok(Some(first)),
                None => {
                    let frame = plain.data(self.session.deadline());
                    match tokio::time::timeout(self.session.keep_alive(), frame).await {
                        Ok(frame) => frame,
                        Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
                    }
                }
            };
            let failure = match frame {
                Ok(Some(bytes)) => match self.events.add(bytes) {
                    Ok(events) if events.is_empty() => continue,
                    Ok(events) => {
                        self.count(&events);
                        return Some(events);
                    }
                    Err(failure) => failure,
                },
                Ok(None) => {
                    if let Some(plain) = self.plain.take() {
                        plain.give_back();
                    }
                    self.session.completed();
                    // The last event's empty line may be missing; it is the server's to say.
                    return Some(self.events.rest()).filter(|rest| !rest.is_empty());
                }
                Err(failure) => failure,
            };
            let plain = self.plain.take()?;
            let replica = plain.ticket.replica.clone();
            drop(plain);
            return Some(self.session.lost(&replica, failure).event());
        }
    }

    fn count(&mut self, events: &[u8]) {
        // A chunk is about a token; who says what was used is believed.
        let lines = events.split(|b| *b == b'\n').filter(|line| line.starts_with(b"data: {"));
        let mut count = 0;
        for line in lines {
            count += 1;
            if line.windows(9).any(|at| at == b"\"usage\":{")
                && let Some(Some(usage)) = usage_of(&line[6..])
            {
                note(self.session.tally(), &usage);
                count = 0;
            }
        }
        let ticket = self.plain.as_mut().map(|plain| &mut plain.ticket);
        self.session.passed(Instant::now(), count, ticket);
    }
}

impl Session {
    /// A stream that can't go on: what its client is told.
    fn lost(&mut self, replica: &crate::fleet::Replica, failure: Failure) -> Refusal {
        self.failed();
        let message = format!(
            "the server that gave this answer broke off ({}); it isn't one whose answers can be continued elsewhere",
            failure.name()
        );
        match self.note(replica, failure) {
            Err(refusal) if refusal.code == "deadline_exceeded" => refusal,
            _ => Refusal::new(hyper::StatusCode::BAD_GATEWAY, "upstream_lost", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_object_and_says_what_it_used() {
        assert!(usage_of(b"").is_none() && usage_of(b"[1]").is_none() && usage_of(b"{\"a\":").is_none());
        assert!(usage_of(b"{}").is_some_and(|usage| usage.is_none()));
        let usage = br#"{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
        assert_eq!(usage_of(usage).flatten().map(|usage| usage.completion_tokens), Some(4));
    }
}

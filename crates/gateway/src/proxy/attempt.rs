//! One replica's try at an answer: the request sent there, and the events that come back until it ends or breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::Protocol;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::chunk::Head;
use super::plain::Plain;
use super::sse::{Event, Events};
use super::upstream::SendError;
use super::vigil::Vigil;
use super::wire::{Connection, Head as ResponseHead};
use crate::fleet::{Replica, Ticket, Work};
use crate::settings::ReplicaSettings;

/// Bytes of a refusal that is passed on.
const MAX_REFUSAL: usize = 64 << 10;

/// Why a try came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No connection.
    Unreachable(String),
    /// The connection broke.
    Broken(String),
    /// What came was no answer.
    Garbage,
    /// Nothing came for too long.
    Silent,
    /// The replica was found dead while it was waited for.
    Lost,
    /// It is shutting down, and says so.
    HandedOver,
    /// It isn't ready, or full: what it said.
    NotNow(Box<Refused>),
    /// It failed: what it said.
    Error(Box<Refused>),
    /// Its numerics class is another than the answer's.
    OtherClass,
    /// It didn't begin in the time that a try has.
    Slow,
    /// The request's own time was up.
    Deadline,
}

impl Failure {
    /// For metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Failure::Unreachable(_) => "unreachable",
            Failure::Broken(_) => "broken",
            Failure::Garbage => "garbage",
            Failure::Silent => "silent",
            Failure::Lost => "lost",
            Failure::HandedOver => "handed_over",
            Failure::NotNow(_) => "not_now",
            Failure::Error(_) => "error",
            Failure::OtherClass => "other_class",
            Failure::Slow => "slow",
            Failure::Deadline => "deadline",
        }
    }
}

/// A response that is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What a replica made of a request.
pub(crate) enum Reply {
    /// It streams.
    Stream(Box<Attempt>),
    /// It says that the request is wrong: the client's affair.
    Refused(Box<Refused>),
    /// Somebody else's server answers, in its own way.
    Plain(Box<Plain>),
}

/// A response, before it is anybody's.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it comes")]
enum Taken {
    Answer(ResponseHead, Connection),
    Refused(Box<Refused>),
}

/// A stream under way.
pub(crate) struct Attempt {
    pub(crate) ticket: Ticket,
    pub(crate) headers: HeaderMap,
    connection: Connection,
    events: Events,
    /// What its chunks have in common.
    pub(crate) head: Head,
    /// When what is being told was read.
    pub(crate) read: Instant,
    vigil: Vigil,
}

/// What is sent.
pub(crate) struct Question {
    pub(crate) path: &'static str,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) body: Bytes,
    pub(crate) work: Work,
}

impl Attempt {
    /// Sends the request and waits until the replica has taken it.
    pub(crate) async fn start(
        replica: &Arc<Replica>,
        question: Question,
        settings: &ReplicaSettings,
        deadline: Instant,
    ) -> Result<Reply, Failure> {
        let mut ticket = replica.ticket(question.work);
        let mut vigil = Vigil::new(replica, settings);
        let reply = Attempt::reply(replica, question, &mut vigil, deadline).await;
        // Whoever called learns how it went, and notes it. A caller that goes away in between never comes here.
        ticket.settled = !matches!(reply, Ok(Taken::Answer(..)));
        let (head, connection) = match reply? {
            Taken::Refused(refused) => return Ok(Reply::Refused(refused)),
            Taken::Answer(head, connection) => (head, connection),
        };
        let headers = head.headers;
        if replica.protocol == Protocol::OpenAi {
            return Ok(Reply::Plain(Box::new(Plain { ticket, headers, connection, vigil })));
        }
        let kind = headers.get(CONTENT_TYPE);
        if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
            ticket.settled = true;
            return Err(Failure::Garbage);
        }
        let (events, head, read) = (Events::default(), Head::default(), Instant::now());
        let attempt = Attempt { ticket, headers, connection, events, head, read, vigil };
        Ok(Reply::Stream(Box::new(attempt)))
    }

    async fn reply(
        replica: &Arc<Replica>,
        question: Question,
        vigil: &mut Vigil,
        deadline: Instant,
    ) -> Result<Taken, Failure> {
        let Question { path, headers, body, .. } = &question;
        let sent = {
            let timeout = vigil.patience.connect;
            let mut sending = std::pin::pin!(replica.upstream.ask(path, headers, body, timeout));
            vigil.wait(&mut sending, replica, deadline).await?
        };
        let (head, mut connection) = sent.map_err(|error| match error {
            SendError::Connect(error) => Failure::Unreachable(error.to_string()),
            // No response at all: it can't be talked to.
            SendError::Broken { error, .. } => Failure::Unreachable(error.to_string()),
        })?;
        replica.seen_alive();
        if head.status == StatusCode::OK {
            return Ok(Taken::Answer(head, connection));
        }
        let body = match tokio::time::timeout_at(deadline.into(), connection.collect(MAX_REFUSAL)).await {
            Ok(Ok(body)) => body,
            Ok(Err(error)) => return Err(Failure::Broken(error.to_string())),
            Err(_) => return Err(Failure::Deadline),
        };
        replica.upstream.put_back(connection);
        let refused = Box::new(Refused { status: head.status, headers: head.headers, body });
        match head.status.as_u16() {
            429 | 503 => Err(Failure::NotNow(refused)),
            504 => Err(Failure::Deadline),
            // A replica asks for a key that the gateway should have had: no client's mistake.
            401 | 403 | 408 | 500.. => Err(Failure::Error(refused)),
            400..=499 => Ok(Taken::Refused(refused)),
            _ => Err(Failure::Garbage),
        }
    }

    /// The next event that is one; comments are signs of life only.
    pub(crate) async fn event(&mut self, deadline: Instant) -> Result<Event, Failure> {
        loop {
            match self.events.next() {
                Err(_) => return Err(Failure::Garbage),
                Ok(Some(Event::Comment)) => {}
                Ok(Some(event)) => return Ok(event),
                Ok(None) => {
                    let replica = &self.ticket.replica;
                    let mut data = std::pin::pin!(self.connection.data());
                    match self.vigil.wait(&mut data, replica, deadline).await? {
                        Ok(None) => return Err(Failure::Broken("it ended before the answer did".to_owned())),
                        Err(error) => return Err(Failure::Broken(error.to_string())),
                        Ok(Some(bytes)) => {
                            replica.seen_alive();
                            self.read = Instant::now();
                            self.events.push(bytes);
                        }
                    }
                }
            }
        }
    }

    /// The answer is complete: the connection may serve another.
    pub(crate) async fn finish(mut self) {
        // The stream's last chunk may be on its way; a replica that doesn't end it soon loses the connection.
        let connection = &mut self.connection;
        if !connection.ended() {
            let end = async { while let Ok(Some(_)) = connection.data().await {} };
            let _ = tokio::time::timeout(Duration::from_millis(200), end).await;
        }
        self.ticket.replica.upstream.put_back(self.connection);
    }
}

/// Bytes of an answer that comes as a whole.
const MAX_ANSWER: usize = 64 << 20;

/// Asks what is answered as a whole: the response, where the replica gave one that is its client's to see.
///
/// # Errors
/// As for an attempt.
pub(crate) async fn ask(
    replica: &Arc<Replica>,
    question: Question,
    settings: &ReplicaSettings,
    deadline: Instant,
) -> Result<Refused, Failure> {
    let mut ticket = replica.ticket(question.work);
    ticket.settled = true;
    let mut vigil = Vigil::new(replica, settings);
    let (head, mut connection) = match Attempt::reply(replica, question, &mut vigil, deadline).await? {
        Taken::Refused(refused) => return Ok(*refused),
        Taken::Answer(head, connection) => (head, connection),
    };
    let body = {
        let mut reading = std::pin::pin!(connection.collect(MAX_ANSWER));
        vigil.wait(&mut reading, replica, deadline).await?
    };
    let body = body.map_err(|error| Failure::Broken(error.to_string()))?;
    replica.upstream.put_back(connection);
    Ok(Refused { status: head.status, headers: head.headers, body })
}

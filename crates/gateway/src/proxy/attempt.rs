//! One replica's try at an answer: the request sent there, and the events that come back until it ends or breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consort_api::Protocol;
use http_body::Body as _;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::watch;

use super::chunk::Head;
use super::plain::Plain;
use super::sse::{Event, Events};
use super::upstream::{Connection, SendError};
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
enum Taken {
    Answer(Response<Incoming>, Connection, watch::Receiver<u64>),
    Refused(Box<Refused>),
}

/// A stream under way.
pub(crate) struct Attempt {
    pub(crate) ticket: Ticket,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    connection: Option<Connection>,
    events: Events,
    /// What its chunks have in common.
    pub(crate) head: Head,
    /// When what is being told was read.
    pub(crate) read: Instant,
    lost: watch::Receiver<u64>,
    patience: Patience,
}

/// How long something is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// A connection.
    pub(super) connect: Duration,
    /// Without a byte, before the replica is asked whether it lives.
    pub(super) suspect: Duration,
    /// Without a byte at all.
    pub(super) silence: Duration,
}

impl Patience {
    fn with(replica: &Replica, settings: &ReplicaSettings) -> Patience {
        Patience {
            connect: settings.connect_timeout,
            suspect: settings.suspect_after,
            silence: match replica.protocol {
                Protocol::Consort => settings.silence_timeout,
                // It says nothing while it thinks; the request's own deadline holds.
                Protocol::OpenAi => Duration::from_secs(86_400),
            },
        }
    }
}

/// What is sent.
pub(crate) struct Question {
    pub(crate) path: &'static str,
    pub(crate) headers: HeaderMap,
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
        let patience = Patience::with(replica, settings);
        let reply = Attempt::reply(replica, question, patience, deadline).await;
        // Whoever called learns how it went, and notes it. A caller that goes away in between never comes here.
        ticket.settled = !matches!(reply, Ok(Taken::Answer(..)));
        let (response, connection, lost) = match reply? {
            Taken::Refused(refused) => return Ok(Reply::Refused(refused)),
            Taken::Answer(response, connection, lost) => (response, connection, lost),
        };
        let (parts, body) = response.into_parts();
        let (headers, connection) = (parts.headers, Some(connection));
        if replica.protocol == Protocol::OpenAi {
            return Ok(Reply::Plain(Box::new(Plain { ticket, headers, body, connection, lost, patience })));
        }
        let kind = headers.get(CONTENT_TYPE);
        if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
            ticket.settled = true;
            return Err(Failure::Garbage);
        }
        let (events, head, read) = (Events::default(), Head::default(), Instant::now());
        let attempt = Attempt { ticket, headers, body, connection, events, head, read, lost, patience };
        Ok(Reply::Stream(Box::new(attempt)))
    }

    async fn reply(
        replica: &Arc<Replica>,
        question: Question,
        patience: Patience,
        deadline: Instant,
    ) -> Result<Taken, Failure> {
        let mut lost = replica.lost();
        lost.mark_unchanged();
        let sent = {
            let mut sending = std::pin::pin!(send(replica, &question, patience.connect));
            wait(&mut sending, replica, &mut lost, patience, deadline).await?
        };
        let (response, connection) = sent.map_err(|error| match error {
            SendError::Connect(error) => Failure::Unreachable(error.to_string()),
            // No response at all: it can't be talked to.
            SendError::Broken { error, .. } => Failure::Unreachable(error.to_string()),
        })?;
        replica.seen_alive();
        if response.status() == StatusCode::OK {
            return Ok(Taken::Answer(response, connection, lost));
        }
        let (parts, body) = response.into_parts();
        let reading = Limited::new(body, MAX_REFUSAL).collect();
        let body = match tokio::time::timeout_at(deadline.into(), reading).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return Err(Failure::Broken(error.to_string())),
            Err(_) => return Err(Failure::Deadline),
        };
        replica.upstream.put_back(connection);
        let refused = Box::new(Refused { status: parts.status, headers: parts.headers, body });
        match parts.status.as_u16() {
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
                    let replica = self.ticket.replica.clone();
                    let mut frame = self.body.frame();
                    let frame = wait(&mut frame, &replica, &mut self.lost, self.patience, deadline).await?;
                    match frame {
                        None => return Err(Failure::Broken("it ended before the answer did".to_owned())),
                        Some(Err(error)) => return Err(Failure::Broken(error.to_string())),
                        Some(Ok(frame)) => {
                            if let Ok(bytes) = frame.into_data() {
                                self.ticket.replica.seen_alive();
                                self.read = Instant::now();
                                self.events.push(bytes);
                            }
                        }
                    }
                }
            }
        }
    }

    /// The answer is complete: the connection may serve another.
    pub(crate) async fn finish(mut self) {
        // The stream's last chunk may be on its way; a replica that doesn't end it soon loses the connection.
        let mut ended = self.body.is_end_stream();
        if !ended {
            let end = async { while self.body.frame().await.is_some_and(|frame| frame.is_ok()) {} };
            ended = tokio::time::timeout(Duration::from_millis(200), end).await.is_ok();
        }
        if ended && let Some(connection) = self.connection.take() {
            self.ticket.replica.upstream.put_back(connection);
        }
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
    let patience = Patience::with(replica, settings);
    let (response, connection, mut lost) = match Attempt::reply(replica, question, patience, deadline).await?
    {
        Taken::Refused(refused) => return Ok(*refused),
        Taken::Answer(response, connection, lost) => (response, connection, lost),
    };
    let (parts, body) = response.into_parts();
    let mut reading = std::pin::pin!(Limited::new(body, MAX_ANSWER).collect());
    let body = wait(&mut reading, replica, &mut lost, patience, deadline).await?;
    let body = body.map_err(|error| Failure::Broken(error.to_string()))?.to_bytes();
    replica.upstream.put_back(connection);
    Ok(Refused { status: parts.status, headers: parts.headers, body })
}

/// Sends, once more over a new connection where an old one was closed under it.
async fn send(
    replica: &Replica,
    question: &Question,
    timeout: Duration,
) -> Result<(Response<Incoming>, Connection), SendError> {
    let request = || {
        let mut request = Request::new(Full::new(question.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = hyper::Uri::from_static(question.path);
        *request.headers_mut() = question.headers.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        request
    };
    let mut connection = replica.upstream.connect(timeout).await?;
    match replica.upstream.send(&mut connection, request()).await {
        Err(SendError::Broken { stale: true, .. }) => {
            connection = replica.upstream.connect_anew(timeout).await?;
            let response = replica.upstream.send(&mut connection, request()).await?;
            Ok((response, connection))
        }
        sent => sent.map(|response| (response, connection)),
    }
}

/// Waits for something from a replica, no longer than makes sense.
pub(super) async fn wait<F: Future + Unpin>(
    future: &mut F,
    replica: &Replica,
    lost: &mut watch::Receiver<u64>,
    patience: Patience,
    deadline: Instant,
) -> Result<F::Output, Failure> {
    let begun = Instant::now();
    let silence = begun + patience.silence;
    let mut check = patience.suspect;
    loop {
        let wake = (begun + check).min(silence).min(deadline);
        tokio::select! {
            biased;
            output = &mut *future => return Ok(output),
            _ = lost.changed() => return Err(Failure::Lost),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(Failure::Deadline);
        }
        if now >= silence {
            return Err(Failure::Silent);
        }
        if replica.silent_for() >= patience.suspect {
            replica.suspected.notify_one();
        }
        check += patience.suspect;
    }
}

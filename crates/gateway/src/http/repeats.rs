//! Requests that were sent before: repeats under one `Idempotency-Key`, and streams taken up again with
//! `Last-Event-ID`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::body::Body;
use super::front::Context;
use crate::Gateway;
use crate::error::{Outcome, Refusal};
use crate::policy::idempotency::{Id, Lookup};
use crate::proxy::call::Call;
use crate::proxy::{Head, Recording};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What a request's `Idempotency-Key` says.
pub(crate) enum Repeat {
    /// It has none.
    Single,
    /// It is the first with its key: its answer goes into the recording.
    First(Id, Arc<Recording>),
    /// It was answered before, or is being answered.
    Again(Arc<Recording>),
}

/// The hash of what makes two requests the same.
pub(crate) fn body_hash(call: &Call) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(call.shape.path().as_bytes());
    hasher.update(call.body());
    *hasher.finalize().as_bytes()
}

/// Reads the `Idempotency-Key`.
///
/// # Errors
/// 400 where it is no plain text, 422 where it was used with another body, 429 where too many run.
pub(crate) fn repeat(gateway: &Gateway, headers: &HeaderMap, client: &str, call: &Call) -> Outcome<Repeat> {
    let Some(value) = headers.get(&IDEMPOTENCY_KEY) else { return Ok(Repeat::Single) };
    let plain =
        |key: &&str| (1..=255).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    let Some(key) = value.to_str().ok().filter(plain) else {
        return Err(Refusal::param(
            "Idempotency-Key",
            "Idempotency-Key must be 1 to 255 printable ASCII characters",
        ));
    };
    let id = (client.to_owned(), key.to_owned());
    let recording = Arc::<Recording>::default();
    let looked_up = gateway.idempotency().begin(
        Instant::now(),
        &id,
        body_hash(call),
        &recording,
        &gateway.settings().idempotency,
    );
    match looked_up {
        Lookup::New => Ok(Repeat::First(id, recording)),
        Lookup::Repeat(recording) => Ok(Repeat::Again(recording)),
        Lookup::Mismatch => Err(Refusal {
            param: Some("Idempotency-Key".to_owned()),
            ..Refusal::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_key_reused",
                "this Idempotency-Key was used with another body; send a new key with a new request",
            )
        }),
        Lookup::Full => Err(Refusal::new(
            StatusCode::TOO_MANY_REQUESTS,
            "overloaded",
            "too many requests with an Idempotency-Key run at the same time; try again",
        )
        .retry_after(Duration::from_secs(1))),
    }
}

/// A recorded answer, from its beginning or from where the client says it got.
///
/// # Errors
/// 504 where its head doesn't come in time.
pub(crate) async fn replay(
    recording: &Arc<Recording>,
    headers: &HeaderMap,
    context: &Context,
    again: bool,
) -> Outcome<Response<Body>> {
    let head = tokio::time::timeout_at(context.deadline.into(), recording.head()).await;
    let Some(Head { status, headers: heads }) = head.map_err(|_| Refusal::deadline())? else {
        return Err(Refusal::unavailable("the request that this one repeats failed; try again"));
    };
    let from = last_event(headers).map_or(0, |(_, number)| number + 1);
    let mut response =
        Response::new(Body::events(recording.read(usize::try_from(from).unwrap_or(usize::MAX))));
    *response.status_mut() = status;
    *response.headers_mut() = heads;
    if again {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// The stream's id and the number of the last event that the client has.
fn last_event(headers: &HeaderMap) -> Option<(&str, u64)> {
    let (id, number) = headers.get(&LAST_EVENT_ID)?.to_str().ok()?.trim().rsplit_once(':')?;
    Some((id, number.parse().ok()?))
}

/// Takes a stream up again where the request says so; none where it says nothing.
///
/// # Errors
/// 400 where the header is no id of ours or the request another, 410 where the stream or the event is gone.
pub(crate) async fn take_up(
    gateway: &Arc<Gateway>,
    headers: &HeaderMap,
    client: &str,
    call: &Call,
    context: &mut Context,
) -> Outcome<Option<crate::proxy::Receiver>> {
    if !headers.contains_key(&LAST_EVENT_ID) {
        return Ok(None);
    }
    let Some((id, number)) = last_event(headers) else {
        return Err(Refusal::param(
            "Last-Event-ID",
            "Last-Event-ID must be the id of an event of this gateway",
        ));
    };
    let gone = |what: &str| {
        let message = format!("{what}; send the request again without Last-Event-ID");
        Refusal {
            param: Some("Last-Event-ID".to_owned()),
            ..Refusal::new(StatusCode::GONE, "stream_gone", message)
        }
    };
    let window = gateway.settings().clients.resume_window;
    let Some(mut stream) = gateway.held.take(id).await else {
        return Err(gone("the stream that Last-Event-ID names is not kept here any more"));
    };
    // Somebody else's stream is as good as none.
    let (owner, body) = &stream.owner;
    if owner != client {
        gateway.held.give_back(id, stream, window);
        return Err(gone("the stream that Last-Event-ID names is not kept here any more"));
    }
    if *body != body_hash(call) {
        gateway.held.give_back(id, stream, window);
        let message = "Last-Event-ID names a stream of another request; send the same body again";
        return Err(Refusal::param("Last-Event-ID", message));
    }
    let Some(before) = stream.since(number.saturating_add(1)) else {
        gateway.held.give_back(id, stream, window);
        return Err(gone("the event that Last-Event-ID names is not kept here any more"));
    };
    stream.session.resume(context.deadline, context.record.tally.clone());
    Ok(Some(stream.start(gateway.held.clone(), before, window)))
}

//! One request, from its bytes to its answer's, whatever happens to the replicas on the way.

mod attempt;
pub(crate) mod call;
pub(crate) mod chunk;
mod events;
mod held;
mod plain;
mod progress;
mod recording;
mod session;
mod shadow;
mod sse;
mod stream;
pub(crate) mod trust;
pub(crate) mod upstream;
mod vigil;
mod whole;
pub(crate) mod wire;

pub(crate) use attempt::{Question, Refused, ask};
pub(crate) use held::Held;
pub(crate) use plain::{PlainAnswer, PlainBody, PlainStream};
pub(crate) use recording::{Head, Recording};
pub(crate) use session::{Opening, Request, Session};
pub(crate) use stream::{Receiver, Stream};
pub(crate) use whole::answer as whole;

/// 64 bits that an outsider can't guess: `RandomState` is keyed by the system's generator.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

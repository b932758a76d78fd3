//! Decisions, as pure state machines: no clock, socket, lock or random number inside. Time and randomness are
//! arguments, so each file's tests run it under seeds in virtual time.

pub(crate) mod affinity;
pub(crate) mod balance;
pub(crate) mod breaker;
pub(crate) mod budget;
pub(crate) mod canary;
pub(crate) mod fair;
pub(crate) mod hedge;
pub(crate) mod idempotency;
pub(crate) mod limits;
pub(crate) mod liveness;
pub(crate) mod outlier;
pub(crate) mod shadow;
#[cfg(test)]
mod simulation;

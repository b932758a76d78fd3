//! Decisions, as pure state machines: no clock, socket, lock or random number inside. Time and randomness are
//! arguments, so each file's tests run it under seeds in virtual time.

pub(crate) mod balance;
pub(crate) mod canary;
pub(crate) mod liveness;

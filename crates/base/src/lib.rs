//! Plain values that every floor above shares: a counter-based random number generator, a clock that tests can
//! turn by hand, retry delays, and distributions of durations. No I/O, no threads, no global state.

pub mod backoff;
pub mod clock;
pub mod histogram;
pub mod philox;

pub use backoff::Backoff;
pub use clock::{Clock, SystemClock, VirtualClock};
pub use histogram::Histogram;
pub use philox::{Philox, philox4x32};

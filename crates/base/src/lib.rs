//! Plain values that every floor above shares: a counter-based random number generator, a clock that tests can
//! turn by hand, and retry delays. No I/O, no threads, no global state.

pub mod backoff;
pub mod clock;
pub mod philox;

pub use backoff::Backoff;
pub use clock::{Clock, SystemClock, VirtualClock};
pub use philox::{Philox, philox4x32};

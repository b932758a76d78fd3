//! What every HTTP listener needs against its clients, whatever it serves.
//!
//! A replica and the gateway before it are two listeners with the same enemies: connections that hold a place and ask
//! nothing, clients that stop reading, pages from elsewhere that drive a server on this machine. hyper bounds the
//! sending side (headers, bodies, their times); this is the rest. A crate of its own because neither of the two may use
//! the other.

mod connections;
mod origin;
mod socket;

pub use connections::{Busy, Connection, ConnectionHandle, Connections};
pub use origin::{Foreign, Origins, is_loopback};
pub use socket::Timed;

//! The sockets' side: connections, bodies, and which path is what.

pub(crate) mod accept;
pub(crate) mod answers;
pub(crate) mod body;
pub(crate) mod front;
pub(crate) mod read;
mod repeats;
mod respond;
mod timer;
pub(crate) mod tls;
mod tokens;

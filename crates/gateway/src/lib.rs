//! The front door: many replicas, one answer.
//!
//! Clients speak OpenAI's API to it; it speaks the replicas' to them. Which replica serves a request, and what happens
//! when that one dies, hangs or goes, is decided here and seen by no client: an answer goes on at the next token on
//! another replica, because a replica's answer is a function of the request (weights, seed and positions), not of its
//! history.
//!
//! Everything a gateway decides is a pure state machine under `policy`; `fleet` keeps what is known of replicas;
//! `proxy` moves one request; `http` is the socket's side. The owner of a [`Gateway`] replaces the fleet and the keys
//! while it runs, and reads a snapshot; the gateway knows nothing of processes, files or deployments.

mod alarm;
mod discovery;
mod error;
mod fleet;
mod gateway;
mod http;
mod json;
mod keys;
mod policy;
mod proxy;
mod settings;
mod stats;
mod telemetry;
mod trace;

pub use discovery::Discovery;
pub use fleet::FleetError;
pub use gateway::{Answering, Extra, Gateway, ServeError};
pub use http::body::Body;
pub use http::tls::{Tls, TlsError};
pub use keys::KeyError;
pub use proxy::upstream::AddressError;
pub use settings::{
    BreakerSettings, BudgetSettings, ClientSettings, HedgeSettings, IdempotencySettings, OutlierSettings,
    ReplicaSettings, RetrySettings, Settings, Trust,
};

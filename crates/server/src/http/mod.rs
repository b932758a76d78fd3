//! HTTP below the API: bodies read within bounds, connections that can't hang, and who may ask at all.

pub(crate) mod body;
pub(crate) mod guard;

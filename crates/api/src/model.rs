//! `/v1/models`.

use serde::{Deserialize, Serialize};

/// The models served here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// `list`
    pub object: String,
    /// One for each name.
    pub data: Vec<ModelCard>,
}

/// A model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// The name that requests use.
    pub id: String,
    /// `model`
    pub object: String,
    /// Seconds since 1970: when it was loaded.
    pub created: u64,
    /// `consort`
    pub owned_by: String,
    /// The longest sequence, in tokens.
    pub max_model_len: usize,
    /// The numerics class, as in every answer.
    pub system_fingerprint: String,
}

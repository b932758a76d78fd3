//! `/tokenize` and `/detokenize`.

use serde::{Deserialize, Serialize};

/// Its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// How many would fit.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their texts, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// Their text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetokenizeResponse {
    /// The text, special tokens left out.
    pub prompt: String,
}

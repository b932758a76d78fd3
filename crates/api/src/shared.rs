//! What chat and plain completions have in common.

use serde::{Deserialize, Serialize};

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Of the prompt (once, however many choices were asked for).
    pub prompt_tokens: usize,
    /// Of all choices.
    pub completion_tokens: usize,
    /// The sum.
    pub total_tokens: usize,
    /// How many of the prompt's were found in the prefix cache, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Where the prompt's tokens came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: usize,
}

/// How one replica takes over an answer that another began (the request's field `consort`).
///
/// The replica answers with exactly the bytes that would have followed `emitted_token_ids` there, provided the rest
/// of the request is the same and carries a `seed` (or temperature 0).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Ids of the answer so far: all `token_ids` that the chunks carried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub emitted_token_ids: Vec<u32>,
    /// The same for a request with several choices: one list each, in the order of their `index`. A choice whose list
    /// is empty is answered from its beginning.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Vec<u32>>,
    /// The answer's `id`, so that the continuation bears the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The answer's `created`, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
}

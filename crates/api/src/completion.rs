//! `/v1/completions`: text after text, no chat template.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Usage;

/// An answer, or one event of a streamed one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// `cmpl-…`
    pub id: String,
    /// `text_completion`
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Who answered.
    pub model: String,
    /// The numerics class: equal class and seed, equal tokens.
    pub system_fingerprint: Option<String>,
    /// The answers.
    pub choices: Vec<CompletionChoice>,
    /// Tokens counted (in a stream: in its last chunk, where asked for).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One answer, or more of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompletionChoice {
    /// Which: prompt's index × `n` + choice.
    pub index: usize,
    /// The text.
    pub text: String,
    /// Where asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
    /// Where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// ln p, as four lists of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionLogprobs {
    /// Texts; a part of a character reads `bytes:\xe2\x80`.
    pub tokens: Vec<String>,
    /// ln p; none for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest at each place, text to ln p.
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each starts in the text, in characters.
    pub text_offset: Vec<usize>,
}

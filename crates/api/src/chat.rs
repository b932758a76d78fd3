//! `/v1/chat/completions`.

use serde::{Deserialize, Serialize};

use crate::{ToolCall, ToolCallDelta, Usage};

/// A turn of the conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: Option<String>,
    /// Calls an assistant's turn made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// The call a tool's turn answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    /// `chatcmpl-…`
    pub id: String,
    /// `chat.completion`
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Who answered.
    pub model: String,
    /// The numerics class: equal class and seed, equal tokens.
    pub system_fingerprint: Option<String>,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// Tokens counted.
    pub usage: Usage,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    /// Which.
    pub index: usize,
    /// What was said.
    pub message: ChatMessage,
    /// Where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: Option<String>,
    /// Where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// ln p of an answer's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// In order.
    pub content: Vec<TokenLogprob>,
}

/// One token's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text; bytes that are no UTF-8 show as U+FFFD.
    pub token: String,
    /// ln p, −9999 where p is 0.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
    /// The likeliest instead of it.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that could have stood there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// ln p, −9999 where p is 0.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
}

/// One event of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    /// `chatcmpl-…`, the same in each.
    pub id: String,
    /// `chat.completion.chunk`
    pub object: String,
    /// Seconds since 1970, the same in each.
    pub created: u64,
    /// Who answers.
    pub model: String,
    /// The numerics class.
    pub system_fingerprint: Option<String>,
    /// What is new; none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// In the last chunk, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// What is new in one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunkChoice {
    /// Which answer.
    pub index: usize,
    /// More of it.
    pub delta: Delta,
    /// Where asked for.
    #[serde(default)]
    pub logprobs: Option<ChatLogprobs>,
    /// In its last chunk.
    pub finish_reason: Option<String>,
    /// Where asked for: ids whose text is out with this chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// More of a message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// In the first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// More text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// More of the calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

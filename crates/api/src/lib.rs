//! Wire types: the OpenAI surface as Consort speaks it, the replica's own fields, and the fleet behind a gateway.
//!
//! Plain serde structs, no behaviour: the server answers with them, the load generator and the gateway read them.
//! Requests are built with these types and sent; a server reads a request field by field instead (its errors name the
//! field), so a request type here holds what a *client* may say, and every field is optional where OpenAI's is.
//!
//! Fields of our own, beside OpenAI's: sampling (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
//! `stop_token_ids`), `chat_template_kwargs`, `return_token_ids` with `token_ids` in each choice, and [`Resume`] under
//! the key `consort`.

mod chat;
mod completion;
pub mod deployment;
mod error;
mod fleet;
mod keys;
mod model;
mod shared;
mod tokens;
mod tool;

pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChatRequest, Delta,
    ResponseFormat, SchemaFormat, TokenLogprob, TopLogprob,
};
pub use completion::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt};
pub use error::{ErrorBody, ErrorObject};
pub use fleet::{
    BreakerState, Fleet, FleetModel, FleetReplica, FleetSnapshot, FleetVersion, GatewayTotals, Latency,
    ModelSnapshot, Numerics, ReadyReport, ReplicaSnapshot, ReplicaState, VersionSnapshot,
};
pub use keys::{ApiKeyRecord, KeyLimits};
pub use model::{ModelCard, ModelList};
pub use shared::{PromptTokensDetails, Resume, Stop, StreamOptions, Usage};
pub use tokens::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
pub use tool::{FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta};

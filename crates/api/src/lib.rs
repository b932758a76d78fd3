//! Wire types: the OpenAI surface as Consort speaks it, the replica's own fields, and the fleet behind a gateway.
//!
//! Plain serde structs, no behaviour: the server answers with them, the load generator and the gateway read them.
//! There are no types of requests: a server reads them field by field, because its errors name the field, and a gateway
//! passes on what it was sent. What a request may say stands in `docs/api.md`.
//!
//! Fields of our own, beside OpenAI's: `token_ids` in each choice, and [`Resume`] under the key `consort` of a request.

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
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatMessage, Delta, TokenLogprob,
    TopLogprob,
};
pub use completion::{Completion, CompletionChoice, CompletionLogprobs};
pub use error::{ErrorBody, ErrorObject};
pub use fleet::{
    BreakerState, Fleet, FleetModel, FleetReplica, FleetSnapshot, FleetVersion, GatewayTotals, Latency,
    ModelSnapshot, Numerics, Protocol, ReadyReport, ReplicaSnapshot, ReplicaState, Shadow, ShadowSnapshot,
    VersionSnapshot,
};
pub use keys::{ApiKeyRecord, KeyLimits};
pub use model::{ModelCard, ModelList};
pub use shared::{PromptTokensDetails, Resume, Usage};
pub use tokens::{DetokenizeResponse, TokenizeResponse};
pub use tool::{FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta};

//! Functions the model may call: how they are asked for, described, enforced and read back.
//!
//! Three formats are read, and which one is the chat template's business: it shows the model how calls look.
//!
//! | format | looks like | templates |
//! |---|---|---|
//! | tagged | `<tool_call>{"name": …, "arguments": {…}}</tool_call>` | Hermes, Qwen, SmolLM; and ours |
//! | marker | `[TOOL_CALLS][{"name": …, "arguments": {…}}]` | Mistral |
//! | bare | `{"name": …, "parameters": {…}}` as the whole answer | Llama 3 |
//!
//! A template that knows nothing of tools gets them described in a system message (see [`mod@describe`]), tagged. A call
//! that was required or named is enforced by a grammar over the bare format ([`mod@grammar`]), so it always parses;
//! so is an answer that may be calls or JSON in a response format.

mod describe;
mod grammar;
mod request;
mod scan;
mod stream;

pub(crate) use describe::{describe, spell_out};
pub(crate) use grammar::grammar;
pub(crate) use request::ToolRequest;
pub(crate) use stream::{Format, Marks, ToolPiece, ToolStream};

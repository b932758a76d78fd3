//! Chat templates, run as the model's authors wrote them (Jinja), with user text kept apart from special tokens.

use crate::{Error, Tokenizer};

/// A compiled chat template.
pub struct ChatTemplate {}

/// What a template may see beside the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// OpenAI tool definitions, as JSON.
    pub tools: Vec<serde_json::Value>,
    /// Ends the prompt with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`, …).
    pub variables: serde_json::Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Token ids of a conversation. `messages` are OpenAI messages as JSON (`role`, `content`, `tool_calls`, …).
    /// Special tokens are recognised in what the template wrote, never in what a message said.
    ///
    /// # Errors
    /// [`Error::Template`] where the template refuses the messages.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[serde_json::Value],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, Error> {
        let _ = (tokenizer, messages, options);
        todo!()
    }

    /// The template's source text.
    pub fn source(&self) -> &str {
        todo!()
    }
}

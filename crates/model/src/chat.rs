//! Chat templates, run as the model's authors wrote them (Jinja), with user text kept apart from special tokens.
//!
//! Templates are made for Python: what transformers offers them (string methods, `tojson`, `raise_exception`,
//! `strftime_now`) is offered here, so that the same template gives the same prompt. Nothing is added to what it
//! writes, no start token either.
//!
//! **No text becomes a special token.** A template's output is one string, in which what the template wrote can't be
//! told from what a message said. So before rendering, every special token's spelling in every string of the request
//! is broken by a mark, a character that occurs nowhere in it; afterwards special tokens are parsed, and the mark is
//! taken out of the text between them.
//!
//! Templates come with models, from strangers: instructions, recursion and output are bounded. (A template can still
//! take much memory by doubling a string; it can't get at anything else.)

mod date;
mod environment;
mod guard;
mod python;

use std::io;
use std::time::SystemTime;

use minijinja::{Environment, Value};
use serde_json::Map;

use crate::formats::Opened;
use crate::{Error, Tokenizer};

/// Longest template taken, in bytes. Real ones have up to 20,000.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest prompt rendered, in bytes.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Instructions a rendering may run: a second's worth. A message takes some 100.
const MAX_INSTRUCTIONS: u64 = 20_000_000;

/// A compiled chat template.
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    uses_tools: bool,
}

/// What a template may see beside the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// OpenAI tool definitions, as JSON.
    pub tools: Vec<serde_json::Value>,
    /// Ends the prompt with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`, …).
    pub variables: Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where it doesn't parse.
    pub fn new(source: &str) -> Result<ChatTemplate, Error> {
        ChatTemplate::with_clock(source, SystemTime::now)
    }

    /// As [`ChatTemplate::new`]; `clock` gives the date that templates ask for.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where it doesn't parse.
    pub fn with_clock(source: &str, clock: fn() -> SystemTime) -> Result<ChatTemplate, Error> {
        if source.len() > MAX_SOURCE_BYTES {
            let reason = format!("it has {} bytes; at most {MAX_SOURCE_BYTES} are taken", source.len());
            return Err(Error::Template { reason });
        }
        let mut environment = environment::new(clock);
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        environment
            .add_template_owned(environment::NAME, environment::without_generation_tags(source))
            .map_err(|e| Error::Template { reason: environment::explain(&e) })?;
        let uses_tools = environment
            .get_template(environment::NAME)
            .is_ok_and(|template| template.undeclared_variables(false).contains("tools"));
        Ok(ChatTemplate { source: source.to_owned(), environment, uses_tools })
    }

    /// The template that a model file or folder carries, if it carries one.
    ///
    /// # Errors
    /// [`Error::Template`] where it doesn't parse; what reading the file says.
    pub fn of(opened: &Opened) -> Result<Option<ChatTemplate>, Error> {
        let folder = opened.folder().map(crate::tokenizer::chat_template_source).transpose()?.flatten();
        let source = match opened.gguf() {
            Some(gguf) => gguf.str("tokenizer.chat_template")?,
            None => folder.as_deref(),
        };
        source.filter(|s| !s.is_empty()).map(ChatTemplate::new).transpose()
    }

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
        let texts = || messages.iter().chain(&options.tools).chain(options.variables.values());
        let Some(mark) = guard::unused_character(&self.source, texts()) else {
            let reason = "the messages hold every private-use character of Unicode".to_owned();
            return Err(Error::Template { reason });
        };
        let guarded = |values: &[serde_json::Value]| -> Vec<serde_json::Value> {
            values.iter().map(|value| guard::broken(value, tokenizer, mark)).collect()
        };
        let variables =
            options.variables.iter().map(|(key, value)| (key.clone(), guard::broken(value, tokenizer, mark)));
        let options = ChatOptions {
            tools: guarded(&options.tools),
            add_generation_prompt: options.add_generation_prompt,
            variables: variables.collect(),
        };
        let text = self.render(tokenizer, &guarded(messages), &options)?;
        Ok(tokenizer.encode_guarded(&text, mark))
    }

    /// The prompt as text, with nothing told apart: for people to look at, and for tests.
    ///
    /// # Errors
    /// [`Error::Template`] where the template refuses the messages.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[serde_json::Value],
        options: &ChatOptions,
    ) -> Result<String, Error> {
        let fail = |e: &minijinja::Error| Error::Template { reason: environment::explain(e) };
        let mut context = Map::new();
        for (name, text) in [("bos_token", tokenizer.bos_text()), ("eos_token", tokenizer.eos_text())] {
            context.extend(text.map(|text| (name.to_owned(), text.into())));
        }
        context.extend(options.variables.clone());
        context.insert("messages".to_owned(), messages.into());
        context.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        let tools = &options.tools;
        let tools = if tools.is_empty() { serde_json::Value::Null } else { tools.clone().into() };
        context.insert("tools".to_owned(), tools);

        let template = self.environment.get_template(environment::NAME).map_err(|e| fail(&e))?;
        let mut output = Bounded(Vec::new());
        template.render_captured_to(Value::from_serialize(&context), &mut output).map_err(|e| fail(&e))?;
        String::from_utf8(output.0).map_err(|_| Error::Template { reason: "it wrote no UTF-8".to_owned() })
    }

    /// Whether the template reads `tools`; where not, tools must be described in a message.
    pub fn uses_tools(&self) -> bool {
        self.uses_tools
    }

    /// The template's source text.
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A buffer that refuses to grow past [`MAX_OUTPUT_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(format!(
                "the prompt is longer than {} MiB",
                MAX_OUTPUT_BYTES >> 20
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! `/v1/chat/completions`.

use consort_inference::request::Grammar;
use consort_model::chat::ChatOptions;
use serde_json::{Map, Value};

use crate::engine::Replica;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, kind};
use crate::params::{Common, is_false};
use crate::plan::{self, Call, Plan, Prompt, Reading};
use crate::respond::Shape;
use crate::tools::{self, Format, ToolRequest};

mod messages;

pub(crate) use messages::read as read_messages;

/// Calls that one answer may hold.
const MAX_CALLS: usize = 64;

/// A request, read and checked, before its tokens are known.
pub(crate) struct ChatCall {
    common: Common,
    messages: Vec<Value>,
    max_tokens: Option<usize>,
    logprobs: Option<u8>,
    format: Option<Grammar>,
    tools: ToolRequest,
    variables: Map<String, Value>,
}

impl Call for ChatCall {
    const SHAPE: Shape = Shape::Chat;

    fn read(value: Value, replica: &Replica) -> ApiResult<ChatCall> {
        let mut fields = Fields::new(value, "")?;
        let common = Common::read(&mut fields, replica.tokenizer.vocab())?;
        let Some(messages) = fields.array("messages")? else {
            return Err(ApiError::param("messages", "messages is missing"));
        };
        let messages = read_messages(messages)?;
        let max_tokens = max_tokens(&mut fields)?;
        let wanted = fields.bool("logprobs")?.unwrap_or(false);
        let top = fields.integer("top_logprobs", 0..=20)?;
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs: true"));
        }
        let logprobs = wanted.then(|| top.unwrap_or(0) as u8);
        let format = response_format(&mut fields)?;
        let tools = ToolRequest::read(&mut fields)?;
        let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
        if let Some(own) =
            ["messages", "tools", "add_generation_prompt"].iter().find(|n| variables.contains_key(**n))
        {
            let param = format!("chat_template_kwargs.{own}");
            return Err(ApiError::unsupported(
                &param,
                format!("{param} is not supported: the request itself says it"),
            ));
        }
        refuse_others(&mut fields)?;
        fields.finish()?;
        Ok(ChatCall { common, messages, max_tokens, logprobs, format, tools, variables })
    }

    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn is_heavy(&self) -> bool {
        self.format.is_some() || self.tools.forced()
    }

    /// Runs the template and puts all together.
    fn plan(self, replica: &Replica) -> ApiResult<Plan> {
        let Some(template) = &replica.template else {
            return Err(ApiError::param("messages", "this model has no chat template; use /v1/completions"));
        };
        let taught = if template.uses_tools() { Format::of_template(template.source()) } else { None };
        let mut messages = self.messages;
        let mut options =
            ChatOptions { tools: Vec::new(), add_generation_prompt: true, variables: self.variables };
        let shown = self.tools.shown();
        if taught.is_some() {
            if shown {
                options.tools = self.tools.tools.iter().map(|tool| tool.definition.clone()).collect();
            }
        } else {
            messages = tools::spell_out(messages);
            if shown {
                tools::describe(&mut messages, &self.tools);
            }
        }
        let ids = template
            .encode(&replica.tokenizer, &messages, &options)
            .map_err(|error| ApiError::param("messages", error.to_string()))?;
        let calls = taught.unwrap_or(Format::Tagged);
        let grammar_param = if self.tools.forced() { "tools" } else { "response_format" };
        let calls_or_json = self.format.is_some();
        let grammar = tools::grammar(&self.tools, self.format, calls, &replica.tokenizer)?;
        let reading = shown.then(|| Reading {
            // An enforced call follows our own grammar.
            format: if self.tools.forced() { Format::Bare } else { calls },
            names: self.tools.tools.iter().map(|tool| tool.name.clone()).collect(),
            max_calls: if self.tools.parallel { MAX_CALLS } else { 1 },
            calls_or_json,
        });
        Ok(Plan {
            common: self.common,
            prompts: vec![Prompt { ids, text: None }],
            max_tokens: self.max_tokens,
            logprobs: self.logprobs,
            echo: false,
            grammar,
            grammar_param,
            reading,
        })
    }
}

fn max_tokens(fields: &mut Fields) -> ApiResult<Option<usize>> {
    let newer = fields.integer("max_completion_tokens", 1..=i64::MAX)?;
    let older = fields.integer("max_tokens", 1..=i64::MAX)?;
    match (newer, older) {
        (Some(a), Some(b)) if a != b => Err(ApiError::param(
            "max_tokens",
            format!("max_tokens is {b} and max_completion_tokens {a}; they mean the same: send one"),
        )),
        (a, b) => Ok(a.or(b).map(|tokens| tokens as usize)),
    }
}

fn response_format(fields: &mut Fields) -> ApiResult<Option<Grammar>> {
    let Some(mut format) = fields.nested("response_format")? else { return Ok(None) };
    let grammar = match format.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(Grammar::JsonObject),
        Some("json_schema") => {
            let missing = |what: &str| ApiError::param(what, format!("{what} is missing"));
            let mut named =
                format.nested("json_schema")?.ok_or_else(|| missing("response_format.json_schema"))?;
            // Neither changes the answer: the schema is always enforced.
            named.string("name")?;
            named.string("description")?;
            named.bool("strict")?;
            let schema = named.take("schema").ok_or_else(|| missing("response_format.json_schema.schema"))?;
            if !schema.is_object() && !schema.is_boolean() {
                let message =
                    format!("response_format.json_schema.schema must be an object, not {}", kind(&schema));
                return Err(ApiError::param("response_format.json_schema.schema", message));
            }
            named.finish()?;
            Some(Grammar::JsonSchema(schema))
        }
        _ => {
            return Err(ApiError::param(
                "response_format.type",
                "response_format.type must be text, json_object or json_schema",
            ));
        }
    };
    format.finish()?;
    Ok(grammar)
}

/// OpenAI's other parameters: refused with the reason unless their value changes nothing.
fn refuse_others(fields: &mut Fields) -> ApiResult<()> {
    let is = |text: &'static str| move |v: &Value| v == text;
    fields.refuse_unless("audio", |_| false, "answers are text")?;
    fields.refuse_unless("modalities", |v| v == &serde_json::json!(["text"]), "answers are text")?;
    fields.refuse_unless("prediction", |_| false, "there is no predicted output here")?;
    fields.refuse_unless(
        "reasoning_effort",
        |_| false,
        "set the template's own switch in chat_template_kwargs",
    )?;
    fields.refuse_unless("verbosity", is("medium"), "ask for it in a message")?;
    fields.refuse_unless("web_search_options", |_| false, "there is no web search here")?;
    fields.refuse_unless("prompt_cache_retention", |_| false, "the prefix cache keeps what memory allows")?;
    fields.refuse_unless("echo", is_false, "it is for /v1/completions")?;
    fields.refuse_unless("best_of", |v| v.as_u64() == Some(1), "use n")?;
    fields.refuse_unless("prompt", |_| false, "it is for /v1/completions; send messages")?;
    fields.refuse_unless(
        "add_generation_prompt",
        |v| v == &Value::Bool(true),
        "an answer always begins a new turn",
    )?;
    fields.refuse_unless("continue_final_message", is_false, "an answer always begins a new turn")?;
    plan::refuse_for_all(fields)
}

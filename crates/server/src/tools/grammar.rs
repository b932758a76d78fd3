//! The grammar of enforced calls, and of answers that are either calls or JSON, in llguidance's Lark dialect.
//!
//! A call that is required or named takes the bare format, byte for byte: `{"name": "f", "arguments": {…}}`, more of
//! them on lines of their own where more are allowed. Where the model may choose between calling and answering in a
//! `response_format`, the calls look as the chat template shows them, and stand alone: an answer is calls or JSON,
//! never both. Arguments follow the function's own schema, which stays a document of its own, so that its `$ref`s
//! point where they did.
//!
//! Every part of a call is a lexeme of its own: llguidance's lexer never goes back, so that a longer literal would take
//! its beginning away from a JSON answer that begins alike (`{"n…`).

use consort_inference::grammar::prepare_schema;
use consort_inference::request::Grammar;
use consort_model::Tokenizer;
use serde_json::{Value, json};

use super::Format;
use super::request::{Choice, ToolRequest};
use crate::error::{ApiError, ApiResult};

/// Calls of one answer, where more than one is allowed.
const MAX_CALLS: usize = 8;

/// The grammar that answers must follow, if any: of the calls that `request` enforces, of `format`, or of either where
/// the model decides. `calls` is how calls look where they aren't enforced.
///
/// # Errors
/// Names the schema that is no schema or past the limits.
pub(crate) fn grammar(
    request: &ToolRequest,
    format: Option<Grammar>,
    calls: Format,
    tokenizer: &Tokenizer,
) -> ApiResult<Option<Grammar>> {
    let more = |next: &str| match request.parallel {
        true => format!(" ({next}){{0,{}}}", MAX_CALLS - 1),
        false => String::new(),
    };
    if request.forced() {
        let (allowed, more) = match request.choice {
            Choice::Named(index) => (index..index + 1, String::new()),
            _ => (0..request.tools.len(), more("\"\\n\" call")),
        };
        let rules = call_rules(request, allowed, "arguments")?;
        return Ok(Some(Grammar::Lark(format!("start: call{more}\n{rules}"))));
    }
    let schema = match &format {
        Some(Grammar::JsonObject) => json!({"type": "object"}),
        Some(Grammar::JsonSchema(schema)) => schema.clone(),
        _ => return Ok(format),
    };
    if !request.shown() {
        return Ok(format);
    }
    let schema = prepared(&schema, "response_format.json_schema.schema")?;
    let (calls_rule, argument_key) = match calls {
        Format::Tagged => {
            let (open, close) = (mark("<tool_call>", tokenizer), mark("</tool_call>", tokenizer));
            let one = format!("{open} SPACE? call SPACE? {close}");
            (format!("{one}{}", more(&format!("SPACE? {one}"))), "arguments")
        }
        Format::Marker => {
            let open = mark("[TOOL_CALLS]", tokenizer);
            (format!("{open} SPACE? \"[\" call{} \"]\"", more("\",\" SPACE? call")), "arguments")
        }
        // One alone: whether the JSON or the call ended at a brace couldn't be told where another call may follow.
        Format::Bare => ("call".to_owned(), "parameters"),
    };
    let rules = call_rules(request, 0..request.tools.len(), argument_key)?;
    Ok(Some(Grammar::Lark(format!(
        "start: answer | calls\nanswer: %json {schema}\ncalls: {calls_rule}\n{rules}"
    ))))
}

/// The rule `call`: one call of one of these functions.
fn call_rules(
    request: &ToolRequest,
    allowed: std::ops::Range<usize>,
    argument_key: &str,
) -> ApiResult<String> {
    let alternatives: Vec<String> = allowed.clone().map(|i| format!("call_{i}")).collect();
    let mut lark = format!("SPACE: / |\\n/\ncall: {}\n", alternatives.join(" | "));
    for i in allowed {
        let tool = &request.tools[i];
        let schema = prepared(&tool.parameters, &format!("tools[{i}].function.parameters"))?;
        // Names are letters, digits, `_`, `-` and `.`: nothing in them needs escaping.
        let name = &tool.name;
        lark.push_str(&format!(
            "call_{i}: \"{{\" \"\\\"name\\\"\" \":\" \" \" \"\\\"{name}\\\"\" \",\" \" \" \"\\\"{argument_key}\\\"\" \":\" \" \" args_{i} \"}}\"\n\
             args_{i}: %json {schema}\n"
        ));
    }
    Ok(lark)
}

fn prepared(schema: &Value, param: &str) -> ApiResult<Value> {
    prepare_schema(schema).map_err(|error| ApiError::param(param, format!("{param}: {error}")))
}

/// What announces or closes calls: the special token of that name, or the text.
fn mark(text: &str, tokenizer: &Tokenizer) -> String {
    match tokenizer.token_id(text).filter(|id| tokenizer.is_special(*id)) {
        Some(id) => format!("<[{id}]>"),
        None => format!("\"{text}\""),
    }
}

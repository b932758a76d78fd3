//! The conversation: OpenAI's messages, checked and put into the form that chat templates expect.
//!
//! What changes on the way: parts of type `text` are joined by line breaks into one text; `developer` becomes
//! `system`, the older name that templates know; a call's arguments, a string of JSON on the wire, become the object
//! they stand for, since that is what templates print.

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, kind};

/// Messages of one conversation.
const MAX_MESSAGES: usize = 4096;

/// Checks all messages.
pub(crate) fn read(messages: Vec<Value>) -> ApiResult<Vec<Value>> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "messages is empty; send at least one"));
    }
    if messages.len() > MAX_MESSAGES {
        let message = format!("messages has {} entries; at most {MAX_MESSAGES} are taken", messages.len());
        return Err(ApiError::param("messages", message));
    }
    messages.into_iter().enumerate().map(|(i, message)| read_one(message, i)).collect()
}

fn read_one(message: Value, i: usize) -> ApiResult<Value> {
    let mut fields = Fields::new(message, format!("messages[{i}]"))?;
    let mut out = Map::new();
    let role_param = fields.name("role");
    let role = fields
        .string("role")?
        .ok_or_else(|| ApiError::param(&role_param, format!("{role_param} is missing")))?;
    let role = match role.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        other => {
            let other: String = other.chars().take(32).collect();
            let message =
                format!("{role_param} is {other:?}; it must be system, developer, user, assistant or tool");
            return Err(ApiError::param(&role_param, message));
        }
    };
    out.insert("role".to_owned(), role.into());
    let content_param = fields.name("content");
    let content = content(fields.take("content"), &content_param)?;
    let mut has_calls = false;
    if role == "assistant" {
        if let Some(calls) = fields.array("tool_calls")?
            && !calls.is_empty()
        {
            let calls: Vec<Value> = calls
                .into_iter()
                .enumerate()
                .map(|(j, call)| tool_call(call, i, j))
                .collect::<ApiResult<_>>()?;
            out.insert("tool_calls".to_owned(), calls.into());
            has_calls = true;
        }
        fields.refuse_unless("audio", |_| false, "conversations are text")?;
        fields.refuse_unless("function_call", |_| false, "it was replaced by tool_calls")?;
        // What a client sends back of an earlier answer.
        fields.refuse_unless("refusal", |v| v == "", "put it into content")?;
        fields.refuse_unless(
            "annotations",
            |v| v.as_array().is_some_and(Vec::is_empty),
            "conversations are text",
        )?;
    }
    match content {
        Some(text) => out.insert("content".to_owned(), text.into()),
        None if has_calls => out.insert("content".to_owned(), "".into()),
        None => return Err(ApiError::param(&content_param, format!("{content_param} is missing"))),
    };
    if role == "tool" {
        let id_param = fields.name("tool_call_id");
        let id = fields.string("tool_call_id")?.ok_or_else(|| {
            ApiError::param(&id_param, format!("{id_param} is missing: which call does this answer?"))
        })?;
        out.insert("tool_call_id".to_owned(), id.into());
    }
    if let Some(name) = fields.string("name")? {
        out.insert("name".to_owned(), name.into());
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

fn content(value: Option<Value>, param: &str) -> ApiResult<Option<String>> {
    match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let texts: Vec<String> = parts
                .into_iter()
                .enumerate()
                .map(|(j, part)| text_part(part, &format!("{param}[{j}]")))
                .collect::<ApiResult<_>>()?;
            Ok(Some(texts.join("\n")))
        }
        Some(other) => Err(ApiError::param(
            param,
            format!("{param} must be a string or an array of parts, not {}", kind(&other)),
        )),
    }
}

fn text_part(part: Value, param: &str) -> ApiResult<String> {
    let mut fields = Fields::new(part, param)?;
    let kind = fields.string("type")?.unwrap_or_default();
    if kind != "text" {
        let kind: String = kind.chars().take(32).collect();
        let param = format!("{param}.type");
        let message = format!("{param} is {kind:?}; this model reads text only (no images, audio or files)");
        return Err(ApiError::unsupported(param, message));
    }
    let text_param = fields.name("text");
    let text = fields
        .string("text")?
        .ok_or_else(|| ApiError::param(&text_param, format!("{text_param} is missing")))?;
    fields.finish()?;
    Ok(text)
}

fn tool_call(call: Value, i: usize, j: usize) -> ApiResult<Value> {
    let path = format!("messages[{i}].tool_calls[{j}]");
    let mut fields = Fields::new(call, path.clone())?;
    let id = fields.string("id")?.unwrap_or_default();
    if fields.string("type")?.is_some_and(|kind| kind != "function") {
        return Err(ApiError::param(format!("{path}.type"), format!("{path}.type must be \"function\"")));
    }
    fields.ignore("index");
    let missing = |what: &str| ApiError::param(format!("{path}.{what}"), format!("{path}.{what} is missing"));
    let mut function = fields.nested("function")?.ok_or_else(|| missing("function"))?;
    let name = function.string("name")?.ok_or_else(|| missing("function.name"))?;
    let arguments = match function.take("arguments") {
        None => Value::Object(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
        // What isn't JSON (a model wrote it) is shown as it was.
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        Some(other) => {
            let param = format!("{path}.function.arguments");
            return Err(ApiError::param(
                &param,
                format!("{param} must be a string of JSON, not {}", kind(&other)),
            ));
        }
    };
    function.finish()?;
    fields.finish()?;
    Ok(serde_json::json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_take_the_form_templates_expect() {
        let got = read(vec![
            json!({"role": "developer", "content": "Be brief."}),
            json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": null, "refusal": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}),
            json!({"role": "tool", "tool_call_id": "c1", "content": "7"}),
        ])
        .unwrap();
        assert_eq!(got[0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(got[1]["content"], "a\nb");
        assert_eq!(got[2]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(got[3]["tool_call_id"], "c1");
    }

    #[test]
    fn wrong_messages_are_refused_by_path() {
        for (messages, param) in [
            (json!([]), "messages"),
            (json!([3]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
                "messages[0].content[0].type",
            ),
            (json!([{"role": "user", "content": "x", "mood": "good"}]), "messages[0].mood"),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}]),
                "messages[0].tool_calls[0].function.name",
            ),
            (json!([{"role": "assistant", "content": "x", "audio": {"id": "a"}}]), "messages[0].audio"),
        ] {
            let Value::Array(messages) = messages else { unreachable!() };
            assert_eq!(read(messages).unwrap_err().param.as_deref(), Some(param));
        }
    }
}

//! `tools`, `tool_choice`, `parallel_tool_calls`: what the client offers and wants.

use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, kind};

/// Functions a request may offer.
const MAX_TOOLS: usize = 128;

/// A function offered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) parameters: Value,
    /// The definition as the client wrote it, for the template.
    pub(crate) definition: Value,
}

/// Whether and what to call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Choice {
    /// No calls; the functions are not shown to the model.
    None,
    /// The model decides.
    Auto,
    /// At least one call, of any function.
    Required,
    /// One call of the function with this index.
    Named(usize),
}

/// All that a request says about tools.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolRequest {
    pub(crate) tools: Vec<Tool>,
    pub(crate) choice: Choice,
    pub(crate) parallel: bool,
}

impl ToolRequest {
    pub(crate) fn read(fields: &mut Fields) -> ApiResult<ToolRequest> {
        let values = fields.array("tools")?.unwrap_or_default();
        if values.len() > MAX_TOOLS {
            return Err(ApiError::param(
                "tools",
                format!("tools has {} entries; at most {MAX_TOOLS} are taken", values.len()),
            ));
        }
        let mut tools: Vec<Tool> = Vec::with_capacity(values.len());
        for (i, value) in values.into_iter().enumerate() {
            let tool = tool(value, i)?;
            if tools.iter().any(|t| t.name == tool.name) {
                let param = format!("tools[{i}].function.name");
                return Err(ApiError::param(
                    &param,
                    format!("{param} is {:?}, which an earlier tool has too", tool.name),
                ));
            }
            tools.push(tool);
        }
        let choice = choice(fields.take("tool_choice"), &tools)?;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        fields.refuse_unless("functions", |_| false, "it was replaced by tools")?;
        fields.refuse_unless("function_call", |_| false, "it was replaced by tool_choice")?;
        Ok(ToolRequest { tools, choice, parallel })
    }

    /// Whether the model is shown the functions.
    pub(crate) fn shown(&self) -> bool {
        !self.tools.is_empty() && self.choice != Choice::None
    }

    /// Whether a call is enforced.
    pub(crate) fn forced(&self) -> bool {
        matches!(self.choice, Choice::Required | Choice::Named(_))
    }
}

fn tool(value: Value, i: usize) -> ApiResult<Tool> {
    let definition = value.clone();
    let mut outer = Fields::new(value, format!("tools[{i}]"))?;
    match outer.string("type")?.as_deref() {
        Some("function") => {}
        other => {
            let param = format!("tools[{i}].type");
            let got = other.unwrap_or("absent");
            return Err(ApiError::param(&param, format!("{param} must be \"function\"; it is {got}")));
        }
    }
    let Some(mut function) = outer.nested("function")? else {
        let param = format!("tools[{i}].function");
        return Err(ApiError::param(&param, format!("{param} is missing")));
    };
    outer.finish()?;
    let name_param = function.name("name");
    let name = function.string("name")?.unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(fits) {
        return Err(ApiError::param(
            &name_param,
            format!("{name_param} must be 1 to 64 letters, digits, _, - or ."),
        ));
    }
    function.string("description")?;
    // Arguments of an enforced call follow the schema either way.
    function.bool("strict")?;
    let parameters = function.object("parameters")?.map_or_else(|| json!({"type": "object"}), Value::Object);
    function.finish()?;
    Ok(Tool { name, parameters, definition })
}

fn choice(value: Option<Value>, tools: &[Tool]) -> ApiResult<Choice> {
    let param = "tool_choice";
    let choice = match value {
        None if tools.is_empty() => Choice::None,
        None => Choice::Auto,
        Some(Value::String(text)) => match text.as_str() {
            "none" => Choice::None,
            "auto" if tools.is_empty() => Choice::None,
            "auto" => Choice::Auto,
            "required" => Choice::Required,
            _ => {
                return Err(ApiError::param(
                    param,
                    "tool_choice must be none, auto, required, or an object that names a function",
                ));
            }
        },
        Some(Value::Object(map)) => Choice::Named(named(map, tools)?),
        Some(other) => {
            return Err(ApiError::param(
                param,
                format!("tool_choice must be a string or an object, not {}", kind(&other)),
            ));
        }
    };
    if choice == Choice::Required && tools.is_empty() {
        return Err(ApiError::param(param, "tool_choice is required, but there are no tools"));
    }
    Ok(choice)
}

fn named(map: Map<String, Value>, tools: &[Tool]) -> ApiResult<usize> {
    let mut outer = Fields::new(Value::Object(map), "tool_choice")?;
    if outer.string("type")?.as_deref() != Some("function") {
        return Err(ApiError::param("tool_choice.type", "tool_choice.type must be \"function\""));
    }
    let missing = || ApiError::param("tool_choice.function.name", "tool_choice.function.name is missing");
    let mut function = outer.nested("function")?.ok_or_else(missing)?;
    let name = function.string("name")?.ok_or_else(missing)?;
    function.finish()?;
    outer.finish()?;
    tools.iter().position(|tool| tool.name == name).ok_or_else(|| {
        let name: String = name.chars().take(64).collect();
        ApiError::param(
            "tool_choice.function.name",
            format!("tool_choice names {name:?}, which is not among the tools"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> ApiResult<ToolRequest> {
        let mut fields = Fields::new(value, "").unwrap();
        let request = ToolRequest::read(&mut fields)?;
        fields.finish()?;
        Ok(request)
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices_are_read_and_checked_against_the_tools() {
        let choice = |choice: Value| {
            read(json!({"tools": [tool("a"), tool("b")], "tool_choice": choice})).map(|r| r.choice)
        };
        assert_eq!(choice(json!(null)).unwrap(), Choice::Auto);
        assert_eq!(choice(json!("none")).unwrap(), Choice::None);
        assert_eq!(choice(json!("required")).unwrap(), Choice::Required);
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        assert_eq!(choice(named("b")).unwrap(), Choice::Named(1));
        assert_eq!(choice(named("c")).unwrap_err().param.as_deref(), Some("tool_choice.function.name"));
        assert_eq!(choice(json!("always")).unwrap_err().param.as_deref(), Some("tool_choice"));
        assert_eq!(
            read(json!({"tool_choice": "required"})).unwrap_err().param.as_deref(),
            Some("tool_choice")
        );
        assert_eq!(read(json!({})).unwrap().choice, Choice::None);
    }

    #[test]
    fn tools_are_read_strictly() {
        for (tools, param) in [
            (json!([{"type": "retrieval"}]), "tools[0].type"),
            (json!([{"type": "function"}]), "tools[0].function"),
            (json!([{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
            (json!([tool("a"), tool("a")]), "tools[1].function.name"),
            (
                json!([{"type": "function", "function": {"name": "a", "parameters": 3}}]),
                "tools[0].function.parameters",
            ),
            (
                json!([{"type": "function", "function": {"name": "a", "params": {}}}]),
                "tools[0].function.params",
            ),
        ] {
            assert_eq!(read(json!({"tools": tools})).unwrap_err().param.as_deref(), Some(param));
        }
        assert_eq!(read(json!({"functions": []})).unwrap_err().param.as_deref(), Some("functions"));
    }
}

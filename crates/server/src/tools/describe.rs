//! Tools for a chat template that knows nothing of them.
//!
//! The functions go into the system message as their JSON definitions, one a line, with the tagged format to answer
//! in; calls and results of earlier turns become plain text in the same format. Small models trained on the tagged
//! format know it; others follow it about as well as any.

use serde_json::{Map, Value, json};

use super::request::{Tool, ToolRequest};

/// The text that offers `request`'s functions.
fn offer(request: &ToolRequest) -> String {
    let mut text = String::from("You can call functions. Each line here describes one, as JSON:\n");
    for Tool { definition, .. } in &request.tools {
        let function = definition.get("function").unwrap_or(definition);
        text.push_str(&function.to_string());
        text.push('\n');
    }
    text.push_str("To call one, answer with its name and arguments as JSON between two tags:\n");
    text.push_str("<tool_call>\n{\"name\": \"function name\", \"arguments\": {\"argument\": \"value\"}}\n</tool_call>\n");
    text.push_str("Results come back between <tool_response> and </tool_response>. ");
    text.push_str(if request.forced() {
        "You must call a function now."
    } else {
        "Call a function only where it helps; otherwise just answer."
    });
    text
}

/// Puts the offer into the system message (made, where there is none).
pub(crate) fn describe(messages: &mut Vec<Value>, request: &ToolRequest) {
    let offer = offer(request);
    match messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let said = first["content"].as_str().unwrap_or_default();
            first["content"] =
                if said.is_empty() { offer.into() } else { format!("{said}\n\n{offer}").into() };
        }
        _ => messages.insert(0, json!({"role": "system", "content": offer})),
    }
}

/// Turns earlier calls and results into the text of ordinary turns. Results in a row share one turn.
pub(crate) fn spell_out(messages: Vec<Value>) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len());
    let mut last_was_tool = false;
    for mut message in messages {
        let is_tool = message["role"] == "tool";
        if is_tool {
            let result = format!(
                "<tool_response>\n{}\n</tool_response>",
                message["content"].as_str().unwrap_or_default()
            );
            match plain.last_mut() {
                Some(previous) if last_was_tool => {
                    let said = previous["content"].as_str().unwrap_or_default();
                    previous["content"] = format!("{said}\n{result}").into();
                }
                _ => plain.push(json!({"role": "user", "content": result})),
            }
        } else {
            if let Some(Value::Array(calls)) = message.as_object_mut().and_then(|m| m.remove("tool_calls")) {
                let mut said = message["content"].as_str().unwrap_or_default().to_owned();
                for call in calls {
                    let mut shown = Map::new();
                    shown.insert("name".to_owned(), call["function"]["name"].clone());
                    shown.insert("arguments".to_owned(), call["function"]["arguments"].clone());
                    let separator = if said.is_empty() { "" } else { "\n" };
                    said.push_str(&format!("{separator}<tool_call>\n{}\n</tool_call>", Value::Object(shown)));
                }
                message["content"] = said.into();
            }
            plain.push(message);
        }
        last_was_tool = is_tool;
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::super::request::Choice;
    use super::*;

    #[test]
    fn the_offer_joins_the_system_message_and_turns_become_text() {
        let definition = json!({"type": "function", "function": {"name": "add"}});
        let tool = Tool { name: "add".to_owned(), parameters: json!({}), definition };
        let request = ToolRequest { tools: vec![tool], choice: Choice::Auto, parallel: true };
        let mut messages = spell_out(vec![
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}),
            json!({"role": "tool", "content": "2"}),
            json!({"role": "tool", "content": "3"}),
        ]);
        describe(&mut messages, &request);
        let system = messages[0]["content"].as_str().unwrap();
        assert!(system.starts_with("Be brief.\n\n") && system.contains("{\"name\":\"add\"}"), "{system}");
        assert_eq!(
            messages[1]["content"],
            "<tool_call>\n{\"name\":\"add\",\"arguments\":{\"a\":1}}\n</tool_call>"
        );
        assert_eq!(messages.len(), 3);
        assert_eq!(messages[2]["role"], "user");
        assert_eq!(
            messages[2]["content"],
            "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
        );
    }
}

//! The grammar of an enforced call, in llguidance's Lark dialect.
//!
//! The bare format, byte for byte: `{"name": "f", "arguments": {…}}`, more of them on lines of their own where more
//! are allowed. The arguments follow the function's own schema, which stays a document of its own so that its `$ref`s
//! point where they did.

use consort_inference::request::Grammar;

use super::request::{Choice, ToolRequest};

/// Calls of one answer, where more than one is allowed.
const MAX_CALLS: usize = 8;

/// The grammar that `request` asks for; none where no call is enforced.
pub(crate) fn grammar(request: &ToolRequest) -> Option<Grammar> {
    let (allowed, parallel): (Vec<usize>, bool) = match request.choice {
        Choice::None | Choice::Auto => return None,
        Choice::Required => ((0..request.tools.len()).collect(), request.parallel),
        Choice::Named(index) => (vec![index], false),
    };
    let mut lark = if parallel {
        format!("start: call (\"\\n\" call){{0,{}}}\n", MAX_CALLS - 1)
    } else {
        String::from("start: call\n")
    };
    let alternatives: Vec<String> = allowed.iter().map(|i| format!("call_{i}")).collect();
    lark.push_str(&format!("call: {}\n", alternatives.join(" | ")));
    for i in allowed {
        let tool = &request.tools[i];
        // Names are letters, digits, `_`, `-` and `.`: nothing in them needs escaping.
        lark.push_str(&format!(
            "call_{i}: \"{{\\\"name\\\": \\\"{}\\\", \\\"arguments\\\": \" args_{i} \"}}\"\n",
            tool.name
        ));
        lark.push_str(&format!("args_{i}: %json {}\n", tool.parameters));
    }
    Some(Grammar::Lark(lark))
}

//! The Jinja environment that transformers gives to chat templates, in minijinja.

use std::time::SystemTime;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;

use super::{date, python};

/// The name of the one template in an environment.
pub(super) const NAME: &str = "chat_template";

/// Longest string that one call may make, in bytes: `replace` and `join` multiply lengths.
const MAX_STRING_BYTES: usize = 16 << 20;

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// An environment without a template.
pub(super) fn new(clock: fn() -> SystemTime) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_recursion_limit(200);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out: &mut Output, _: &State, value: &Value| {
        if let Some(text) = value.as_str() {
            return out.write_str(text).map_err(Error::from);
        }
        out.write_str(&python::str_of(value)).map_err(Error::from)
    });
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| python::str_of(value));
    environment.add_filter("replace", |text: &Value, from: &Value, to: &Value| {
        let (text, from, to) = (python::str_of(text), python::str_of(from), python::str_of(to));
        replace(&text, &from, &to, None).map(Value::from)
    });
    environment.add_filter("trim", |value: &Value, chars: Option<String>| {
        let text = python::str_of(value);
        let trimmed = match chars {
            Some(chars) => text.trim_matches(|c| chars.contains(c)),
            None => text.trim(),
        };
        trimmed.to_owned()
    });
    // As Python has it: a string is iterable and a sequence, and so is a dictionary; None is neither.
    environment.add_test("iterable", |value: &Value| is_many(value.kind()) || value.is_undefined());
    environment.add_test("sequence", |value: &Value| is_many(value.kind()));
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = python::str_of(message);
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: &str| date::strftime(format, clock()));
    environment
}

fn is_many(kind: ValueKind) -> bool {
    matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

/// Methods of Python's strings, lists and dictionaries.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match (name, args) {
            // These two would multiply lengths, or never end, in the general implementation.
            ("replace", [from, to, rest @ ..]) => {
                let (from, to) = (python::str_of(from), python::str_of(to));
                let count = rest.first().and_then(|n| i64::try_from(n.clone()).ok());
                let count = count.and_then(|n| usize::try_from(n).ok());
                return replace(text, &from, &to, count).map(Value::from);
            }
            ("count", [what]) => {
                let what = python::str_of(what);
                let count =
                    if what.is_empty() { text.chars().count() + 1 } else { text.matches(&what).count() };
                return Ok(Value::from(count));
            }
            ("join", [items]) => {
                let mut out = String::new();
                for (i, item) in items.try_iter()?.enumerate() {
                    if i > 0 {
                        out.push_str(text);
                    }
                    out.push_str(&python::str_of(&item));
                    check_length(out.len())?;
                }
                return Ok(Value::from(out));
            }
            ("removeprefix", [prefix]) => {
                let prefix = python::str_of(prefix);
                return Ok(Value::from(text.strip_prefix(prefix.as_str()).unwrap_or(text)));
            }
            ("removesuffix", [suffix]) => {
                let suffix = python::str_of(suffix);
                return Ok(Value::from(text.strip_suffix(suffix.as_str()).unwrap_or(text)));
            }
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn replace(text: &str, from: &str, to: &str, count: Option<usize>) -> Result<String, Error> {
    let found = if from.is_empty() { text.chars().count() + 1 } else { text.matches(from).count() };
    let found = found.min(count.unwrap_or(usize::MAX));
    check_length(text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(text.replacen(from, to, found))
}

fn check_length(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_STRING_BYTES {
        let reason = format!("it makes a string longer than {} MiB", MAX_STRING_BYTES >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    Ok(())
}

/// transformers' `tojson`: Python's `json.dumps` without HTML escapes.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson got an undefined value"));
    }
    let indent: Option<Value> = options.get("indent")?;
    let indent = match indent.filter(|v| !v.is_none()) {
        None => None,
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(" ".repeat(usize::try_from(indent)?.min(32))),
        },
    };
    let separators: Option<Value> = options.get("separators")?;
    let (comma, colon) = match separators.filter(|v| !v.is_none()) {
        Some(pair) => {
            (python::str_of(&pair.get_item_by_index(0)?), python::str_of(&pair.get_item_by_index(1)?))
        }
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    options.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, "tojson can't write this").with_source(e))?;
    Ok(Value::from(python::Dumps { indent, comma, colon, sort_keys, ascii }.dump(&json)))
}

/// Makes `{% generation %}` and its end (they mark the assistant's words for training) a block without effect.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + length];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => word,
        };
        out.push_str(&rest[..start + 2]);
        if replacement == word {
            out.push_str(inner);
        } else {
            out.push_str(&inner.replacen(word, replacement, 1));
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

/// An error in a sentence: what a template raised as it said it, all else with the line.
pub(super) fn explain(error: &Error) -> String {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref::<Raised>() {
            return raised.0.clone();
        }
        source = inner.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "it ran too long on these messages".to_owned();
    }
    // What the output buffer refused.
    if let Some(io) = std::error::Error::source(error).filter(|_| error.kind() == ErrorKind::WriteFailure) {
        return io.to_string();
    }
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

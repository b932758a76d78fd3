//! Values as Python prints them: templates are written against its `str` and `json.dumps`.

use std::fmt::Write as _;

use minijinja::Value;
use minijinja::value::ValueKind;
use serde_json::Value as Json;

/// `str(value)`: what `{{ value }}` prints.
pub(super) fn str_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => value.to_string(),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::None => "None".to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(|v| repr(&v)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(pair).collect();
            format!("{{{}}}", items.join(", "))
        }
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or(value.to_string(), float)
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `repr` of a float: the shortest digits that read back the same, in scientific notation from 1e16 on.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { if x > 0.0 { "inf" } else { "-inf" }.into() };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&power) || x == 0.0 {
        let plain = format!("{x}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs())
}

/// How `json.dumps` is asked to write.
#[derive(Clone, Debug)]
pub(super) struct Dumps {
    /// What one level is indented by; `None` writes all on one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) comma: String,
    /// Between key and value.
    pub(super) colon: String,
    pub(super) sort_keys: bool,
    pub(super) ascii: bool,
}

impl Dumps {
    /// `json.dumps(value, …)`.
    pub(super) fn dump(&self, value: &Json) -> String {
        let mut out = String::new();
        self.write(value, 0, &mut out);
        out
    }

    fn write(&self, value: &Json, level: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
                Some(x) => out.push_str(&float(x)),
                None => {
                    let _ = write!(out, "{n}");
                }
            },
            Json::String(text) => self.string(text, out),
            Json::Array(items) => self.nested(items, level, ['[', ']'], out, |item, level, out| {
                self.write(item, level, out);
            }),
            Json::Object(map) => {
                let mut pairs: Vec<(&String, &Json)> = map.iter().collect();
                if self.sort_keys {
                    pairs.sort_by_key(|&(key, _)| key);
                }
                self.nested(&pairs, level, ['{', '}'], out, |&(key, item), level, out| {
                    self.string(key, out);
                    out.push_str(&self.colon);
                    self.write(item, level, out);
                });
            }
        }
    }

    fn nested<T>(
        &self,
        items: &[T],
        level: usize,
        brackets: [char; 2],
        out: &mut String,
        mut write: impl FnMut(&T, usize, &mut String),
    ) {
        let line = |level: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..level).for_each(|_| out.push_str(indent));
            }
        };
        out.push(brackets[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.comma);
            }
            line(level + 1, out);
            write(item, level + 1, out);
        }
        if !items.is_empty() {
            line(level, out);
        }
        out.push(brackets[1]);
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                // The guard's mark is private-use and must come out as it went in.
                c if c < ' ' || self.ascii && !c.is_ascii() && !('\u{E000}'..='\u{F8FF}').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_as_python_writes_them() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-300, "-2.5e-300"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn values_as_python_prints_them() {
        let value = Value::from_serialize(json!({"a": [true, null, 1, 2.0, "it's"], "b\n": "\"'\u{1}"}));
        assert_eq!(str_of(&value), r#"{'a': [True, None, 1, 2.0, "it's"], 'b\n': '"\'\x01'}"#);
        assert_eq!(str_of(&Value::from("plain\n")), "plain\n");
        assert_eq!(str_of(&Value::UNDEFINED), "");
    }

    #[test]
    fn dumps_as_python_does() {
        let value = json!({"b": [1, 2.5, {}, []], "a": "é<\"\u{7f}\u{8}😀"});
        let one_line =
            Dumps { indent: None, comma: ", ".into(), colon: ": ".into(), sort_keys: false, ascii: false };
        assert_eq!(one_line.dump(&value), "{\"b\": [1, 2.5, {}, []], \"a\": \"é<\\\"\u{7f}\\b😀\"}");
        let lines =
            Dumps { indent: Some("  ".into()), comma: ",".into(), sort_keys: true, ascii: true, ..one_line };
        assert_eq!(
            lines.dump(&value),
            "{\n  \"a\": \"\\u00e9<\\\"\u{7f}\\b\\ud83d\\ude00\",\n  \"b\": [\n    1,\n    2.5,\n    {},\n    []\n  ]\n}"
        );
    }
}

//! Watches one JSON object go by and says what its name and its arguments are, as soon as that is known.
//!
//! It never builds the object: it follows depth, strings and the top level's keys, and remembers where the arguments
//! begin, so that they can be passed on while they are still being written.

/// Where in the top level of the object the scan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before a key or the end.
    Key,
    /// In a key's string.
    InKey,
    /// Between a key and its colon.
    Colon,
    /// Between the colon and the value.
    Value,
    /// In a value.
    InValue,
    /// After the closing brace.
    Done,
}

/// Which field of the object a value belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

/// One object under scan.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    /// The object's text so far, from its opening brace.
    raw: String,
    place: Place,
    field: Field,
    depth: usize,
    in_string: bool,
    escaped: bool,
    value_start: usize,
    key_start: usize,
    name: Option<String>,
    /// Whether the first key is the name; none before it is complete.
    name_first: Option<bool>,
    /// Start, and end once it is known, of the arguments in `raw`.
    arguments: Option<(usize, Option<usize>)>,
}

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The object goes on.
    More,
    /// It ended with this character.
    End,
    /// It is no JSON object.
    Broken,
}

/// Nesting of a value; no call needs more, and a model that opens brackets for ever should be noticed.
const MAX_DEPTH: usize = 64;

impl Scan {
    /// At the object's opening brace, which is taken.
    pub(crate) fn new() -> Scan {
        Scan {
            raw: String::from("{"),
            place: Place::Key,
            field: Field::Other,
            depth: 1,
            in_string: false,
            escaped: false,
            value_start: 0,
            key_start: 0,
            name: None,
            name_first: None,
            arguments: None,
        }
    }

    /// Whether the first key is clear and isn't the name.
    pub(crate) fn begins_without_name(&self) -> bool {
        self.name_first == Some(false)
    }

    /// The name, once its string is complete.
    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The arguments' text so far.
    pub(crate) fn arguments(&self) -> Option<&str> {
        let (start, end) = self.arguments?;
        self.raw.get(start..end.unwrap_or(self.raw.len()))
    }

    /// Takes one character.
    pub(crate) fn push(&mut self, c: char) -> Step {
        let at = self.raw.len();
        self.raw.push(c);
        match self.place {
            Place::Key => match c {
                '"' => {
                    self.key_start = at;
                    (self.place, self.escaped) = (Place::InKey, false);
                }
                '}' => return self.end(),
                ',' => {}
                c if c.is_whitespace() => {}
                _ => return Step::Broken,
            },
            Place::InKey => {
                if self.string_ends(c) {
                    self.field = match self.raw.get(self.key_start..) {
                        Some("\"name\"") => Field::Name,
                        Some("\"arguments\"" | "\"parameters\"") => Field::Arguments,
                        _ => Field::Other,
                    };
                    self.name_first.get_or_insert(self.field == Field::Name);
                    self.place = Place::Colon;
                }
            }
            Place::Colon => match c {
                ':' => self.place = Place::Value,
                c if c.is_whitespace() => {}
                _ => return Step::Broken,
            },
            Place::Value => {
                if !c.is_whitespace() {
                    self.value_start = at;
                    (self.place, self.escaped, self.in_string) = (Place::InValue, false, c == '"');
                    match c {
                        '{' | '[' => self.depth += 1,
                        '}' | ']' | ',' => return Step::Broken,
                        _ => {}
                    }
                    if self.field == Field::Arguments && self.arguments.is_none() {
                        self.arguments = Some((at, None));
                    }
                }
            }
            Place::InValue if self.in_string => {
                if self.string_ends(c) {
                    self.in_string = false;
                    if self.depth == 1 {
                        self.value_ends(at + 1);
                    }
                }
            }
            Place::InValue => match c {
                '"' => self.in_string = true,
                '{' | '[' => {
                    self.depth += 1;
                    if self.depth > MAX_DEPTH {
                        return Step::Broken;
                    }
                }
                ',' if self.depth == 1 => self.value_ends(at),
                '}' if self.depth == 1 => {
                    self.value_ends(at);
                    return self.end();
                }
                '}' | ']' if self.depth > 1 => {
                    self.depth -= 1;
                    if self.depth == 1 {
                        self.value_ends(at + 1);
                    }
                }
                _ => {}
            },
            Place::Done => return Step::Broken,
        }
        Step::More
    }

    /// Whether `c` closes the string it is in.
    fn string_ends(&mut self, c: char) -> bool {
        match (self.escaped, c) {
            (true, _) => self.escaped = false,
            (false, '\\') => self.escaped = true,
            (false, '"') => return true,
            _ => {}
        }
        false
    }

    fn value_ends(&mut self, end: usize) {
        match self.field {
            Field::Name => {
                let text = self.raw.get(self.value_start..end).unwrap_or_default();
                self.name = serde_json::from_str(text).ok();
            }
            Field::Arguments => {
                if let Some((start, None)) = self.arguments {
                    let text = self.raw.get(start..end).unwrap_or_default();
                    self.arguments = Some((start, Some(start + text.trim_end().len())));
                }
            }
            Field::Other => {}
        }
        self.field = Field::Other;
        self.place = Place::Key;
    }

    fn end(&mut self) -> Step {
        self.place = Place::Done;
        Step::End
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> (Step, Scan) {
        let mut scan = Scan::new();
        let mut step = Step::More;
        for c in text.chars().skip(1) {
            step = scan.push(c);
            if step != Step::More {
                break;
            }
        }
        (step, scan)
    }

    #[test]
    fn finds_name_and_arguments_in_any_order() {
        for text in [
            r#"{"name": "f", "arguments": {"a": "}\"{", "b": [1, {"c": 2}]}}"#,
            r#"{"arguments":{"a": "}\"{", "b": [1, {"c": 2}]},"id":7,"name":"f"}"#,
            r#"{ "id": [1], "name" : "\u0066", "parameters" : {"a": "}\"{", "b": [1, {"c": 2}]} }"#,
        ] {
            let (step, scan) = scan(text);
            assert_eq!(step, Step::End, "{text}");
            assert_eq!(scan.name(), Some("f"));
            assert_eq!(scan.arguments(), Some(r#"{"a": "}\"{", "b": [1, {"c": 2}]}"#));
        }
        let (_, scan) = scan(r#"{"name": "f", "arguments": {"a": 1"#);
        assert_eq!(scan.arguments(), Some(r#"{"a": 1"#));
    }

    #[test]
    fn what_is_no_object_is_broken() {
        for text in ["{hello}", "{\"a\" 1}", "{\"a\":}", "{1: 2}"] {
            assert_eq!(scan(text).0, Step::Broken, "{text}");
        }
        let deep = format!("{{\"a\": {}", "[".repeat(100));
        assert_eq!(scan(&deep).0, Step::Broken);
    }
}

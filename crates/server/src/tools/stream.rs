//! Reads calls out of an answer as it is written.
//!
//! Text in, pieces out: ordinary text, the start of a call, more of its arguments. Whole and streamed answers take the
//! same road, so they can't differ. What might be the beginning of a call is held back until it is clear; what turns
//! out to be none (no JSON, a function nobody offered) comes out as the text it was.

use super::scan::{Scan, Step};

/// How calls look in a model's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Each call, or a list of them, between `<tool_call>` and `</tool_call>`.
    Tagged,
    /// `[TOOL_CALLS]`, then calls to the end.
    Marker,
    /// Nothing but calls: the answer's first character is a brace (or `<|python_tag|>` comes before it).
    Bare,
}

impl Format {
    /// The format a template teaches; none where it says nothing of calls.
    pub(crate) fn of_template(source: &str) -> Option<Format> {
        if source.contains("[TOOL_CALLS]") {
            Some(Format::Marker)
        } else if source.contains("<tool_call>") {
            Some(Format::Tagged)
        } else if source.contains("\"parameters\"")
            || source.contains("<|python_tag|>")
            || source.contains("ipython")
        {
            Some(Format::Bare)
        } else {
            None
        }
    }

    /// What announces calls.
    fn opening(self) -> &'static str {
        match self {
            Format::Tagged => "<tool_call>",
            Format::Marker => "[TOOL_CALLS]",
            Format::Bare => "<|python_tag|>",
        }
    }

    fn closing(self) -> Option<&'static str> {
        (self == Format::Tagged).then_some("</tool_call>")
    }

    /// What announces and what ends calls: text in some models, special tokens in others.
    pub(crate) fn marks(self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.opening()).chain(self.closing())
    }
}

/// The special tokens that announce or end calls, and the text they stand for.
pub(crate) type Marks = std::sync::Arc<[(u32, &'static str)]>;

/// What comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolPiece {
    /// Ordinary text.
    Text(String),
    /// A call begins.
    Call {
        /// Which of the answer's.
        index: usize,
        /// Of the function.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call's.
        index: usize,
        /// JSON text.
        text: String,
    },
}

/// One answer under reading.
#[derive(Clone, Debug)]
pub(crate) struct ToolStream {
    format: Format,
    /// Names that count as calls.
    names: Vec<String>,
    calls: usize,
    /// Calls past this are dropped.
    max_calls: usize,
    /// A grammar lets the answer be calls or JSON: calls come first or not at all, the name first and then arguments.
    either: bool,
    state: State,
    /// Held back: white space and what might be an opening. In a section: its text since the last call that got out.
    held: String,
    /// Bytes of white space that `held` begins with, before an opening.
    blank: usize,
    /// Whether anything but white space came before.
    began: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Ordinary text.
    Text,
    /// Among calls, between objects.
    Section,
    /// In an object; how much of its arguments is out, once its call is announced.
    Object { scan: Box<Scan>, sent: Option<usize> },
    /// No calls can follow: everything is text.
    Plain,
    /// More calls than were allowed: the rest is dropped.
    Drop,
}

impl ToolStream {
    pub(crate) fn new(format: Format, names: Vec<String>, max_calls: usize) -> ToolStream {
        ToolStream {
            format,
            names,
            calls: 0,
            max_calls,
            either: false,
            state: State::Text,
            held: String::new(),
            blank: 0,
            began: false,
        }
    }

    /// For answers under a grammar of calls or JSON: what looks like a call within the JSON is none.
    pub(crate) fn calls_or_json(self) -> ToolStream {
        ToolStream { either: true, ..self }
    }

    /// Whether a call came.
    pub(crate) fn called(&self) -> bool {
        self.calls > 0
    }

    /// Takes more of the answer.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<ToolPiece>) {
        for c in text.chars() {
            self.take(c, out);
        }
        if let State::Object { scan, sent: Some(sent) } = &mut self.state {
            send_arguments(scan, sent, self.calls - 1, out);
        }
    }

    /// The answer is over: what was held back comes out.
    pub(crate) fn finish(&mut self, out: &mut Vec<ToolPiece>) {
        let announced = matches!(&self.state, State::Object { sent: Some(_), .. });
        let held = std::mem::take(&mut self.held);
        // White space and closing brackets around calls say nothing.
        let around = |c: char| c.is_whitespace() || matches!(c, ']' | ',' | ';');
        let rest = held.trim_start_matches(around);
        let in_section = matches!(self.state, State::Section);
        let closes = in_section && self.format.closing().is_some_and(|closing| closing.starts_with(rest));
        let noise = self.called() && (rest.is_empty() || closes);
        if !announced && !noise {
            emit_text(out, &held);
        }
        self.state = State::Plain;
    }

    fn take(&mut self, c: char, out: &mut Vec<ToolPiece>) {
        match &mut self.state {
            State::Plain => emit_char(out, c),
            State::Drop => {}
            State::Text => self.take_text(c, out),
            State::Section => self.take_between(c, out),
            State::Object { scan, sent } => {
                if sent.is_none() {
                    self.held.push(c);
                }
                match scan.push(c) {
                    Step::More => self.announce(false, out),
                    Step::End => self.announce(true, out),
                    Step::Broken => {
                        if sent.is_some() {
                            // Announced already: its arguments are cut off here.
                            self.state = State::Section;
                        } else {
                            self.give_up(out);
                        }
                    }
                }
            }
        }
    }

    fn take_text(&mut self, c: char, out: &mut Vec<ToolPiece>) {
        let opening = self.format.opening();
        if self.format == Format::Bare && !self.began && c == '{' && self.held.trim().is_empty() {
            self.held.push(c);
            self.state = State::Object { scan: Box::new(Scan::new()), sent: None };
            return;
        }
        // Any amount of white space may come first: it isn't looked at again with each character.
        let blank = self.blank == self.held.len() && c.is_whitespace();
        self.held.push(c);
        if blank {
            self.blank = self.held.len();
            return;
        }
        loop {
            let candidate = &self.held[self.blank..];
            if candidate == opening {
                self.state = State::Section;
                return;
            }
            if opening.starts_with(candidate) {
                return;
            }
            // Neither white space nor an opening begins at the candidate's first character: release up to after it.
            let cut = self.blank + candidate.chars().next().map_or(0, char::len_utf8);
            let rest = self.held.split_off(cut);
            emit_text(out, &std::mem::replace(&mut self.held, rest));
            self.blank = self.held.len() - self.held.trim_start().len();
            self.began = true;
            if self.format == Format::Bare || self.either {
                let rest = std::mem::take(&mut self.held);
                emit_text(out, &rest);
                self.state = State::Plain;
                return;
            }
            if self.held.is_empty() {
                return;
            }
        }
    }

    fn take_between(&mut self, c: char, out: &mut Vec<ToolPiece>) {
        self.held.push(c);
        if let Some(closing) = self.format.closing() {
            // No further back than a closing is long.
            let from = self.held.len().saturating_sub(closing.len());
            let tail_start = self.held.as_bytes()[from..]
                .iter()
                .rposition(|byte| *byte == b'<')
                .map(|at| from + at)
                .filter(|at| !self.held[*at..].starts_with(self.format.opening()));
            if let Some(at) = tail_start {
                let tail = &self.held[at..];
                if tail == closing {
                    if self.called() {
                        self.held.clear();
                        self.blank = 0;
                        self.began = true;
                        self.state = State::Text;
                    } else {
                        self.give_up(out);
                    }
                    return;
                }
                if closing.starts_with(tail) {
                    return;
                }
            }
        }
        match c {
            '{' if self.calls < self.max_calls => {
                self.state = State::Object { scan: Box::new(Scan::new()), sent: None };
            }
            '{' => {
                self.held.clear();
                self.state = State::Drop;
            }
            '[' | ']' | ',' | ';' => {}
            c if c.is_whitespace() => {}
            _ => self.give_up(out),
        }
    }

    /// After a character of an object: announces its call once the name is known to be one of ours and the arguments
    /// have begun, and sends what is new of them.
    fn announce(&mut self, ended: bool, out: &mut Vec<ToolPiece>) {
        let State::Object { scan, sent } = &mut self.state else { return };
        if self.either && scan.begins_without_name() {
            return self.give_up(out);
        }
        if sent.is_none()
            && let Some(name) = scan.name()
        {
            if !self.names.iter().any(|offered| offered == name) {
                return self.give_up(out);
            }
            // Arguments written as a string hold the JSON inside it: they wait for the end.
            let streams = scan.arguments().is_some_and(|a| a.starts_with('{'));
            if streams || (ended && (!self.either || scan.arguments().is_some())) {
                out.push(ToolPiece::Call { index: self.calls, name: name.to_owned() });
                self.calls += 1;
                self.held.clear();
                *sent = Some(0);
            }
        }
        if ended {
            match sent {
                Some(sent) => {
                    send_arguments(scan, sent, self.calls - 1, out);
                    self.state = State::Section;
                }
                None => self.give_up(out),
            }
        }
    }

    /// It was no call: the held text comes out as text.
    fn give_up(&mut self, out: &mut Vec<ToolPiece>) {
        emit_text(out, &std::mem::take(&mut self.held));
        self.blank = 0;
        self.began = true;
        let last = self.format == Format::Bare || self.either;
        self.state = if last { State::Plain } else { State::Text };
    }
}

fn send_arguments(scan: &Scan, sent: &mut usize, index: usize, out: &mut Vec<ToolPiece>) {
    let all = match scan.arguments() {
        None => "{}".to_owned(),
        // A string that holds the arguments' JSON.
        Some(text) if text.starts_with('"') => serde_json::from_str(text).unwrap_or_else(|_| text.to_owned()),
        Some(text) => text.to_owned(),
    };
    if let Some(new) = all.get(*sent..).filter(|new| !new.is_empty()) {
        *sent = all.len();
        out.push(ToolPiece::Arguments { index, text: new.to_owned() });
    }
}

fn emit_text(out: &mut Vec<ToolPiece>, text: &str) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(ToolPiece::Text(last)) => last.push_str(text),
        _ => out.push(ToolPiece::Text(text.to_owned())),
    }
}

fn emit_char(out: &mut Vec<ToolPiece>, c: char) {
    emit_text(out, c.encode_utf8(&mut [0; 4]));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name and arguments of each call.
    type Calls = Vec<(String, String)>;

    /// Text, then calls; fed in pieces of `step` characters.
    fn read(format: Format, text: &str, step: usize) -> (String, Calls) {
        let mut stream = ToolStream::new(format, vec!["add".to_owned(), "say".to_owned()], 8);
        let mut out = Vec::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(step) {
            stream.push(&piece.iter().collect::<String>(), &mut out);
        }
        stream.finish(&mut out);
        let (mut said, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for piece in out {
            match piece {
                ToolPiece::Text(text) => said.push_str(&text),
                ToolPiece::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                ToolPiece::Arguments { index, text } => calls[index].1.push_str(&text),
            }
        }
        (said, calls)
    }

    #[test]
    fn formats_are_read_however_the_text_is_cut() {
        let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
        let add = || call("add", r#"{"a": 1, "b": "x}"}"#);
        let table: Vec<(Format, &str, &str, Calls)> = vec![
            (Format::Tagged, "Hello there.", "Hello there.", vec![]),
            (Format::Tagged, "a < b and\n\n<tool> is fine ", "a < b and\n\n<tool> is fine ", vec![]),
            (
                Format::Tagged,
                r#"<tool_call>
{"name": "add", "arguments": {"a": 1, "b": "x}"}}
</tool_call>"#,
                "",
                vec![add()],
            ),
            (
                Format::Tagged,
                r#"Let me see.
<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x}"}}</tool_call>
<tool_call>{"name": "say", "arguments": {}}</tool_call>"#,
                "Let me see.",
                vec![add(), call("say", "{}")],
            ),
            (
                Format::Tagged,
                r#"<tool_call>[{"name": "add", "arguments": {"a": 1, "b": "x}"}}, {"name": "say"}]</tool_call>"#,
                "",
                vec![add(), call("say", "{}")],
            ),
            (
                Format::Tagged,
                r#"<tool_call>{"name": "steal", "arguments": {}}</tool_call>"#,
                r#"<tool_call>{"name": "steal", "arguments": {}}</tool_call>"#,
                vec![],
            ),
            (Format::Tagged, "<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", vec![]),
            (
                Format::Tagged,
                r#"<tool_call>{"name": "add", "arguments": {"a": 1"#,
                "",
                vec![call("add", r#"{"a": 1"#)],
            ),
            (Format::Tagged, r#"<tool_call>{"name": "ad"#, r#"<tool_call>{"name": "ad"#, vec![]),
            (
                Format::Tagged,
                r#"<tool_call>{"arguments": "{\"a\": 1}", "name": "add"}</tool_call>"#,
                "",
                vec![call("add", r#"{"a": 1}"#)],
            ),
            (
                Format::Marker,
                r#"[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x}"}}, {"name": "say", "arguments": {}}]"#,
                "",
                vec![add(), call("say", "{}")],
            ),
            (Format::Marker, "[TOOLS] no", "[TOOLS] no", vec![]),
            (Format::Bare, r#"{"name": "add", "parameters": {"a": 1, "b": "x}"}}"#, "", vec![add()]),
            (
                Format::Bare,
                r#"<|python_tag|>{"name": "say", "parameters": {}}; {"name": "say", "parameters": {}}"#,
                "",
                vec![call("say", "{}"), call("say", "{}")],
            ),
            (
                Format::Bare,
                "{\"name\": \"add\", \"arguments\": {}}\n{\"name\": \"say\", \"arguments\": {}}",
                "",
                vec![call("add", "{}"), call("say", "{}")],
            ),
            (Format::Bare, r#"{"answer": 42}"#, r#"{"answer": 42}"#, vec![]),
            (Format::Bare, "{ not json", "{ not json", vec![]),
            (
                Format::Bare,
                "plain {\"name\": \"add\", \"parameters\": {}}",
                "plain {\"name\": \"add\", \"parameters\": {}}",
                vec![],
            ),
            (Format::Bare, "  \n", "  \n", vec![]),
        ];
        for (format, text, said, calls) in table {
            for step in [1, 2, 3, 7, 1000] {
                assert_eq!(read(format, text, step), (said.to_owned(), calls.clone()), "{text:?} by {step}");
            }
        }
    }

    #[test]
    fn json_that_looks_like_a_call_is_none_where_calls_come_first_or_never() {
        let read = |format: Format, text: &str| {
            let mut stream = ToolStream::new(format, vec!["add".to_owned()], 8).calls_or_json();
            let mut out = Vec::new();
            text.chars().for_each(|c| stream.push(c.encode_utf8(&mut [0; 4]), &mut out));
            // Before the end: what is surely text isn't held back.
            let said: String = out.iter().map(|p| if let ToolPiece::Text(t) = p { t } else { "" }).collect();
            stream.finish(&mut out);
            (said, stream.called())
        };
        for format in [Format::Tagged, Format::Marker, Format::Bare] {
            for text in [
                r#"{"a": 1, "b": "<tool_call>{", "name": "add", "arguments": {}}"#,
                r#"{"name": "adder", "arguments": {}}"#,
                r#"["[TOOL_CALLS]", {"name": "add", "arguments": {}}]"#,
                r#"{"name": "add"}"#,
            ] {
                assert_eq!(read(format, text), (text.to_owned(), false), "{format:?}");
            }
        }
        assert!(read(Format::Tagged, r#"<tool_call>{"name": "add", "arguments": {}}</tool_call>"#).1);
        assert!(read(Format::Bare, r#"{"name": "add", "parameters": {}}"#).1);
        let mut stream = ToolStream::new(Format::Bare, vec!["add".to_owned()], 8).calls_or_json();
        let mut out = Vec::new();
        stream.push("{\"a\"", &mut out);
        assert_eq!(out, [ToolPiece::Text("{\"a\"".to_owned())], "clear at its first key");
    }

    /// A model that writes nothing but white space, for the length of a long context: looking through all of it again
    /// with each character would take hours.
    #[test]
    fn white_space_without_end_costs_no_more_than_text() {
        let blank = " \n".repeat(2_000_000);
        for format in [Format::Tagged, Format::Marker, Format::Bare] {
            assert_eq!(read(format, &blank, 4096), (blank.clone(), vec![]));
        }
        let call = r#"{"name": "say", "arguments": {}}"#;
        let (said, calls) =
            read(Format::Tagged, &format!("{blank}<tool_call>{blank}{call}</tool_call>"), 4096);
        assert_eq!((said.as_str(), calls), ("", vec![("say".to_owned(), "{}".to_owned())]));
    }

    #[test]
    fn text_is_not_held_longer_than_needed() {
        let mut stream = ToolStream::new(Format::Tagged, vec!["add".to_owned()], 8);
        let mut out = Vec::new();
        stream.push("Hello <", &mut out);
        assert_eq!(out, [ToolPiece::Text("Hello".to_owned())]);
        stream.push("b>", &mut out);
        assert_eq!(out, [ToolPiece::Text("Hello <b>".to_owned())]);
    }

    #[test]
    fn arguments_stream_as_they_come() {
        let mut stream = ToolStream::new(Format::Tagged, vec!["add".to_owned()], 8);
        let mut out = Vec::new();
        stream.push("<tool_call>{\"name\": \"add\", \"arguments\": {\"a\"", &mut out);
        assert_eq!(out.len(), 2, "{out:?}");
        stream.push(": 12", &mut out);
        assert_eq!(out[2], ToolPiece::Arguments { index: 0, text: ": 12".to_owned() });
    }
}

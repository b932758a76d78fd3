//! What is wrong with a file, shown the way rustc shows it: where, what, why, and what to do.
//!
//! ```text
//! error: unknown key `replcas`
//!  --> consort.toml:4:1
//!   |
//! 4 | replcas = 2
//!   | ^^^^^^^ [models.chat] has no such key
//!   |
//!   = help: did you mean `replicas`?
//! ```

use std::fmt::{self, Write as _};
use std::ops::Range;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, in bytes of the file.
    pub span: Range<usize>,
    /// What, in a line.
    pub message: String,
    /// Why, beside the place.
    pub label: String,
    /// What to do.
    pub help: Option<String>,
}

/// Everything that is wrong with one file; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The file's name as it was given.
    pub file: String,
    /// Line and column (both from 1, the column in characters) of each problem.
    pub places: Vec<(usize, usize)>,
    /// In the file's order.
    pub problems: Vec<Problem>,
    text: String,
}

/// No more problems are shown than a person would read.
const MOST_SHOWN: usize = 20;
/// A longer line is cut around the place.
const MOST_COLUMNS: usize = 160;

impl Problems {
    /// The problems of a file called `file` whose text is `source`; there is at least one.
    pub fn new(file: &str, source: &str, mut problems: Vec<Problem>) -> Problems {
        problems.sort_by_key(|p| p.span.start);
        let places = problems.iter().map(|p| place(source, p.span.start)).collect();
        let mut text = String::new();
        for problem in problems.iter().take(MOST_SHOWN) {
            // Writing to a String doesn't fail.
            let _ = render(&mut text, file, source, problem);
        }
        let count = problems.len();
        let shown = if count > MOST_SHOWN { format!(" ({MOST_SHOWN} shown)") } else { String::new() };
        let plural = if count == 1 { "" } else { "s" };
        let _ = write!(text, "{file} was not accepted: {count} error{plural}{shown}");
        Problems { file: file.to_owned(), places, problems, text }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Problems {}

/// Line and column of a byte, both from 1.
fn place(source: &str, at: usize) -> (usize, usize) {
    let before = &source[..floor(source, at)];
    let line_start = before.rfind('\n').map_or(0, |n| n + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The nearest border of a character at or before `at`.
fn floor(source: &str, at: usize) -> usize {
    let mut at = at.min(source.len());
    while !source.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn render(out: &mut String, file: &str, source: &str, problem: &Problem) -> fmt::Result {
    let start = floor(source, problem.span.start);
    let (line, column) = place(source, start);
    let line_start = source[..start].rfind('\n').map_or(0, |n| n + 1);
    let line_end = source[start..].find('\n').map_or(source.len(), |n| start + n);
    let end = floor(source, problem.span.end).clamp(start, line_end);
    // A control character (or a tab) would move what follows it.
    let tame = |c: char| if c.is_control() { ' ' } else { c };
    let skipped = (column - 1).saturating_sub(MOST_COLUMNS / 2);
    let shown: String =
        source[line_start..line_end].chars().map(tame).skip(skipped).take(MOST_COLUMNS).collect();
    let carets = source[start..end].chars().count().clamp(1, MOST_COLUMNS / 2);
    let gutter = " ".repeat(line.to_string().len());
    writeln!(out, "error: {}", problem.message)?;
    writeln!(out, "{gutter}--> {file}:{line}:{column}")?;
    writeln!(out, "{gutter} |")?;
    writeln!(out, "{line} | {}", shown.trim_end())?;
    writeln!(out, "{gutter} | {}{} {}", " ".repeat(column - 1 - skipped), "^".repeat(carets), problem.label)?;
    if let Some(help) = &problem.help {
        writeln!(out, "{gutter} |")?;
        writeln!(out, "{gutter} = help: {help}")?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(span: Range<usize>) -> Problem {
        Problem { span, message: "what".into(), label: "why".into(), help: Some("cure".into()) }
    }

    #[test]
    fn the_place_is_shown_and_counted_in_characters() {
        let source = "a = 1\nü = \"größe\" # ß\n";
        let at = source.find("\"gr").unwrap();
        let said = Problems::new("f.toml", source, vec![problem(at..at + 9)]);
        assert_eq!(said.places, [(2, 5)]);
        let expected = "error: what\n --> f.toml:2:5\n  |\n2 | ü = \"größe\" # ß\n  |     ^^^^^^^ why\n  |\n  = help: cure\n\nf.toml was not accepted: 1 error";
        assert_eq!(said.to_string(), expected);
    }

    #[test]
    fn no_span_can_make_it_fail() {
        for source in ["", "\n", "ü", "a\tb\u{7}c", &"x".repeat(5000), "a\r\nb\r\n"] {
            for start in 0..source.len().min(40) + 3 {
                for end in [0, start, start + 1, usize::MAX] {
                    let said = Problems::new("f", source, vec![problem(start..end)]).to_string();
                    assert!(said.lines().all(|l| l.chars().count() < 300));
                }
            }
        }
    }
}

//! Standard output for results, standard error for everything else.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

mod wrap;

pub(crate) use wrap::Wrap;

/// Writes a line of a result. An error is the reader's going away (see [`is_closed_output`]) or a full disk.
pub(crate) fn line(text: impl Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a piece of a result, at once.
pub(crate) fn piece(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a piece of a model's answer for a person: what could drive the terminal left out, lines broken between words.
pub(crate) fn flow(wrap: &mut Wrap, text: &str) -> io::Result<()> {
    let text = printable(text);
    match width() {
        Some(width) => piece(&wrap.take(&text, width)),
        None => piece(&text),
    }
}

/// The cells of a line on standard output, where that is a terminal.
#[cfg(unix)]
fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

#[cfg(not(unix))]
fn width() -> Option<usize> {
    None
}

/// Writes a line for a person on standard error. Nobody may be there to read it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether an error says that standard output's reader is gone.
pub(crate) fn is_closed_output(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes in one line. A cause that the error above it quotes already isn't said twice.
pub(crate) fn said(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

/// Escape sequences, or nothing where colour isn't wanted (`NO_COLOR`, no terminal).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    on: bool,
}

impl Style {
    pub(crate) fn stdout() -> Style {
        Style { on: io::stdout().is_terminal() && crate::environment::colour() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_string() }
    }
}

/// Keeps what is typed while an answer streams (`^C` among it) from being shown in the midst of it. Ctrl-C still
/// reaches the program as a signal; dropping this shows what is typed again.
pub(crate) struct Silent {
    #[cfg(unix)]
    before: Option<rustix::termios::Termios>,
}

#[cfg(unix)]
impl Silent {
    pub(crate) fn begin() -> Silent {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let input = io::stdin();
        // Whatever fails here costs looks alone.
        let before = tcgetattr(&input).ok().filter(|before| {
            let mut modes = before.clone();
            modes.local_modes.remove(LocalModes::ECHO);
            tcsetattr(&input, OptionalActions::Now, &modes).is_ok()
        });
        Silent { before }
    }
}

#[cfg(unix)]
impl Drop for Silent {
    fn drop(&mut self) {
        use rustix::termios::{OptionalActions, tcsetattr};
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

#[cfg(not(unix))]
impl Silent {
    pub(crate) fn begin() -> Silent {
        Silent {}
    }
}

/// Lines of aligned cells, two blanks between; the first line is the heading.
pub(crate) fn table<R: AsRef<[String]>>(rows: &[R]) -> Vec<String> {
    let columns = rows.first().map_or(0, |row| row.as_ref().len());
    let cells = |column: usize| rows.iter().filter_map(move |row| row.as_ref().get(column));
    let width = |column: usize| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &R| {
        let cells = row.as_ref().iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A model's text for a terminal: without the control characters that could drive it.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Bytes for people: `98.4 MB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 9.95 => format!("{value:.2} {}", UNITS[unit]),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_text_cannot_drive_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\tc\nd\u{7}\r"), "a[2Jb\tc\nd");
    }

    #[test]
    fn a_cause_is_said_once() {
        use anyhow::Context as _;
        let io = || io::Error::other("the disk is on fire");
        let quoted = anyhow::Error::from(io()).context("can't read x: the disk is on fire; put it out");
        assert_eq!(said(&quoted), "can't read x: the disk is on fire; put it out");
        let named = Err::<(), _>(io()).context("can't read x").unwrap_err();
        assert_eq!(said(&named), "can't read x: the disk is on fire");
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(bytes(1_234), "1.23 kB");
        assert_eq!(bytes(999_950_000), "1.00 GB");
    }
}

//! Files that people write (`consort.toml`, a training job): TOML that is read key by key, and refused with the line, the
//! reason and the cure. All mistakes are reported at once.
//!
//! A reader is a function from text to what the text says: it opens no file and asks nothing of the machine, so that a
//! check, a start and a live edit are judged by the same rule. A crate of its own because the crates that read such
//! files may not use each other.

mod report;
mod section;
pub mod values;

use toml::de::DeTable;

pub use report::{Problem, Problems};
pub use section::{Placed, Section};
pub use values::parse_duration;

/// A longer file is refused unread: it can't be meant.
pub const MOST_BYTES: usize = 1 << 20;

/// Reads the text of a file that messages call `file`: `read` takes it key by key and adds what is wrong to the list.
///
/// # Errors
/// [`Problems`]: everything that is wrong with it. What `read` returned is then dropped.
pub fn read<T>(
    file: &str,
    source: &str,
    read: impl FnOnce(Section<'_>, &mut Vec<Problem>) -> T,
) -> Result<T, Problems> {
    let mut problems = Vec::new();
    if source.len() > MOST_BYTES {
        problems.push(Problem {
            span: 0..0,
            message: format!("the file has {} bytes", source.len()),
            label: format!("at most {MOST_BYTES} are read"),
            help: None,
        });
        return Err(Problems::new(file, "", problems));
    }
    let (table, errors) = DeTable::parse_recoverable(source);
    for error in errors {
        problems.push(Problem {
            span: error.span().unwrap_or(0..0),
            message: "this is not TOML".into(),
            label: error.message().lines().next().unwrap_or_default().to_owned(),
            help: None,
        });
    }
    if !problems.is_empty() {
        // What could be read of a broken file would only lead to errors that aren't there.
        return Err(Problems::new(file, source, problems));
    }
    let result = read(Section::new("", table.get_ref()), &mut problems);
    if problems.is_empty() { Ok(result) } else { Err(Problems::new(file, source, problems)) }
}

//! Files that people write, a job's or a deployment's, read whole; what can't be read says what to do.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::Path;

use anyhow::Result;

use crate::cli::UsageError;

/// Reads `path`, no more of it than such a file may have. `what` is what it should be, with an example.
///
/// # Errors
/// [`UsageError`]: it names the file and the cure.
pub(crate) fn text(path: &Path, what: &str) -> Result<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // The one byte more lets its reader see that it is too long.
        File::open(path)?.take(consort_config::MOST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| UsageError(unreadable(path, what, &error)))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        UsageError(format!("{} is not text: byte {at} is no UTF-8; name {what}", path.display())).into()
    })
}

/// Why a file that was named can't be read, and the cure.
pub(crate) fn unreadable(path: &Path, what: &str, error: &io::Error) -> String {
    let shown = path.display();
    match error.kind() {
        ErrorKind::NotFound => format!("there is no file {shown}; name {what}"),
        ErrorKind::IsADirectory => format!("{shown} is a folder; name {what}"),
        ErrorKind::NotADirectory => format!("{shown} leads through a file that is no folder; name {what}"),
        ErrorKind::PermissionDenied => {
            format!("{shown}: this user may not read it; allow it, or name {what}")
        }
        _ => format!("can't read {shown}: {error}; name {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cant_be_read_is_named_with_the_cure() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let good = file("good.toml", b"a = 1");
        let cases = [
            (folder.path().join("none"), "there is no file"),
            (folder.path().to_owned(), "is a folder"),
            (good.join("below"), "leads through a file"),
            (file("latin", b"caf\xe9"), "is not text: byte 3 is no UTF-8"),
        ];
        for (path, expected) in cases {
            let error = text(&path, "a job's file").unwrap_err();
            assert!(error.downcast_ref::<UsageError>().is_some());
            let said = error.to_string();
            assert!(said.contains(expected) && said.contains(&path.display().to_string()), "{said}");
            assert!(said.ends_with("; name a job's file"), "{said}");
        }
        assert_eq!(text(&good, "").unwrap(), "a = 1");
        let long = file("long", &vec![b' '; 2 << 20]);
        assert_eq!(text(&long, "").unwrap().len(), consort_config::MOST_BYTES + 1);
    }
}

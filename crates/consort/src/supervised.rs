//! A replica's side of `consort up`: it says what its parent waits for, and ends when its parent does.

use std::io::{self, Read as _};

use anyhow::Result;
use consort_control::Said;

use crate::terminal::{line, note};

/// Ends this process when standard input does. The parent holds the other end open and never writes; however it goes,
/// the kernel closes it. A thread of its own, so that it works while everything else hangs.
pub(crate) fn end_with_parent() -> io::Result<()> {
    std::thread::Builder::new().name("parent".into()).spawn(|| {
        let mut input = io::stdin().lock();
        let mut ignored = [0u8; 64];
        loop {
            match input.read(&mut ignored) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    note("the parent is gone");
                    std::process::exit(1);
                }
            }
        }
    })?;
    Ok(())
}

/// Tells the parent.
pub(crate) fn say(said: &Said) -> Result<()> {
    Ok(line(serde_json::to_string(said)?)?)
}

//! A worker's or a server's process, and the threads that read what it says.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::watch::News;
use crate::environment;
use crate::train::status::Place;

/// Characters of a line that is passed on.
const MOST_CHARS: u64 = 1 << 20;

/// One worker's place.
pub(super) struct Worker {
    pub(super) number: usize,
    pub(super) child: Option<(Child, ChildStdin)>,
    pub(super) shown: Place,
    /// It said why it ends.
    pub(super) failed: bool,
    /// It has had a rank in an epoch, so it has the job's state.
    pub(super) member: bool,
    /// It keeps weights that can't be written.
    pub(super) holds: bool,
    /// It has ended well and without the others, who go on.
    pub(super) strayed: bool,
}

impl Worker {
    pub(super) fn new(number: usize, trainers: usize) -> Worker {
        let name = match number.checked_sub(trainers) {
            None => format!("worker {number}"),
            Some(server) => format!("server {server}"),
        };
        Worker {
            number,
            child: None,
            shown: Place::new(number, &name),
            failed: false,
            member: false,
            holds: false,
            strayed: false,
        }
    }
}

/// Starts this program as `command` says, with a thread for each of its outputs; `number` is its place.
pub(super) fn spawn(
    mut command: Command,
    number: usize,
    news: &SyncSender<News>,
) -> Result<(Child, ChildStdin)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A Ctrl-C in the terminal is for the launcher, which tells the workers.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    environment::not_a_rank(&mut command);
    let mut child = command.spawn().context("can't start a worker")?;
    let (Some(input), Some(output), Some(errors)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        bail!("a worker was started without pipes");
    };
    let pid = child.id();
    let said = news.clone();
    thread(move || {
        for line in lines(output) {
            if let Ok(words) = serde_json::from_str(&line)
                && said.send(News::Said(number, pid, Box::new(words))).is_err()
            {
                return;
            }
        }
        // The main loop may have ended.
        let _ = said.send(News::Gone(number, pid));
    })?;
    let noted = news.clone();
    thread(move || {
        for line in lines(errors) {
            if noted.send(News::Noted(number, line)).is_err() {
                return;
            }
        }
    })?;
    Ok((child, input))
}

/// A process whose output has ended is about to end; one that isn't is made to.
pub(super) fn reap(child: &mut Child) -> Result<ExitStatus> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(status) = child.try_wait().context("a worker is gone")? {
            return Ok(status);
        }
        if Instant::now() >= until {
            // It may have ended by itself.
            let _ = child.kill();
            return child.wait().context("a worker is gone");
        }
        // The system tells of an end only to who waits for it, and that wait has no deadline.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How a process ended.
pub(super) fn how(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return match signal {
            9 => "was killed".to_owned(),
            signal => format!("was ended by signal {signal}"),
        };
    }
    match status.code() {
        Some(code) => format!("ended with status {code}"),
        None => "ended".to_owned(),
    }
}

fn thread(work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name("worker-output".into()).spawn(work).context("can't start a thread")?;
    Ok(())
}

/// Lines of bounded length, whatever they hold.
fn lines(from: impl Read) -> impl Iterator<Item = String> {
    let mut from = BufReader::new(from);
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        match (&mut from).take(MOST_CHARS).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(plain(&String::from_utf8_lossy(&line))),
        }
    })
}

/// A line without escape sequences and other control characters. A sequence is `ESC [`, parameters, and a letter; without its
/// first character alone the rest would be left to read.
fn plain(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars().peekable();
    while let Some(c) = characters.next() {
        if c == '\u{1b}' && characters.next_if_eq(&'[').is_some() {
            // Its last character is the first one from `@` to `~` (ECMA-48, 5.4).
            let _ = characters.by_ref().find(|c| ('@'..='~').contains(c));
        } else if !c.is_control() || c == '\t' {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_workers_are_plain_and_bounded() {
        let said = b"\x1b[2m12:00\x1b[0m \x1b[33m WARN\x1b[0m refused\x07\r\na\tb\n\x1b[\n\x1b]x";
        let heard: Vec<String> = lines(&said[..]).collect();
        assert_eq!(heard, ["12:00  WARN refused", "a\tb", "", "]x"]);
        let long = vec![b'x'; MOST_CHARS as usize + 7];
        assert_eq!(lines(&long[..]).map(|line| line.len()).collect::<Vec<_>>(), [MOST_CHARS as usize, 7]);
    }
}

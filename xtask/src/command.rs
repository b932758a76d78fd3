//! Other programs, run with errors that name them.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long [`followed`] shows nothing.
const QUIET: Duration = Duration::from_secs(20);

/// The command as a person would type it.
pub(crate) fn spelled(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs to the end; its output is ours.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", spelled(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", spelled(command));
    }
    Ok(())
}

/// Runs to the end and returns what it wrote to stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", spelled(command)))?;
    if !out.status.success() {
        bail!("`{}` ended with {}", spelled(command), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs to the end with all output in a log file, whose last lines join the error.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start `{}`", spelled(command)))?;
    judged(command, status, log)
}

/// An error with the log's last lines where the command failed.
fn judged(command: &Command, status: ExitStatus, log: &Path) -> Result<()> {
    if !status.success() {
        let text = fs::read(log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        bail!("`{}` ended with {status}; the end of {}:\n{tail}", spelled(command), log.display());
    }
    Ok(())
}

/// As [`logged`], for what takes minutes: each line is also shown as it comes, and where none comes for [`QUIET`], that it
/// goes on.
pub(crate) fn followed(command: &mut Command, log: &Path) -> Result<()> {
    let mut file = fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start `{}`", spelled(command)))?;
    // The pipe ends when the child's ends of it are the last ones.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (lines, shown) = mpsc::sync_channel(64);
    let reading = thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let started = Instant::now();
    loop {
        match shown.recv_timeout(QUIET) {
            Ok(line) => {
                writeln!(file, "{line}")?;
                println!("  {}", line.trim_end());
            }
            Err(RecvTimeoutError::Timeout) => {
                println!("  … {} s, still at it", started.elapsed().as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // It ends with the pipe.
    let _ = reading.join();
    let status = child.wait()?;
    judged(command, status, log)
}

/// Runs to the end, passing each line of stdout on and showing it to `see`.
pub(crate) fn watched(command: &mut Command, see: impl FnMut(&str)) -> Result<()> {
    watched_as(command, str::to_owned, see)
}

/// The same, passing each line on as `show` has it.
pub(crate) fn watched_as(
    command: &mut Command,
    mut show: impl FnMut(&str) -> String,
    mut see: impl FnMut(&str),
) -> Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", spelled(command)))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{}", show(&line));
            see(&line);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`{}` ended with {status}", spelled(command));
    }
    Ok(())
}

/// Where a program of this name lies on the PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A cargo command in `root`, with the cargo that runs us.
pub(crate) fn cargo<S: AsRef<OsStr>>(root: &Path, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(arguments);
    command
}

/// The target folder in use: `CARGO_TARGET_DIR` or `target`.
pub(crate) fn target_folder(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map(|folder| root.join(folder))
        .unwrap_or_else(|| root.join("target"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_is_followed_is_logged_whole_and_fails_with_its_last_words() {
        let log = std::env::temp_dir().join(format!("consort-xtask-followed-{}", std::process::id()));
        followed(&mut shell("echo one; echo two >&2; printf three"), &log).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\nthree\n");
        let error = followed(&mut shell("echo the reason >&2; exit 3"), &log).unwrap_err().to_string();
        assert!(error.contains("the reason") && error.contains("exit status: 3"), "{error}");
        let _ = fs::remove_file(&log);
    }
}

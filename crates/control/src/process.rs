//! Processes: telling one from a later one with the same number, ending what a dead `up` left behind, and signals.

use std::process::Command;

use crate::store::{Child, Store, StoreError};

/// When process `pid` began, in a form that no later process with that number has; `None` where there is none.
///
/// On Linux that is the boot's id and the start time in ticks; elsewhere what `ps` says.
pub fn identity(pid: u32) -> Option<String> {
    if cfg!(target_os = "linux") {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; the start time is the 20th field after it (proc(5): 22nd).
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        if matches!(state, "Z" | "X") {
            return None;
        }
        let began = fields.nth(18)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        return Some(format!("{} {began}", boot.trim()));
    }
    let said = Command::new("ps").args(["-o", "lstart=", "-p", &pid.to_string()]).output().ok()?;
    let began = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    (!began.is_empty()).then_some(began)
}

/// A signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Drain and end.
    Terminate,
    /// End now.
    Kill,
}

/// Sends a signal; whether there was a process to get it.
pub fn signal(pid: u32, signal: Signal) -> bool {
    let number = match signal {
        Signal::Terminate => rustix::process::Signal::TERM,
        Signal::Kill => rustix::process::Signal::KILL,
    };
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::kill_process(pid, number).is_ok())
}

/// Ends the children that a dead `up` left behind, and forgets them; returns how many were ended.
///
/// A replica ends by itself when its parent does, unless it is stopped or hangs: those are found here.
///
/// # Errors
/// [`StoreError`]
pub fn end_leftovers(store: &Store) -> Result<usize, StoreError> {
    let mut ended = 0;
    for (id, child) in store.children()? {
        if is(&child) {
            tracing::warn!(
                replica = id,
                pid = child.pid,
                "a replica of an earlier run was still there; it is ended"
            );
            ended += usize::from(signal(child.pid, Signal::Kill));
        }
        store.forget_child(&id)?;
    }
    Ok(ended)
}

/// Whether that very process still runs.
fn is(child: &Child) -> bool {
    identity(child.pid).is_some_and(|began| began == child.began)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn only_the_very_process_that_was_noted_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut ours = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let mut other = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let began = identity(ours.id()).unwrap();
        assert_eq!(identity(ours.id()).unwrap(), began, "it stays the same");
        store.note_child("a", &Child { pid: ours.id(), began: began.clone() }).unwrap();
        // A number that another process has by now.
        store.note_child("b", &Child { pid: other.id(), began: format!("{began}0") }).unwrap();
        store.note_child("c", &Child { pid: u32::MAX, began }).unwrap();
        assert_eq!(end_leftovers(&store).unwrap(), 1);
        assert!(!ours.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none(), "a stranger was killed");
        assert!(store.children().unwrap().is_empty());
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(identity(other.id()), None);
    }
}

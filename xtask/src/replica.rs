//! A server process under measurement: started on a free port, waited for, watched, and gone with its handle.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::spelled;

/// How long a server may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// How long it may take to end when it is asked to.
const FAREWELL: Duration = Duration::from_secs(5);

/// A running server.
pub(crate) struct Replica {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Replica {
    /// Starts what `command` makes of an address and waits until `path` answers 200. Its output goes to `log`.
    pub(crate) fn start(
        path: &str,
        log: &Path,
        command: impl FnOnce(SocketAddr) -> Command,
    ) -> Result<Replica> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = command(address);
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start `{}`", spelled(&command)))?;
        let mut replica = Replica { child, address };
        let started = Instant::now();
        while !replica.answers(path) {
            if let Some(status) = replica.child.try_wait()? {
                bail!("`{}` ended with {status}; see {}", spelled(&command), log.display());
            }
            if started.elapsed() > READY_WITHIN {
                bail!("`{}` was not ready in {READY_WITHIN:?}; see {}", spelled(&command), log.display());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(replica)
    }

    fn answers(&self, path: &str) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address)?;
            let mut head = [0; 12];
            stream.read_exact(&mut head)?;
            Ok(&head[9..] == b"200")
        };
        ask().unwrap_or(false)
    }

    /// Its address as a URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory it ever held, in bytes.
    pub(crate) fn peak_bytes(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("no VmHWM in the status")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024.0)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // Asked first: a master that is killed outright leaves its workers behind.
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
            && rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok()
        {
            let end = Instant::now() + FAREWELL;
            while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

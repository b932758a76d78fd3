//! A worker as a real process: the test binary starts itself again, and the copy that finds `WORKER_STORE` in its
//! environment reduces until it fails, says why and when, joins the next epoch and says what that one adds up to.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use consort_collectives::{Error, Group, JoinOptions, ReduceOp, TransportKind};

use super::TOKEN;

/// How long a worker's peers may be silent.
pub const SILENCE: Duration = Duration::from_millis(700);

/// Microseconds on a clock that all processes share.
pub fn clock_us() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros()
}

/// The worker's life; returns at once in a process that is none.
pub fn live() {
    let Ok(address) = std::env::var("WORKER_STORE") else { return };
    let kind = std::env::var("WORKER_TRANSPORT").ok().and_then(|name| TransportKind::by_name(&name));
    let host = std::env::var("WORKER_HOST").ok();
    let options = JoinOptions { transport: kind, host, silence: SILENCE, ..JoinOptions::new(address, TOKEN) };
    let mut group = Group::join(options).unwrap();
    println!("\njoined {} {} {}", group.rank(), std::process::id(), group.transport().name());
    let mut buffer = vec![0f32; 200_000];
    loop {
        let error = loop {
            buffer.fill(1.0);
            if let Err(error) = group.all_reduce(&mut buffer, ReduceOp::Sum) {
                break error;
            }
            assert_eq!(buffer[199_999], group.world_size() as f32);
        };
        println!("\nfailed {} {:?} {error}", clock_us(), error.lost_rank());
        let again = group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap_err();
        assert!(matches!(again, Error::Broken { .. }), "{again}");
        group = match group.rejoin() {
            Ok(group) => group,
            Err(error) => {
                println!("\nalone {error}");
                return;
            }
        };
        let mut one = [1i32; 3];
        group.all_reduce(&mut one, ReduceOp::Sum).unwrap();
        println!("\nreformed {} {} {}", group.epoch(), group.world_size(), one[2]);
        // Stays until the test says something, or closes its input: nobody's leaving is part of the test.
        if std::io::stdin().read_line(&mut String::new()).unwrap() == 0 {
            return;
        }
    }
}

/// The test's end of a worker.
pub struct Worker {
    child: Child,
    stdin: ChildStdin,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Worker {
    /// Starts one, in a network namespace if one is named.
    pub fn start(store: &str, kind: Option<TransportKind>, namespace: Option<&str>) -> Self {
        Self::on_host(store, kind, namespace, None)
    }

    /// Starts one that says that it is on this host.
    pub fn on_host(
        store: &str,
        kind: Option<TransportKind>,
        namespace: Option<&str>,
        host: Option<usize>,
    ) -> Self {
        let itself = std::env::current_exe().unwrap();
        let mut command = match namespace {
            None => Command::new(itself),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(itself);
                command
            }
        };
        command.args(["--exact", "worker_process", "--nocapture"]).env("WORKER_STORE", store);
        if let Some(kind) = kind {
            command.env("WORKER_TRANSPORT", kind.name());
        }
        if let Some(host) = host {
            command.env("WORKER_HOST", host.to_string());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { stdin: child.stdin.take().unwrap(), child, lines }
    }

    /// The rest of the next line that begins with `word`.
    pub fn says(&mut self, word: &str) -> String {
        loop {
            let line =
                self.lines.next().unwrap_or_else(|| panic!("a worker ended before it said {word}")).unwrap();
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Lets a worker that has said `reformed` go on reducing.
    pub fn go_on(&mut self) {
        use std::io::Write;
        self.stdin.write_all(b"\n").unwrap();
    }

    /// Sends it a signal.
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

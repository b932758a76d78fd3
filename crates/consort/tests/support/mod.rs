//! What the tests of the whole command share.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The command, with nothing of this machine's settings: a cache of its own and sources that refuse at once.
pub(crate) struct Consort {
    pub(crate) home: tempfile::TempDir,
}

impl Consort {
    pub(crate) fn new() -> Consort {
        Consort { home: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consort"));
        self.environment(&mut command);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    pub(crate) fn environment(&self, command: &mut Command) {
        command
            .env("CONSORT_HOME", self.home.path())
            // Port 1 of this machine: nothing listens there.
            .env("CONSORT_HF_ENDPOINT", "http://127.0.0.1:1")
            .env("CONSORT_PYPI_INDEX", "http://127.0.0.1:1/simple")
            .env("NO_COLOR", "1");
        for name in [
            "CONSORT_API_KEY",
            "CONSORT_LOG",
            "HF_TOKEN",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ] {
            command.env_remove(name);
        }
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that refuses its arguments reads nothing.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }
}

pub(crate) fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The real model.
#[allow(dead_code)] // Not every test binary needs it.
pub(crate) fn model() -> PathBuf {
    let path = std::env::var_os("CONSORT_TEST_SMOLLM2").map(PathBuf::from);
    path.expect("CONSORT_TEST_SMOLLM2 names no model file; `cargo xtask test` fetches one and sets it")
}

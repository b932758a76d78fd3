//! Two network namespaces with a cable of 1 Gb/s between them.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::needs;
use crate::command::spelled;

/// The shaped link; gone when dropped.
pub(super) struct Shaped {
    spaces: [String; 2],
}

impl Shaped {
    pub(super) fn new() -> Result<Self> {
        let (ip, tc) = (needs("ip", "iproute2")?, needs("tc", "iproute2")?);
        let shaped = Self { spaces: ["a", "b"].map(|end| format!("consort-{}-{end}", std::process::id())) };
        let run = |program: &std::path::Path, words: String| -> Result<()> {
            let mut command = Command::new(program);
            command.args(words.split(' '));
            let done = command.output().with_context(|| format!("cannot start `{}`", spelled(&command)))?;
            if !done.status.success() {
                let said = String::from_utf8_lossy(&done.stderr);
                bail!(
                    "`{}`: {} (the shaped link needs root; leave it out with --links)",
                    spelled(&command),
                    said.trim()
                );
            }
            Ok(())
        };
        let [a, b] = &shaped.spaces;
        run(&ip, format!("netns add {a}"))?;
        run(&ip, format!("netns add {b}"))?;
        run(&ip, format!("link add cable netns {a} type veth peer name cable netns {b}"))?;
        for (end, space) in shaped.spaces.iter().enumerate() {
            run(&ip, format!("-n {space} addr add {}/24 dev cable", Self::address(end)))?;
            run(&ip, format!("-n {space} link set cable up"))?;
            run(&ip, format!("-n {space} link set lo up"))?;
            run(&tc, format!("-n {space} qdisc add dev cable root tbf rate 1gbit burst 128kb latency 20ms"))?;
        }
        Ok(shaped)
    }

    /// The address of an end (0 or 1).
    pub(super) fn address(end: usize) -> &'static str {
        ["10.251.7.1", "10.251.7.2"][end]
    }

    /// A command that runs `program` at an end.
    pub(super) fn at(&self, end: usize, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.spaces[end]]).arg(program);
        command
    }
}

impl Drop for Shaped {
    fn drop(&mut self) {
        for space in &self.spaces {
            // Whatever of it was made; the cable goes with its ends.
            let _ = Command::new("ip").args(["netns", "del", space]).output();
        }
    }
}

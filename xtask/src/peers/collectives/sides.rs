//! The sides: how each is started, and what it prints.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::link::Shaped;
use super::{Link, Times, needs};
use crate::command::{find, logged, output, spelled};
use crate::machine;

const GLOO: &str = include_str!("gloo.py");
const OPEN_MPI: &str = include_str!("openmpi.c");
/// PyTorch, which brings gloo.
const PYTHON_PACKAGES: [&str; 2] = ["torch", "numpy"];

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Side {
    /// Ours over shared memory.
    Shm,
    /// Ours over TCP.
    Tcp,
    /// Ours over TLS.
    Tls,
    /// Ours over what a job takes by itself.
    Auto,
    /// Open MPI, over the memory or over TCP.
    OpenMpi,
    /// gloo through PyTorch, over TCP.
    Gloo,
}

/// All of them, ready to run.
pub(super) struct Sides {
    bench: PathBuf,
    python: PathBuf,
    gloo: PathBuf,
    open_mpi: PathBuf,
    budget: f64,
    pub(super) gloo_version: String,
    pub(super) mpi_version: String,
}

impl Sides {
    /// Installs and builds what is missing.
    pub(super) fn set_up(work: &Path, bench: PathBuf, python: Option<&Path>, budget: f64) -> Result<Self> {
        if !bench.is_file() {
            bail!("no benchmark at {}; leave --no-build out", bench.display());
        }
        let missing: Vec<&str> = [("mpirun", "openmpi-bin"), ("mpicc", "libopenmpi-dev"), ("gcc", "gcc")]
            .into_iter()
            .filter_map(|(program, package)| find(program).is_none().then_some(package))
            .collect();
        machine::install(&missing, work)?;
        let python = match python {
            Some(given) => given.to_owned(),
            None => machine::python(work, "torch", &PYTHON_PACKAGES)?,
        };
        let (gloo, source) = (work.join("gloo.py"), work.join("openmpi.c"));
        fs::write(&gloo, GLOO)?;
        fs::write(&source, OPEN_MPI)?;
        let open_mpi = work.join("openmpi-all-reduce");
        let mut compile = Command::new(needs("mpicc", "libopenmpi-dev")?);
        logged(compile.args(["-O2", "-o"]).arg(&open_mpi).arg(&source), &work.join("mpicc.log"))?;
        let says = output(Command::new("mpirun").arg("--version"))?;
        let mpi_version = says.lines().next().unwrap_or("Open MPI").replace("mpirun (Open MPI)", "Open MPI");
        let asks = "import torch; print(torch.__version__)";
        let gloo_version =
            format!("gloo of PyTorch {}", output(Command::new(&python).args(["-c", asks]))?.trim());
        Ok(Self { bench, python, gloo, open_mpi, budget, gloo_version, mpi_version })
    }

    /// Microseconds a call by length.
    pub(super) fn measure(
        &self,
        side: Side,
        link: Link,
        ranks: u32,
        lengths: &[usize],
        shaped: Option<&Shaped>,
    ) -> Result<Times> {
        let processes = match side {
            Side::Shm | Side::Tcp | Side::Tls | Side::Auto => self.ours(side, ranks, lengths, shaped),
            Side::OpenMpi => self.open_mpi(link, ranks, lengths),
            Side::Gloo => self.gloo(ranks, lengths, shaped)?,
        };
        let texts = together(processes)?;
        if side == Side::Auto && !texts.contains(r#""transport":"mixed""#) {
            bail!("two hosts of two ranks were not found to be that; it printed: {texts}");
        }
        let times: Times = texts.lines().filter_map(parse).collect();
        if times.len() != lengths.len() {
            bail!("{side:?} measured {} of {} lengths; it printed: {texts}", times.len(), lengths.len());
        }
        Ok(times)
    }

    fn ours(&self, side: Side, ranks: u32, lengths: &[usize], shaped: Option<&Shaped>) -> Vec<Command> {
        let name = match side {
            Side::Shm => "shm",
            Side::Tls => "tls",
            Side::Auto => "auto",
            _ => "tcp",
        };
        let words = [ranks.to_string(), name.into(), "auto".into(), "--json".into()];
        let with = |mut command: Command| {
            command.args(&words).args(lengths.iter().map(usize::to_string));
            command.env("BENCH_SECONDS", self.budget.to_string());
            command
        };
        match shaped {
            None => vec![with(Command::new(&self.bench))],
            Some(shaped) => {
                let store = format!("{}:7411", Shaped::address(0));
                let here = ranks / 2;
                let mut first = with(shaped.at(0, &self.bench));
                first.env("BENCH_LISTEN", &store).env("BENCH_STARTS", here.to_string());
                let mut all = vec![first];
                for _ in here..ranks {
                    let mut other = with(shaped.at(1, &self.bench));
                    other.env("BENCH_STORE", &store);
                    all.push(other);
                }
                all
            }
        }
    }

    fn open_mpi(&self, link: Link, ranks: u32, lengths: &[usize]) -> Vec<Command> {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1"]);
        match link {
            Link::Memory => command.args(["--mca", "btl", "vader,self"]),
            _ => command.args(["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]),
        };
        if ranks as usize > std::thread::available_parallelism().map_or(1, usize::from) {
            // Without it, ranks that wait keep the core from those that work.
            command.args(["--mca", "mpi_yield_when_idle", "1"]);
        }
        command.args(["-np", &ranks.to_string()]).arg(&self.open_mpi).arg(self.budget.to_string());
        command.args(lengths.iter().map(usize::to_string));
        vec![command]
    }

    fn gloo(&self, ranks: u32, lengths: &[usize], shaped: Option<&Shaped>) -> Result<Vec<Command>> {
        let master = match shaped {
            Some(_) => format!("{}:7412", Shaped::address(0)),
            // Free now; nobody else takes it within the second.
            None => TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string(),
        };
        let rank = |rank: u32| {
            let mut command = match shaped {
                Some(shaped) => shaped.at(usize::from(rank >= ranks / 2), &self.python),
                None => Command::new(&self.python),
            };
            command.arg(&self.gloo).args([rank.to_string(), ranks.to_string(), master.clone()]);
            command.arg(self.budget.to_string()).args(lengths.iter().map(usize::to_string));
            command.env("GLOO_SOCKET_IFNAME", if shaped.is_some() { "cable" } else { "lo" });
            command
        };
        Ok((0..ranks).map(rank).collect())
    }
}

fn parse(line: &str) -> Option<(usize, f64)> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    Some((usize::try_from(value["bytes"].as_u64()?).ok()?, value["micros"].as_f64()?))
}

/// Ends with its processes.
struct Running(Vec<(String, Child)>);

impl Drop for Running {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs all at once; what they print, one after the other. If one fails the others are ended.
fn together(commands: Vec<Command>) -> Result<String> {
    let mut running = Running(Vec::new());
    for mut command in commands {
        let text = spelled(&command);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        running.0.push((text.clone(), child.with_context(|| format!("cannot start `{text}`"))?));
    }
    let mut all = String::new();
    for (text, child) in &mut running.0 {
        if let Some(mut stdout) = child.stdout.take() {
            std::io::Read::read_to_string(&mut stdout, &mut all)?;
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("`{text}` ended with {status}");
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_measurements_are_read() {
        assert_eq!(parse(r#"{"bytes": 4096, "micros": 1.5}"#), Some((4096, 1.5)));
        assert_eq!(parse("a warning of some library"), None);
    }
}

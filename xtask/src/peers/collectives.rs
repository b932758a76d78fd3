//! `cargo xtask peers collectives`: all-reduce of ours beside Open MPI's and gloo's, on this machine, in turns.
//!
//! Every side measures in the same way (`crates/collectives/src/bench.rs`; the peers' programs beside this file say
//! the same in C and Python). A round runs each side once, so that all meet the same machine; what is quoted is the
//! median over rounds. Links: shared memory, TCP over loopback, and a link of 1 Gb/s between two network namespaces, with
//! one rank in each or with two.
//! What a run doesn't measure, it takes from the last one, since a quiet machine is rare for long.

mod link;
mod page;
mod sides;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::command::{cargo, run, target_folder};
use sides::{Side, Sides};

/// What `peers collectives` alone knows.
#[derive(Args)]
pub(crate) struct CollectivesArguments {
    /// collectives: numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "2,4", value_parser = clap::value_parser!(u32).range(2..=64))]
    ranks: Vec<u32>,
    /// collectives: what the bytes go over.
    #[arg(long, value_delimiter = ',', default_value = "memory,loopback,shaped,hosts")]
    links: Vec<Link>,
    /// collectives: a Python with PyTorch in it, instead of making an environment (some gigabytes).
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// collectives: seconds for each length on each side.
    #[arg(long, default_value_t = 0.2)]
    budget: f64,
}

/// What the bytes go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Link {
    /// The memory of one host; gloo knows only TCP, there over loopback.
    Memory,
    /// TCP over the loopback interface.
    Loopback,
    /// TCP between two network namespaces of one rank each, 1 Gb/s each way. Needs root.
    Shaped,
    /// The same between two namespaces of two ranks each, which share the memory of their own.
    Hosts,
}

impl Link {
    fn sides(self) -> &'static [Side] {
        match self {
            Self::Memory => &[Side::Shm, Side::OpenMpi, Side::Gloo],
            Self::Loopback => &[Side::Tcp, Side::Gloo, Side::Tls, Side::OpenMpi],
            Self::Shaped => &[Side::Tcp, Side::Gloo, Side::Tls],
            // Open MPI takes what has one host name for one host, and there is one name here.
            Self::Hosts => &[Side::Auto, Side::Gloo],
        }
    }

    /// Whether it takes this number of ranks.
    fn takes(self, ranks: u32) -> bool {
        match self {
            Self::Shaped => ranks == 2,
            Self::Hosts => ranks == 4,
            _ => true,
        }
    }

    fn lengths(self) -> Vec<usize> {
        match self {
            // A call of 64 MB takes half a second there.
            Self::Shaped => [12, 16, 20, 24].map(|power| 1 << power).to_vec(),
            Self::Hosts => (16..=26).step_by(2).map(|power| 1 << power).collect(),
            _ => (12..=28).step_by(2).map(|power| 1 << power).collect(),
        }
    }
}

/// Microseconds a call, by bytes of the vector.
type Times = BTreeMap<usize, f64>;

/// What was measured over one link with one number of ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Series {
    link: Link,
    ranks: u32,
    /// Each side once.
    rounds: Vec<BTreeMap<Side, Times>>,
}

/// Everything that is known of this machine.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    gloo: String,
    open_mpi: String,
    /// Bytes read and written a second by copies on all cores, in GB/s.
    copy_gb_per_s: f64,
    series: Vec<Series>,
}

/// Sets all sides up, measures, and writes docs/peers-collectives.md.
pub(crate) fn compare(
    root: &Path,
    arguments: &CollectivesArguments,
    rounds: usize,
    build: bool,
    json: bool,
) -> Result<()> {
    let work = target_folder(root).join("peers");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    if build {
        eprintln!("xtask: building the benchmark (release)");
        let words = ["build", "--release", "--quiet", "-p", "consort-collectives", "--example", "bench"];
        run(&mut cargo(root, words))?;
    }
    let bench = target_folder(root).join("release/examples/bench");
    let sides = Sides::set_up(&work, bench, arguments.python.as_deref(), arguments.budget)?;
    let kept = work.join("collectives.json");
    let mut record: Record =
        fs::read_to_string(&kept).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    (record.gloo, record.open_mpi) = (sides.gloo_version.clone(), sides.mpi_version.clone());
    // A limit is the fastest that was ever seen here.
    record.copy_gb_per_s = record.copy_gb_per_s.max(copy_speed());
    for link in &arguments.links {
        let between_spaces = matches!(link, Link::Shaped | Link::Hosts);
        let shaped = between_spaces.then(link::Shaped::new).transpose()?;
        for ranks in arguments.ranks.iter().filter(|ranks| link.takes(**ranks)) {
            let mut series = Series { link: *link, ranks: *ranks, rounds: Vec::new() };
            for round in 1..=rounds {
                eprintln!("xtask: {link:?}, {ranks} ranks, round {round} of {rounds}");
                let mut times = BTreeMap::new();
                for side in link.sides() {
                    times.insert(
                        *side,
                        sides.measure(*side, *link, *ranks, &link.lengths(), shaped.as_ref())?,
                    );
                }
                series.rounds.push(times);
            }
            record.series.retain(|old| (old.link, old.ranks) != (*link, *ranks));
            record.series.push(series);
        }
    }
    record.series.sort_by_key(|series| (series.link, series.ranks));
    fs::write(&kept, serde_json::to_string(&record)?)
        .with_context(|| format!("cannot write {}", kept.display()))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&record)?);
        return Ok(());
    }
    let page = page::page(&record, &super::machine(), rounds);
    println!("{page}");
    let document = root.join("docs/peers-collectives.md");
    fs::write(&document, page).with_context(|| format!("cannot write {}", document.display()))?;
    println!("written to {}", document.display());
    Ok(())
}

/// The speed of large copies on all cores at once: the best of some, since this is a limit.
fn copy_speed() -> f64 {
    const BYTES: usize = 64 << 20;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut pairs: Vec<_> = (0..threads).map(|_| (vec![1u8; BYTES], vec![2u8; BYTES])).collect();
    let mut best: f64 = 0.0;
    for _ in 0..12 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in &mut pairs {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        best = best.max((2 * threads * BYTES) as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}

/// A program that one of the sides needs, or an error that names its package.
fn needs(program: &str, package: &str) -> Result<PathBuf> {
    match crate::command::find(program) {
        Some(path) => Ok(path),
        None => bail!("{program} is not on the PATH; install the package {package}"),
    }
}

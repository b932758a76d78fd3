//! `consort bench collectives`: how long all-reduce and its relatives take between processes of this machine.
//!
//! This process opens the meeting place and starts one copy of itself for each rank; they find its address and the
//! token in their environment. Rank 0 writes one JSON object a length to its output, which becomes the table. What a
//! figure means: `consort_collectives::bench`.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use consort_collectives::bench::{Compared, Measured, OPERATIONS, compare, measure};
use consort_collectives::{Algorithm, Group, JoinOptions, Operation, Store, StoreOptions, TransportKind};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::plot::{self, Chart};
use crate::cli::UsageError;
use crate::environment::{self, BenchRank};
use crate::terminal::{bytes, line, note, table};

/// All-reduce and its relatives between processes of this machine: time and bandwidth by length
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort bench collectives\n  consort bench collectives --ranks 4 --transport tls --bytes 4k,1M,64M\n  consort bench collectives --operation all_gather --algorithm ring --json\n  consort bench collectives --tune --transport mixed --ranks 4 --hosts 2 --plot tuned.svg"
)]
pub(crate) struct CollectivesBench {
    /// Processes
    #[arg(long, short, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    ranks: u16,
    /// What the bytes go over: shm, tcp, tls, or mixed (shared memory inside a host, TLS between hosts)
    #[arg(long, value_name = "NAME", default_value = "shm", value_parser = transport)]
    transport: TransportKind,
    /// all_reduce, reduce_scatter, all_gather, broadcast or all_to_all
    #[arg(long, value_name = "NAME", default_value = "all_reduce", value_parser = operation)]
    operation: Operation,
    /// ring, halving_doubling, tree, one_shot, direct or hierarchical [default: by length]
    #[arg(long, value_name = "NAME", value_parser = algorithm)]
    algorithm: Option<Algorithm>,
    /// Divides the processes among so many hosts, which share no memory: a layout to try out on one machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    hosts: u16,
    /// Measures every algorithm for each length, and marks the one that a call takes by itself
    #[arg(long, conflicts_with = "algorithm")]
    tune: bool,
    /// Lengths of the vector, with k, M or G for powers of 1024
    #[arg(long, value_name = "BYTES", value_delimiter = ',', value_parser = length, default_value = "4k,16k,64k,256k,1M,4M,16M,64M")]
    bytes: Vec<usize>,
    /// Time for each length
    #[arg(long, value_name = "SECONDS", default_value_t = 0.3, value_parser = seconds)]
    seconds: f64,
    /// Draw it, as an SVG picture
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn transport(name: &str) -> Result<TransportKind, String> {
    TransportKind::by_name(name).ok_or_else(|| "write shm, tcp, tls or mixed".into())
}

fn operation(name: &str) -> Result<Operation, String> {
    let known = Operation::by_name(name).filter(|operation| OPERATIONS.contains(operation));
    known.ok_or_else(|| "write all_reduce, reduce_scatter, all_gather, broadcast or all_to_all".into())
}

fn algorithm(name: &str) -> Result<Algorithm, String> {
    let names: Vec<&str> = Algorithm::ALL.into_iter().map(Algorithm::name).collect();
    Algorithm::by_name(name).ok_or_else(|| format!("there are {}", names.join(", ")))
}

/// `64k`, `1M`, `4096`: at most 1 GiB.
fn length(text: &str) -> Result<usize, String> {
    let (digits, power) = match text.trim().strip_suffix(['k', 'K', 'M', 'G']) {
        Some(digits) if text.ends_with('G') => (digits, 30),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 10),
        None => (text.trim(), 0),
    };
    let wrong = || "write bytes as 4096, 64k or 1M, at most 1G".to_owned();
    let bytes = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(1 << power)).ok_or_else(wrong)?;
    if (4..=1 << 30).contains(&bytes) { Ok(bytes) } else { Err(wrong()) }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.01..=60.0).contains(s));
    seconds.ok_or_else(|| "write seconds between 0.01 and 60".into())
}

#[derive(Serialize)]
struct Report {
    operation: &'static str,
    transport: &'static str,
    algorithm: &'static str,
    ranks: u16,
    lengths: Vec<Measured>,
}

/// The ranks' processes; they end with this.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl CollectivesBench {
    pub(crate) fn run(self) -> Result<()> {
        if let Some(rank) = environment::bench_rank() {
            return self.rank(rank);
        }
        plot::check(self.plot.as_deref())?;
        if let Some(algorithm) = self.algorithm.filter(|a| !Algorithm::of(self.operation).contains(a)) {
            let known: Vec<&str> = Algorithm::of(self.operation).iter().map(|a| a.name()).collect();
            let (operation, algorithm) = (self.operation.name(), algorithm.name());
            let what = format!("{operation} has no algorithm {algorithm}; it has {}", known.join(", "));
            return Err(UsageError(what).into());
        }
        if self.transport == TransportKind::SharedMemory && self.hosts > 1 {
            let what = format!("{} hosts share no memory; use --transport mixed, tcp or tls", self.hosts);
            return Err(UsageError(what).into());
        }
        if self.tune {
            return self.show_tuned(&self.launch()?);
        }
        let lengths = self.launch()?;
        let report = Report {
            operation: self.operation.name(),
            transport: self.transport.name(),
            algorithm: self.algorithm.map_or("by length", Algorithm::name),
            ranks: self.ranks,
            lengths,
        };
        if self.json {
            line(serde_json::to_string_pretty(&report)?)?;
        } else {
            let mut rows = vec![["vector", "µs", "alg GB/s", "bus GB/s"].map(str::to_owned)];
            for m in &report.lengths {
                let speeds = [m.algorithm_gb_per_s, m.bus_gb_per_s].map(|speed| format!("{speed:.2}"));
                let [algorithm, bus] = speeds;
                rows.push([bytes(m.bytes as u64), format!("{:.1}", m.micros), algorithm, bus]);
            }
            table(&rows).into_iter().try_for_each(line)?;
        }
        let bus = report.lengths.iter().map(|m| m.bus_gb_per_s).collect();
        self.draw("bus GB/s", report.lengths.iter().map(|m| m.bytes), vec![("bus".to_owned(), bus)])
    }

    /// A picture, if one is asked for.
    fn draw(
        &self,
        unit: &str,
        lengths: impl Iterator<Item = usize>,
        series: Vec<(String, Vec<f64>)>,
    ) -> Result<()> {
        let Some(file) = &self.plot else { return Ok(()) };
        let (operation, transport) = (self.operation.name(), self.transport.name());
        Chart {
            title: format!("{operation}, {} processes over {transport}: {unit} by length", self.ranks),
            places: lengths.map(|length| bytes(length as u64)).collect(),
            series,
            bars: false,
        }
        .write(file)
    }

    /// A row a length, a column an algorithm.
    fn show_tuned(&self, lengths: &[Compared]) -> Result<()> {
        if self.json {
            line(serde_json::to_string_pretty(lengths)?)?;
        } else {
            self.print_tuned(lengths)?;
        }
        let speeds = |algorithm: &Algorithm| {
            let one = |compared: &Compared| {
                let timed = compared.times.iter().find(|timed| timed.algorithm == algorithm.name());
                timed.map_or(f64::NAN, |timed| compared.bytes as f64 / timed.micros / 1e3)
            };
            (algorithm.name().to_owned(), lengths.iter().map(one).collect())
        };
        let series = Algorithm::of(self.operation).iter().map(speeds).collect();
        self.draw("GB/s of each algorithm", lengths.iter().map(|compared| compared.bytes), series)
    }

    fn print_tuned(&self, lengths: &[Compared]) -> Result<()> {
        let names = Algorithm::of(self.operation).iter().map(|algorithm| algorithm.name().to_owned());
        let mut rows: Vec<Vec<String>> = vec![std::iter::once("vector".to_owned()).chain(names).collect()];
        for compared in lengths {
            let cell = |timed: &consort_collectives::bench::Timed| {
                let mark = if timed.algorithm == compared.chosen { "*" } else { " " };
                format!("{:.1}{mark}", timed.micros)
            };
            let length = std::iter::once(bytes(compared.bytes as u64));
            rows.push(length.chain(compared.times.iter().map(cell)).collect());
        }
        table(&rows).into_iter().try_for_each(line)?;
        note("microseconds of a call; * is what a call takes by itself");
        Ok(())
    }

    fn launch<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        if !self.json {
            let (operation, transport) = (self.operation.name(), self.transport.name());
            note(&format!(
                "{operation} (f32), {} processes over {transport}, on the slowest rank",
                self.ranks
            ));
        }
        let mut random = [0u8; 16];
        getrandom::fill(&mut random)
            .map_err(|error| anyhow!("no random numbers for the job's token: {error}"))?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let store = Store::listen("127.0.0.1:0", token.as_bytes(), StoreOptions::new(self.ranks.into()))?;
        let itself = std::env::current_exe().context("cannot find this program to start the ranks")?;
        let mut ranks = Ranks(Vec::new());
        for rank in 0..self.ranks {
            let mut command = Command::new(&itself);
            command.args(std::env::args_os().skip(1));
            let rank = BenchRank {
                store: store.address().to_string(),
                token: token.clone(),
                host: format!(
                    "host {}",
                    usize::from(rank) * usize::from(self.hosts) / usize::from(self.ranks)
                ),
            };
            environment::for_bench_rank(&mut command, &rank);
            ranks.0.push(
                command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start a rank")?,
            );
        }
        let mut lengths = Vec::new();
        for child in &mut ranks.0 {
            let Some(out) = child.stdout.take() else { continue };
            for said in BufReader::new(out).lines() {
                lengths.push(serde_json::from_str::<T>(&said?).context("a rank printed what it should not")?);
            }
            let status = child.wait().context("a rank is gone")?;
            if !status.success() {
                bail!("a rank ended with {status}; its words are above");
            }
        }
        Ok(lengths)
    }

    fn rank(&self, rank: BenchRank) -> Result<()> {
        let options = JoinOptions {
            transport: Some(self.transport),
            host: Some(rank.host),
            ..JoinOptions::new(rank.store, rank.token.as_bytes())
        };
        let mut group = Group::join(options)?;
        group.set_algorithm(self.algorithm);
        let budget = Duration::from_secs_f64(self.seconds);
        for bytes in &self.bytes {
            let said = if self.tune {
                serde_json::to_string(&compare(&mut group, self.operation, *bytes, budget)?)?
            } else {
                serde_json::to_string(&measure(&mut group, self.operation, *bytes, budget)?)?
            };
            if group.rank() == 0 {
                line(said)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_units_and_bounds() {
        assert_eq!([length("4k"), length("1M"), length("64")], [Ok(4096), Ok(1 << 20), Ok(64)]);
        for wrong in ["", "k", "-1", "2G", "99999999999999999999", "1", "4x"] {
            assert!(length(wrong).is_err(), "{wrong}");
        }
    }
}

//! `cargo xtask tune`: which algorithm is fastest for which length, and the table that calls choose by.
//!
//! Each round runs every case once, so that a slow minute of the machine is shared by all of them; a time is the median
//! over rounds. An algorithm that is hardly better than the one for the next shorter length doesn't replace it, as noise
//! would then draw the table. It writes `crates/collectives/src/schedule/measured.rs`, by which `Algorithm::choose` goes,
//! and `docs/collectives-choice.md`, which shows the times behind it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::command::{cargo, output, run, target_folder};
use crate::peers::{machine, median};

/// How to measure.
#[derive(Args)]
pub(crate) struct TuneArguments {
    /// Rounds over all cases.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds for each algorithm and length in a round.
    #[arg(long, default_value_t = 0.05)]
    seconds: f64,
    /// Measures these alone and keeps what is known of the others, as shm/2, tcp/4 or mixed/4.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Takes the release build of the benchmark that is there.
    #[arg(long)]
    no_build: bool,
}

/// An operation, the transport's name, and the number of ranks.
type Case = (String, String, u32);

/// Microseconds by length and algorithm, one of each round.
type Times = BTreeMap<usize, BTreeMap<String, Vec<f64>>>;

/// Everything that was measured.
#[derive(Default, Serialize, Deserialize)]
struct Record {
    cases: Vec<(Case, Times)>,
}

#[derive(Deserialize)]
struct Compared {
    operation: String,
    bytes: usize,
    times: Vec<Timed>,
}

#[derive(Deserialize)]
struct Timed {
    algorithm: String,
    micros: f64,
}

const OPERATIONS: [(&str, &str); 4] = [
    ("all_reduce", "AllReduce"),
    ("reduce_scatter", "ReduceScatter"),
    ("all_gather", "AllGather"),
    ("broadcast", "Broadcast"),
];

/// Transport, its variant in the code, ranks, hosts.
const WAYS: [(&str, &str, u32, u32); 7] = [
    ("shm", "SharedMemory", 2, 1),
    ("shm", "SharedMemory", 4, 1),
    ("tcp", "Tcp", 2, 1),
    ("tcp", "Tcp", 4, 1),
    ("tls", "Tls", 2, 1),
    ("tls", "Tls", 4, 1),
    ("mixed", "Mixed", 4, 2),
];

/// How much faster an algorithm must be to replace the one for shorter vectors.
const WORTH: f64 = 1.1;

fn lengths() -> Vec<usize> {
    (8..=24).step_by(2).map(|power| 1 << power).collect()
}

/// Measures, and writes the code and the page.
pub(crate) fn tune(root: &Path, arguments: &TuneArguments) -> Result<()> {
    if !arguments.no_build {
        run(&mut cargo(
            root,
            ["build", "--release", "--quiet", "-p", "consort-collectives", "--example", "bench"],
        ))?;
    }
    let bench = target_folder(root).join("release/examples/bench");
    let kept = target_folder(root).join("peers/collectives-choice.json");
    let known: Record =
        fs::read_to_string(&kept).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let wanted = |transport: &str, ranks: u32| {
        arguments.only.is_empty() || arguments.only.contains(&format!("{transport}/{ranks}"))
    };
    let mut cases: BTreeMap<Case, Times> =
        known.cases.into_iter().filter(|((_, transport, ranks), _)| !wanted(transport, *ranks)).collect();
    for round in 1..=arguments.rounds {
        for (transport, _, ranks, hosts) in WAYS.iter().filter(|way| wanted(way.0, way.2)) {
            eprintln!("xtask: {transport}, {ranks} ranks, round {round} of {}", arguments.rounds);
            for (operation, _) in OPERATIONS {
                let mut command = Command::new(&bench);
                command.args([&ranks.to_string(), *transport, &format!("each-{operation}")]);
                command.args(lengths().iter().map(usize::to_string));
                command.env("BENCH_SECONDS", arguments.seconds.to_string());
                command.env("BENCH_HOSTS", hosts.to_string());
                let times = cases.entry((operation.into(), (*transport).into(), *ranks)).or_default();
                for line in output(&mut command)?.lines() {
                    let said: Compared = serde_json::from_str(line).context("the benchmark said")?;
                    if said.operation != operation {
                        bail!("asked for {operation}, got {}", said.operation);
                    }
                    for timed in said.times {
                        let of_length = times.entry(said.bytes).or_default();
                        of_length.entry(timed.algorithm).or_default().push(timed.micros);
                    }
                }
            }
        }
    }
    let record = Record { cases: cases.into_iter().collect() };
    if let Some(folder) = kept.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&kept, serde_json::to_string(&record)?)?;
    let find = |operation: &str, transport: &str, ranks: u32| {
        let case: Case = (operation.into(), transport.into(), ranks);
        record.cases.iter().find(|(known, _)| *known == case).map(|(_, times)| times)
    };
    let (mut code, mut page) = (code_head(), page_head(arguments));
    for (operation, variant) in OPERATIONS {
        for (transport, kind, ranks, hosts) in WAYS {
            let times = find(operation, transport, ranks);
            let times =
                times.with_context(|| format!("{transport}/{ranks} was never measured: leave --only out"))?;
            let best = best(times, Charge::of(operation, transport, ranks));
            writeln!(code, "{}", row(variant, kind, ranks, &best))?;
            page += &table(operation, transport, ranks, hosts, times, &best);
        }
    }
    code += "];\n";
    for (path, text) in
        [("crates/collectives/src/schedule/measured.rs", code), ("docs/collectives-choice.md", page)]
    {
        fs::write(root.join(path), text).with_context(|| format!("cannot write {path}"))?;
        println!("written to {path}");
    }
    Ok(())
}

/// What a real link charges for and a loopback doesn't: bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Charge {
    /// There is no link, or every algorithm sends the same over it.
    Nothing,
    /// Long vectors that are sent whole.
    Whole,
    /// What goes between hosts more than once.
    Between,
}

impl Charge {
    fn of(operation: &str, transport: &str, ranks: u32) -> Self {
        match (operation, transport) {
            (_, "shm") | ("broadcast", _) => Self::Nothing,
            (_, "mixed") => Self::Between,
            ("all_reduce", _) if ranks > 2 => Self::Whole,
            _ => Self::Nothing,
        }
    }

    /// Whether an algorithm may be taken. Over a link of 1 Gb/s between two hosts of two ranks each the hierarchical one
    /// is the fastest from 64 KB on, up to twice as fast as the next; over a loopback others can look better.
    fn allows(self, algorithm: &str, bytes: usize) -> bool {
        match self {
            Self::Nothing => true,
            Self::Whole => bytes < 1 << 20 || !["tree", "one_shot"].contains(&algorithm),
            Self::Between => bytes < 64 << 10 || algorithm == "hierarchical",
        }
    }
}

/// The algorithm for each length: the fastest that may be taken, unless the one before it is nearly as fast. The last
/// length stands for all that are longer, where little becomes much: there it is the fastest.
fn best(times: &Times, charge: Charge) -> Vec<(usize, String)> {
    let mut chosen: Vec<(usize, String)> = Vec::new();
    for (index, (bytes, by)) in times.iter().enumerate() {
        let worth = if index + 1 < times.len() { WORTH } else { 1.0 };
        let micros = |name: &str| by.get(name).map_or(f64::INFINITY, |rounds| median(rounds.clone()));
        let fair = |name: &&String| charge.allows(name, *bytes);
        let Some(fastest) = by.keys().filter(fair).min_by(|a, b| micros(a).total_cmp(&micros(b))) else {
            continue;
        };
        let before = chosen.last().map(|(_, name)| name.clone());
        let stays = before.filter(|name| fair(&name) && micros(name) < micros(fastest) * worth);
        chosen.push((*bytes, stays.unwrap_or_else(|| fastest.clone())));
    }
    chosen
}

/// One entry of the table in the code. Between two lengths that were measured, it turns at their geometric mean.
fn row(operation: &str, kind: &str, ranks: u32, best: &[(usize, String)]) -> String {
    let mut up_to: Vec<(String, String)> = Vec::new();
    for (index, (bytes, name)) in best.iter().enumerate() {
        let most = match best.get(index + 1) {
            Some((next, _)) => (*bytes as f64 * *next as f64).sqrt().round().to_string(),
            None => "MAX".into(),
        };
        if up_to.last().is_some_and(|(_, last)| *last == variant(name)) {
            up_to.pop();
        }
        up_to.push((most, variant(name)));
    }
    let up_to: Vec<String> = up_to.into_iter().map(|(most, name)| format!("({most}, {name})")).collect();
    let up_to = up_to.join(", ");
    format!("    Row {{ operation: {operation}, transport: {kind}, ranks: {ranks}, up_to: &[{up_to}] }},")
}

/// `one_shot` as the code spells it.
fn variant(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').filter(|word| !word.is_empty()).map(capital).collect()
}

fn code_head() -> String {
    format!(
        "//! The fastest algorithm by length. `cargo xtask tune` writes this file; the times behind it are in\n\
         //! `docs/collectives-choice.md`.\n\
         //!\n\
         //! Machine: {}, {} cores.\n\n\
         use super::Algorithm::*;\n\
         use super::choice::Row;\n\
         use crate::call::Operation::*;\n\
         use crate::transport::TransportKind::*;\n\n\
         const MAX: usize = usize::MAX;\n\n\
         #[rustfmt::skip]\n\
         pub(super) const MEASURED: &[Row] = &[\n",
        machine(),
        std::thread::available_parallelism().map_or(1, usize::from),
    )
}

fn page_head(arguments: &TuneArguments) -> String {
    let (rounds, cores) = (arguments.rounds, std::thread::available_parallelism().map_or(1, usize::from));
    format!(
        "# Which algorithm for which length\n\n\
         Made by `cargo xtask tune --rounds {rounds}`, which writes this page and the table that calls choose by \
         (`crates/collectives/src/schedule/measured.rs`). Machine: {}, {cores} cores; more ranks than cores take turns on \
         them, so their figures say how things are on a full machine and not how they would be with a core for each.\n\n\
         Microseconds of a call over f32, on its slowest rank, the median over rounds. **Bold** is what a call takes when \
         nobody names an algorithm (`Group::set_algorithm`, `--algorithm`): the fastest, unless the one for the next shorter \
         length is within {:.0} % (the last length stands for all longer ones: there the fastest); between more than two ranks that don't share memory, for a megabyte and more, only one that \
         sends no whole vectors, and between hosts of several ranks, for 64 KB and more, only the hierarchical one, since a loopback doesn't charge for bytes as a link does \
         (over one of 1 Gb/s it is the fastest from there on: 0.47 ms for 64 KB, 9.4 for 1 MB, where halving and doubling takes 1.0 and 18.7). *mixed* is shared memory inside each of two hosts, of two ranks each, and TLS between them \
         (both hosts are this machine). `consort bench collectives --tune` measures the same anywhere.\n",
        machine(),
        (WORTH - 1.0) * 100.0,
    )
}

fn table(
    operation: &str,
    transport: &str,
    ranks: u32,
    hosts: u32,
    times: &Times,
    best: &[(usize, String)],
) -> String {
    let Some(names) = times.values().next().map(|by| by.keys().cloned().collect::<Vec<_>>()) else {
        return String::new();
    };
    let on = if hosts == 1 { String::new() } else { format!(" on {hosts} hosts") };
    let mut text =
        format!("\n## {operation}, {transport}, {ranks} ranks{on}\n\n| vector | {} |\n", names.join(" | "));
    text += &format!("|---{}|\n", "|--:".repeat(names.len()));
    for ((bytes, by), (_, chosen)) in times.iter().zip(best) {
        let cell = |name: &String| {
            let micros = by.get(name).map_or(f64::NAN, |rounds| median(rounds.clone()));
            let micros = if micros < 100.0 { format!("{micros:.1}") } else { format!("{micros:.0}") };
            if name == chosen { format!("**{micros}**") } else { micros }
        };
        let length = match *bytes {
            b if b >= 1 << 20 => format!("{} MB", b >> 20),
            b if b >= 1 << 10 => format!("{} KB", b >> 10),
            b => format!("{b} B"),
        };
        text += &format!("| {length} | {} |\n", names.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_a_link_would_charge_for_are_not_free() {
        let of =
            |pairs: &[(&str, f64)]| pairs.iter().map(|(name, t)| ((*name).to_owned(), vec![*t])).collect();
        let by: BTreeMap<String, Vec<f64>> =
            of(&[("tree", 1.0), ("ring", 2.0), ("hierarchical", 3.0), ("one_shot", 4.0)]);
        let times: Times = [(32 << 10, by.clone()), (64 << 10, by.clone()), (1 << 20, by)].into();
        let names = |operation, transport| {
            let chosen = best(&times, Charge::of(operation, transport, 4));
            chosen.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
        };
        assert_eq!(names("all_reduce", "shm"), ["tree", "tree", "tree"]);
        assert_eq!(names("all_reduce", "tls"), ["tree", "tree", "ring"]);
        assert_eq!(names("all_gather", "mixed"), ["tree", "hierarchical", "hierarchical"]);
    }

    #[test]
    fn noise_does_not_change_the_algorithm_and_a_gain_does() {
        let of = |tree: f64, ring: f64| {
            BTreeMap::from([("one_shot".to_owned(), vec![tree]), ("ring".to_owned(), vec![ring, ring, 1e9])])
        };
        let times: Times = [
            (256, of(1.0, 2.0)),
            (1024, of(2.0, 1.95)),
            (4096, of(9.0, 3.0)),
            (16384, of(11.0, 12.0)),
            (65536, of(11.0, 12.0)),
        ]
        .into();
        let best = best(&times, Charge::Nothing);
        let names: Vec<&str> = best.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["one_shot", "one_shot", "ring", "ring", "one_shot"]);
        assert_eq!(
            row("AllReduce", "Tcp", 2, &best),
            "    Row { operation: AllReduce, transport: Tcp, ranks: 2, up_to: &[(2048, OneShot), (32768, Ring), (MAX, OneShot)] },"
        );
    }
}

//! docs/peers-collectives.md.

use super::sides::Side;
use super::{Link, Record, Series};
use crate::peers::table::median;

/// Bytes a rank must at least send, as a part of the vector (NCCL's tests).
fn bus_factor(ranks: u32) -> f64 {
    2.0 * f64::from(ranks - 1) / f64::from(ranks)
}

impl Series {
    /// The median over rounds, in microseconds.
    fn micros(&self, side: Side, bytes: usize) -> f64 {
        median(self.rounds.iter().filter_map(|round| round.get(&side)?.get(&bytes).copied()).collect())
    }

    /// How many times faster `side` is than `other`: the median of the rounds' ratios.
    fn times(&self, side: Side, other: Side, bytes: usize) -> f64 {
        let ratio = |round: &std::collections::BTreeMap<Side, super::Times>| {
            Some(round.get(&other)?.get(&bytes)? / round.get(&side)?.get(&bytes)?)
        };
        median(self.rounds.iter().filter_map(ratio).collect())
    }
}

fn label(side: Side) -> &'static str {
    match side {
        Side::Shm | Side::Auto => "Consort",
        Side::Tcp => "Consort TCP",
        Side::Tls => "Consort TLS",
        Side::OpenMpi => "Open MPI",
        Side::Gloo => "gloo",
    }
}

fn length(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 => format!("{} MB", b >> 20),
        b => format!("{} KB", b >> 10),
    }
}

fn figure(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// The table of one link and number of ranks.
fn table(series: &Series, copy_gb_per_s: f64) -> String {
    let sides = series.link.sides();
    let ours = sides[0];
    let peers: Vec<Side> = sides[1..].to_vec();
    let memory = series.link == Link::Memory;
    let mut head = vec!["vector".to_owned()];
    for side in sides {
        head.push(format!("{} µs", label(*side)));
    }
    head.extend(["alg GB/s", "bus GB/s"].map(|what| format!("{} {what}", label(ours))));
    head.extend(peers.iter().map(|side| format!("{} bus", label(*side))));
    head.extend(peers.iter().map(|side| format!("× {}", label(*side))));
    if memory {
        head.push("of the limit".into());
    }
    let mut text = format!("| {} |\n|---{}|\n", head.join(" | "), "|--:".repeat(head.len() - 1));
    for bytes in series.link.lengths() {
        let speed = |side: Side| bytes as f64 / series.micros(side, bytes) / 1e3;
        let mut row = vec![length(bytes)];
        row.extend(sides.iter().map(|side| figure(series.micros(*side, bytes))));
        row.push(figure(speed(ours)));
        row.push(figure(speed(ours) * bus_factor(series.ranks)));
        row.extend(peers.iter().map(|side| figure(speed(*side) * bus_factor(series.ranks))));
        row.extend(peers.iter().map(|side| figure(series.times(ours, *side, bytes))));
        if memory {
            let limit = copy_gb_per_s / (2.0 * f64::from(series.ranks));
            // Shorter vectors never leave the caches.
            row.push(if bytes >= 16 << 20 {
                format!("{:.0} %", 100.0 * speed(ours) / limit)
            } else {
                "".into()
            });
        }
        text += &format!("| {} |\n", row.join(" | "));
    }
    text
}

/// The whole page.
pub(super) fn page(record: &Record, machine: &str, rounds: usize) -> String {
    let mut text = format!(
        "# Beside gloo and Open MPI\n\n\
         Made by `cargo xtask peers collectives --pairs {rounds}`, which sets the peers up and writes this page. \
         Machine: {machine}. Peers: {}, {}.\n\n\
         All-reduce (sum, f32, in place). Each round runs every side once; a figure is the median over the rounds, a \
         ratio the median of the rounds' ratios (above 1 Consort is faster). A call's time is the median over calls, each on \
         its slowest rank. Bandwidths by the formulas of NCCL's tests: algorithm bandwidth is the vector's bytes over the \
         time, bus bandwidth that times 2·(n−1)/n.\n",
        record.open_mpi, record.gloo,
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if record.series.iter().any(|series| series.ranks as usize > cores) {
        text += &format!(
            "\nThe machine has {cores} cores: more ranks than that take turns on them, on every side.\n"
        );
    }
    for series in &record.series {
        let ranks = series.ranks;
        text += &match series.link {
            Link::Memory => format!(
                "\n## Shared memory, {ranks} ranks\n\n\
                 Open MPI over shared memory (`btl vader`); gloo, which knows only TCP, over loopback. The limit: an \
                 all-reduce reads and writes every rank's vector at least once, {} bytes of memory traffic for each byte \
                 of the vector; copies on all cores reach {:.0} GB/s (read and written) here, so no more than {:.1} GB/s \
                 for vectors beyond the caches.\n\n",
                2 * ranks,
                record.copy_gb_per_s,
                record.copy_gb_per_s / (2.0 * f64::from(ranks)),
            ),
            Link::Loopback => format!("\n## TCP over loopback, {ranks} ranks\n\n"),
            Link::Shaped => "\n## A link of 1 Gb/s, one rank on each side\n\n\
                 Two network namespaces and a cable (token bucket: 1 Gb/s each way). Each of two ranks must send the \
                 other as many bytes as the vector has, 2·(n−1)/n of it, by whatever algorithm; so no side can have \
                 more than 0.125 GB/s of bus bandwidth, or 0.119 without the headers of Ethernet, IP and TCP. Where all \
                 sides fill the link, all take the same time: 1.0 is the most that a ratio can be.\n\n"
                .to_owned(),
            Link::Hosts => "\n## A link of 1 Gb/s between two hosts of two ranks\n\n\
                 The same cable, with two ranks in each namespace. A ring of four that knows nothing of hosts, as \
                 gloo's, sends 2·(n−1)/n = 1.5 times the vector over the link in each direction. Consort finds by \
                 itself who shares a host, adds up inside each host through its memory and sends each sum over the link \
                 once, encrypted: 1.0 times the vector. So 1.5 is what a link that is the bottleneck allows. Algorithm \
                 bandwidth can be 0.119 GB/s then, and the bus bandwidth that follows from the formula, 1.5 times that, \
                 is more than the link's. Open MPI is left out: it tells hosts apart by their names, and the namespaces \
                 of one machine have one.\n\n"
                .to_owned(),
        };
        text += &table(series, record.copy_gb_per_s);
    }
    text
}

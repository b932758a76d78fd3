//! The table, and the document around it.

use super::proxies::{Cores, Proxy};
use super::{LOAD, SECONDS, Side, open_loop, pauses, wrk};
use crate::peers::table::median;

fn label(name: &str) -> &str {
    match name {
        "consort" => "Consort, before an OpenAI server",
        "consort-replica" => "Consort, before its own replicas",
        "nginx" => "nginx",
        "haproxy" => "HAProxy",
        "litellm" => "LiteLLM",
        other => other,
    }
}

/// One row a proxy.
pub(super) fn table(alone: &Side, sides: &[Side]) -> String {
    let nginx = sides.iter().find(|side| side.name == "nginx");
    let mut text = String::from(
        "| | requests/s | of nginx | p50 / p99 at the limit | at | adds at p50 | at p99 | at p99 of everything |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for side in std::iter::once(alone).chain(sides) {
        let ratio = nginx.map(|nginx| {
            let pairs = side.bursts.iter().zip(&nginx.bursts);
            median(pairs.map(|(own, nginx)| own.rate / nginx.rate).collect())
        });
        let (at, added) = if side.times.is_empty() {
            (String::new(), [const { String::new() }; 3])
        } else {
            let at = median(side.times.iter().map(|(through, _)| through.rate).collect());
            (format!("{at:.0}/s"), side.added().map(|us| format!("{us:.0} µs")))
        };
        text += &format!(
            "| {} | {:.0} | {:.3} | {:.2} / {:.2} ms | {at} | {} |\n",
            label(side.name),
            side.rate(),
            ratio.unwrap_or(f64::NAN),
            side.at_limit().0 / 1e3,
            side.at_limit().1 / 1e3,
            added.join(" | "),
        );
    }
    text
}

/// The document.
pub(super) fn page(
    rounds: usize,
    cores: &Cores,
    proxies: &[Proxy],
    pauses: &pauses::Pauses,
    table: &str,
) -> String {
    let mut versions: Vec<&str> = proxies.iter().map(|proxy| proxy.version.as_str()).collect();
    versions.dedup();
    format!(
        "# The gateway beside other proxies\n\n\
        Made by `cargo xtask peers gateway --pairs {rounds}`, which installs the others, starts everything and writes this \
        page. Machine: {machine}. {versions}.\n\n\
        {table}\n\
        Every proxy has one core; {load}. All run all the time and take turns under load, {rounds} rounds of {SECONDS} s; \
        figures are medians of the rounds, and ratios and differences are taken within a round. Of the 99th percentiles at \
        the limit the least of the rounds is shown.\n\n\
        - *requests/s, p50 / p99 at the limit*: wrk, {wrk} keep-alive connections, a chat request of two short messages. \
        The upstream is an nginx with a fixed answer of {answer} bytes.\n\
        - *adds*: what a request takes through the proxy less what it takes at the upstream alone, in an open loop: {open} \
        connections send at random times (a Poisson process) at {percent:.0} % of our own limit in that \
        round; for LiteLLM and for Consort before its own replicas at {percent:.0} % of theirs. A request counts from when it was due \
        if no connection was free then.\n\
        - *at p99* is the 99th percentile of each {window} ms, and of those the median; *of everything* is that of a whole \
        round. They differ because this machine's cores stand still: with both busy and nothing else to do, each of them \
        was gone for more than {pause} ms {rate_of_pauses:.1} times a second, {share:.1} % of the time, and {longest:.0} ms at the \
        longest. At {percent:.0} % load it takes a proxy longer than the pause to work off what came meanwhile.\n\
        - nginx and HAProxy pass bytes on. Consort reads the request's JSON, picks a model and a replica by what each has \
        to do, reads the answer's JSON for what was used, and counts both. *Before its own replicas* it also asks for a \
        stream with token ids and puts the answer (here nine tokens) together from its chunks: what makes an answer \
        outlive its replica.\n{priority}",
        priority = priority(),
        machine = crate::peers::machine(),
        versions = versions.join(", "),
        load = if cores.shared() {
            "load and upstream share another one"
        } else {
            "load and upstream have one each"
        },
        wrk = wrk::CONNECTIONS,
        open = open_loop::CONNECTIONS,
        answer = super::proxies::ANSWER.len(),
        percent = LOAD * 100.0,
        window = open_loop::WINDOW.as_millis(),
        pause = pauses::LEAST.as_millis(),
        rate_of_pauses = pauses.rate,
        share = pauses.share * 100.0,
        longest = pauses.longest.as_secs_f64() * 1e3,
    )
}

/// What our own priority does to the figures; all processes have it from us.
fn priority() -> &'static str {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The policy is the 41st field, the 39th behind the name.
    let policy = stat.rsplit(") ").next().unwrap_or_default().split(' ').nth(38);
    if matches!(policy, Some("1" | "2")) {
        "- Everything ran with real-time priority (`chrt -r 1`), because others used the machine as well. Linux keeps a \
        twentieth of each second from such processes: the 99th percentiles of proxies at their limit are that.\n"
    } else {
        ""
    }
}

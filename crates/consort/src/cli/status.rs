//! `consort status`: what runs, where, how healthy, how loaded.

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use consort_api::{FleetSnapshot, ReplicaSnapshot, ReplicaState};
use consort_control::supervisor::{ReplicaView, SlotState, SlotView};

use crate::terminal::{Style, line, piece, table};
use crate::up::FleetStatus;
use crate::{admin_client, environment};

/// What `consort up` runs here: replicas, where they are, how healthy and how loaded
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort status\n  consort status --watch\n  consort status --json | jq .slots"
)]
pub(crate) struct Status {
    /// Show it anew every second until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Print JSON; with --watch one line a second
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(crate) fn run(self) -> Result<()> {
        super::log("warn")?;
        let folder = environment::state_folder()?;
        loop {
            let Some(up) = admin_client::find(&folder)? else {
                bail!("no consort up runs here (looked in {}); start one with: consort up", folder.display());
            };
            if self.json {
                let status: serde_json::Value = up.get("/fleet")?;
                line(if self.watch { status.to_string() } else { serde_json::to_string_pretty(&status)? })?;
            } else {
                let shown = show(&up.get("/fleet")?, Style::stdout());
                // Home, then the rest of each line and of the screen: no flicker as clearing it first would give.
                let home = if self.watch && std::io::stdout().is_terminal() { "\u{1b}[H" } else { "" };
                let lines: Vec<_> = shown
                    .iter()
                    .map(|l| if home.is_empty() { l.clone() } else { format!("{l}\u{1b}[K") })
                    .collect();
                piece(&format!(
                    "{home}{}\n{}",
                    lines.join("\n"),
                    if home.is_empty() { "" } else { "\u{1b}[J" }
                ))?;
            }
            if !self.watch {
                return Ok(());
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn show(status: &FleetStatus, style: Style) -> Vec<String> {
    let totals = &status.gateway.totals;
    let ready =
        status.slots.iter().filter(|s| matches!(s.state, SlotState::Ready | SlotState::Rolling)).count();
    let mut lines = vec![
        style.bold(&format!(
            "{}   {ready} of {} replicas ready, up {}",
            status.url,
            status.slots.len(),
            span(status.uptime_ms)
        )),
        format!(
            "{:.1} requests/s   {:.0} tokens/s   {} open   {} waiting   {} errors   {} retries   {} resumed   {} lost ever",
            totals.requests_per_second,
            totals.tokens_per_second,
            totals.streams,
            totals.queued,
            totals.errors,
            totals.retries,
            totals.resumes,
            status.restarts_ever,
        ),
        String::new(),
    ];
    let head = [
        "REPLICA",
        "STATE",
        "PID",
        "ADDRESS",
        "THREADS",
        "REQUESTS",
        "TOKENS LEFT",
        "TOK/S",
        "P50 FIRST",
        "AGE",
        "LOST",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for slot in &status.slots {
        rows.extend(
            slot.replicas.iter().map(|replica| row(slot, replica, seen(&status.gateway, &replica.id))),
        );
        if slot.replicas.is_empty() {
            let mut cells = head.map(|_| String::new());
            (cells[0], cells[1]) = (slot.slot.clone(), slot.state.text().to_owned());
            cells[10] = slot.restarts.to_string();
            rows.push(cells);
        }
    }
    for (i, row) in table(&rows).into_iter().enumerate() {
        lines.push(if i == 0 { style.dim(&row) } else { row });
    }
    for slot in status.slots.iter().filter(|s| s.failures > 0 && s.state != SlotState::Ready) {
        let next = slot.retry_in_ms.map_or(String::new(), |ms| format!("; next start in {}", span(ms)));
        let why = slot.last_failure.as_deref().unwrap_or_default();
        lines.push(format!("{}: lost {} times in a row: {why}{next}", slot.slot, slot.failures));
    }
    for scaling in status.scaling.iter().filter(|s| s.min != s.max) {
        lines.push(format!(
            "{} {}: {} of {} to {} replicas ({})",
            scaling.model, scaling.version, scaling.replicas, scaling.min, scaling.max, scaling.reason
        ));
    }
    for view in &status.rollouts {
        lines.push(String::new());
        lines.extend(super::rollout::show(view, style));
    }
    lines.extend(status.warning.iter().map(|text| format!("warning: {text}")));
    if !status.restart_needed.is_empty() {
        lines.push(format!("changed in the file, for the next start: {}", status.restart_needed.join(", ")));
    }
    if let Some(error) = &status.file_error {
        lines.push(String::new());
        lines.push("the file's last edit was refused:".to_owned());
        lines.extend(error.lines().map(str::to_owned));
    }
    lines
}

fn seen<'a>(snapshot: &'a FleetSnapshot, id: &str) -> Option<&'a ReplicaSnapshot> {
    snapshot.models.iter().flat_map(|m| &m.versions).flat_map(|v| &v.replicas).find(|r| r.id == id)
}

fn row(slot: &SlotView, replica: &ReplicaView, seen: Option<&ReplicaSnapshot>) -> [String; 11] {
    // What the door makes of a ready replica says more than that it is one.
    let state = match seen.map(|s| s.state) {
        Some(ReplicaState::Degraded) if replica.phase == "ready" => "degraded",
        Some(ReplicaState::Ejected) if replica.phase == "ready" => "ejected",
        Some(ReplicaState::Down) if replica.phase == "ready" => "no answer",
        _ => &replica.phase,
    };
    let of = |read: &dyn Fn(&ReplicaSnapshot) -> String| seen.map(read).unwrap_or_else(|| "-".to_owned());
    [
        replica.id.clone(),
        state.to_owned(),
        replica.pid.map(|pid| pid.to_string()).unwrap_or_default(),
        replica.address.clone().unwrap_or_default(),
        slot.threads.to_string(),
        of(&|s| s.outstanding_requests.to_string()),
        of(&|s| s.outstanding_tokens.to_string()),
        of(&|s| format!("{:.0}", s.tokens_per_second)),
        of(&|s| {
            if s.first_token.count == 0 { "-".to_owned() } else { format!("{:.0} ms", s.first_token.p50_ms) }
        }),
        span(replica.age_ms),
        slot.restarts.to_string(),
    ]
}

/// A time for people: `850 ms`, `12 s`, `3 min`, `5 h`.
fn span(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..120_000 => format!("{} s", ms / 1000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

//! What a job is doing right now, for `consort train status`: a file that the launcher keeps fresh, and an explanation
//! of it.
//!
//! Workers say four times a second what they compute and which call of the group is under way. Of those who wait, the
//! calls have numbers; who hasn't come as far as the others is who they wait for. A worker that says nothing any more is
//! stopped, swapped out, or on a machine that is gone; the system knows of the first.

mod served;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use consort_training::job::Job;
use consort_training::parallel::{Activity, Status};
use consort_training::server::View;
use serde::{Deserialize, Serialize};

use super::endpoint::Endpoint;
use super::metrics::Metrics;
use super::{publish, unix_ms};

/// How often the file is written.
const EVERY: Duration = Duration::from_millis(500);
/// A worker that has said nothing for so long is silent.
const SILENT_MS: u64 = 1500;
/// A launcher that has written nothing for so long is gone, or stopped.
const STALE_MS: u64 = 5000;

/// A worker's place, as the file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The place's number, from 0; ranks change, places don't.
    pub(crate) number: usize,
    /// What it is called: `worker 1`, `server 0`.
    pub(crate) name: String,
    /// Its process; `None` while there is none.
    pub(crate) pid: Option<u32>,
    /// When it last said something, in milliseconds since 1970.
    pub(crate) heard_unix_ms: u64,
    /// Processes that were started for it.
    pub(crate) starts: u32,
    /// What it said last of what it is doing.
    pub(crate) status: Option<Status>,
    /// It has ended as it should.
    pub(crate) done: bool,
    /// The system says that it is stopped (SIGSTOP, a debugger).
    #[serde(default)]
    pub(crate) stopped: bool,
}

impl Place {
    pub(crate) fn new(number: usize, name: &str) -> Place {
        Place {
            number,
            name: name.to_owned(),
            pid: None,
            heard_unix_ms: 0,
            starts: 0,
            status: None,
            done: false,
            stopped: false,
        }
    }

    /// Whether it keeps weights and computes nothing.
    fn is_server(&self) -> bool {
        self.name.starts_with("server")
    }

    /// A process was started for it.
    pub(crate) fn started(&mut self, pid: u32) {
        *self = Place {
            pid: Some(pid),
            heard_unix_ms: unix_ms(),
            starts: self.starts + 1,
            ..Place::new(self.number, &self.name)
        };
    }

    /// It said something.
    pub(crate) fn heard(&mut self) {
        self.heard_unix_ms = unix_ms();
    }
}

/// The file's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The launcher's process.
    pub(crate) launcher: u32,
    /// When it was written.
    pub(crate) unix_ms: u64,
    /// Steps taken.
    pub(crate) step: u64,
    /// Steps in all.
    pub(crate) steps: u64,
    /// Workers that take steps together.
    pub(crate) members: usize,
    /// Mean loss of the last step.
    pub(crate) loss: Option<f64>,
    /// Tokens a second of the last step.
    pub(crate) tokens_per_second: Option<f64>,
    /// The launcher has ended, and whether the job is complete.
    pub(crate) ended: Option<bool>,
    /// Workers that this launcher started, and servers behind them.
    pub(crate) places: Vec<Place>,
    /// Of a job around servers: who waits for whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) servers: Option<View>,
}

/// Keeps the file fresh.
pub(crate) struct Published {
    path: PathBuf,
    written: Option<Instant>,
    endpoint: Option<Endpoint>,
    last: Option<Report>,
    /// Of a job around servers.
    view: Option<View>,
}

impl Published {
    pub(crate) fn new(job: &Job, endpoint: Option<Endpoint>) -> Published {
        Published { path: file(&job.out), written: None, endpoint, last: None, view: None }
    }

    /// The coordinator of a job around servers says who waits for whom.
    pub(crate) fn view(&mut self, view: View) {
        self.view = Some(view);
    }

    pub(crate) fn update(&mut self, step: u64, members: usize, places: &[Place], metrics: &Metrics) {
        if self.written.is_some_and(|written| written.elapsed() < EVERY) {
            return;
        }
        self.written = Some(Instant::now());
        if let Some(endpoint) = &self.endpoint {
            endpoint.show(metrics.prometheus(step, members));
        }
        let mut places = places.to_vec();
        for place in &mut places {
            place.stopped = place.pid.is_some_and(stopped);
        }
        let last = metrics.counts.last;
        self.put(Report {
            launcher: std::process::id(),
            unix_ms: unix_ms(),
            step,
            steps: metrics.steps(),
            members,
            loss: last.map(|step| step.loss),
            tokens_per_second: last.map(|step| step.rate()),
            ended: None,
            places,
            servers: self.view.clone(),
        });
    }

    pub(crate) fn end(
        &mut self,
        step: u64,
        members: usize,
        complete: bool,
        places: &[Place],
        metrics: &Metrics,
    ) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.show(metrics.prometheus(step, members));
        }
        if let Some(last) = self.last.take() {
            self.put(Report {
                unix_ms: unix_ms(),
                step,
                ended: Some(complete),
                places: places.to_vec(),
                ..last
            });
        }
    }

    fn put(&mut self, report: Report) {
        if let Ok(text) = serde_json::to_string(&report) {
            // Whoever asks sees an older file; that is said of it there.
            let _ = publish(&self.path, &text);
        }
        self.last = Some(report);
    }
}

/// The file of a job whose result goes to `out`.
pub(crate) fn file(out: &Path) -> PathBuf {
    out.join("job").join("status.json")
}

/// The folder of a job's file, or the folder itself.
pub(crate) fn folder(of: &Path) -> anyhow::Result<PathBuf> {
    if of.is_dir() {
        return Ok(of.to_owned());
    }
    if !of.exists() {
        let what = format!("there is neither a job's folder nor its file at {}", of.display());
        return Err(crate::cli::UsageError(what).into());
    }
    Ok(super::read(of)?.job.out)
}

/// Whether the system says that a process is stopped.
fn stopped(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state is the first word behind the name, which may hold anything but ends with the last bracket.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}

/// What the report means, in lines for a person. `now` is in milliseconds since 1970.
pub(crate) fn explain(report: &Report, now: u64) -> String {
    let mut out = String::new();
    // Writing to a String doesn't fail.
    let age = now.saturating_sub(report.unix_ms);
    let _ = match report.ended {
        Some(true) => writeln!(out, "step {}/{}: the job is complete", report.step, report.steps),
        Some(false) => {
            writeln!(out, "step {}/{}: the job was stopped; --resume goes on", report.step, report.steps)
        }
        None if age > STALE_MS => writeln!(
            out,
            "step {}/{}: the launcher (process {}) has said nothing for {}: it is gone or stopped. Where it is gone, its \
             workers have stopped too, with a checkpoint; --resume goes on",
            report.step,
            report.steps,
            report.launcher,
            seconds(age)
        ),
        None => {
            let loss = report.loss.map(|loss| format!("  loss {loss:.3}")).unwrap_or_default();
            let rate = report.tokens_per_second.map(|rate| format!("  {rate:.0} tok/s")).unwrap_or_default();
            writeln!(out, "step {}/{}{loss}{rate}  {} workers", report.step, report.steps, report.members)
        }
    };
    if report.ended.is_some() {
        return out;
    }
    if let Some(view) = &report.servers {
        return out + &served::explain(view, &report.places, report.unix_ms);
    }
    for place in &report.places {
        let _ = writeln!(out, "  worker {}{}", place.number, line(place, report.unix_ms));
    }
    let _ = write!(out, "{}", verdict(report));
    out
}

/// What one worker does.
fn line(place: &Place, now: u64) -> String {
    let Some(pid) = place.pid else {
        let what = if place.done { "has done its work" } else { "is gone; a new process is due" };
        return format!("  {what}");
    };
    let silent = now.saturating_sub(place.heard_unix_ms);
    let mut line = match &place.status {
        None => format!("  process {pid}  is starting ({})", seconds(silent)),
        Some(status) => {
            let (rank, step, doing) = (status.rank, status.step, doing(&status.activity));
            let since = seconds(status.since_ms + silent);
            format!("  process {pid}  rank {rank}  step {step}  {doing} for {since}")
        }
    };
    if let Some(talking) = place.status.as_ref().and_then(|status| status.talking.as_ref()) {
        let since = seconds(talking.since_ms + silent);
        let _ = write!(line, "; in {} (call {}) for {since}", talking.what, talking.sequence);
    }
    if place.stopped {
        let _ = write!(line, "; STOPPED: a signal stopped the process (kill -CONT {pid} lets it go on)");
    } else if silent > SILENT_MS {
        let _ = write!(line, "; SILENT for {}", seconds(silent));
    }
    line
}

fn doing(activity: &Activity) -> String {
    match activity {
        Activity::Starting => "starting".into(),
        Activity::Joining => "waiting for a group to be formed".into(),
        Activity::Agreeing => "agreeing with the others on where they stand".into(),
        Activity::Receiving { from, bytes, total } => {
            format!("receiving the state from rank {from} ({})", share(*bytes, *total))
        }
        Activity::Sending { bytes, total } => {
            format!("sending the state to others ({})", share(*bytes, *total))
        }
        Activity::Computing { micro_batch } => format!("computing micro-batch {micro_batch}"),
        Activity::Waiting => "waiting for the others' gradients".into(),
        Activity::Applying => "moving the weights".into(),
        Activity::Saving => "saving a checkpoint".into(),
        Activity::Ended => "done".into(),
    }
}

fn share(bytes: u64, total: u64) -> String {
    format!("{} of {}", crate::terminal::bytes(bytes), crate::terminal::bytes(total))
}

/// Who waits for whom.
fn verdict(report: &Report) -> String {
    let alive: Vec<(&Place, &Status)> = report
        .places
        .iter()
        .filter(|p| p.pid.is_some())
        .filter_map(|p| Some((p, p.status.as_ref()?)))
        .collect();
    let silent =
        |place: &Place| place.stopped || report.unix_ms.saturating_sub(place.heard_unix_ms) > SILENT_MS;
    let waits = |status: &Status| {
        matches!(status.activity, Activity::Waiting | Activity::Joining | Activity::Agreeing)
    };
    let quiet: Vec<&Place> = alive.iter().map(|(place, _)| *place).filter(|place| silent(place)).collect();
    let waiting: Vec<String> = alive
        .iter()
        .filter(|(place, status)| waits(status) && !silent(place))
        .map(|(place, _)| place.number.to_string())
        .collect();
    if !quiet.is_empty() {
        let names: Vec<String> = quiet.iter().map(|place| place.number.to_string()).collect();
        let longest =
            quiet.iter().map(|place| report.unix_ms.saturating_sub(place.heard_unix_ms)).max().unwrap_or(0);
        let who = if waiting.is_empty() {
            "the others".to_owned()
        } else {
            format!("worker {}", waiting.join(", "))
        };
        return format!(
            "{who} waits for worker {}, silent for {}; past the silence that the job allows, the others go on without it\n",
            names.join(", "),
            seconds(longest)
        );
    }
    if waiting.is_empty() || waiting.len() == alive.len() && report.members > alive.len() {
        return String::new();
    }
    // Those who haven't made the call that the others are in.
    let newest = alive.iter().filter_map(|(_, s)| Some((s.epoch, s.talking.as_ref()?.sequence))).max();
    let behind: Vec<String> = alive
        .iter()
        .filter(|(_, s)| {
            !waits(s) && newest.is_some_and(|n| s.talking.as_ref().is_none_or(|t| (s.epoch, t.sequence) < n))
        })
        .map(|(place, status)| format!("worker {} ({})", place.number, doing(&status.activity)))
        .collect();
    if behind.is_empty() {
        return String::new();
    }
    format!("worker {} waits for {}\n", waiting.join(", "), behind.join(", "))
}

fn seconds(ms: u64) -> String {
    if ms < 10_000 { format!("{:.1} s", ms as f64 / 1e3) } else { super::show::duration(ms as f64 / 1e3) }
}

#[cfg(test)]
mod tests {
    use consort_training::parallel::Talking;

    use super::*;

    fn place(number: usize, activity: Activity, sequence: Option<u64>) -> Place {
        let talking =
            sequence.map(|sequence| Talking { what: "bucket 3 of step 8".into(), sequence, since_ms: 2000 });
        let status = Status {
            rank: number,
            workers: 3,
            epoch: 1,
            step: 8,
            steps: 20,
            activity,
            since_ms: 2100,
            talking,
        };
        Place {
            status: Some(status),
            pid: Some(100 + number as u32),
            heard_unix_ms: 9_900,
            ..Place::new(number, &format!("worker {number}"))
        }
    }

    fn report(places: Vec<Place>) -> Report {
        Report {
            launcher: 1,
            unix_ms: 10_000,
            step: 8,
            steps: 20,
            members: 3,
            loss: Some(2.5),
            tokens_per_second: Some(900.0),
            ended: None,
            places,
            servers: None,
        }
    }

    #[test]
    fn who_waits_for_whom_is_said() {
        let slow = report(vec![
            place(0, Activity::Waiting, Some(40)),
            place(1, Activity::Computing { micro_batch: 5 }, Some(37)),
            place(2, Activity::Waiting, Some(40)),
        ]);
        let text = explain(&slow, 10_100);
        assert!(text.contains("worker 0, 2 waits for worker 1 (computing micro-batch 5)"), "{text}");
        assert!(text.contains("in bucket 3 of step 8 (call 40) for 2.1 s"), "{text}");
        assert!(text.starts_with("step 8/20  loss 2.500  900 tok/s  3 workers"), "{text}");
    }

    #[test]
    fn who_is_stopped_or_silent_is_named() {
        let mut places = vec![
            place(0, Activity::Waiting, Some(40)),
            place(1, Activity::Computing { micro_batch: 5 }, None),
        ];
        places[1].heard_unix_ms = 4_000;
        let text = explain(&report(places.clone()), 10_100);
        assert!(
            text.contains("SILENT for 6.0 s")
                && text.contains("worker 0 waits for worker 1, silent for 6.0 s"),
            "{text}"
        );
        places[1].stopped = true;
        assert!(explain(&report(places), 10_100).contains("kill -CONT 101"));
    }

    #[test]
    fn a_launcher_that_is_gone_and_a_job_that_ended_are_told_apart() {
        let running = report(vec![place(0, Activity::Waiting, None)]);
        assert!(explain(&running, 60_000).contains("has said nothing for 50 s"));
        let complete = Report { ended: Some(true), ..running.clone() };
        assert_eq!(explain(&complete, 60_000), "step 8/20: the job is complete\n");
        assert!(explain(&Report { ended: Some(false), ..running }, 60_000).contains("--resume"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_not_stopped() {
        assert!(!stopped(std::process::id()) && !stopped(0));
    }
}

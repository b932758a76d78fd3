//! What a job's status means, in lines for a person: who does what, and who waits for whom.

use std::fmt::Write as _;

use consort_training::parallel::{Activity, Status};

use super::{Place, Report, SILENT_MS, seconds, served};

/// A launcher that has written nothing for so long is gone, or stopped.
const STALE_MS: u64 = 5000;

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
}

//! Writes what a job is doing, twice a second, to a file and for who reads metrics.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use consort_training::job::Job;
use consort_training::server::View;

use super::{Place, Report, file};
use crate::train::endpoint::Endpoint;
use crate::train::metrics::Metrics;
use crate::train::{publish, unix_ms};

/// How often the file is written.
const EVERY: Duration = Duration::from_millis(500);

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

/// Whether the system says that a process is stopped.
fn stopped(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state is the first word behind the name, which may hold anything but ends with the last bracket.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_not_stopped() {
        assert!(!stopped(std::process::id()) && !stopped(0));
    }
}

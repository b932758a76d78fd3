//! A job's progress for a person: a bar on a terminal, plain lines elsewhere. All of it on standard error.

use std::collections::{BTreeSet, VecDeque};
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use consort_training::data::Progress;
use consort_training::report::Step;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal::note;

/// How often a plain line is written.
const LINE: Duration = Duration::from_secs(5);
/// Steps whose pace counts for the time that is left.
const PACE: usize = 30;

/// Lines that are remembered, so as not to say them again.
const MOST_SAID: usize = 1000;

/// Draws it.
pub(crate) struct Show {
    quiet: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    reading: Option<ProgressBar>,
    steps: u64,
    members: usize,
    /// When the last steps were over.
    pace: VecDeque<(u64, Instant, f64)>,
    loss: Option<f64>,
    line: Option<Instant>,
    said: BTreeSet<String>,
}

impl Show {
    /// `quiet` says nothing of progress.
    pub(crate) fn new(quiet: bool) -> Show {
        Show {
            quiet,
            terminal: std::io::stderr().is_terminal(),
            bar: None,
            reading: None,
            steps: 0,
            members: 0,
            pace: VecDeque::new(),
            loss: None,
            line: None,
            said: BTreeSet::new(),
        }
    }

    /// Writes a line, above the bar.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    /// Writes a line that several workers would say, once; whether it was news.
    pub(crate) fn once(&mut self, text: &str) -> bool {
        let news = self.said.insert(text.to_owned());
        if self.said.len() > MOST_SAID {
            self.said.clear();
        }
        if news {
            self.say(text);
        }
        news
    }

    /// How far the making of samples is.
    pub(crate) fn reading(&mut self, progress: Progress) {
        if self.quiet || !self.terminal {
            return;
        }
        let bar = self.reading.get_or_insert_with(|| {
            let bar = ProgressBar::new(progress.total);
            if let Ok(style) = ProgressStyle::with_template(
                "tokenizing  {wide_bar:.cyan/dim}  {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}",
            ) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar
        });
        bar.set_position(progress.bytes);
    }

    /// Workers start.
    pub(crate) fn begin(&mut self, steps: u64) {
        self.clear();
        self.steps = steps;
        if self.quiet || !self.terminal {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{wide_bar:.cyan/dim}  {pos}/{len}  {msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_message("workers are starting");
        bar.tick();
        self.bar = Some(bar);
    }

    /// So many workers take steps together now.
    pub(crate) fn members(&mut self, workers: usize) {
        self.members = workers;
    }

    /// A step was taken.
    pub(crate) fn step(&mut self, step: &Step) {
        let now = Instant::now();
        self.members = step.workers;
        // Enough of the past that the number can be read, and no more.
        self.loss = Some(self.loss.map_or(step.loss, |loss| 0.9 * loss + 0.1 * step.loss));
        self.pace.push_back((step.step, now, step.tokens));
        if self.pace.len() > PACE {
            self.pace.pop_front();
        }
        if self.quiet {
            return;
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.step);
                bar.set_message(self.words());
            }
            None => {
                let due = self.line.is_none_or(|line| now - line >= LINE) || step.step == self.steps;
                if due {
                    self.line = Some(now);
                    note(&format!("step {}/{}  {}", step.step, self.steps, self.words()));
                }
            }
        }
    }

    /// `loss 2.314  12.3k tok/s  4 workers  38 s left`.
    fn words(&self) -> String {
        let mut words = vec![format!("loss {:.3}", self.loss.unwrap_or(f64::NAN))];
        if let (Some(first), Some(last)) = (self.pace.front(), self.pace.back()) {
            let seconds = (last.1 - first.1).as_secs_f64();
            if last.0 > first.0 && seconds > 0.0 {
                let tokens: f64 = self.pace.iter().skip(1).map(|(.., tokens)| tokens).sum();
                words.push(rate(tokens / seconds));
                words.push(workers(self.members));
                let left = self.steps.saturating_sub(last.0) as f64 * seconds / (last.0 - first.0) as f64;
                words.push(format!("{} left", duration(left)));
                return words.join("  ");
            }
        }
        words.push(workers(self.members));
        words.join("  ")
    }

    /// Takes the bars away.
    pub(crate) fn clear(&mut self) {
        for bar in [self.bar.take(), self.reading.take()].into_iter().flatten() {
            bar.finish_and_clear();
        }
    }
}

/// The beginning of the work.
pub(crate) fn workers_met(n: usize) -> String {
    if n == 1 { "the worker begins".to_owned() } else { format!("{n} workers have met") }
}

fn workers(n: usize) -> String {
    format!("{n} worker{}", if n == 1 { "" } else { "s" })
}

fn rate(tokens: f64) -> String {
    if tokens >= 10_000.0 { format!("{:.1}k tok/s", tokens / 1e3) } else { format!("{tokens:.0} tok/s") }
}

/// Seconds for people.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..120 => format!("{whole} s"),
        120..7200 => format!("{} min", whole.div_ceil(60)),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_rates_are_read_at_a_glance() {
        assert_eq!(
            [duration(0.4), duration(61.0), duration(130.0), duration(7300.0)],
            ["0 s", "61 s", "3 min", "2 h 1 min"]
        );
        assert_eq!([rate(812.3), rate(12_345.0)], ["812 tok/s", "12.3k tok/s"]);
    }
}

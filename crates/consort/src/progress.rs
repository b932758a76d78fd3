//! A fetch's progress: a bar on a terminal, plain lines elsewhere. All of it on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use consort_hub::Event;
use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal::{bytes, note};

/// Draws what a fetch reports.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    terminal: bool,
    quiet: bool,
    last_line: Instant,
    name: String,
}

impl Progress {
    /// `quiet` says nothing but failures of sources.
    pub(crate) fn new(quiet: bool) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        Progress { bar: None, terminal, quiet, last_line: Instant::now(), name: String::new() }
    }

    /// Takes one report.
    pub(crate) fn on(&mut self, event: Event<'_>) {
        match event {
            Event::Source { label } => self.say(&format!("fetching from the {label}")),
            Event::SourceFailed { label, reason } => {
                self.clear();
                note(&format!("{label} didn't serve: {reason}"));
            }
            Event::File { name, resumed, total } => {
                self.clear();
                self.name = name.to_string();
                if resumed > 0 {
                    self.say(&format!("{name}: going on after {}", bytes(resumed)));
                }
                self.bar(total, resumed);
                self.last_line = Instant::now();
            }
            Event::Unpacking { name } => {
                self.clear();
                self.name = format!("unpacking {name}");
                self.bar(None, 0);
            }
            Event::Bytes { done, total } => match &self.bar {
                Some(bar) => {
                    if bar.length() != total {
                        bar.set_length(total.unwrap_or(done));
                    }
                    bar.set_position(done);
                }
                None if self.last_line.elapsed() > Duration::from_secs(5) => {
                    self.last_line = Instant::now();
                    let percent = total.filter(|t| *t > 0).map(|t| format!(" ({} %)", done * 100 / t));
                    self.say(&format!("{}: {}{}", self.name, bytes(done), percent.unwrap_or_default()));
                }
                None => {}
            },
            Event::Retry { reason } => {
                self.clear();
                self.say(&format!("{reason}; trying again"));
            }
            Event::Waiting => self.say("another process is fetching this model; waiting for it"),
        }
    }

    /// Takes the bar away.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            note(text);
        }
    }

    fn bar(&mut self, total: Option<u64>, done: u64) {
        if !self.terminal || self.quiet {
            return;
        }
        let bar = ProgressBar::new(total.unwrap_or(0));
        let template = "{msg}  {wide_bar:.cyan/dim}  {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_message(self.name.clone());
        bar.set_position(done);
        self.bar = Some(bar);
    }
}

//! All answers of one request: several choices, several prompts.
//!
//! A request has at most [`WINDOW`] answers in the engine at one time, the rest waits here: a batch of prompts can't
//! crowd out everyone else's single ones, and it can be larger than the engine's queue. The set is polled by whoever
//! writes the response; dropping it drops every submission, which is how a client that goes away frees its rows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use consort_inference::{Event, Request, Submission, SubmitError};

use super::{Answer, Out};
use crate::engine::Generate;
use crate::error::{ApiError, ApiResult};
use crate::metrics::ServerMetrics;

/// Answers of one request in the engine at one time.
const WINDOW: usize = 16;

/// An answer to be had.
pub(crate) struct Job {
    /// The choice's index.
    pub(crate) index: usize,
    pub(crate) request: Request,
    pub(crate) answer: Answer,
}

struct Running {
    index: usize,
    submission: Submission,
    answer: Answer,
    last_token: Option<Instant>,
}

/// The answers of one request.
pub(crate) struct AnswerSet {
    engine: Arc<dyn Generate>,
    metrics: Arc<ServerMetrics>,
    arrived: Instant,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    /// Answers that were complete before they began.
    ready: VecDeque<(usize, Out)>,
    /// Where the next poll begins, so that no choice starves another.
    turn: usize,
}

impl AnswerSet {
    /// Submits as many as the window holds.
    ///
    /// # Errors
    /// Where the engine refuses the first, or any for another reason than a full queue.
    pub(crate) fn start(
        engine: Arc<dyn Generate>,
        metrics: Arc<ServerMetrics>,
        arrived: Instant,
        jobs: Vec<Job>,
    ) -> ApiResult<AnswerSet> {
        let mut set = AnswerSet {
            engine,
            metrics,
            arrived,
            waiting: VecDeque::with_capacity(jobs.len()),
            running: Vec::new(),
            ready: VecDeque::new(),
            turn: 0,
        };
        for mut job in jobs {
            match job.answer.replay(&job.request.emitted, job.request.max_tokens) {
                Some(out) => set.ready.push_back((job.index, out)),
                None => set.waiting.push_back(job),
            }
        }
        set.submit()?;
        Ok(set)
    }

    fn submit(&mut self) -> ApiResult<()> {
        while self.running.len() < WINDOW {
            let Some(job) = self.waiting.pop_front() else { break };
            match self.engine.submit(job.request.clone()) {
                Ok(submission) => {
                    self.running.push(Running {
                        index: job.index,
                        submission,
                        answer: job.answer,
                        last_token: None,
                    });
                }
                Err(SubmitError::Busy { .. }) if !self.running.is_empty() => {
                    self.waiting.push_front(job);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What comes next, and of which choice; none once all are complete.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Out)>> {
        if let Some(ready) = self.ready.pop_front() {
            return Poll::Ready(Some(ready));
        }
        if self.running.is_empty() && self.waiting.is_empty() {
            return Poll::Ready(None);
        }
        let count = self.running.len();
        for offset in 0..count {
            let at = (self.turn + offset) % count;
            while let Poll::Ready(event) = self.running[at].submission.events.poll_recv(cx) {
                let Some(out) = self.event(at, event) else { continue };
                let index = self.running[at].index;
                self.turn = at + 1;
                if matches!(out, Out::Done { .. } | Out::Failed(_)) {
                    self.running.swap_remove(at);
                    if let Err(error) = self.submit() {
                        self.waiting.clear();
                        self.ready.push_back((index, Out::Failed(error)));
                    }
                }
                return Poll::Ready(Some((index, out)));
            }
        }
        Poll::Pending
    }

    fn event(&mut self, at: usize, event: Option<Event>) -> Option<Out> {
        let running = &mut self.running[at];
        let Some(event) = event else {
            return Some(Out::Failed(ApiError::internal(
                "the engine stopped before the answer was complete",
            )));
        };
        if matches!(event, Event::Token(_)) {
            let now = Instant::now();
            match running.last_token {
                Some(last) => self.metrics.inter_token.observe((now - last).as_secs_f64()),
                None => self.metrics.first_token.observe((now - self.arrived).as_secs_f64()),
            }
            running.last_token = Some(now);
        }
        running.answer.event(event)
    }
}

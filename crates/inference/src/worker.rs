//! The engine's thread: *plan, forward, sample, send*, until the last handle is gone.
//!
//! [`Core`] is the loop's body without its waiting, so that tests drive it turn by turn with a clock of their own;
//! [`run`] adds the channel, the machine's clock and what happens when the body panics.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use consort_base::Clock;
use consort_model::Batch;
use consort_tensor::attention::Span;

use crate::answer::{Answer, AnswerSender, Outcome};
use crate::grammar::GrammarState;
use crate::request::{FinishReason, Request};
use crate::runner::Runner;
use crate::sampler::Scratch;
use crate::scheduler::{Arrival, Chunk, Ended, Limits, Scheduler, SequenceId};
use crate::stats::Shared;

/// How often readers are looked at while nothing else is to do but to wait for them.
const SLOW_READER_POLL: Duration = Duration::from_millis(20);

/// A checked request on its way to the thread.
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) grammar: Option<Box<GrammarState>>,
    pub(crate) sender: AnswerSender,
    /// Prompt and answer never grow past this.
    pub(crate) limit: usize,
    /// Why the answer ends there.
    pub(crate) at_limit: FinishReason,
    /// What it adds to [`Shared::inbox_tokens`].
    pub(crate) tokens: usize,
}

/// What handles ask of the thread.
pub(crate) enum Command {
    Submit(Box<Job>),
    /// Hands over what still runs at `until`, or has got `tokens` more; answers when nothing is left.
    Drain {
        until: Instant,
        tokens: Option<usize>,
        done: Sender<()>,
    },
}

/// What a turn did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// A step ran.
    Ran,
    /// There are requests, but all wait for their readers.
    Waiting,
    /// There are no requests.
    Idle,
}

/// The loop's body: everything the engine owns.
pub(crate) struct Core<R> {
    runner: R,
    scheduler: Scheduler,
    answers: BTreeMap<SequenceId, Answer>,
    shared: Arc<Shared>,
    scratches: Vec<Mutex<Scratch>>,
    tokens: Vec<u32>,
    logit_rows: Vec<usize>,
    logits: Vec<f32>,
    drains: Vec<(Instant, Sender<()>)>,
    rows_per_second: f64,
}

impl<R: Runner> Core<R> {
    pub(crate) fn new(runner: R, limits: Limits, shared: Arc<Shared>) -> Core<R> {
        let scheduler = Scheduler::new(limits, runner.blocks());
        let scratches = (0..runner.threads()).map(|_| Mutex::default()).collect();
        Core {
            runner,
            scheduler,
            answers: BTreeMap::new(),
            shared,
            scratches,
            tokens: Vec::new(),
            logit_rows: Vec::new(),
            logits: Vec::new(),
            drains: Vec::new(),
            rows_per_second: 0.0,
        }
    }

    #[cfg(test)]
    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub(crate) fn accept(&mut self, command: Command) {
        match command {
            Command::Submit(job) => {
                let Job { request, grammar, sender, limit, at_limit, tokens } = *job;
                let arrival = Arrival {
                    tokens: [&request.prompt[..], &request.emitted].concat(),
                    prompt: request.prompt.len(),
                    limit,
                    score_prompt: request.prompt_logprobs.is_some(),
                    deadline: request.deadline,
                };
                let id = self.scheduler.submit(arrival);
                self.answers.insert(id, Answer::new(request, grammar, sender, at_limit));
                self.shared.inbox_tokens.fetch_sub(tokens, Relaxed);
            }
            Command::Drain { until, tokens, done } => {
                self.drains.push((until, done));
                for answer in self.answers.values_mut() {
                    answer.hand_over_at =
                        tokens.map_or(usize::MAX, |tokens| answer.length.saturating_add(tokens));
                }
            }
        }
    }

    /// Ends every answer with [`FinishReason::HandedOver`].
    pub(crate) fn hand_over(&mut self) {
        while let Some((&id, _)) = self.answers.first_key_value() {
            self.finish(id, FinishReason::HandedOver);
        }
    }

    /// Ends the answers that have used up what a drain leaves them.
    fn hand_over_spent(&mut self) {
        if self.drains.is_empty() {
            return;
        }
        let spent = |answer: &Answer| answer.length >= answer.hand_over_at;
        let spent: Vec<_> = self.answers.iter().filter(|(_, a)| spent(a)).map(|(id, _)| *id).collect();
        for id in spent {
            self.finish(id, FinishReason::HandedOver);
        }
    }

    /// Ends every answer with an error.
    pub(crate) fn fail_all(&mut self, reason: &str) {
        while let Some((_, answer)) = self.answers.pop_first() {
            answer.fail(reason.to_owned());
        }
    }

    /// One round: looks at the readers, plans, computes, samples and sends.
    ///
    /// # Errors
    /// The forward pass's; the engine can't go on.
    pub(crate) fn turn(&mut self, now: Instant) -> Result<Turn, consort_model::Error> {
        if self.drains.iter().any(|(until, _)| *until <= now) {
            self.hand_over();
        }
        self.hand_over_spent();
        self.look_at_readers(now);
        let plan = self.scheduler.plan(now);
        for &(id, ended) in &plan.ended {
            let reason = match ended {
                Ended::Deadline => FinishReason::Deadline,
                Ended::Abandoned => FinishReason::Cancelled,
            };
            self.finish(id, reason);
        }
        for id in &plan.admitted {
            if let Some(answer) = self.answers.get_mut(id) {
                answer.sender.admitted();
            }
        }
        let ran = !plan.chunks.is_empty();
        if ran {
            self.forward(&plan.chunks)?;
            let outcomes = self.sample(&plan.chunks);
            self.settle(&plan.chunks, outcomes);
        }
        self.publish(&plan.chunks);
        if self.scheduler.is_empty() {
            for (_, done) in self.drains.drain(..) {
                // Whoever asked may have stopped waiting.
                let _ = done.send(());
            }
            return Ok(Turn::Idle);
        }
        Ok(if ran { Turn::Ran } else { Turn::Waiting })
    }

    /// Frees what nobody listens to and leaves out who has no room for another event.
    fn look_at_readers(&mut self, now: Instant) {
        let mut gone = Vec::new();
        for (&id, answer) in &self.answers {
            if answer.sender.is_closed() {
                gone.push(id);
            } else if answer.sender.has_room(answer.room_needed()) {
                self.scheduler.resume(id);
            } else {
                self.scheduler.pause(id, now);
            }
        }
        for id in gone {
            self.finish(id, FinishReason::Cancelled);
        }
    }

    fn forward(&mut self, chunks: &[Chunk]) -> Result<(), consort_model::Error> {
        self.tokens.clear();
        self.logit_rows.clear();
        let mut spans = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let first_row = self.tokens.len();
            let positions = chunk.first_position..chunk.first_position + chunk.rows;
            self.tokens.extend_from_slice(&self.scheduler.tokens(chunk.id)[positions]);
            self.logit_rows.extend((chunk.scored.0..chunk.scored.1).map(|row| first_row + row));
            if chunk.samples {
                self.logit_rows.push(first_row + chunk.rows - 1);
            }
            spans.push(Span {
                first_row,
                rows: chunk.rows,
                first_position: chunk.first_position,
                blocks: self.scheduler.blocks(chunk.id),
            });
        }
        let batch = Batch { tokens: &self.tokens, spans: &spans, logit_rows: &self.logit_rows };
        self.runner.forward(batch, &mut self.logits)
    }

    /// Scores and samples every chunk's rows, one answer a task, on all threads.
    fn sample(&mut self, chunks: &[Chunk]) -> Vec<Outcome> {
        struct Task<'a> {
            answer: &'a mut Answer,
            chunk: Chunk,
            tokens: &'a [u32],
            logits: &'a [f32],
            outcome: Outcome,
        }
        let vocab = self.runner.vocab();
        let cpu = self.runner.cpu();
        let mut rest = &self.logits[..];
        let mut tasks = Vec::with_capacity(chunks.len());
        // Both are in order of age.
        let mut answers = self.answers.iter_mut();
        for chunk in chunks {
            let wanted = chunk.scored.1 - chunk.scored.0 + usize::from(chunk.samples);
            let (logits, after) = rest.split_at(wanted * vocab);
            rest = after;
            if let Some((_, answer)) = answers.find(|(id, _)| **id == chunk.id) {
                let tokens = self.scheduler.tokens(chunk.id);
                tasks.push(Mutex::new(Task {
                    answer,
                    chunk: *chunk,
                    tokens,
                    logits,
                    outcome: Outcome::default(),
                }));
            }
        }
        assert_eq!(tasks.len(), chunks.len(), "a chunk without an answer");

        let next = AtomicUsize::new(0);
        let work = |rank: usize| {
            // Nobody else takes this rank's buffers, nor a task that was claimed: the locks never wait.
            let mut scratch = self.scratches[rank].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(task) = tasks.get(next.fetch_add(1, Relaxed)) {
                let mut task = task.lock().unwrap_or_else(PoisonError::into_inner);
                let Task { answer, chunk, tokens, logits, outcome } = &mut *task;
                let mut rows = logits.chunks_exact(vocab);
                let targets = &tokens[chunk.first_position + 1..];
                let scored = (chunk.scored.0..chunk.scored.1)
                    .zip(rows.by_ref())
                    .map(|(row, logits)| (logits, targets[row]));
                let sampled =
                    logits.len().checked_sub(vocab).filter(|_| chunk.samples).map(|at| &logits[at..]);
                *outcome = answer.step(cpu, &mut scratch, scored, sampled);
            }
        };
        if self.logit_rows.len() > 1 {
            self.runner.spread(&work);
        } else {
            work(0);
        }
        tasks
            .into_iter()
            .map(|task| task.into_inner().unwrap_or_else(PoisonError::into_inner).outcome)
            .collect()
    }

    /// Books what was computed, sends what was picked, ends what is over.
    fn settle(&mut self, chunks: &[Chunk], outcomes: Vec<Outcome>) {
        let mut generated = 0;
        for (chunk, mut outcome) in chunks.iter().zip(outcomes) {
            self.scheduler.commit(chunk);
            if let Some(reason) = outcome.failed.take() {
                tracing::warn!(reason, "a request failed");
                self.scheduler.finish(chunk.id);
                if let Some(answer) = self.answers.remove(&chunk.id) {
                    answer.fail(reason);
                }
                continue;
            }
            if let Some(token) = &outcome.token {
                generated += 1;
                self.scheduler.push_token(chunk.id, token.id);
            }
            let complete = self.scheduler.is_complete(chunk.id);
            let cached = self.scheduler.cached_tokens(chunk.id);
            let over =
                self.answers.get_mut(&chunk.id).and_then(|answer| answer.deliver(outcome, complete, cached));
            if let Some(reason) = over {
                self.finish(chunk.id, reason);
            }
        }
        self.shared.generated_tokens.fetch_add(generated, Relaxed);
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let cached = self.scheduler.cached_tokens(id);
        self.scheduler.finish(id);
        if let Some(answer) = self.answers.remove(&id) {
            answer.finish(reason, cached);
        }
    }

    fn publish(&self, chunks: &[Chunk]) {
        let shared = &self.shared;
        let rows: usize = chunks.iter().map(|chunk| chunk.rows).sum();
        let sampled = chunks.iter().filter(|chunk| chunk.samples && chunk.rows == 1).count();
        let (lookups, hits) = self.scheduler.lookups();
        shared.running.store(self.scheduler.running(), Relaxed);
        shared.outstanding.store(self.scheduler.outstanding_tokens(), Relaxed);
        shared.kv_blocks_used.store(self.scheduler.pool().owned(), Relaxed);
        shared.lookup_tokens.store(lookups, Relaxed);
        shared.hit_tokens.store(hits, Relaxed);
        shared.preemptions.store(self.scheduler.preemptions(), Relaxed);
        shared.prompt_tokens.fetch_add((rows - sampled) as u64, Relaxed);
        if rows > 0 {
            shared.count_step(rows);
        }
        shared.mark_alive();
    }

    /// Does a little of what can be done ahead; false where nothing is left.
    fn prepare(&mut self) -> bool {
        self.runner.prepare(self.scheduler.pool().touched())
    }

    /// Keeps the recent rate: the last dozen steps or so.
    fn note_rate(&mut self, rows: u64, took: Duration) {
        if rows > 0 {
            let rate = rows as f64 / took.as_secs_f64().max(1e-6);
            let before = if self.rows_per_second > 0.0 { self.rows_per_second } else { rate };
            self.rows_per_second = before + (rate - before) * 0.1;
            self.shared.rows_per_second.store(self.rows_per_second as u64, Relaxed);
        }
    }
}

/// Runs the engine until the last handle is gone, the forward pass fails or something panics. Whatever happens,
/// every answer gets a last event.
pub(crate) fn run<R: Runner>(mut core: Core<R>, inbox: Receiver<Command>, clock: Arc<dyn Clock>) {
    let ended = catch_unwind(AssertUnwindSafe(|| turns(&mut core, &inbox, &*clock)));
    let reason = match ended {
        Ok(Ok(())) => {
            core.hand_over();
            return;
        }
        Ok(Err(error)) => format!("the engine has stopped: {error}"),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            format!("the engine has stopped after an internal error: {text}")
        }
    };
    tracing::error!(reason, "the engine is down");
    // First, so that whoever hears of the failure also sees its cause lasts.
    core.shared.stopped.store(true, Relaxed);
    core.fail_all(&reason);
    // Dropping the inbox turns later submits into `Stopped`; what is in it is told by `AnswerSender`'s drop.
}

fn turns<R: Runner>(
    core: &mut Core<R>,
    inbox: &Receiver<Command>,
    clock: &dyn Clock,
) -> Result<(), consort_model::Error> {
    let mut last = Turn::Idle;
    loop {
        let first = match last {
            Turn::Ran => None,
            Turn::Waiting => match inbox.recv_timeout(SLOW_READER_POLL) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            },
            Turn::Idle => match inbox.try_recv() {
                Ok(command) => Some(command),
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) if core.prepare() => continue,
                Err(TryRecvError::Empty) => match inbox.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return Ok(()),
                },
            },
        };
        if last == Turn::Idle {
            core.shared.mark_alive();
        }
        if let Some(command) = first {
            core.accept(command);
        }
        loop {
            match inbox.try_recv() {
                Ok(command) => core.accept(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        let start = clock.now();
        let before = core.shared.rows();
        last = core.turn(start)?;
        let rows = core.shared.rows() - before;
        core.note_rate(rows, clock.now().saturating_duration_since(start));
    }
}

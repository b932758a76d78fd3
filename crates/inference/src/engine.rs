//! The engine's handle: checks requests, hands them to the engine's thread, reads its numbers.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use consort_base::{Clock, SystemClock};
use consort_model::{Model, Tokenizer};
use consort_tensor::Pool;
use consort_tensor::kv::BLOCK_TOKENS;

use crate::answer::AnswerSender;
use crate::check::{self, Checked};
use crate::grammar::GrammarEngine;
use crate::memory;
use crate::request::{Event, Request, Submission, SubmitError};
use crate::runner::{ModelRunner, Runner};
use crate::scheduler::Limits;
use crate::stats::{Shared, StepRows};
use crate::worker::{self, Command, Core, Job};

/// Past a drain's budget the step under way may still take this long.
const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// Prompt rows a step whose logits are wanted: at 49,152 tokens 32 of them are 6 MB.
const SCORE_ROWS: usize = 32;

/// How an engine runs. Defaults suit the machine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bytes for the cache; `None` takes room for eight full contexts of the model or a quarter of memory, whichever is less.
    pub kv_bytes: Option<usize>,
    /// The longest sequence taken; `None` takes the model's own. Never more than the cache holds.
    pub max_context: Option<usize>,
    /// Sequences that run at once.
    pub max_running: usize,
    /// Requests that wait at most while `max_running` others run; one more is [`SubmitError::Busy`].
    pub max_queued: usize,
    /// Rows a step: decode rows and prefill chunks share them. More is a better use of the machine and a longer
    /// wait between two tokens while a prompt is computed.
    pub step_tokens: usize,
    /// Keep finished blocks for prompts with the same start.
    pub prefix_cache: bool,
    /// Events that wait in an answer's channel; at that point its sequence pauses until its reader catches up.
    pub answer_buffer: usize,
    /// A sequence whose reader takes nothing for this long is cancelled.
    pub reader_patience: Duration,
    /// Tokens that an answer may still get after a drain began, before it is handed over; `None` leaves it to the
    /// drain's time alone.
    pub drain_tokens: Option<usize>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            kv_bytes: None,
            max_context: None,
            max_running: 32,
            max_queued: 256,
            step_tokens: 512,
            prefix_cache: true,
            answer_buffer: 64,
            reader_patience: Duration::from_secs(30),
            drain_tokens: None,
        }
    }
}

/// Numbers for `/metrics` and `/ready`, read without stopping the engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests waiting for their first step.
    pub queued: usize,
    /// Sequences running.
    pub running: usize,
    /// Tokens still to compute for waiting and running requests (prompt rows and the answers' limits).
    pub outstanding_tokens: usize,
    /// Cache blocks in all.
    pub kv_blocks: usize,
    /// Cache blocks held by running sequences.
    pub kv_blocks_used: usize,
    /// Prompt tokens looked up in the prefix cache, ever.
    pub prefix_lookup_tokens: u64,
    /// Prompt tokens found there, ever.
    pub prefix_hit_tokens: u64,
    /// Prompt tokens computed, ever.
    pub prompt_tokens: u64,
    /// Tokens generated, ever.
    pub generated_tokens: u64,
    /// Steps by their rows, ever.
    pub step_rows: StepRows,
    /// Sequences preempted, ever.
    pub preemptions: u64,
    /// Milliseconds since the last step while there are requests; seconds of it mean a hang. 0 while idle.
    pub stalled_ms: u64,
}

/// A handle on a running engine; clones share it. The last one dropped stops it: answers under way end with
/// [`crate::FinishReason::HandedOver`].
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    /// `None` only while the last handle is dropped.
    inbox: Option<SyncSender<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    grammars: Option<GrammarEngine>,
    fingerprint: String,
    vocab: usize,
    max_context: usize,
    max_open: usize,
    max_running: usize,
    answer_buffer: usize,
    drain_tokens: Option<usize>,
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// [`consort_model::Error`] where the cache can't be made.
    pub fn start(
        model: Arc<Model>,
        tokenizer: Arc<Tokenizer>,
        pool: Pool,
        options: EngineOptions,
    ) -> Result<Engine, consort_model::Error> {
        let blocks = memory::cache_blocks(&model, &options)?;
        let runner = ModelRunner::new(model, pool, blocks)?;
        Engine::start_runner(runner, Some(tokenizer), options)
    }

    /// Starts an engine over any [`Runner`] (tests use [`crate::HashRunner`]); without a tokenizer requests with a
    /// grammar are refused.
    ///
    /// # Errors
    /// [`consort_model::Error::Batch`] where the runner has no cache block, [`consort_model::Error::Io`] where the
    /// system refuses the thread.
    pub fn start_runner(
        runner: impl Runner,
        tokenizer: Option<Arc<Tokenizer>>,
        options: EngineOptions,
    ) -> Result<Engine, consort_model::Error> {
        let capacity = runner.blocks() * BLOCK_TOKENS;
        let wanted = options.max_context.unwrap_or(usize::MAX).min(runner.max_context());
        let max_context = wanted.min(capacity);
        if max_context < 2 {
            let reason = format!(
                "a context of {max_context} tokens runs nothing: the model takes {}, the cache holds {capacity}",
                runner.max_context()
            );
            return Err(consort_model::Error::Batch { reason });
        }
        if max_context < wanted {
            tracing::warn!(max_context, wanted, "the cache is too small for the whole context");
        }
        let max_running = options.max_running.max(1);
        let max_open = max_running + options.max_queued;
        let limits = Limits {
            max_running,
            step_tokens: options.step_tokens,
            score_rows: SCORE_ROWS,
            prefix_cache: options.prefix_cache,
            patience: options.reader_patience,
        };
        let shared = Arc::new(Shared::new(runner.blocks()));
        let fingerprint = runner.fingerprint();
        let vocab = runner.vocab();
        // Open requests are bounded before they get here; the rest is for drains.
        let (inbox, commands) = mpsc::sync_channel(max_open + 16);
        let core = Core::new(runner, limits, Arc::clone(&shared));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let thread = (std::thread::Builder::new().name("engine".to_owned()))
            .spawn(move || worker::run(core, commands, clock))
            .map_err(|source| consort_model::Error::Io { path: "the engine's thread".into(), source })?;
        Ok(Engine {
            inner: Arc::new(Inner {
                shared,
                inbox: Some(inbox),
                thread: Mutex::new(Some(thread)),
                grammars: tokenizer.map(GrammarEngine::new),
                fingerprint,
                vocab,
                max_context,
                max_open,
                max_running,
                answer_buffer: options.answer_buffer,
                drain_tokens: options.drain_tokens,
            }),
        })
    }

    /// Hands a request to the engine. Never waits, except for compiling a grammar (some ms): call it off the
    /// network's threads for requests that carry one.
    ///
    /// # Errors
    /// [`SubmitError`]: busy, draining, invalid (checked here, before it queues) or stopped.
    pub fn submit(&self, request: Request) -> Result<Submission, SubmitError> {
        let inner = &*self.inner;
        let shared = &inner.shared;
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let checked = check::check(request, inner.vocab, inner.max_context, inner.grammars.as_ref())?;
        let (sender, submission) = AnswerSender::new(inner.answer_buffer, shared);
        match checked {
            Checked::Complete { scored, finished } => {
                if scored {
                    sender.send(Event::Prompt(Vec::new()));
                }
                sender.end(finished);
            }
            Checked::Runs { request, grammar, limit, at_limit } => {
                let tokens = limit;
                shared.inbox_tokens.fetch_add(tokens, Relaxed);
                let job = Job { request: *request, grammar, sender, limit, at_limit, tokens };
                let Some(inbox) = &inner.inbox else { return Err(SubmitError::Stopped) };
                let refused = match inbox.try_send(Command::Submit(Box::new(job))) {
                    Ok(()) => return Ok(submission),
                    Err(TrySendError::Full(_)) => self.busy(),
                    Err(TrySendError::Disconnected(_)) => SubmitError::Stopped,
                };
                shared.inbox_tokens.fetch_sub(tokens, Relaxed);
                return Err(refused);
            }
        }
        Ok(submission)
    }

    /// Why any request would be turned away now, if so. Cheap: ask before the work of making one, so that a flood
    /// costs little.
    pub fn refusal(&self) -> Option<SubmitError> {
        let shared = &self.inner.shared;
        if shared.stopped.load(Relaxed) {
            return Some(SubmitError::Stopped);
        }
        if shared.draining.load(Relaxed) {
            return Some(SubmitError::Draining);
        }
        (shared.open.load(Relaxed) >= self.inner.max_open).then(|| self.busy())
    }

    fn busy(&self) -> SubmitError {
        let shared = &self.inner.shared;
        let open = shared.open.load(Relaxed);
        let outstanding = shared.outstanding.load(Relaxed) + shared.inbox_tokens.load(Relaxed);
        let rate = shared.rows_per_second.load(Relaxed).max(1);
        // A place is free when one of them is done.
        let seconds = (outstanding / open.max(1)) as u64 / rate + 1;
        SubmitError::Busy {
            queued: open.saturating_sub(self.inner.max_running),
            retry_after_seconds: seconds.min(120),
        }
    }

    /// Names the numerics class: answers are equal between replicas that share it.
    pub fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// The longest sequence it takes, in tokens.
    pub fn max_context(&self) -> usize {
        self.inner.max_context
    }

    /// Current numbers.
    pub fn stats(&self) -> Stats {
        self.inner.shared.read()
    }

    /// Stops admitting; running requests finish, or are handed over once `budget` is spent or they have got
    /// [`EngineOptions::drain_tokens`] more. Returns when none is left, at the latest some seconds past the budget.
    pub fn drain(&self, budget: Duration) {
        self.inner.shared.draining.store(true, Relaxed);
        let Some(inbox) = &self.inner.inbox else { return };
        let until = Instant::now() + budget;
        let (done, drained) = mpsc::channel();
        let mut command = Command::Drain { until, tokens: self.inner.drain_tokens, done };
        // The inbox is full only while the thread is in a step.
        while let Err(TrySendError::Full(back)) = inbox.try_send(command) {
            if Instant::now() > until + DRAIN_GRACE {
                return;
            }
            command = back;
            std::thread::sleep(Duration::from_millis(5));
        }
        let patience = (until + DRAIN_GRACE).saturating_duration_since(Instant::now());
        if let Err(RecvTimeoutError::Timeout) = drained.recv_timeout(patience) {
            tracing::warn!("the engine did not drain in time");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.inbox = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // At most one step away: memory is free again when this returns.
            let _ = thread.join();
        }
    }
}

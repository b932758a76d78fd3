//! One request under way, as the engine's thread sees it: its sampler, its grammar and its way out.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use consort_tensor::Cpu;
use tokio::sync::mpsc;

use crate::grammar::GrammarState;
use crate::request::{Event, FinishReason, Request, Submission, TokenEvent, Usage};
use crate::sampler::{Allowed, Sampler, Scratch, logprob};
use crate::stats::Shared;

/// The sending end of an answer. One place of its channel is kept for the last event, so that an end can always be
/// told; dropped without one (a panic, a lost queue) it says so itself. So nobody waits for an answer for ever.
pub(crate) struct AnswerSender {
    events: mpsc::Sender<Event>,
    last: Option<mpsc::OwnedPermit<Event>>,
    shared: Arc<Shared>,
    counted_as_queued: bool,
}

impl AnswerSender {
    /// An answer's channel with room for `buffer` events beside the last. Counts the request as open and queued.
    pub(crate) fn new(buffer: usize, shared: &Arc<Shared>) -> (AnswerSender, Submission) {
        // A step sends three events at most: the start, the prompt's scores and a token.
        let (events, receiver) = mpsc::channel(buffer.max(3) + 1);
        let last = events.clone().try_reserve_owned().ok();
        shared.open.fetch_add(1, Relaxed);
        shared.queued.fetch_add(1, Relaxed);
        let sender = AnswerSender { events, last, shared: Arc::clone(shared), counted_as_queued: true };
        (sender, Submission { events: receiver })
    }

    /// The request runs from now on.
    pub(crate) fn admitted(&mut self) {
        if std::mem::take(&mut self.counted_as_queued) {
            self.shared.queued.fetch_sub(1, Relaxed);
        }
    }

    /// Nobody listens any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Room for the events of one more step.
    pub(crate) fn has_room(&self, events: usize) -> bool {
        self.events.capacity() >= events
    }

    /// Sends an event that there is room for.
    pub(crate) fn send(&self, event: Event) {
        // Full can't be (a step needs room first); closed is seen at the next step's start.
        let _ = self.events.try_send(event);
    }

    /// Sends the last event.
    pub(crate) fn end(mut self, event: Event) {
        self.leave(event);
    }

    fn leave(&mut self, event: Event) {
        if let Some(permit) = self.last.take() {
            // Counted out first: whoever reads the last event finds the place free.
            self.admitted();
            self.shared.open.fetch_sub(1, Relaxed);
            permit.send(event);
        }
    }
}

impl Drop for AnswerSender {
    fn drop(&mut self) {
        self.leave(Event::Failed { reason: "the engine has stopped".to_owned() });
    }
}

/// What a step made of one answer.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Scores of the prompt's tokens, in order.
    pub(crate) scores: Vec<TokenEvent>,
    /// The next token.
    pub(crate) token: Option<TokenEvent>,
    /// The answer ends with this token.
    pub(crate) stops: bool,
    /// The answer can't go on.
    pub(crate) failed: Option<String>,
}

/// A request under way.
pub(crate) struct Answer {
    pub(crate) sender: AnswerSender,
    pub(crate) request: Request,
    /// Why it ends at its limit.
    pub(crate) at_limit: FinishReason,
    sampler: Sampler,
    grammar: Option<Box<GrammarState>>,
    /// Tokens of the answer so far.
    pub(crate) length: usize,
    /// At this length a drain hands it over.
    pub(crate) hand_over_at: usize,
    scores: Option<Vec<TokenEvent>>,
    /// Its reader knows of the start.
    started: bool,
}

impl Answer {
    pub(crate) fn new(
        request: Request,
        grammar: Option<Box<GrammarState>>,
        sender: AnswerSender,
        at_limit: FinishReason,
    ) -> Answer {
        let sampler = Sampler::new(request.sampling.clone(), &request.prompt, &request.emitted);
        let scores = request.prompt_logprobs.map(|_| Vec::new());
        let (length, hand_over_at) = (request.emitted.len(), usize::MAX);
        Answer { sender, at_limit, sampler, grammar, length, hand_over_at, scores, started: false, request }
    }

    /// Events that the next step may send.
    pub(crate) fn room_needed(&self) -> usize {
        1 + usize::from(self.scores.is_some()) + usize::from(!self.started)
    }

    /// Scores prompt rows (`logits` rows in order, each with the token it should predict) and picks the next token
    /// from `sampled`.
    pub(crate) fn step<'a>(
        &mut self,
        cpu: Cpu,
        scratch: &mut Scratch,
        scored: impl Iterator<Item = (&'a [f32], u32)>,
        sampled: Option<&[f32]>,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let top = usize::from(self.request.prompt_logprobs.unwrap_or(0));
        for (logits, next) in scored {
            outcome.scores.push(logprob::token_event(cpu, scratch, logits, next, top));
        }
        if let Some(logits) = sampled {
            match self.pick(cpu, scratch, logits) {
                Ok((token, stops)) => (outcome.token, outcome.stops) = (Some(token), stops),
                Err(reason) => outcome.failed = Some(reason),
            }
        }
        outcome
    }

    fn pick(
        &mut self,
        cpu: Cpu,
        scratch: &mut Scratch,
        logits: &[f32],
    ) -> Result<(TokenEvent, bool), String> {
        let allowed = match &mut self.grammar {
            Some(grammar) => Some(Allowed(grammar.mask().map_err(|error| error.to_string())?)),
            None => None,
        };
        let banned =
            if allowed.is_some() { "the grammar allows no token" } else { "the model put out no number" };
        let id = (self.sampler.pick(cpu, scratch, logits, self.length, allowed))
            .ok_or_else(|| format!("{banned} at index {} of the answer", self.length))?;
        let event = match self.request.logprobs {
            Some(top) => logprob::token_event(cpu, scratch, logits, id, usize::from(top)),
            None => TokenEvent { id, logprob: None, top: Vec::new() },
        };
        self.length += 1;
        self.sampler.accept(id);
        let mut stops = !self.request.ignore_end && self.request.end_tokens.contains(&id);
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(id).map_err(|error| error.to_string())?;
            stops |= grammar.is_finished();
        }
        Ok((event, stops))
    }

    /// Sends what a step made; returns whether the answer is over and why.
    pub(crate) fn deliver(
        &mut self,
        outcome: Outcome,
        complete: bool,
        cached_tokens: usize,
    ) -> Option<FinishReason> {
        let Outcome { scores, token, stops, .. } = outcome;
        if !std::mem::replace(&mut self.started, true) {
            self.sender.send(Event::Started { cached_tokens });
        }
        if let Some(all) = &mut self.scores {
            all.extend(scores);
            // All rows before the last are computed once a token was sampled, or once nothing is left to compute.
            if token.is_some() || complete {
                let all = std::mem::take(all);
                self.scores = None;
                self.sender.send(Event::Prompt(all));
            }
        }
        let sampled = token.is_some();
        if let Some(token) = token {
            self.sender.send(Event::Token(token));
        }
        match (stops, complete, sampled) {
            (true, ..) => Some(FinishReason::Stop),
            (false, true, _) => Some(self.at_limit),
            _ => None,
        }
    }

    /// Ends the answer.
    pub(crate) fn finish(self, reason: FinishReason, cached_tokens: usize) {
        let usage =
            Usage { prompt_tokens: self.request.prompt.len(), cached_tokens, completion_tokens: self.length };
        self.sender.end(Event::Finished { reason, usage });
    }

    /// Fails the answer.
    pub(crate) fn fail(self, reason: String) {
        self.sender.end(Event::Failed { reason });
    }
}

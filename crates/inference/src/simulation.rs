//! The whole loop under seeds: random arrivals, prompts with common starts, tiny caches and budgets, cancels,
//! deadlines, slow and dead readers, resumed answers. In every schedule each answer must be, bit for bit, what the
//! same request gives alone in a roomy engine; nothing may leak, exceed its bound or starve.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use consort_base::{Clock, Philox, VirtualClock};
use consort_tensor::kv::BLOCK_TOKENS;

use crate::answer::AnswerSender;
use crate::check::{Checked, check};
use crate::hash_runner::HashRunner;
use crate::request::{Event, FinishReason, Request, Sampling, Submission, TokenEvent};
use crate::scheduler::Limits;
use crate::stats::Shared;
use crate::worker::{Command, Core, Job, Turn};

const VOCAB: usize = 61;

struct World {
    core: Core<HashRunner>,
    shared: Arc<Shared>,
    limits: Limits,
    max_context: usize,
    buffer: usize,
}

impl World {
    fn new(limits: Limits, blocks: usize, buffer: usize) -> World {
        let shared = Arc::new(Shared::new(blocks));
        let core = Core::new(HashRunner::new(VOCAB, 4096, blocks), limits, Arc::clone(&shared));
        World { core, shared, limits, max_context: blocks * BLOCK_TOKENS, buffer }
    }

    fn submit(&mut self, request: Request) -> Submission {
        let (sender, submission) = AnswerSender::new(self.buffer, &self.shared);
        match check(request, VOCAB, self.max_context, None).expect("the simulation sends what is right") {
            Checked::Complete { scored, finished } => {
                if scored {
                    sender.send(Event::Prompt(Vec::new()));
                }
                sender.end(finished);
            }
            Checked::Runs { request, grammar, limit, at_limit } => {
                let job = Job { request: *request, grammar, sender, limit, at_limit, tokens: 0 };
                self.core.accept(Command::Submit(Box::new(job)));
            }
        }
        submission
    }

    /// A turn, with every bound checked.
    fn turn(&mut self, now: Instant) -> Turn {
        let before = self.shared.rows();
        let turn = self.core.turn(now).expect("the fake never fails");
        let rows = self.shared.rows() - before;
        assert!(
            rows <= self.limits.step_tokens as u64,
            "{rows} rows in a step of {}",
            self.limits.step_tokens
        );
        self.core.scheduler().check();
        turn
    }
}

fn limits() -> Limits {
    Limits {
        max_running: 64,
        step_tokens: 512,
        score_rows: 32,
        prefix_cache: false,
        patience: Duration::from_secs(1),
    }
}

/// A token, its log-probability's bits, and those of the likeliest.
type TokenBits = (u32, Option<u32>, Vec<(u32, u32)>);

/// An answer as bits: its tokens with their log-probabilities and its prompt's scores.
#[derive(Debug, Default, PartialEq)]
struct Bits {
    prompt: Option<Vec<TokenBits>>,
    tokens: Vec<TokenBits>,
    finished: Option<FinishReason>,
}

impl Bits {
    fn take(&mut self, event: Event) {
        assert_eq!(self.finished, None, "an event after the last");
        let bits = |token: TokenEvent| {
            let top = token.top.iter().map(|(id, p)| (*id, p.to_bits())).collect();
            (token.id, token.logprob.map(f32::to_bits), top)
        };
        match event {
            Event::Prompt(scores) => {
                assert!(self.prompt.is_none() && self.tokens.is_empty(), "scores come once and first");
                self.prompt = Some(scores.into_iter().map(bits).collect());
            }
            Event::Started { .. } => {}
            Event::Token(token) => self.tokens.push(bits(token)),
            Event::Finished { reason, .. } => self.finished = Some(reason),
            Event::Failed { reason } => panic!("failed: {reason}"),
        }
    }
}

/// What a request gives with the engine for itself.
fn alone(request: &Request) -> Bits {
    let mut world = World::new(limits(), 64, 4096);
    let mut submission = world.submit(Request { deadline: None, ..request.clone() });
    let now = Instant::now();
    while world.turn(now) != Turn::Idle {}
    let mut bits = Bits::default();
    while let Ok(event) = submission.events.try_recv() {
        bits.take(event);
    }
    bits
}

fn one_of<T: Copy>(rng: &mut Philox, values: &[T]) -> T {
    values[rng.below(values.len() as u64) as usize]
}

fn request(rng: &mut Philox, max_context: usize) -> Request {
    // Two families of prompts, so that starts are shared at every length, also exactly at a block's border.
    let family = rng.below(2) as u32;
    let shared = one_of(rng, &[0, 15, 16, 17, 32, 48, 64]);
    let own = rng.below(20) as usize + 1;
    let mut prompt: Vec<u32> = (0..shared).map(|i| (family * 31 + i * 7) % VOCAB as u32).collect();
    prompt.extend((0..own).map(|_| rng.below(3) as u32));
    prompt.truncate(max_context - 2);
    let sampling = Sampling {
        temperature: one_of(rng, &[0.0, 0.0, 1.0, 0.8]),
        top_k: one_of(rng, &[0, 20]),
        top_p: one_of(rng, &[1.0, 0.9]),
        min_p: one_of(rng, &[0.0, 0.02]),
        presence_penalty: one_of(rng, &[0.0, 0.5]),
        frequency_penalty: one_of(rng, &[0.0, 0.5]),
        repetition_penalty: one_of(rng, &[1.0, 1.2]),
        logit_bias: if rng.chance(0.3) { vec![(3, 2.0), (5, -3.0)] } else { Vec::new() },
        seed: rng.below(3),
    };
    let room = max_context - prompt.len();
    let max_tokens = (rng.below(50) as usize).min(room);
    Request {
        prompt,
        emitted: Vec::new(),
        sampling,
        end_tokens: if rng.chance(0.3) { vec![7, 8] } else { Vec::new() },
        max_tokens,
        ignore_end: rng.chance(0.1),
        logprobs: one_of(rng, &[None, Some(0), Some(3)]),
        prompt_logprobs: one_of(rng, &[None, None, None, Some(1)]),
        grammar: None,
        deadline: None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Reader {
    Prompt,
    /// Takes an event every few turns.
    Slow,
    /// Takes nothing, ever.
    Dead,
    /// Goes away at this turn.
    Leaves(u64),
}

struct Client {
    request: Request,
    expected: Bits,
    skipped: usize,
    reader: Reader,
    arrives: u64,
    submission: Option<Submission>,
    got: Bits,
    over: bool,
}

fn client(rng: &mut Philox, clock: &VirtualClock, max_context: usize, before: &[Client]) -> Client {
    let mut request = request(rng, max_context);
    // Some ask again what another asked: also the answer's blocks are in the cache then.
    if let Some(other) = before.last().filter(|_| rng.chance(0.3)) {
        request = Request { emitted: Vec::new(), deadline: None, ..other.request.clone() };
    }
    let expected = alone(&request);
    let mut skipped = 0;
    if rng.chance(0.25) {
        skipped = rng.below(expected.tokens.len() as u64 + 1) as usize;
        request.emitted = expected.tokens[..skipped].iter().map(|token| token.0).collect();
    }
    if rng.chance(0.1) {
        request.deadline = Some(clock.now() + Duration::from_millis(rng.below(800)));
    }
    let leaves = Reader::Leaves(rng.below(60));
    let reader = one_of(
        rng,
        &[Reader::Prompt, Reader::Prompt, Reader::Prompt, Reader::Prompt, Reader::Slow, Reader::Dead, leaves],
    );
    let arrives = rng.below(40);
    Client {
        request,
        expected,
        skipped,
        reader,
        arrives,
        submission: None,
        got: Bits::default(),
        over: false,
    }
}

impl Client {
    fn read(&mut self, rng: &mut Philox, turn: u64) {
        let Some(submission) = &mut self.submission else { return };
        match self.reader {
            Reader::Dead => return,
            Reader::Leaves(at) if turn >= at + self.arrives => {
                (self.submission, self.over) = (None, true);
                return;
            }
            Reader::Slow if !rng.chance(0.2) => return,
            Reader::Slow => {
                if let Ok(event) = submission.events.try_recv() {
                    self.got.take(event);
                }
            }
            _ => {
                while let Ok(event) = submission.events.try_recv() {
                    self.got.take(event);
                }
            }
        }
        self.over = self.got.finished.is_some();
    }

    fn judge(mut self, seed: u64) {
        if let (Reader::Dead, Some(submission)) = (self.reader, &mut self.submission) {
            while let Ok(event) = submission.events.try_recv() {
                self.got.take(event);
            }
        }
        let expected = &self.expected.tokens[self.skipped..];
        let complete = self.got.finished == self.expected.finished;
        let (request, reader, got) = (&self.request, self.reader, &self.got);
        if complete {
            assert_eq!(got.tokens, expected, "seed {seed}: {request:?}");
            assert_eq!(got.prompt, self.expected.prompt, "seed {seed}: {request:?}");
            return;
        }
        let excused = match got.finished {
            Some(FinishReason::Deadline) => request.deadline.is_some(),
            Some(FinishReason::Cancelled) => reader == Reader::Dead,
            None => matches!(reader, Reader::Leaves(_)),
            _ => false,
        };
        assert!(excused, "seed {seed}: ended with {:?} under {reader:?}: {request:?}", got.finished);
        assert!(expected.starts_with(&got.tokens), "seed {seed}: {request:?}");
    }
}

fn simulate(seed: u64) -> (u64, u64) {
    let mut rng = Philox::new(seed, 0xC0);
    let clock = VirtualClock::new();
    let limits = Limits {
        max_running: 1 + rng.below(6) as usize,
        step_tokens: one_of(&mut rng, &[1, 2, 7, 16, 64, 512]),
        score_rows: one_of(&mut rng, &[1, 5, 32]),
        prefix_cache: rng.chance(0.8),
        patience: Duration::from_secs(1),
    };
    let blocks = 3 + rng.below(16) as usize;
    let buffer = one_of(&mut rng, &[2, 3, 16, 100]);
    let mut world = World::new(limits, blocks, buffer);
    let count = 1 + rng.below(12);
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..count {
        clients.push(client(&mut rng, &clock, world.max_context, &clients));
    }

    let work: usize = clients.iter().map(|c| c.request.prompt.len() + c.request.max_tokens).sum();
    // Generous, but no hang passes: recomputation, dead readers' patience (100 turns) and slow readers.
    let bound = 40 + 20 * work as u64 + 200 * count;
    let mut oldest = None;
    let mut stuck = 0;
    for turn in 0.. {
        assert!(turn < bound, "seed {seed}: not done after {turn} turns for {work} tokens");
        for client in clients.iter_mut().filter(|client| client.arrives == turn) {
            client.submission = Some(world.submit(client.request.clone()));
        }
        let ran = world.turn(clock.now());
        clock.advance(Duration::from_millis(10));
        for client in &mut clients {
            client.read(&mut rng, turn);
        }
        // The oldest that is not paused gets on, at the latest when everybody had a turn.
        let now = world.core.scheduler().oldest_progress();
        stuck = if now.is_some() && now == oldest { stuck + 1 } else { 0 };
        oldest = now;
        let scheduler = world.core.scheduler();
        assert!(
            stuck <= limits.max_running + 2,
            "seed {seed}: {oldest:?} stands still: {limits:?} {scheduler:#?}"
        );
        let arrived = clients.iter().all(|client| client.arrives <= turn);
        if arrived && ran == Turn::Idle && clients.iter().all(|c| c.over || c.reader == Reader::Dead) {
            break;
        }
    }
    let scheduler = world.core.scheduler();
    assert!(scheduler.is_empty(), "seed {seed}");
    assert_eq!(scheduler.pool().owned(), 0, "seed {seed}: blocks leak");
    assert_eq!(world.shared.open.load(Relaxed), 0, "seed {seed}: requests leak");
    assert_eq!(world.shared.queued.load(Relaxed), 0, "seed {seed}: queued requests leak");
    let evidence = (scheduler.preemptions(), scheduler.lookups().1);
    clients.into_iter().for_each(|client| client.judge(seed));
    evidence
}

#[test]
fn every_schedule_gives_the_answers_of_an_engine_alone() {
    let first = std::env::var("CONSORT_TEST_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let seeds = first.map_or(0..4000, |seed| seed..seed + 1);
    let whole = seeds.end > seeds.start + 1;
    let (mut preemptions, mut hits) = (0, 0);
    for seed in seeds {
        // A panic inside says which: rerun it with CONSORT_TEST_SEED.
        let evidence = std::panic::catch_unwind(|| simulate(seed)).unwrap_or_else(|panic| {
            eprintln!("the schedule of seed {seed} failed");
            std::panic::resume_unwind(panic)
        });
        preemptions += evidence.0;
        hits += evidence.1;
    }
    if whole {
        assert!(preemptions > 2000, "the schedules preempt too rarely to mean much: {preemptions}");
        assert!(hits > 10_000, "the schedules share too little to mean much: {hits}");
    }
}

/// `n` equal prompts at once: one is computed, the others adopt its blocks.
#[test]
fn equal_prompts_at_once_are_computed_once() {
    let limits = Limits { prefix_cache: true, ..limits() };
    let mut world = World::new(limits, 64, 64);
    let prompt: Vec<u32> = (0..200).map(|i| i % VOCAB as u32).collect();
    let mut all: Vec<Submission> = (0..8)
        .map(|_| {
            world.submit(Request {
                prompt: prompt.clone(),
                ..request(&mut Philox::new(1, 1), world.max_context)
            })
        })
        .collect();
    let now = Instant::now();
    while world.turn(now) != Turn::Idle {}
    let answers: Vec<Bits> = (all.iter_mut())
        .map(|submission| {
            let mut bits = Bits::default();
            while let Ok(event) = submission.events.try_recv() {
                bits.take(event);
            }
            bits
        })
        .collect();
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    // 200 rows once; then the 8 past the last full block for each of the other seven.
    assert_eq!(world.shared.prompt_tokens.load(Relaxed), 200 + 7 * 8);
    assert_eq!(world.core.scheduler().lookups(), (1600, 7 * 192));
}

/// A long prompt doesn't hold up short ones, nor they it.
#[test]
fn long_and_short_prompts_share_the_steps() {
    let limits = Limits { step_tokens: 64, ..limits() };
    let mut world = World::new(limits, 256, 64);
    let base = Request {
        max_tokens: 1,
        prompt_logprobs: None,
        ..request(&mut Philox::new(2, 1), world.max_context)
    };
    let mut long = world.submit(Request { prompt: vec![1; 1000], ..base.clone() });
    let mut short = world.submit(Request { prompt: vec![2; 40], ..base.clone() });
    let now = Instant::now();
    let mut turns = 0;
    let (mut short_done, mut long_done) = (None, None);
    let mut others = Vec::new();
    while short_done.is_none() || long_done.is_none() {
        // A new short prompt with every turn.
        others.push(world.submit(Request { prompt: vec![3; 30], ..base.clone() }));
        world.turn(now);
        turns += 1;
        short_done = short_done.or(short.events.try_recv().ok().map(|_| turns));
        long_done = long_done.or(long.events.try_recv().ok().map(|_| turns));
    }
    // First come, first served would make it wait for the long one: 16 turns.
    assert!(short_done <= Some(8), "the short prompt waited {short_done:?} turns");
    assert!(long_done <= Some(1000 / 32 + 1), "the long prompt waited {long_done:?} turns");
}

//! The engine's public face over a deterministic fake model: what a server meets.

use std::time::{Duration, Instant};

use consort_inference::{
    Engine, EngineOptions, Event, FinishReason, HashRunner, Request, Sampling, Submission, SubmitError, Usage,
};

const VOCAB: usize = 97;

fn engine(options: EngineOptions) -> Engine {
    Engine::start_runner(HashRunner::new(VOCAB, 512, 64), None, options).expect("starts")
}

fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: usize) -> Request {
    Request {
        prompt: prompt.into_iter().collect(),
        emitted: Vec::new(),
        sampling: Sampling::default(),
        end_tokens: Vec::new(),
        max_tokens,
        ignore_end: false,
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        deadline: None,
    }
}

fn events(mut submission: Submission) -> Vec<Event> {
    std::iter::from_fn(|| submission.events.blocking_recv()).collect()
}

fn ids(events: &[Event]) -> Vec<u32> {
    let id = |event: &Event| if let Event::Token(token) = event { Some(token.id) } else { None };
    events.iter().filter_map(id).collect()
}

fn reason(events: &[Event]) -> FinishReason {
    match events.last() {
        Some(Event::Finished { reason, .. }) => *reason,
        other => panic!("the answer ends with {other:?}"),
    }
}

/// What greedy decoding over the fake gives, computed without any engine.
fn greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let runner = HashRunner::new(VOCAB, 512, 1);
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = runner.logits_after(&tokens);
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a token");
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn a_greedy_answer_is_the_models() {
    let engine = engine(EngineOptions::default());
    let prompt: Vec<u32> = (0..50).collect();
    let got = events(engine.submit(request(prompt.clone(), 20)).expect("taken"));
    assert_eq!(ids(&got), greedy(&prompt, 20));
    let usage = Usage { prompt_tokens: 50, cached_tokens: 0, completion_tokens: 20 };
    assert_eq!(got.last(), Some(&Event::Finished { reason: FinishReason::Length, usage }));
    assert_eq!(got[0], Event::Started { cached_tokens: 0 });
    assert_eq!(got.len(), 22);
}

#[test]
fn an_end_token_is_sent_and_ends_the_answer() {
    let engine = engine(EngineOptions::default());
    let answer = greedy(&[1, 2, 3], 20);
    let end = answer[5];
    let first = answer.iter().position(|id| *id == end).expect("it is there");
    let ending = Request { end_tokens: vec![end], ..request([1, 2, 3], 20) };
    let got = events(engine.submit(ending.clone()).expect("taken"));
    assert_eq!((ids(&got), reason(&got)), (answer[..=first].to_vec(), FinishReason::Stop));
    let got = events(engine.submit(Request { ignore_end: true, ..ending }).expect("taken"));
    assert_eq!((ids(&got), reason(&got)), (answer, FinishReason::Length));
}

#[test]
fn a_full_context_ends_the_answer() {
    let engine = engine(EngineOptions { max_context: Some(40), ..EngineOptions::default() });
    assert_eq!(engine.max_context(), 40);
    let got = events(engine.submit(request(0..30, usize::MAX)).expect("taken"));
    assert_eq!((ids(&got).len(), reason(&got)), (10, FinishReason::Length));
}

#[test]
fn prompt_scores_come_once_before_the_first_token() {
    let engine = engine(EngineOptions { step_tokens: 7, ..EngineOptions::default() });
    let scored = Request { prompt_logprobs: Some(2), logprobs: Some(1), ..request(0..50, 3) };
    // Warm the cache: scores need the rows computed all the same.
    let _ = events(engine.submit(request(0..50, 3)).expect("taken"));
    let got = events(engine.submit(scored.clone()).expect("taken"));
    assert!(matches!(got[0], Event::Started { .. }), "{:?} comes first", got[0]);
    let Event::Prompt(scores) = &got[1] else { panic!("{:?} comes second", got[1]) };
    assert_eq!(scores.iter().map(|score| score.id).collect::<Vec<_>>(), (1..50).collect::<Vec<_>>());
    assert!(scores.iter().all(|score| score.top.len() == 2 && score.logprob.is_some_and(|p| p < 0.0)));
    assert_eq!(got.iter().filter(|event| matches!(event, Event::Prompt(_))).count(), 1);
    assert_eq!(ids(&got).len(), 3);
    // A score is what the token would have had as an answer.
    let runner = HashRunner::new(VOCAB, 512, 1);
    let logits = runner.logits_after(&(0..10).collect::<Vec<_>>());
    let normalizer = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    let expected = f64::from(logits[10]) - normalizer;
    assert!((f64::from(scores[9].logprob.expect("asked for")) - expected).abs() < 1e-5);

    let only = Request { max_tokens: 0, ..scored };
    let got = events(engine.submit(only).expect("taken"));
    assert!(
        matches!(&got[..], [Event::Started { .. }, Event::Prompt(all), Event::Finished { reason: FinishReason::Length, .. }] if all.len() == 49)
    );
}

#[test]
fn nothing_to_do_ends_at_once() {
    let engine = engine(EngineOptions::default());
    let got = events(engine.submit(request([1], 0)).expect("taken"));
    assert_eq!((got.len(), reason(&got)), (1, FinishReason::Length));
    let ended = Request { emitted: vec![7, 9], end_tokens: vec![9], ..request([1], 5) };
    let got = events(engine.submit(ended).expect("taken"));
    assert_eq!((got.len(), reason(&got)), (1, FinishReason::Stop));
    let scored = Request { prompt_logprobs: Some(0), ..request([1], 0) };
    assert_eq!(events(engine.submit(scored).expect("taken"))[0], Event::Prompt(Vec::new()));
}

#[test]
fn refusals_name_the_field_and_the_numbers() {
    let engine = engine(EngineOptions { max_context: Some(100), ..EngineOptions::default() });
    let base = || request([1, 2, 3], 5);
    let sampling = |change: fn(&mut Sampling)| {
        let mut request = base();
        change(&mut request.sampling);
        request
    };
    let cases = [
        (request([], 5), "prompt", "empty"),
        (request([97], 5), "prompt", "97"),
        (request(vec![1; 100], 5), "prompt", "100"),
        (Request { emitted: vec![1; 6], ..base() }, "max_tokens", "6"),
        (Request { emitted: vec![200], ..base() }, "emitted", "200"),
        (sampling(|s| s.temperature = -1.0), "temperature", "-1"),
        (sampling(|s| s.temperature = f32::NAN), "temperature", "NaN"),
        (sampling(|s| s.top_p = -0.5), "top_p", "-0.5"),
        (sampling(|s| s.min_p = 1.5), "min_p", "1.5"),
        (sampling(|s| s.repetition_penalty = 0.0), "repetition_penalty", "0"),
        (sampling(|s| s.logit_bias = vec![(97, 1.0)]), "logit_bias", "97"),
        (
            Request { grammar: Some(consort_inference::request::Grammar::JsonObject), ..base() },
            "response_format",
            "grammar",
        ),
    ];
    for (request, expected, word) in cases {
        match engine.submit(request) {
            Err(SubmitError::Invalid { field, reason }) => {
                assert_eq!(field, expected, "{reason}");
                assert!(reason.contains(word), "{reason:?} doesn't name {word}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert_eq!(engine.stats().queued, 0);
}

#[test]
fn the_queue_is_bounded() {
    let options =
        EngineOptions { max_running: 1, max_queued: 2, answer_buffer: 1, ..EngineOptions::default() };
    let engine = engine(options);
    // Unread: each answer pauses after an event, so all stay open.
    let taken: Vec<_> = (0..3).map(|i| engine.submit(request([i], 400)).expect("taken")).collect();
    match engine.submit(request([9], 4)) {
        Err(SubmitError::Busy { queued: 2, retry_after_seconds: 1.. }) => {}
        other => panic!("{other:?}"),
    }
    for submission in taken {
        assert_eq!(ids(&events(submission)).len(), 400);
    }
    assert_eq!(ids(&events(engine.submit(request([9], 4)).expect("taken again"))).len(), 4);
}

#[test]
fn a_deadline_ends_queued_and_running_answers() {
    let engine = engine(EngineOptions::default());
    let late = Request { deadline: Some(Instant::now()), ..request([1], 400) };
    assert_eq!(reason(&events(engine.submit(late).expect("taken"))), FinishReason::Deadline);
}

#[test]
fn draining_hands_over_what_does_not_finish() {
    let engine = engine(EngineOptions { answer_buffer: 4, ..EngineOptions::default() });
    let unread = engine.submit(request([1], 400)).expect("taken");
    engine.drain(Duration::ZERO);
    assert!(matches!(engine.submit(request([1], 4)), Err(SubmitError::Draining)));
    let got = events(unread);
    assert_eq!(reason(&got), FinishReason::HandedOver);
    // Elsewhere it goes on with what is missing.
    let other = self::engine(EngineOptions::default());
    let mut all = ids(&got);
    let rest = Request { emitted: all.clone(), ..request([1], 400) };
    all.extend(ids(&events(other.submit(rest).expect("taken"))));
    assert_eq!(all, greedy(&[1], 400));
}

#[test]
fn a_drain_counts_tokens_where_it_is_told_to() {
    let engine =
        engine(EngineOptions { answer_buffer: 4, drain_tokens: Some(20), ..EngineOptions::default() });
    let long = engine.submit(request([1], 400)).expect("taken");
    let short = engine.submit(request([2], 10)).expect("taken");
    let (got, other) = std::thread::scope(|scope| {
        scope.spawn(|| engine.drain(Duration::from_secs(60)));
        // Nobody reads yet, so both answers stand still when the drain begins.
        while !matches!(engine.submit(request([3], 1)), Err(SubmitError::Draining)) {
            std::thread::yield_now();
        }
        let long = scope.spawn(|| events(long));
        (long.join().expect("read"), events(short))
    });
    assert_eq!(reason(&got), FinishReason::HandedOver);
    assert_eq!((ids(&other).len(), reason(&other)), (10, FinishReason::Length), "what is short finishes");
    let mut all = ids(&got);
    assert!((20..100).contains(&all.len()), "{} tokens", all.len());
    let other = self::engine(EngineOptions::default());
    let rest = Request { emitted: all.clone(), ..request([1], 400) };
    all.extend(ids(&events(other.submit(rest).expect("taken"))));
    assert_eq!(all, greedy(&[1], 400));
}

#[test]
fn draining_waits_for_what_finishes() {
    let engine = engine(EngineOptions { answer_buffer: 512, ..EngineOptions::default() });
    let unread = engine.submit(request([1], 300)).expect("taken");
    engine.drain(Duration::from_secs(60));
    let got = events(unread);
    assert_eq!((ids(&got).len(), reason(&got)), (300, FinishReason::Length));
}

#[test]
fn dropping_the_engine_hands_over() {
    let engine = engine(EngineOptions { answer_buffer: 4, ..EngineOptions::default() });
    let unread = engine.submit(request([1], 400)).expect("taken");
    drop(engine);
    assert_eq!(reason(&events(unread)), FinishReason::HandedOver);
}

#[test]
fn a_dead_engine_fails_everything_and_hangs_nobody() {
    for pass in [3, 4] {
        let mut runner = HashRunner::new(VOCAB, 512, 64);
        runner.fails_at = Some(pass);
        let engine = Engine::start_runner(runner, None, EngineOptions::default()).expect("starts");
        let taken: Vec<_> = (0..4).map(|i| engine.submit(request([i], 400))).collect();
        for submission in taken.into_iter().flatten() {
            let got = events(submission);
            assert!(
                matches!(got.last(), Some(Event::Failed { reason }) if reason.contains("stopped")),
                "{got:?}"
            );
        }
        // Whoever saw an answer fail sees the cause lasts.
        assert_eq!(engine.refusal(), Some(SubmitError::Stopped));
        assert_eq!(engine.submit(request([1], 4)).err(), Some(SubmitError::Stopped));
        engine.drain(Duration::from_secs(1));
    }
}

//! The contract on a real model: the same request gives the same token ids and the same log-probability bits,
//! whatever the chunking, the cache, the company, the threads, preemption or a change of replica.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use consort_inference::request::Grammar;
use consort_inference::{Engine, EngineOptions, Event, FinishReason, Request, Sampling, Submission};
use consort_model::tokenizer::Specials;
use consort_model::{Model, Tokenizer};
use consort_tensor::kv::BLOCK_TOKENS;
use consort_tensor::{Cpu, Pool};
use serde_json::{Value, json};

const ANSWER: usize = 40;

struct Loaded {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
}

static LOADED: LazyLock<Loaded> = LazyLock::new(|| {
    let path = std::env::var_os("CONSORT_TEST_SMOLLM2").map(PathBuf::from).unwrap_or_else(|| {
        panic!("CONSORT_TEST_SMOLLM2 names no model file; `cargo xtask test` fetches one and sets it")
    });
    let opened = consort_model::open(&path).expect("the model opens");
    let model = opened.load(&Pool::new(2, Cpu::detect())).expect("the model loads");
    let tokenizer = opened.tokenizer().expect("it has a tokenizer");
    Loaded { model: Arc::new(model), tokenizer: Arc::new(tokenizer) }
});

fn engine(threads: usize, options: EngineOptions) -> Engine {
    let Loaded { model, tokenizer } = &*LOADED;
    let pool = Pool::new(threads, Cpu::detect());
    Engine::start(Arc::clone(model), Arc::clone(tokenizer), pool, options).expect("the engine starts")
}

fn options() -> EngineOptions {
    EngineOptions { max_context: Some(512), answer_buffer: 256, ..EngineOptions::default() }
}

/// Cache bytes for this many tokens.
fn cache_of(tokens: usize) -> Option<usize> {
    Some(LOADED.model.kv_shape().block_bytes() * tokens.div_ceil(BLOCK_TOKENS))
}

const TEXT: &str = "The lighthouse keeper wrote a letter every evening, though no ship had passed for years. \
    He described the weather, the birds, and the slow work of the sea on the stones below. On the last night of \
    the year he found, pushed under the door, a letter in an unknown hand. It began with his own name, and then \
    it said that somebody had read every word. He lit the lamp again, sat down by the window and";

fn request(sampling: Sampling, prompt: Vec<u32>) -> Request {
    Request {
        prompt,
        emitted: Vec::new(),
        sampling,
        end_tokens: LOADED.tokenizer.end_tokens().to_vec(),
        max_tokens: ANSWER,
        ignore_end: true,
        logprobs: Some(4),
        prompt_logprobs: None,
        grammar: None,
        deadline: None,
    }
}

fn loaded_sampling() -> Sampling {
    Sampling {
        temperature: 0.9,
        top_k: 200,
        top_p: 0.95,
        min_p: 0.01,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        logit_bias: vec![(28, -1.5), (260, 1.0)],
        seed: 20_240_607,
    }
}

fn prompt() -> Vec<u32> {
    LOADED.tokenizer.encode(TEXT, Specials::AsText)
}

/// Greedy, every filter and penalty at once, plain temperature, and the same under a schema.
fn subjects() -> Vec<Request> {
    let plain = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
    let free = [Sampling::default(), loaded_sampling(), plain];
    let mut subjects = free.map(|sampling| request(sampling, prompt())).to_vec();
    // Nearly greedy: at higher temperatures this model spends its tokens on white space.
    let calm = Sampling { temperature: 0.7, top_p: 0.8, seed: 7, ..Sampling::default() };
    subjects.push(Request { grammar: Some(Grammar::JsonSchema(schema())), ..request(calm, prompt()) });
    subjects
}

/// What follows it fits the answer's length, and only just.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 8},
    "year": {"type": "integer", "minimum": 1, "maximum": 99},
            "sea": {"enum": ["calm", "rough"]},
        },
        "required": ["name", "year", "sea"],
        "additionalProperties": false,
    })
}

/// The subject under the schema, among [`subjects`].
const UNDER_SCHEMA: usize = 3;

/// A token, its log-probability's bits, and those of the likeliest.
type Bits = Vec<(u32, Option<u32>, Vec<(u32, u32)>)>;

fn take(mut submission: Submission) -> Bits {
    let mut bits = Vec::new();
    loop {
        match submission.events.blocking_recv() {
            Some(Event::Started { .. }) => {}
            Some(Event::Token(token)) => {
                let top = token.top.iter().map(|(id, p)| (*id, p.to_bits())).collect();
                bits.push((token.id, token.logprob.map(f32::to_bits), top));
            }
            Some(Event::Finished { reason, .. }) => {
                assert!(matches!(reason, FinishReason::Length | FinishReason::Stop), "{reason:?}");
                return bits;
            }
            other => panic!("{other:?}"),
        }
    }
}

fn answers(engine: &Engine, requests: &[Request]) -> Vec<Bits> {
    let taken: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).expect("taken")).collect();
    taken.into_iter().map(take).collect()
}

/// Each subject alone in an engine without a prefix cache.
static ALONE: LazyLock<Vec<Bits>> = LazyLock::new(|| {
    let engine = engine(2, EngineOptions { prefix_cache: false, ..options() });
    let alone: Vec<Bits> =
        subjects().iter().flat_map(|request| answers(&engine, std::slice::from_ref(request))).collect();
    assert!(alone[..UNDER_SCHEMA].iter().all(|answer| answer.len() == ANSWER));
    assert!(alone[0] != alone[1] && alone[1] != alone[2], "the subjects should differ");
    let length = alone[UNDER_SCHEMA].len();
    assert!((12..ANSWER).contains(&length), "{length} tokens: is it complete, and does it say something?");
    alone
});

fn assert_same(got: &[Bits], what: &str) {
    for (subject, (got, expected)) in got.iter().zip(ALONE.iter()).enumerate() {
        if let Some(at) = (0..ANSWER).find(|&at| got.get(at) != expected.get(at)) {
            panic!(
                "{what}: subject {subject} differs at token {at}: {:?}, alone {:?}",
                got.get(at),
                expected.get(at)
            );
        }
    }
}

#[test]
fn an_answer_under_a_schema_is_valid() {
    let ids: Vec<u32> = ALONE[UNDER_SCHEMA].iter().map(|token| token.0).collect();
    let text = LOADED.tokenizer.decode(&ids);
    let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields: Vec<&str> = answer.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(fields, ["name", "year", "sea"]);
    let name = answer["name"].as_str().expect("a string");
    assert!((3..=8).contains(&name.chars().count()), "{text}");
    assert!(answer["year"].as_u64().is_some_and(|year| (1..=99).contains(&year)), "{text}");
    assert!(["calm", "rough"].contains(&answer["sea"].as_str().expect("a string")), "{text}");
}

#[test]
fn however_the_prompt_is_chunked() {
    for step_tokens in [1, 7, 64, 512] {
        let engine = engine(2, EngineOptions { step_tokens, ..options() });
        assert_same(&answers(&engine, &subjects()), &format!("steps of {step_tokens}"));
    }
}

#[test]
fn with_one_thread() {
    assert_same(&answers(&engine(1, options()), &subjects()), "one thread");
}

#[test]
fn with_a_warm_prefix_cache() {
    let engine = engine(2, options());
    // Warm with other answers to prompts that share all, half and little of the subjects' tokens.
    let warm: Vec<Request> = [prompt().len(), 50, 20]
        .map(|length| {
            request(
                Sampling { temperature: 1.0, seed: 1, ..Sampling::default() },
                prompt()[..length].to_vec(),
            )
        })
        .to_vec();
    answers(&engine, &warm);
    let before = engine.stats().prefix_hit_tokens;
    assert_same(&answers(&engine, &subjects()), "a warm cache");
    assert!(engine.stats().prefix_hit_tokens > before + 100, "the cache was not used");
}

/// Sixteen others, of all lengths, arriving before and after.
fn companions() -> Vec<Request> {
    (0..16u64)
        .map(|i| {
            let length = [3, 17, 64, 80][i as usize % 4];
            let own = prompt().into_iter().cycle().skip(i as usize).take(length).collect();
            let max_tokens = 5 + 7 * (i as usize % 5);
            let sampling = Sampling { temperature: 0.8, seed: i, ..Sampling::default() };
            Request { max_tokens, logprobs: None, ..request(sampling, own) }
        })
        .collect()
}

#[test]
fn among_sixteen_others() {
    for threads in [2, 1] {
        let engine = engine(threads, options());
        let (before, after) = (companions(), companions());
        let mut all = before[..8].to_vec();
        all.extend(subjects());
        all.extend_from_slice(&after[8..]);
        let got = answers(&engine, &all);
        assert_same(&got[8..], &format!("among others, {threads} threads"));
    }
}

#[test]
fn after_preemptions() {
    // Room for two of the answers; everything beyond is pushed out and computed again.
    let longest = prompt().len() + ANSWER;
    let kv_bytes = cache_of(2 * longest + BLOCK_TOKENS);
    let engine = engine(2, EngineOptions { kv_bytes, max_context: Some(longest), ..options() });
    // The companions are younger or older than the subjects; their short prompts are let in and then grow.
    let small = |i: u64| {
        let sampling = Sampling { temperature: 0.8, seed: i, ..Sampling::default() };
        Request { logprobs: None, max_tokens: 60, ..request(sampling, prompt()[i as usize..][..8].to_vec()) }
    };
    let mut all: Vec<Request> = (0..6).map(small).collect();
    all.extend(subjects());
    let got = answers(&engine, &all);
    assert_same(&got[6..], "a full cache");
    // Short prompts whose answers outgrow the cache push each other out.
    let mut grown = subjects();
    grown.iter_mut().for_each(|request| request.prompt.truncate(4));
    let crowd: Vec<Request> = (0..4).flat_map(|_| grown.clone()).collect();
    let crowded = answers(&engine, &crowd);
    assert!(engine.stats().preemptions > 0, "nothing was preempted: the test tests nothing");
    let roomy = self::engine(2, EngineOptions { prefix_cache: false, ..options() });
    let expected = answers(&roomy, &grown);
    for (index, got) in crowded.iter().enumerate() {
        assert_eq!(*got, expected[index % grown.len()], "answer {index} of the crowd");
    }
}

#[test]
fn resumed_at_every_token() {
    let engine = engine(2, options());
    for (subject, request) in subjects().into_iter().enumerate() {
        let whole = &ALONE[subject];
        let resumed: Vec<Request> = (0..=whole.len())
            .map(|at| Request {
                emitted: whole[..at].iter().map(|token| token.0).collect(),
                ..request.clone()
            })
            .collect();
        for (at, got) in answers(&engine, &resumed).into_iter().enumerate() {
            assert_eq!(got, whole[at..], "subject {subject} resumed at {at}");
        }
    }
}

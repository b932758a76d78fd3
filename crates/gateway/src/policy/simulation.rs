//! Balancing, measured: a mixed load over four replicas under each way to choose, in virtual time from a seed.
//!
//! What chooses is the gateway's own code, with what the gateway knows: a prompt's bytes, a request's `max_tokens` (or
//! none), the tokens that came back. What it chooses among are models of replicas. A step of one takes 0.4 ms, and
//! 2.3 ms for each sequence that decodes, and 0.51 ms for each prompt token that isn't in its prefix cache, which is what
//! `cargo xtask peers llama.cpp` measured of a 135M model on two cores (370 tokens a second alone, 425 with eight; 1,950
//! of a prompt). 16 sequences run at one time, others wait their turn there. The cache holds 24,576 tokens in blocks of
//! 16 and forgets the longest unused.
//!
//! The load: conversations of one to five turns, each of which brings the whole conversation along, over twelve
//! system prompts of 300 to 900 tokens; and single requests with a prompt of their own. Three in four answers are
//! short (8 to 64 tokens), the others 200 to 600 tokens long. Three in ten clients set no `max_tokens`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use consort_api::deployment::Balancing;
use consort_base::Philox;

use super::affinity;
use super::balance::{Balance, Candidate};

const REPLICAS: usize = 4;
const SEATS: usize = 16;
/// Prompt tokens of one step.
const CHUNK: u64 = 256;
/// Bytes of a token, of a cache block, and blocks of a cache.
const TOKEN: usize = 4;
const BLOCK: usize = 16 * TOKEN;
const BLOCKS: usize = 24_576 / 16;
/// Conversations, and single requests, that begin.
const BEGIN: usize = 1000;

/// How much there is to do: the name, and microseconds between two beginnings, on average. A third of what four
/// replicas can do, and nine tenths.
const LOADS: [(&str, f64); 2] = [("little to do", 900_000.0), ("busy", 300_000.0)];
/// Seeds of the table. What is tuned is tuned on others ([`SETTING_SEEDS`]).
const SEEDS: std::ops::Range<u64> = 1000..1003;

/// As the gateway has it.
const UNDER_WAY: u64 = 16;

/// What is yet to be computed, as the gateway takes it to be.
#[derive(Clone, Copy)]
struct Ticket {
    prompt: u64,
    answer: u64,
}

struct Request {
    text: Vec<u8>,
    answer: u64,
    max_tokens: Option<u64>,
    /// Turns that follow.
    turns: u64,
    arrived: u64,
}

struct Running {
    request: Request,
    /// Prompt tokens that aren't computed yet, and answer tokens that were given.
    prompt: u64,
    given: u64,
    found: u64,
    ticket: Ticket,
    first: u64,
}

#[derive(Default)]
struct Server {
    waiting: VecDeque<Running>,
    running: Vec<Running>,
    steps: bool,
    requests: u64,
    tokens: u64,
    cache: HashMap<u64, u64>,
    clock: u64,
}

#[derive(Default)]
struct Outcome {
    first: Vec<f64>,
    whole: Vec<f64>,
    prompt: u64,
    found: u64,
}

fn blocks(text: &[u8]) -> impl Iterator<Item = u64> {
    let mut hash = 7u64;
    text.chunks_exact(BLOCK).map(move |block| {
        for byte in block {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        hash
    })
}

impl Server {
    fn find(&mut self, text: &[u8]) -> u64 {
        self.clock += 1;
        let mut found = 0;
        for block in blocks(text) {
            let Some(used) = self.cache.get_mut(&block) else { break };
            (*used, found) = (self.clock, found + 1);
        }
        // The last token is computed in any case.
        (found * 16).min((text.len() / TOKEN) as u64 - 1)
    }

    fn keep(&mut self, text: &[u8]) {
        self.clock += 1;
        let clock = self.clock;
        self.cache.extend(blocks(text).map(|block| (block, clock)));
        if self.cache.len() > BLOCKS {
            let mut ages: Vec<u64> = self.cache.values().copied().collect();
            ages.sort_unstable();
            let oldest = ages[ages.len() - BLOCKS];
            self.cache.retain(|_, used| *used >= oldest);
        }
    }

    /// Seats who waits, and says how long the next step takes; none where there is nothing to do.
    fn begin(&mut self, plan: &mut Vec<u64>) -> Option<u64> {
        while self.running.len() < SEATS
            && let Some(mut next) = self.waiting.pop_front()
        {
            next.found = self.find(&next.request.text);
            next.prompt = (next.request.text.len() / TOKEN) as u64 - next.found;
            self.running.push(next);
        }
        let (mut chunk, mut decoding) = (CHUNK, 0);
        plan.clear();
        for running in &self.running {
            let now = running.prompt.min(chunk);
            chunk -= now;
            decoding += u64::from(running.prompt == 0);
            plan.push(now);
        }
        (!self.running.is_empty()).then_some(400 + 2300 * decoding + 510 * (CHUNK - chunk))
    }
}

struct World {
    rng: Philox,
    servers: Vec<Server>,
    plans: Vec<Vec<u64>>,
    balance: Balance,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    arriving: HashMap<u64, Request>,
    number: u64,
    outcome: Outcome,
}

impl World {
    fn text(&mut self, tokens: u64) -> Vec<u8> {
        let letters = |bytes: u64| bytes.to_le_bytes().map(|byte| b'a' + byte % 26);
        let words = (tokens as usize * TOKEN).div_ceil(8);
        let mut text: Vec<u8> = (0..words).flat_map(|_| letters(self.rng.next_u64())).collect();
        text.truncate(tokens as usize * TOKEN);
        text
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.rng.next_u64() % (high - low + 1)
    }

    fn request(&mut self, text: Vec<u8>, turns: u64) -> Request {
        let long = self.rng.next_u64().is_multiple_of(4);
        let (low, high) = if long { (200, 600) } else { (8, 64) };
        let says = !self.rng.next_u64().is_multiple_of(10) && !self.rng.next_u64().is_multiple_of(4);
        Request { text, answer: self.between(low, high), max_tokens: says.then_some(high), turns, arrived: 0 }
    }

    fn schedule(&mut self, at: u64, mut request: Request) {
        request.arrived = at;
        self.number += 1;
        self.arriving.insert(self.number, request);
        self.events.push(Reverse((at, self.number, usize::MAX)));
    }

    fn choose(&mut self, way: Balancing, request: &Request, cost: u64) -> usize {
        let candidate = |(i, server): (usize, &Server)| Candidate {
            id: i as u64 + 1,
            requests: server.requests,
            tokens: server.tokens,
            share: 1.0,
        };
        let candidates: Vec<Candidate> = self.servers.iter().enumerate().map(candidate).collect();
        let near = way == Balancing::Affinity;
        let beginnings = if near { affinity::beginnings(&request.text) } else { Vec::new() };
        let random = self.rng.next_u64();
        let index = self.balance.choose(way, &candidates, &beginnings, cost, random).unwrap_or(0);
        self.balance.note(&beginnings, index as u64 + 1);
        index
    }

    fn step(&mut self, now: u64, index: usize) {
        let server = &mut self.servers[index];
        if let Some(takes) = server.begin(&mut self.plans[index]) {
            server.steps = true;
            self.number += 1;
            self.events.push(Reverse((now + takes, self.number, index)));
        } else {
            server.steps = false;
        }
    }

    /// What a step computed.
    fn stepped(&mut self, now: u64, index: usize) {
        let (server, plan) = (&mut self.servers[index], &self.plans[index]);
        let mut done = Vec::new();
        for (running, prompt) in server.running.iter_mut().zip(plan) {
            let last = running.prompt > 0 && running.prompt == *prompt;
            let decodes = running.prompt == 0;
            running.prompt -= prompt;
            // The last chunk of a prompt gives the first token.
            if last || decodes {
                if running.given == 0 {
                    running.first = now;
                }
                running.given += 1;
                let paid = u64::from(running.ticket.answer > UNDER_WAY);
                running.ticket.answer -= paid;
                server.tokens -= paid + std::mem::take(&mut running.ticket.prompt);
            }
        }
        let mut at = 0;
        while at < server.running.len() {
            if server.running[at].given >= server.running[at].request.answer {
                done.push(server.running.remove(at));
            } else {
                at += 1;
            }
        }
        for ended in done {
            let server = &mut self.servers[index];
            let left = ended.ticket.prompt + ended.ticket.answer;
            (server.requests, server.tokens) = (server.requests - 1, server.tokens - left);
            let request = ended.request;
            self.outcome.first.push((ended.first - request.arrived) as f64 / 1e6);
            self.outcome.whole.push((now - request.arrived) as f64 / 1e6);
            self.outcome.prompt += (request.text.len() / TOKEN) as u64;
            self.outcome.found += ended.found;
            let mut text = request.text;
            text.extend(self.text(request.answer));
            self.servers[index].keep(&text);
            if request.turns > 0 {
                let more = self.between(10, 80);
                text.extend(self.text(more));
                let (next, pause) =
                    (self.request(text, request.turns - 1), self.between(1_000_000, 8_000_000));
                self.schedule(now + pause, next);
            }
        }
    }
}

fn simulate(seed: u64, way: Balancing, gap: f64) -> Outcome {
    let mut world = World {
        rng: Philox::new(seed, 0),
        servers: (0..REPLICAS).map(|_| Server::default()).collect(),
        plans: vec![Vec::new(); REPLICAS],
        balance: Balance::default(),
        events: BinaryHeap::new(),
        arriving: HashMap::new(),
        number: 0,
        outcome: Outcome::default(),
    };
    let systems: Vec<Vec<u8>> = (0..12)
        .map(|_| {
            let tokens = world.between(300, 900);
            world.text(tokens)
        })
        .collect();
    let mut at = 0.0;
    for _ in 0..BEGIN {
        let uniform = ((world.rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        at += -uniform.ln() * gap;
        let own = world.between(20, 200);
        let (mut text, mut turns) = (Vec::new(), 0);
        if !world.rng.next_u64().is_multiple_of(3) {
            text = systems[world.rng.next_u64() as usize % systems.len()].clone();
            turns = world.between(0, 4);
        }
        text.extend(world.text(own));
        let request = world.request(text, turns);
        world.schedule(at as u64, request);
    }
    while let Some(Reverse((now, number, index))) = world.events.pop() {
        if index < REPLICAS {
            world.stepped(now, index);
            world.step(now, index);
            continue;
        }
        let Some(request) = world.arriving.remove(&number) else { continue };
        let ticket =
            Ticket { prompt: (request.text.len() / TOKEN) as u64, answer: request.max_tokens.unwrap_or(256) };
        let cost = ticket.prompt + ticket.answer;
        let index = world.choose(way, &request, cost);
        let server = &mut world.servers[index];
        (server.requests, server.tokens) = (server.requests + 1, server.tokens + cost);
        server.waiting.push_back(Running { request, prompt: 0, given: 0, found: 0, ticket, first: 0 });
        if !server.steps {
            world.step(now, index);
        }
    }
    world.outcome
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}

#[derive(Clone, Copy)]
struct Row {
    way: Balancing,
    first: [f64; 2],
    whole: [f64; 2],
    found: f64,
}

const WAYS: [Balancing; 4] =
    [Balancing::RoundRobin, Balancing::LeastRequests, Balancing::TwoChoices, Balancing::Affinity];

fn rows(seeds: std::ops::Range<u64>, gap: f64) -> [Row; 4] {
    WAYS.map(|way| {
        let mut all = Outcome::default();
        for seed in seeds.clone() {
            let mut one = simulate(seed, way, gap);
            all.first.append(&mut one.first);
            all.whole.append(&mut one.whole);
            (all.prompt, all.found) = (all.prompt + one.prompt, all.found + one.found);
        }
        Row {
            way,
            first: [0.5, 0.99].map(|share| quantile(&mut all.first, share)),
            whole: [0.5, 0.99].map(|share| quantile(&mut all.whole, share)),
            found: 100.0 * all.found as f64 / all.prompt as f64,
        }
    })
}

fn table(loads: &[(&str, [Row; 4])]) -> String {
    let mut table = String::from(
        "| load | `balancing` | first token p50 / p99 | whole answer p50 / p99 | prompt tokens found in caches |\n\
         |---|---|---:|---:|---:|\n",
    );
    for (load, rows) in loads {
        for row in rows {
            let [[a, b], [c, d]] = [row.first, row.whole];
            let (way, found) = (row.way.name(), row.found);
            table +=
                &format!("| {load} | `{way}` | {a:.2} / {b:.2} s | {c:.2} / {d:.2} s | {found:.0} % |\n");
        }
    }
    table
}

/// The table of docs/gateway.md, which is compared with what is computed here; and what it has to show.
#[test]
fn balancing_is_better_than_turns_and_least_requests_as_the_table_says() {
    let loads = LOADS.map(|(name, gap)| (name, rows(SEEDS, gap)));
    let table = table(&loads);
    for (_, [turns, fewest, two, ours]) in &loads {
        assert!(ours.first[0] < fewest.first[0] && ours.first[1] < fewest.first[1], "{table}");
        assert!(ours.first[0] < turns.first[0] && ours.first[1] < turns.first[1], "{table}");
        assert!(ours.whole[0] < fewest.whole[0] && ours.whole[0] < turns.whole[0], "{table}");
        assert!(ours.found > two.found, "{table}");
    }
    let (_, [turns, fewest, _, ours]) = &loads[1];
    assert!(ours.whole[1] < fewest.whole[1] && ours.whole[1] < turns.whole[1], "{table}");
    let page =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/gateway.md")).unwrap();
    assert!(page.contains(&table), "docs/gateway.md doesn't have this table:\n{table}");
}

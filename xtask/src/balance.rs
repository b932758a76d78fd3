//! `cargo xtask balance`: every way of choosing a replica, before the same real replicas, in turns.
//!
//! One gateway for each way stands before the same `consort serve` processes, which have a thread each. The load takes turns
//! with them: the same conversations and single requests at the same random times (a Poisson process), in words that no
//! turn before has used, so that no turn finds what another one left in a prefix cache. Conversations share system prompts
//! and bring along what was said; three answers in four are short. What is printed is of all rounds together.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::command::{cargo, run, target_folder};
use crate::replica::Replica;
use crate::stages;

/// What is measured.
#[derive(Args)]
pub(crate) struct BalanceArguments {
    /// Ways to choose, as `consort gateway --balancing` knows them.
    #[arg(long, value_delimiter = ',', default_value = "round_robin,least_requests,two_choices,affinity")]
    ways: Vec<String>,
    /// Replicas, each with one thread.
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// Turns of each way.
    #[arg(long, default_value_t = 4)]
    rounds: u64,
    /// The first round's number: each has a load of its own, so that a measurement can go on where another one ended.
    #[arg(long, default_value_t = 1)]
    first_round: u64,
    /// Prints all times as JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Seconds in which conversations begin, of one turn.
    #[arg(long, default_value_t = 12)]
    seconds: u64,
    /// Conversations and single requests that begin in a second.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// The model file [default: the first that `cargo xtask test` fetches]
    #[arg(long)]
    model: Option<std::path::PathBuf>,
    /// Measures the release build that is there instead of making one.
    #[arg(long)]
    no_build: bool,
}

/// A conversation: what is asked, turn by turn.
struct Conversation {
    begins: Duration,
    system: Option<String>,
    turns: Vec<Turn>,
}

struct Turn {
    says: String,
    tokens: u64,
    pause: Duration,
}

/// What clients saw.
#[derive(Default)]
struct Seen {
    /// Seconds.
    first: Vec<f64>,
    whole: Vec<f64>,
    prompt: u64,
    cached: u64,
}

/// Numbers from a seed (xorshift64*), good enough for a load.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + (self.next() >> 16) % (high - low + 1)
    }

    fn exponential(&mut self) -> f64 {
        -(((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64).ln()
    }
}

const WORDS: [&str; 32] = [
    "river", "stone", "garden", "window", "letter", "music", "winter", "bridge", "paper", "market", "silver",
    "forest", "morning", "engine", "harbor", "castle", "mirror", "island", "pocket", "summer", "thunder",
    "village", "basket", "copper", "desert", "feather", "ladder", "meadow", "needle", "orange", "pillow",
    "rocket",
];

/// Measures, and prints a row for each way.
pub(crate) fn measure(root: &Path, arguments: &BalanceArguments) -> Result<()> {
    if arguments.replicas < 2 || arguments.rounds == 0 || arguments.rate <= 0.0 {
        bail!("--replicas must be at least 2, --rounds at least 1 and --rate above 0");
    }
    if !arguments.no_build {
        run(&mut cargo(root, ["build", "--release", "--quiet", "-p", "consort"]))?;
    }
    let consort = target_folder(root).join("release/consort");
    let work = target_folder(root).join("xtask");
    std::fs::create_dir_all(&work)?;
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => stages::release_model(root)?.1.into(),
    };
    let replicas = (0..arguments.replicas)
        .map(|number| {
            Replica::start("/ready", &work.join(format!("balance-{number}.log")), |address| {
                let mut command = Command::new(&consort);
                command.arg("serve").arg(&model).args(["--threads", "1", "--name", "m", "--json"]);
                command.args(["--port", &address.port().to_string()]);
                command
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let gateways = arguments
        .ways
        .iter()
        .map(|way| {
            Replica::start("/ready", &work.join(format!("balance-{way}.log")), |address| {
                let mut command = Command::new(&consort);
                command.args([
                    "gateway",
                    "--json",
                    "--balancing",
                    way,
                    "--port",
                    &address.port().to_string(),
                ]);
                replicas.iter().for_each(|replica| {
                    command.args(["--upstream", &replica.url()]);
                });
                command
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut all: Vec<Seen> = arguments.ways.iter().map(|_| Seen::default()).collect();
    for round in arguments.first_round..arguments.first_round + arguments.rounds {
        for turn in 0..gateways.len() {
            // Every way is first once.
            let at = (turn + round as usize) % gateways.len();
            eprintln!("xtask: round {round}: {}", arguments.ways[at]);
            let salt = round * 1000 + at as u64 + 1;
            let load = load(round, salt, arguments.seconds, arguments.rate);
            let seen = runtime.block_on(turn_of(gateways[at].address, load))?;
            all[at].add(seen);
        }
    }
    if arguments.json {
        for (way, seen) in arguments.ways.iter().zip(&all) {
            println!(
                "{}",
                json!({"way": way, "first": seen.first, "whole": seen.whole, "prompt": seen.prompt, "cached": seen.cached})
            );
        }
        return Ok(());
    }
    println!(
        "| `balancing` | requests | first token p50 / p90 | whole answer p50 / p90 | prompt tokens found in caches |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (way, seen) in arguments.ways.iter().zip(&mut all) {
        let at = |times: &mut Vec<f64>, share: f64| {
            times.sort_by(f64::total_cmp);
            times.get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1))).copied()
        };
        let [a, b] = [0.5, 0.9].map(|share| at(&mut seen.first, share).unwrap_or(f64::NAN));
        let [c, d] = [0.5, 0.9].map(|share| at(&mut seen.whole, share).unwrap_or(f64::NAN));
        let found = 100.0 * seen.cached as f64 / seen.prompt.max(1) as f64;
        println!("| `{way}` | {} | {a:.2} / {b:.2} s | {c:.2} / {d:.2} s | {found:.0} % |", seen.first.len());
    }
    Ok(())
}

/// A load: its times and lengths from `seed`, its words from `salt` too.
fn load(seed: u64, salt: u64, seconds: u64, rate: f64) -> Vec<Conversation> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut words = Random(salt.wrapping_mul(0xd134_2543_de82_ef95) | 1);
    let mut text = |count: u64| -> String {
        (0..count).map(|_| WORDS[(words.next() >> 40) as usize % WORDS.len()]).collect::<Vec<_>>().join(" ")
    };
    let systems: Vec<String> = (0..6).map(|_| text(random.between(150, 350))).collect();
    let (mut at, mut conversations) = (0.0, Vec::new());
    loop {
        at += random.exponential() / rate;
        if at > seconds as f64 {
            return conversations;
        }
        let talks = !random.next().is_multiple_of(3);
        let system = talks.then(|| systems[(random.next() >> 33) as usize % systems.len()].clone());
        let turns = (0..if talks { random.between(1, 4) } else { 1 })
            .map(|_| Turn {
                says: text(if talks { random.between(8, 40) } else { random.between(20, 150) }),
                tokens: if random.next().is_multiple_of(4) {
                    random.between(80, 200)
                } else {
                    random.between(8, 40)
                },
                pause: Duration::from_millis(random.between(200, 2000)),
            })
            .collect();
        conversations.push(Conversation { begins: Duration::from_secs_f64(at), system, turns });
    }
}

/// One turn: everything that begins in it, to its end.
async fn turn_of(gateway: SocketAddr, load: Vec<Conversation>) -> Result<Seen> {
    let began = Instant::now();
    let load: Vec<_> = load.into_iter().map(Arc::new).collect();
    let talks: Vec<_> =
        load.iter().map(|conversation| tokio::spawn(talk(gateway, began, conversation.clone()))).collect();
    let mut all = Seen::default();
    for talk in talks {
        all.add(talk.await??);
    }
    Ok(all)
}

async fn talk(gateway: SocketAddr, began: Instant, conversation: Arc<Conversation>) -> Result<Seen> {
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(conversation.system.iter().map(|text| json!({"role": "system", "content": text})));
    let mut seen = Seen::default();
    tokio::time::sleep_until((began + conversation.begins).into()).await;
    for turn in &conversation.turns {
        messages.push(json!({"role": "user", "content": turn.says}));
        let answer = ask(gateway, &messages, turn.tokens, &mut seen).await?;
        messages.push(json!({"role": "assistant", "content": answer}));
        tokio::time::sleep(turn.pause).await;
    }
    Ok(seen)
}

/// One request, streamed; its text.
async fn ask(gateway: SocketAddr, messages: &[Value], tokens: u64, seen: &mut Seen) -> Result<String> {
    let body = json!({
        "model": "m", "messages": messages, "max_tokens": tokens, "ignore_eos": true, "temperature": 0,
        "stream": true, "stream_options": {"include_usage": true},
    })
    .to_string();
    let began = Instant::now();
    let mut stream = BufReader::new(TcpStream::connect(gateway).await?);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {gateway}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await?;
    let (mut line, mut first, mut text) = (String::new(), None, String::new());
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            bail!("a stream broke off after {text:?}");
        }
        let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            break;
        }
        let event: Value = serde_json::from_str(data).with_context(|| format!("an event was {data}"))?;
        if let Some(more) = event["choices"][0]["delta"]["content"].as_str().filter(|more| !more.is_empty()) {
            first.get_or_insert_with(|| began.elapsed());
            text += more;
        }
        if let Some(usage) = event["usage"].as_object() {
            seen.prompt += usage["prompt_tokens"].as_u64().unwrap_or(0);
            seen.cached += event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
    }
    let whole = began.elapsed().as_secs_f64();
    seen.first.push(first.map_or(whole, |first| first.as_secs_f64()));
    seen.whole.push(whole);
    Ok(text)
}

impl Seen {
    fn add(&mut self, more: Seen) {
        self.first.extend(more.first);
        self.whole.extend(more.whole);
        self.prompt += more.prompt;
        self.cached += more.cached;
    }
}

//! `cargo xtask streams`: many open streams at once through the gateway, on a release build.
//!
//! The gateway has one processor core. Another one has this program, which is both ends: servers that give each stream
//! a token at fixed times, as replicas do (32 of them, since a gateway sends one replica at most 64 requests), and
//! the streams' clients. Each token bears the time at which it was written, so what is measured is the way through the
//! gateway, as well as the gap between two tokens as a client sees it. Memory is the gateway's resident set.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::command::{cargo, run, target_folder};
use crate::replica::Replica;

/// What is measured.
#[derive(Args)]
pub(crate) struct StreamsArguments {
    /// Streams at one time, one measurement after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 2000])]
    streams: Vec<usize>,
    /// Between two tokens of a stream.
    #[arg(long, default_value_t = 200)]
    pace_ms: u64,
    /// Of one measurement, once all streams are open.
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Measures the release build that is there instead of making one.
    #[arg(long)]
    no_build: bool,
    /// Set where this runs on its core already.
    #[arg(long, hide = true)]
    pinned: bool,
}

/// Servers that the gateway stands before.
const SERVERS: usize = 32;
/// Streams that one of them gets at most.
const EACH: usize = 64;

/// What servers and clients share.
struct Scene {
    origin: Instant,
    pace: Duration,
    /// Streams that have had a token.
    open: AtomicUsize,
    measuring: AtomicBool,
    /// Streams end with their next token.
    ending: AtomicBool,
}

/// What one client saw while it was measured.
#[derive(Default)]
struct Seen {
    /// Milliseconds from a token's writing to its reading, and between two.
    ways: Vec<f64>,
    gaps: Vec<f64>,
}

/// Measures, and prints a row for each number of streams.
pub(crate) fn measure(root: &Path, arguments: &StreamsArguments) -> Result<()> {
    if let Some(most) = arguments.streams.iter().max().filter(|most| **most > SERVERS * EACH) {
        bail!("{most} streams are more than the {} that the servers here take", SERVERS * EACH);
    }
    if arguments.pinned {
        let consort = target_folder(root).join("release/consort");
        let work = target_folder(root).join("xtask");
        std::fs::create_dir_all(&work)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return runtime.block_on(scenes(arguments, &consort, &work));
    }
    if !arguments.no_build {
        run(&mut cargo(root, ["build", "--release", "--quiet", "-p", "consort"]))?;
    }
    // A connection is a file on both sides of each end.
    let own = std::env::current_exe().context("cannot find our own program")?;
    let list: Vec<String> = arguments.streams.iter().map(usize::to_string).collect();
    let mut again = Command::new("sh");
    again.args(["-c", "ulimit -n 16384 && exec taskset -c 1 \"$0\" \"$@\""]).arg(own);
    again.args(["streams", "--pinned", "--streams", &list.join(",")]);
    again.args(["--pace-ms", &arguments.pace_ms.to_string(), "--seconds", &arguments.seconds.to_string()]);
    run(&mut again)
}

async fn scenes(arguments: &StreamsArguments, consort: &Path, work: &Path) -> Result<()> {
    let scene = Arc::new(Scene {
        origin: Instant::now(),
        pace: Duration::from_millis(arguments.pace_ms.max(1)),
        open: AtomicUsize::new(0),
        measuring: AtomicBool::new(false),
        ending: AtomicBool::new(false),
    });
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(consort).args(["gateway", "--json"]);
    for _ in 0..SERVERS {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        command.args(["--upstream", &format!("http://{}", listener.local_addr()?)]);
        tokio::spawn(serve(listener, scene.clone()));
    }
    let log = work.join("streams.log");
    // The servers answer the gateway's questions on this thread while another one waits for it.
    let gateway = tokio::task::spawn_blocking(move || {
        Replica::start("/ready", &log, |address| {
            command.args(["--port", &address.port().to_string()]);
            command
        })
    })
    .await??;
    // All servers, and not the first alone, should be known.
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!(
        "| streams | way p50 / p99 / most | gap p50 / p99 / most | gateway's memory | processor a token |"
    );
    println!("|---:|---:|---:|---:|---:|");
    let mut points = Vec::new();
    for streams in &arguments.streams {
        let bytes = one(&scene, &gateway, *streams, arguments.seconds).await?;
        points.push((*streams as f64, bytes));
    }
    if let (Some(first), Some(last)) = (points.first(), points.last())
        && last.0 > first.0
    {
        println!("\n{:.0} bytes a stream between these numbers", (last.1 - first.1) / (last.0 - first.0));
    }
    Ok(())
}

/// Opens so many streams, measures, ends them. The gateway's memory in bytes.
async fn one(scene: &Arc<Scene>, gateway: &Replica, streams: usize, seconds: u64) -> Result<f64> {
    scene.open.store(0, Ordering::Relaxed);
    scene.ending.store(false, Ordering::Relaxed);
    let mut clients = Vec::new();
    for number in 0..streams {
        clients.push(tokio::spawn(client(scene.clone(), gateway.address)));
        // Nobody opens two thousand connections in one instant; the kernel's queue is shorter than that.
        if number % 50 == 49 {
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }
    let begun = Instant::now();
    while scene.open.load(Ordering::Relaxed) < streams {
        if begun.elapsed() > Duration::from_secs(60) {
            bail!("{} of {streams} streams were open after a minute", scene.open.load(Ordering::Relaxed));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = cpu_seconds(gateway)?;
    scene.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    scene.measuring.store(false, Ordering::Relaxed);
    let cpu = cpu_seconds(gateway)? - before;
    let resident = resident_bytes(gateway)?;
    scene.ending.store(true, Ordering::Relaxed);
    let mut all = Seen::default();
    for client in clients {
        let seen = client.await??;
        all.ways.extend(seen.ways);
        all.gaps.extend(seen.gaps);
    }
    let count = all.ways.len();
    let [way, gap] = [all.ways, all.gaps].map(|mut times| {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).or(times.last()).copied();
        [0.5, 0.99, 1.0].map(|share| at(share).unwrap_or(f64::NAN))
    });
    println!(
        "| {streams} | {:.2} / {:.2} / {:.1} ms | {:.1} / {:.1} / {:.1} ms | {:.1} MB | {:.1} µs |",
        way[0],
        way[1],
        way[2],
        gap[0],
        gap[1],
        gap[2],
        resident / 1e6,
        cpu * 1e6 / count.max(1) as f64,
    );
    Ok(resident)
}

fn proc_file(gateway: &Replica, name: &str) -> Result<String> {
    let path = format!("/proc/{}/{name}", gateway.id());
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

fn resident_bytes(gateway: &Replica) -> Result<f64> {
    let status = proc_file(gateway, "status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}

/// Of user and system time; the kernel counts in hundredths.
fn cpu_seconds(gateway: &Replica) -> Result<f64> {
    let stat = proc_file(gateway, "stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let field = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).context("an odd stat");
    Ok((field(11)? + field(12)?) / 100.0)
}

async fn serve(listener: TcpListener, scene: Arc<Scene>) {
    while let Ok((stream, _)) = listener.accept().await {
        let scene = scene.clone();
        tokio::spawn(async move {
            // A connection that breaks is its client's to notice.
            let _ = answer(stream, &scene).await;
        });
    }
}

async fn answer(stream: TcpStream, scene: &Scene) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let (mut head, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            head += &line.to_ascii_lowercase();
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(Ok(0), |length| length.trim().parse())?];
        stream.read_exact(&mut body).await?;
        if head.starts_with("post") {
            give(&mut stream, scene).await?;
            continue;
        }
        let body = if head.starts_with("get /ready") {
            r#"{"status":"ready","model":"m","system_fingerprint":"fp"}"#
        } else {
            r#"{"object":"list","data":[]}"#
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).await?;
    }
}

/// A stream, token after token, until it is to end.
async fn give(stream: &mut BufReader<TcpStream>, scene: &Scene) -> Result<()> {
    let chunk = |rest: &str| {
        let data = format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"m\",\
             \"system_fingerprint\":\"fp\",\"choices\":[{rest}\n\n"
        );
        format!("{:x}\r\n{data}\r\n", data.len())
    };
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    let opening = r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#;
    stream.write_all((head + &chunk(opening)).as_bytes()).await?;
    let mut due = Instant::now();
    loop {
        due += scene.pace;
        tokio::time::sleep_until(due.into()).await;
        let ending = scene.ending.load(Ordering::Relaxed);
        let (now, reason) = (scene.origin.elapsed().as_micros(), if ending { "\"stop\"" } else { "null" });
        let token = format!(
            r#"{{"index":0,"delta":{{"content":"t{now} "}},"logprobs":null,"finish_reason":{reason},"token_ids":[100]}}],"usage":null}}"#
        );
        stream.write_all(chunk(&token).as_bytes()).await?;
        if ending {
            let usage = chunk(r#"],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#);
            let end = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
            return Ok(stream.write_all((usage + end).as_bytes()).await?);
        }
    }
}

async fn client(scene: Arc<Scene>, address: std::net::SocketAddr) -> Result<Seen> {
    let stream = TcpStream::connect(address).await?;
    let mut stream = BufReader::new(stream);
    let body =
        r#"{"model":"m","messages":[{"role":"user","content":"Hello!"}],"stream":true,"max_tokens":4096}"#;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + body).as_bytes()).await?;
    let (mut seen, mut line, mut last) = (Seen::default(), String::new(), None);
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            bail!("a stream broke off");
        }
        if line.starts_with("data: [DONE]") {
            return Ok(seen);
        }
        let Some((_, rest)) = line.split_once("\"content\":\"t") else { continue };
        let Some((micros, _)) = rest.split_once(' ') else { continue };
        let now = Instant::now();
        let way = (now - scene.origin).as_secs_f64() * 1e3 - micros.parse::<f64>()? / 1e3;
        match last.replace(now) {
            None => {
                scene.open.fetch_add(1, Ordering::Relaxed);
            }
            Some(before) if scene.measuring.load(Ordering::Relaxed) => {
                seen.ways.push(way);
                seen.gaps.push((now - before).as_secs_f64() * 1e3);
            }
            Some(_) => {}
        }
    }
}

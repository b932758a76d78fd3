//! An open loop: requests are sent when they are due, not when the one before has been answered.
//!
//! A closed loop waits for a slow server and so doesn't see what waiting clients would. Here each of 48 connections has
//! its own random schedule (exponential gaps, so that together they are a Poisson process); a request that is due while
//! its connection is still busy counts from when it was due. One that is on time counts from when it was sent: how late
//! the operating system's timer woke the sender is no proxy's affair.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::REQUEST;
use super::proxies::Cores;

/// Connections, each with a thread.
pub(super) const CONNECTIONS: u32 = 48;

/// Sends chat requests at a rate and prints their times; run by `peers gateway` on a core of its own.
#[derive(Args)]
pub(crate) struct OpenLoop {
    address: SocketAddr,
    /// Requests a second.
    rate: f64,
    seconds: u64,
}

/// Times of answers, in microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// Requests a second that were answered.
    pub(crate) rate: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Runs [`OpenLoop`] in a process of its own, on the load's core.
pub(super) fn pinned(cores: &Cores, address: SocketAddr, rate: f64, seconds: u64) -> Result<Latency> {
    let own = std::env::current_exe().context("cannot find our own program")?;
    let mut command = cores.pinned(cores.load, own);
    command.args(["open-loop", &address.to_string(), &format!("{rate:.1}"), &seconds.to_string()]);
    let out = command.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let latency: Latency =
        serde_json::from_str(text.trim()).with_context(|| format!("the load printed {text}"))?;
    if latency.rate < 0.95 * rate {
        eprintln!("xtask: {address} answered {:.0} of {rate:.0} requests a second", latency.rate);
    }
    Ok(latency)
}

impl OpenLoop {
    /// Sends, waits, and prints one line of JSON.
    pub(crate) fn run(&self) -> Result<()> {
        let begin = Instant::now() + Duration::from_millis(200);
        let end = begin + Duration::from_secs(self.seconds);
        let gap = f64::from(CONNECTIONS) / self.rate;
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                let address = self.address;
                thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn(move || connection(address, number, begin, end, gap))
            })
            .collect::<Result<_, _>>()?;
        let mut times: Vec<f64> = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(own) => times.extend(own?),
                Err(_) => bail!("a connection's thread panicked"),
            }
        }
        times.sort_by(f64::total_cmp);
        let quantile = |share: f64| times.get(((times.len() as f64 * share) as usize).min(times.len() - 1));
        let (Some(p50), Some(p99)) = (quantile(0.5), quantile(0.99)) else { bail!("nothing was answered") };
        let rate = times.len() as f64 / self.seconds as f64;
        println!("{}", serde_json::to_string(&Latency { rate, p50: *p50, p99: *p99 })?);
        Ok(())
    }
}

fn connection(address: SocketAddr, number: u32, begin: Instant, end: Instant, gap: f64) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{REQUEST}",
        REQUEST.len()
    );
    let mut random = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let (mut due, mut times, mut buffer) = (begin, Vec::new(), vec![0; 16 << 10]);
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let uniform = ((random >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        due += Duration::from_secs_f64(-uniform.ln() * gap);
        if due >= end {
            return Ok(times);
        }
        let now = Instant::now();
        let from = if due > now {
            thread::sleep(due - now);
            Instant::now()
        } else {
            due
        };
        stream.write_all(request.as_bytes())?;
        answer(&mut stream, &mut buffer)?;
        times.push(from.elapsed().as_secs_f64() * 1e6);
    }
}

/// Reads one response, of a known length or in chunks.
fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    let mut have = 0;
    loop {
        let read = stream.read(&mut buffer[have..]).context("no answer in time")?;
        if read == 0 {
            bail!("the connection was closed");
        }
        have += read;
        let Some(head) = buffer[..have].windows(4).position(|at| at == b"\r\n\r\n") else { continue };
        let text = std::str::from_utf8(&buffer[..head])?.to_ascii_lowercase();
        if !text.starts_with("http/1.1 200") {
            bail!("the answer was {}", text.lines().next().unwrap_or_default());
        }
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
        let whole = match length {
            Some(length) => have >= head + 4 + length.trim().parse::<usize>()?,
            None => buffer[..have].ends_with(b"0\r\n\r\n"),
        };
        if whole {
            return Ok(());
        }
    }
}

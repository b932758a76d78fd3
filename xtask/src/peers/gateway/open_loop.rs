//! An open loop: requests are sent when they are due, not when the one before has been answered.
//!
//! A closed loop waits for a slow server and so doesn't see what waiting clients would. Here requests are due at random
//! moments (a Poisson process) and each takes a free one of 64 connections. One that finds none counts from when it was
//! due; one that finds one counts from when it was sent: how late the operating system's timer woke the sender is no
//! proxy's affair. One thread does it all, because it has the upstream for a neighbour on its core: with a thread a
//! connection, the upstream's answers wait until the scheduler gets round to them.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};
use serde::{Deserialize, Serialize};

use super::REQUEST;
use super::proxies::Cores;

/// Connections that requests are sent over.
pub(super) const CONNECTIONS: u32 = 64;

/// The timer among epoll's events.
const TIMER: u64 = u64::MAX;

/// What [`Latency::p99_window`] looks at.
pub(super) const WINDOW: Duration = Duration::from_millis(100);

/// Without any answer for so long, the proxy is dead.
const PATIENCE: Duration = Duration::from_secs(10);

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
    /// The 99th percentile of each [`WINDOW`], and of those the median: a virtual machine's core that stands still for
    /// ten milliseconds once a second makes up the whole of [`Latency::p99`], whatever is measured.
    pub(crate) p99_window: f64,
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

/// Moments of a Poisson process.
struct Schedule {
    next: Instant,
    end: Instant,
    /// Seconds between requests, on average.
    gap: f64,
    random: u64,
}

impl Schedule {
    /// The next moment, if it has come.
    fn due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.next;
        if due > now || due >= self.end {
            return None;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let uniform = ((self.random >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        self.next += Duration::from_secs_f64(-uniform.ln() * self.gap);
        Some(due)
    }
}

fn quantile(mut times: Vec<f64>, share: f64) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1))).copied()
}

/// A timer that rings once, at `moment` or at once if that has passed.
fn once(moment: Instant) -> Itimerspec {
    let rest = moment.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    Itimerspec {
        it_interval: zero,
        it_value: Timespec { tv_sec: rest.as_secs().cast_signed(), tv_nsec: rest.subsec_nanos().into() },
    }
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    have: usize,
    /// From when the request under way counts.
    from: Instant,
}

impl OpenLoop {
    /// Sends, waits, and prints one line of JSON.
    pub(crate) fn run(&self) -> Result<()> {
        let times = self.load()?;
        let mut windows: Vec<Vec<f64>> = Vec::new();
        for (moment, time) in &times {
            let window = (moment.as_nanos() / WINDOW.as_nanos()) as usize;
            windows.resize_with(windows.len().max(window + 1), Vec::new);
            windows[window].push(*time);
        }
        let within = windows.into_iter().filter_map(|window| quantile(window, 0.99)).collect();
        let all: Vec<f64> = times.into_iter().map(|(_, time)| time).collect();
        let rate = all.len() as f64 / self.seconds as f64;
        let (Some(p50), Some(p99), Some(p99_window)) =
            (quantile(all.clone(), 0.5), quantile(all, 0.99), quantile(within, 0.5))
        else {
            bail!("nothing was answered")
        };
        println!("{}", serde_json::to_string(&Latency { rate, p50, p99_window, p99 })?);
        Ok(())
    }

    /// When each request was sent or due, from the beginning, and the microseconds that it took.
    fn load(&self) -> Result<Vec<(Duration, f64)>> {
        // A timer is late by fifty microseconds unless one asks.
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{REQUEST}",
            self.address,
            REQUEST.len()
        );
        // A timer of its own, because what epoll waits by itself is whole milliseconds.
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&poll, &timer, epoll::EventData::new_u64(TIMER), edge)?;
        let begin = Instant::now() + Duration::from_millis(200);
        let mut connections = Vec::new();
        for number in 0..u64::from(CONNECTIONS) {
            let stream = TcpStream::connect(self.address)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll::add(&poll, &stream, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?;
            connections.push(Connection { stream, buffer: vec![0; 16 << 10], have: 0, from: begin });
        }
        let mut schedule = Schedule {
            next: begin,
            end: begin + Duration::from_secs(self.seconds),
            gap: 1.0 / self.rate,
            random: 0x9e37_79b9_7f4a_7c15,
        };
        let mut free: Vec<usize> = (0..connections.len()).collect();
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let mut times = Vec::new();
        let mut events = Vec::with_capacity(connections.len());
        loop {
            while let Some(due) = schedule.due(Instant::now()) {
                if let Some(index) = free.pop() {
                    connections[index].send(&request, Instant::now())?;
                } else {
                    waiting.push_back(due);
                }
            }
            if schedule.next >= schedule.end && free.len() == connections.len() {
                return Ok(times);
            }
            if schedule.next < schedule.end {
                timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once(schedule.next))?;
            }
            events.clear();
            let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
            match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&patience)) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            if events.is_empty() {
                bail!("{} gave no answer for {} s", self.address, PATIENCE.as_secs());
            }
            for event in &events {
                if event.data.u64() == TIMER {
                    continue;
                }
                let index = event.data.u64() as usize;
                if !connections[index].answered()? {
                    continue;
                }
                let from = connections[index].from;
                times.push((from.saturating_duration_since(begin), from.elapsed().as_secs_f64() * 1e6));
                match waiting.pop_front() {
                    Some(due) => connections[index].send(&request, due)?,
                    None => free.push(index),
                }
            }
        }
    }
}

impl Connection {
    /// The request is small and the connection idle: what doesn't fit its buffer at once is an error.
    fn send(&mut self, request: &str, from: Instant) -> Result<()> {
        self.from = from;
        self.have = 0;
        let written = self.stream.write(request.as_bytes()).context("cannot send")?;
        if written < request.len() {
            bail!("the connection took {written} of {} bytes", request.len());
        }
        Ok(())
    }

    /// Reads what there is; true if the response, of a known length or in chunks, is whole.
    fn answered(&mut self) -> Result<bool> {
        let read = match self.stream.read(&mut self.buffer[self.have..]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            other => other?,
        };
        if read == 0 {
            bail!("the connection was closed");
        }
        self.have += read;
        let have = &self.buffer[..self.have];
        let Some(head) = have.windows(4).position(|at| at == b"\r\n\r\n") else { return Ok(false) };
        let text = std::str::from_utf8(&have[..head])?;
        let mut lines = text.lines();
        let status = lines.next().unwrap_or_default();
        if !status.starts_with("HTTP/1.1 200") {
            bail!("the answer was {status}");
        }
        let length = lines.find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then_some(value)
        });
        Ok(match length {
            Some(length) => have.len() >= head + 4 + length.trim().parse::<usize>()?,
            None => have.ends_with(b"0\r\n\r\n"),
        })
    }
}

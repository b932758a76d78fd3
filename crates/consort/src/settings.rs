//! Arguments that several subcommands share.

use anyhow::Result;
use clap::Args;
use consort_inference::EngineOptions;
use consort_tensor::{Cpu, Family, Pool};

use crate::cli::UsageError;

/// How the machine is used.
#[derive(Args, Clone, Debug)]
pub(crate) struct Compute {
    /// Compute threads [default: one a core this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Kernels: scalar, avx2, avx512 or neon [default: the widest this machine runs]
    #[arg(long, value_name = "FAMILY", value_parser = family)]
    pub(crate) kernels: Option<Family>,
}

/// How the engine runs.
#[derive(Args, Clone, Debug)]
pub(crate) struct Engine {
    /// Longest sequence in tokens, prompt and answer together [default: the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(16..))]
    pub(crate) ctx: Option<u32>,
    /// Memory for keys and values, like 512M or 2G [default: fits the machine]
    #[arg(long, value_name = "BYTES", value_parser = byte_count)]
    pub(crate) kv_bytes: Option<usize>,
    /// Requests that run at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_running: u32,
    /// Requests that may wait; one more is refused with 429
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(crate) max_queued: u32,
    /// Compute every prompt anew instead of reusing what an earlier one had in common
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
    /// Tokens that an answer may still get when the server is told to stop, before another replica continues it
    /// [default: as many as it has time for]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(crate) drain_tokens: Option<u32>,
}

impl Compute {
    /// The pool these arguments describe.
    pub(crate) fn pool(&self) -> Result<Pool> {
        let cpu = match self.kernels {
            Some(family) => Cpu::force(family).map_err(|e| UsageError(e.to_string()))?,
            None => Cpu::detect(),
        };
        let threads = match self.threads {
            Some(n) => usize::from(n),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        Ok(Pool::new(threads, cpu))
    }
}

impl Engine {
    /// The engine's options these arguments describe.
    pub(crate) fn options(&self) -> EngineOptions {
        EngineOptions {
            kv_bytes: self.kv_bytes,
            max_context: self.ctx.map(|n| n as usize),
            max_running: self.max_running as usize,
            max_queued: self.max_queued as usize,
            prefix_cache: !self.no_prefix_cache,
            drain_tokens: self.drain_tokens.map(|n| n as usize),
            ..EngineOptions::default()
        }
    }
}

fn family(name: &str) -> Result<Family, String> {
    Family::from_name(name).ok_or_else(|| {
        let here: Vec<_> = Cpu::available().iter().map(|f| f.name()).collect();
        format!("this machine runs {}", here.join(", "))
    })
}

/// `500ms`, `30s`, `5m`, `1h`.
pub(crate) fn time(text: &str) -> Result<std::time::Duration, String> {
    let read = consort_control::config::parse_duration(text);
    read.ok_or_else(|| "write it with its unit, like 500ms, 30s, 5m or 1h".to_owned())
}

/// `1048576`, `512M`, `2G`, `1.5GiB`: powers of 1024, as memory is counted.
pub(crate) fn byte_count(text: &str) -> Result<usize, String> {
    const SHAPE: &str = "write a number of bytes, or one with K, M or G, like 512M";
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (number, factor) = match digits.char_indices().last() {
        Some((i, 'k')) => (&digits[..i], 1u64 << 10),
        Some((i, 'm')) => (&digits[..i], 1 << 20),
        Some((i, 'g')) => (&digits[..i], 1 << 30),
        _ => (digits, 1),
    };
    let value: f64 = number.parse().map_err(|_| SHAPE.to_string())?;
    let bytes = value * factor as f64;
    if !(bytes >= 1.0 && bytes < (1u64 << 50) as f64) {
        return Err(SHAPE.into());
    }
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_read() {
        assert_eq!(byte_count("512M"), Ok(512 << 20));
        assert_eq!(byte_count("1.5GiB"), Ok(3 << 29));
        assert_eq!(byte_count("4096"), Ok(4096));
        for bad in ["", "M", "-1", "nan", "inf", "1e30", "ten", "0"] {
            assert!(byte_count(bad).is_err(), "{bad}");
        }
    }
}

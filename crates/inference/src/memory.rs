//! How many cache blocks an engine gets.

use consort_model::{Error, Model};
use consort_tensor::kv::BLOCK_TOKENS;

use crate::engine::EngineOptions;

/// Full contexts that the default cache has room for.
const CONTEXTS: usize = 8;

/// Taken where the system doesn't say how much memory it has.
const ASSUMED_BYTES: usize = 8 << 30;

/// Blocks for this model under these options. Memory is touched only as blocks are used.
///
/// # Errors
/// [`Error::Batch`] where `kv_bytes` doesn't hold a single block.
pub(crate) fn cache_blocks(model: &Model, options: &EngineOptions) -> Result<usize, Error> {
    let block_bytes = model.kv_shape().block_bytes().max(1);
    let context = options.max_context.unwrap_or(usize::MAX).min(model.config().max_context);
    let wanted = context.div_ceil(BLOCK_TOKENS).saturating_mul(CONTEXTS);
    let blocks = match options.kv_bytes {
        Some(bytes) => bytes / block_bytes,
        None => wanted.min(memory_bytes() / 4 / block_bytes),
    };
    if blocks == 0 {
        let bytes = options.kv_bytes.unwrap_or(memory_bytes() / 4);
        let reason = format!("{bytes} bytes of cache hold no block; one takes {block_bytes} bytes");
        return Err(Error::Batch { reason });
    }
    // Block ids are 32 bits, and more than the contexts of all sequences is never used.
    Ok(blocks.min(u32::MAX as usize))
}

/// The memory that a process may use: the machine's, or its control group's limit if that is less; `None` where the
/// system doesn't say.
pub fn machine_memory() -> Option<usize> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_of(&text));
    let group = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok());
    match (machine, group) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

fn memory_bytes() -> usize {
    machine_memory().unwrap_or(ASSUMED_BYTES)
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn total_of(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_total() {
        assert_eq!(total_of("MemFree: 1 kB\nMemTotal:       25165824 kB\n"), Some(24 << 30));
        assert_eq!(total_of("MemTotal: many"), None);
        assert!(memory_bytes() > 0);
    }
}

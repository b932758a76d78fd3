//! What the tests of several kernels share.

use crate::{Cpu, Pool};

/// `len` values in −0.5..0.5, from a seed.
pub(crate) fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

/// To compare exactly, signs of zero included.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Every kernel family of this machine.
pub(crate) fn cpus() -> impl Iterator<Item = Cpu> {
    Cpu::available().into_iter().filter_map(|family| Cpu::force(family).ok())
}

/// Pools of one and of two threads with every kernel family of this machine.
pub(crate) fn pools() -> impl Iterator<Item = Pool> {
    cpus().flat_map(|cpu| [Pool::new(1, cpu), Pool::new(2, cpu)])
}

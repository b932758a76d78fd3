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

/// Compares `gradient`, that of `loss` by input number `which`, with central differences at 40 places spread over it.
/// `tolerance` is relative to the gradient's largest magnitude.
pub(crate) fn assert_gradient(
    inputs: &[&[f32]],
    which: usize,
    gradient: &[f32],
    tolerance: f64,
    loss: impl Fn(&[Vec<f64>]) -> f64,
) {
    let mut values: Vec<Vec<f64>> =
        inputs.iter().map(|x| x.iter().map(|&x| f64::from(x)).collect()).collect();
    let largest = gradient.iter().fold(0.0f64, |m, &g| m.max(f64::from(g).abs()));
    assert!(largest > 0.0 && gradient.iter().all(|g| g.is_finite()));
    let places = gradient.len().min(40);
    for place in 0..places {
        let index = (place * gradient.len() / places + place % gradient.len().div_ceil(places))
            .min(gradient.len() - 1);
        let (x, h) = (values[which][index], 1e-4);
        values[which][index] = x + h;
        let above = loss(&values);
        values[which][index] = x - h;
        let below = loss(&values);
        values[which][index] = x;
        let want = (above - below) / (2.0 * h);
        let got = f64::from(gradient[index]);
        assert!((got - want).abs() <= tolerance * largest, "input {which}, value {index}: {got}, not {want}");
    }
}

//! Rotary position embedding (Su et al. 2021), in the half-split ("NeoX") layout.
//!
//! Weights whose file interleaves the pairs (GGUF's `llama` and `mistral`) are permuted when they are loaded,
//! so that one layout runs.

use crate::Pool;

/// Cosines and sines for positions `0..len`, computed in `f64` once, grown on demand.
pub struct Rope {
    _private: (),
}

impl Rope {
    /// `inverse_frequencies` has one value a pair (`rotary_dim / 2`); `magnitude` scales both tables (YaRN, else 1).
    pub fn new(inverse_frequencies: Vec<f64>, magnitude: f64) -> Rope {
        let _ = (inverse_frequencies, magnitude);
        todo!()
    }

    /// Rotates every head of every row of `x` (`positions.len()` rows of `heads * head_dim` values) in place.
    pub fn apply(&self, pool: &Pool, x: &mut [f32], heads: usize, head_dim: usize, positions: &[u32]) {
        let _ = (pool, x, heads, head_dim, positions);
        todo!()
    }
}

//! Matrix products of packed weights with rows of activations.

use crate::Pool;
use crate::activation::Activation;
use crate::matrix::{GatedMatrix, InputKind, Matrix};

/// Input rows in the form the weights want: made once, used by every matrix that reads them.
#[derive(Default)]
pub struct Inputs {}

impl Inputs {
    /// Empty; grows to its first use and keeps its memory.
    pub fn new() -> Inputs {
        Inputs::default()
    }

    /// Turns `x` (`n` rows of `cols` values) into `kind`.
    pub fn prepare(&mut self, pool: &Pool, x: &[f32], cols: usize, kind: InputKind) {
        let _ = (pool, x, cols, kind);
        todo!()
    }

    /// RMS norm and preparation in one pass: as [`crate::norm::rms_norm`] into a temporary, then [`Inputs::prepare`].
    pub fn prepare_normed(&mut self, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, kind: InputKind) {
        let _ = (pool, x, weight, eps, kind);
        todo!()
    }
}

/// One product of a [`linear`] call.
pub struct Product<'a> {
    /// The weights, `rows` by `cols`.
    pub weights: &'a Matrix,
    /// Added to each output row, if any (`rows` values).
    pub bias: Option<&'a [f32]>,
    /// `n` rows of `rows` values.
    pub out: &'a mut [f32],
    /// Adds to `out` instead of replacing it (the residual stream).
    pub accumulate: bool,
}

/// `out = weights · x (+ bias) (+ out)` for several matrices that read the same inputs, in one fork and join.
///
/// # Panics
/// If a shape doesn't fit or `x` was prepared for another kind.
pub fn linear(pool: &Pool, x: &Inputs, products: &mut [Product<'_>]) {
    let _ = (pool, x, products);
    todo!()
}

/// `out = activation(gate · x) * (up · x)`, `n` rows of `rows` values.
pub fn gated(pool: &Pool, x: &Inputs, weights: &GatedMatrix, activation: Activation, out: &mut [f32]) {
    let _ = (pool, x, weights, activation, out);
    todo!()
}

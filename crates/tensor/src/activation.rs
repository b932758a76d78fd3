//! Point-wise non-linearities, built on one exponential so that every kernel family gives the same bits.

use crate::lanes::{LANES, Lanes, Scalar};

/// The gate's non-linearity in a gated feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)` (SwiGLU).
    Silu,
    /// The tanh approximation of GELU (GeGLU, Gemma).
    GeluTanh,
}

impl Activation {
    /// Of one value: the same bits as any lane of the vector kernels.
    pub fn apply(self, x: f32) -> f32 {
        self.apply_lanes(Scalar, [x; LANES])[0]
    }

    /// Of sixteen values.
    #[inline(always)]
    pub(crate) fn apply_lanes<L: Lanes>(self, lanes: L, x: L::V) -> L::V {
        match self {
            Activation::Silu => lanes.silu(x),
            Activation::GeluTanh => lanes.gelu_tanh(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert!((Activation::Silu.apply(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!((Activation::GeluTanh.apply(1.0) - 0.841_192).abs() < 1e-6);
        assert_eq!(Activation::Silu.apply(0.0), 0.0);
    }
}

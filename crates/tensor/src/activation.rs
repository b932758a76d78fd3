//! Point-wise non-linearities.

/// The gate's non-linearity in a gated feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)` (SwiGLU).
    Silu,
    /// The tanh approximation of GELU (GeGLU, Gemma).
    GeluTanh,
}

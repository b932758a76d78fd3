//! RMS normalization (Zhang & Sennrich 2019).

use crate::Pool;

/// `out[i] = x[i] / sqrt(mean(x²) + eps) * weight`, for rows of `weight.len()` values.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let _ = (pool, x, weight, eps, out);
    todo!()
}

/// The same in place (per-head query and key norms, Gemma's post-norms).
pub fn rms_norm_in_place(pool: &Pool, x: &mut [f32], weight: &[f32], eps: f32) {
    let _ = (pool, x, weight, eps);
    todo!()
}

/// `x += rms_norm(y)`: Gemma's norm after a block, added to the residual stream.
pub fn add_rms_norm(pool: &Pool, x: &mut [f32], y: &[f32], weight: &[f32], eps: f32) {
    let _ = (pool, x, y, weight, eps);
    todo!()
}

//! The block formats: how each turns into `f32`. Plain code, and the reference for every packed kernel.

use crate::DType;

/// Turns `out.len()` values of `dtype` stored in `bytes` into `f32`. Exact: each value is the format's own formula in `f32`.
///
/// # Panics
/// If `bytes` is not exactly `dtype.bytes(out.len())` long.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let _ = (dtype, bytes, out);
    todo!()
}

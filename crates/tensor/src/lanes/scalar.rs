//! Sixteen lanes in plain Rust: the specification, and what compilers turn into NEON on 64-bit Arm.

use half::f16;

use super::{LANES, Lanes};

/// Runs everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Lanes for Scalar {
    type V = [f32; LANES];
    type Pairs = [u32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..LANES];
        std::array::from_fn(|i| x[i])
    }

    #[inline(always)]
    fn load_first(self, x: &[f32], n: usize) -> Self::V {
        let x = &x[..n];
        std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0))
    }

    #[inline(always)]
    fn load_half(self, x: &[u16]) -> Self::V {
        let x = &x[..LANES];
        std::array::from_fn(|i| f16::from_bits(x[i]).to_f32())
    }

    #[inline(always)]
    unsafe fn load_at(self, x: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { x.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_half_at(self, x: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        self.load_half(unsafe { std::slice::from_raw_parts(x, LANES) })
    }

    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32]) {
        out[..LANES].copy_from_slice(&v);
    }

    #[inline(always)]
    fn store_first(self, v: Self::V, out: &mut [f32], n: usize) {
        out[..n].copy_from_slice(&v[..n]);
    }

    #[inline(always)]
    fn store_half(self, v: Self::V, out: &mut [u16]) {
        for (out, v) in out[..LANES].iter_mut().zip(v) {
            *out = f16::from_f32(v).to_bits();
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        a.map(f32::sqrt)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V {
        // In two factors, since 2¹²⁸ is no `f32`; both products are exact for a result in range.
        let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        zip(a, n, |a, n| {
            let n = n as i32;
            a * power(n >> 1) * power(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn where_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn nan_to_zero(self, a: Self::V) -> Self::V {
        a.map(|a| if a.is_nan() { 0.0 } else { a })
    }

    #[inline(always)]
    fn largest_magnitude(self, a: Self::V, b: Self::V) -> f32 {
        // As bits, magnitudes are in the order wanted.
        f32::from_bits(a.iter().chain(&b).fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)))
    }

    #[inline(always)]
    fn store_bytes(self, a: Self::V, out: &mut [i8]) {
        for (out, a) in out[..LANES].iter_mut().zip(a) {
            *out = a as i8;
        }
    }

    #[inline(always)]
    unsafe fn load_pairs_at(self, x: *const u32) -> [u32; LANES] {
        // SAFETY: the caller's promise.
        unsafe { x.cast::<[u32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    fn splat_pair(self, x: u32) -> [u32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn dot_pairs(self, a: [u32; LANES], b: [u32; LANES], sum: Self::V) -> Self::V {
        let odd = |x: u32| f32::from_bits(x & 0xFFFF_0000);
        let even = |x: u32| f32::from_bits(x << 16);
        std::array::from_fn(|i| even(a[i]).mul_add(even(b[i]), odd(a[i]).mul_add(odd(b[i]), sum[i])))
    }

    #[inline(always)]
    fn array(self, a: Self::V) -> [f32; LANES] {
        a
    }
}

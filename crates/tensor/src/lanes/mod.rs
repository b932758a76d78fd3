//! Sixteen `f32` lanes: the one vector that every float kernel of this crate is written in.
//!
//! A kernel is one generic function over [`Lanes`]; each family instantiates it with its own registers (one
//! AVX-512 register, two AVX2 registers, or an array that the compiler vectorises as it can, which on 64-bit Arm
//! means NEON). Because the number of lanes and the order of operations are part of the source, and every
//! operation here is a correctly rounded IEEE one, all families give the same bits.
//!
//! A `Lanes` value is a token: it exists only where the machine has the instructions, so its methods are safe.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use crate::{Cpu, Family};

pub(crate) use scalar::Scalar;

/// Lanes of a vector, in every family.
pub(crate) const LANES: usize = 16;

/// Operations on vectors of [`LANES`] `f32` values. Each lane is computed alone and rounded once.
pub(crate) trait Lanes: Copy {
    /// The vector.
    type V: Copy;

    /// Sixteen pairs of bf16 numbers: the even one of a pair in the lower half of 32 bits.
    type Pairs: Copy;

    /// There are 32 registers of a whole vector each, so kernels keep large tiles in them.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    /// The first [`LANES`] values of `x`.
    fn load(self, x: &[f32]) -> Self::V;
    /// `x[..n]` in the first lanes, 0 in the others; `n` at most [`LANES`] and `x.len()`.
    fn load_first(self, x: &[f32], n: usize) -> Self::V;
    /// The first [`LANES`] half-precision values of `x`, exactly.
    fn load_half(self, x: &[u16]) -> Self::V;
    /// As [`Lanes::load`], for inner loops that have checked their bounds.
    ///
    /// # Safety
    /// [`LANES`] values can be read at `x`.
    unsafe fn load_at(self, x: *const f32) -> Self::V;
    /// As [`Lanes::load_half`], for inner loops that have checked their bounds.
    ///
    /// # Safety
    /// [`LANES`] values can be read at `x`.
    unsafe fn load_half_at(self, x: *const u16) -> Self::V;
    /// Into the first [`LANES`] places of `out`.
    fn store(self, v: Self::V, out: &mut [f32]);
    /// The first `n` lanes into `out[..n]`; `n` at most [`LANES`] and `out.len()`.
    fn store_first(self, v: Self::V, out: &mut [f32], n: usize);
    /// Rounded to half precision (nearest, ties to even) into the first [`LANES`] places of `out`.
    fn store_half(self, v: Self::V, out: &mut [u16]);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `a · 2ⁿ` for whole `n` in −126..=128 and `a` in 0.5..2; infinite past the range. Other input gives any value.
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V;
    /// `yes` where `a < b`, else `no` (also for NaN).
    fn where_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `a`, with 0 in place of NaN.
    fn nan_to_zero(self, a: Self::V) -> Self::V;
    /// The largest magnitude of both; an infinity is above all numbers, a NaN above it.
    fn largest_magnitude(self, a: Self::V, b: Self::V) -> f32;
    /// Whole numbers in −128..=127 as bytes into the first [`LANES`] places of `out`.
    fn store_bytes(self, a: Self::V, out: &mut [i8]);
    /// The lanes as an array.
    fn array(self, a: Self::V) -> [f32; LANES];

    /// Sixteen pairs, for inner loops that have checked their bounds.
    ///
    /// # Safety
    /// [`LANES`] words can be read at `x`.
    unsafe fn load_pairs_at(self, x: *const u32) -> Self::Pairs;
    /// One pair in all lanes.
    fn splat_pair(self, x: u32) -> Self::Pairs;
    /// `sum + a.odd · b.odd`, then `+ a.even · b.even`, each rounded once. AVX-512 may round the two together and
    /// takes subnormal numbers for 0: its own numerics.
    fn dot_pairs(self, a: Self::Pairs, b: Self::Pairs, sum: Self::V) -> Self::V;
    /// `2 · LANES` consecutive values as pairs of neighbours, rounded to nearest even, subnormal ones to 0.
    ///
    /// # Safety
    /// As many values can be read at `x`, and [`LANES`] words written at `out`.
    #[inline(always)]
    unsafe fn round_neighbours_at(self, x: *const f32, out: *mut u32) {
        for lane in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe { out.add(lane).write(bf16_pair(*x.add(2 * lane), *x.add(2 * lane + 1))) };
        }
    }
    /// Pairs of one value of `even` and one of `odd`, rounded likewise.
    ///
    /// # Safety
    /// [`LANES`] values can be read at each, and as many words written at `out`.
    #[inline(always)]
    unsafe fn round_rows_at(self, even: *const f32, odd: *const f32, out: *mut u32) {
        for lane in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe { out.add(lane).write(bf16_pair(*even.add(lane), *odd.add(lane))) };
        }
    }
    /// Turns a square of `LANES × LANES` words: row *i* at `x + i · stride` becomes column *i* of `out`.
    ///
    /// # Safety
    /// The square can be read at `x` and written at `out`, with these strides.
    #[inline(always)]
    unsafe fn transpose_at(self, x: *const u32, stride: usize, out: *mut u32, out_stride: usize) {
        for row in 0..LANES {
            for col in 0..LANES {
                // SAFETY: the caller's promise.
                unsafe { out.add(col * out_stride + row).write(*x.add(row * stride + col)) };
            }
        }
    }

    /// Lane 0 + lane 8, 1 + 9, …; then the same with halves of the halves: one fixed tree.
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        let mut x = self.array(a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }

    /// The largest lane (no NaN among them).
    #[inline(always)]
    fn largest(self, a: Self::V) -> f32 {
        let mut x = self.array(a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] = if x[i] > x[i + half] { x[i] } else { x[i + half] };
            }
        }
        x[0]
    }

    /// `eˣ` to within an ulp: 0 below −87, infinite past `f32`'s range, NaN for NaN.
    ///
    /// Cody and Waite's reduction to |r| ≤ ln 2 / 2, then 1 + r + r²·q(r) with q fitted to the least largest
    /// relative error (3·10⁻⁹ before rounding).
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let s = |c| self.splat(c);
        let bounded = self.min(s(89.0), self.max(s(-87.0), x));
        let n = self.round(self.mul(bounded, s(std::f32::consts::LOG2_E)));
        let r = self.fma(n, s(-0.693_145_75), bounded);
        let r = self.fma(n, s(-1.428_606_8e-6), r);
        let mut p = s(0.001_381_459_8);
        for c in [0.008_368_717, 0.041_668_39, 0.166_665_2, 0.499_999_93, 1.0, 1.0] {
            p = self.fma(p, r, s(c));
        }
        let e = self.scale_by_power(p, n);
        self.where_less(x, s(-87.0), s(0.0), e)
    }

    /// `2ˣ` for `x` of 0 or less, to within an ulp: 0 below −125. NaN gives NaN, other input any value.
    ///
    /// For the softmax, which can fold log₂ e into its scale: a third fewer operations than [`Lanes::exp`].
    #[inline(always)]
    fn exp2_below_one(self, x: Self::V) -> Self::V {
        let s = |c| self.splat(c);
        let n = self.round(x);
        let r = self.sub(x, n);
        let mut p = s(1.532_431_5e-4);
        for c in [0.001_339_095_9, 0.009_618_518, 0.055_503_596, 0.240_226_48, std::f32::consts::LN_2, 1.0] {
            p = self.fma(p, r, s(c));
        }
        self.where_less(x, s(-125.0), s(0.0), self.scale_by_power(p, n))
    }

    /// `x · sigmoid(x)`.
    #[inline(always)]
    fn silu(self, x: Self::V) -> Self::V {
        let e = self.exp(self.sub(self.splat(0.0), x));
        self.div(x, self.add(self.splat(1.0), e))
    }

    /// The tanh approximation of GELU, as `x · sigmoid(2·√(2/π)·(x + 0.044715·x³))`, which is the same function.
    #[inline(always)]
    fn gelu_tanh(self, x: Self::V) -> Self::V {
        let square = self.mul(x, x);
        let inner = self.fma(square, self.splat(-0.071_354_814), self.splat(-1.595_769));
        let e = self.exp(self.mul(inner, x));
        self.div(x, self.add(self.splat(1.0), e))
    }

    /// Hyperbolic tangent, absolute error below 2·10⁻⁷.
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let e = self.exp(self.add(x, x));
        let one = self.splat(1.0);
        self.sub(one, self.div(self.splat(2.0), self.add(e, one)))
    }
}

/// Two values as bf16 in one word, the first in the lower half: to nearest even, subnormal values to 0, NaN to NaN.
#[inline(always)]
pub(crate) fn bf16_pair(even: f32, odd: f32) -> u32 {
    bf16_bits(even) | bf16_bits(odd) << 16
}

#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    if magnitude > 0x7F80_0000 {
        bits >> 16 | 0x40
    } else if magnitude < 0x0080_0000 {
        bits >> 16 & 0x8000
    } else {
        rounded
    }
}

/// A kernel that [`dispatch`] instantiates for a family. `call` must be `#[inline(always)]`, and so must all that
/// it calls with the token, or the family's instructions are not used inside.
pub(crate) trait Kernel {
    type Output;

    fn call<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Asks for the line at `at` to write to it; any address is allowed.
#[inline(always)]
pub(crate) fn prefetch_write<T>(at: *const T) {
    // SAFETY: a hint; it faults on no address, and a processor that doesn't know it does nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the line at `at`, to read it soon.
#[inline(always)]
pub(crate) fn prefetch_read<T>(at: *const T) {
    // SAFETY: a hint; it faults on no address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the line at `at` into the second-level cache, to read it later.
#[inline(always)]
pub(crate) fn prefetch_second<T>(at: *const T) {
    // SAFETY: a hint; it faults on no address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Runs `kernel` with this machine's lanes.
#[inline]
pub(crate) fn dispatch<K: Kernel>(cpu: Cpu, kernel: K) -> K::Output {
    match cpu.family() {
        #[cfg(target_arch = "x86_64")]
        Family::Avx512 => {
            // SAFETY: a `Cpu` of this family exists only where its instructions do.
            unsafe { avx512::enter(kernel) }
        }
        #[cfg(target_arch = "x86_64")]
        Family::Avx2 => {
            // SAFETY: as above.
            unsafe { avx2::enter(kernel) }
        }
        _ => kernel.call(Scalar),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every lane operation on one set of operands, as bits.
    struct Everything<'a>(&'a [f32; 16], &'a [f32; 16], &'a [f32; 16]);

    impl Kernel for Everything<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn call<L: Lanes>(self, l: L) -> Vec<u32> {
            let (a, b, c) = (l.load(self.0), l.load(self.1), l.load(self.2));
            let mut half = [0u16; 16];
            l.store_half(c, &mut half);
            let mut part = [7.0; 16];
            l.store_first(a, &mut part, 5);
            let rows = [
                l.add(a, b),
                l.sub(a, b),
                l.mul(a, b),
                l.div(a, b),
                l.fma(a, b, c),
                l.sqrt(a),
                l.max(a, b),
                l.min(a, b),
                l.round(a),
                l.where_less(a, b, c, a),
                l.nan_to_zero(l.div(l.sub(a, a), l.sub(b, b))),
                l.exp(a),
                l.exp2_below_one(l.min(a, l.splat(0.0))),
                l.silu(a),
                l.gelu_tanh(a),
                l.tanh(a),
                l.load_half(&half),
                l.load_first(self.0, 9),
                l.load(&part),
                l.splat(l.sum(a)),
                l.splat(l.largest(a)),
            ];
            rows.into_iter().flat_map(|v| l.array(v).map(f32::to_bits)).collect()
        }
    }

    #[test]
    fn families_agree_bit_for_bit() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        for scale in [1e-30f32, 1e-3, 1.0, 10.0, 180.0, 1e6, 1e30] {
            for _ in 0..50 {
                let mut row = || std::array::from_fn::<f32, 16, _>(|_| uniform() * scale);
                let (a, b, c) = (row(), row(), row());
                let expected = Everything(&a, &b, &c).call(Scalar);
                for family in Cpu::available() {
                    let got = dispatch(Cpu::force(family).unwrap(), Everything(&a, &b, &c));
                    for (i, (e, g)) in expected.iter().zip(&got).enumerate() {
                        let nan = f32::from_bits(*e).is_nan() && f32::from_bits(*g).is_nan();
                        assert!(e == g || nan, "{} row {} lane {}", family.name(), i / 16, i % 16);
                    }
                }
            }
        }
    }

    struct One<F>(f32, F);

    trait Function {
        fn at<L: Lanes>(&self, l: L, x: L::V) -> L::V;
    }

    impl<F: Function> Kernel for One<F> {
        type Output = f32;

        #[inline(always)]
        fn call<L: Lanes>(self, l: L) -> f32 {
            l.array(self.1.at(l, l.splat(self.0)))[3]
        }
    }

    macro_rules! function {
        ($name:ident, $method:ident) => {
            struct $name;
            impl Function for $name {
                #[inline(always)]
                fn at<L: Lanes>(&self, l: L, x: L::V) -> L::V {
                    l.$method(x)
                }
            }
        };
    }
    function!(Exp, exp);
    function!(Exp2, exp2_below_one);
    function!(Silu, silu);
    function!(Gelu, gelu_tanh);
    function!(Tanh, tanh);

    #[test]
    fn exp_is_within_an_ulp_and_right_at_its_ends() {
        let exp = |x| dispatch(Cpu::detect(), One(x, Exp));
        for i in -870_000..887_200 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            assert!((f64::from(exp(x)) - exact).abs() <= ulp, "exp({x}) = {} not {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-87.01), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_below_one_is_within_an_ulp_and_right_at_its_ends() {
        for i in 0..1_250_000 {
            let x = i as f32 * -1e-4;
            let (exact, got) = (f64::from(x).exp2(), dispatch(Cpu::detect(), One(x, Exp2)));
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            assert!((f64::from(got) - exact).abs() <= ulp, "2^{x} = {got} not {exact}");
        }
        for family in Cpu::available() {
            let exp2 = |x| dispatch(Cpu::force(family).unwrap(), One(x, Exp2));
            assert_eq!(exp2(0.0), 1.0);
            assert!(
                [-125.1, -1e4, -1e10, f32::MIN, f32::NEG_INFINITY].iter().all(|&x| exp2(x).to_bits() == 0)
            );
            assert!(exp2(f32::NAN).is_nan());
        }
    }

    #[test]
    fn activations_agree_with_f64() {
        for family in [Cpu::detect(), Cpu::force(Family::Scalar).unwrap()] {
            for i in -4000..4000 {
                let x = i as f32 * 0.01;
                let wide = f64::from(x);
                let silu = wide / (1.0 + (-wide).exp());
                let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
                let gelu = 0.5 * wide * (1.0 + u.tanh());
                for (got, want) in [
                    (dispatch(family, One(x, Silu)), silu),
                    (dispatch(family, One(x, Gelu)), gelu),
                    (dispatch(family, One(x, Tanh)), wide.tanh()),
                ] {
                    assert!((f64::from(got) - want).abs() <= 4e-7 * want.abs().max(1.0), "{x}: {got} {want}");
                }
            }
        }
        for (x, want) in [(-1e30, 0.0), (1e30, 1e30), (f32::INFINITY, f32::INFINITY)] {
            assert_eq!(dispatch(Cpu::detect(), One(x, Silu)), want);
            assert_eq!(dispatch(Cpu::detect(), One(x, Gelu)), want);
        }
    }
}

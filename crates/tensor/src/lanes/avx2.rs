//! Sixteen lanes in two AVX2 registers.
//!
//! Each block below is sound for one reason: an [`Avx2`] value is made only by [`enter`], whose caller vouches
//! for the instructions, and slices are cut to length before their pointer is taken.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes};

/// Proof of AVX2, FMA and F16C, made by [`enter`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

type Pair = (__m256, __m256);

/// Runs `kernel` with these lanes.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.call(Avx2(()))
}

macro_rules! lanewise {
    ($($name:ident($($a:ident),+) = $body:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($a: Pair),+) -> Pair {
            // SAFETY: `self` proves the instructions; registers only.
            unsafe {
                (
                    { $(let $a = $a.0;)+ $body },
                    { $(let $a = $a.1;)+ $body },
                )
            }
        }
    )+};
}

/// 2ⁿ for whole `n` in −126..=127.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn power(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

/// The bits of `a` that are also in `bits`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn and(a: __m256, bits: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(a), bits)
}

/// Eight lanes of [`Lanes::dot_pairs`].
#[inline(always)]
fn dot_half(_proof: Avx2, a: __m256i, b: __m256i, sum: __m256) -> __m256 {
    // SAFETY: the token proves the instructions; registers only.
    unsafe {
        let upper = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
        let odd = |x| _mm256_castsi256_ps(_mm256_and_si256(x, upper));
        let even = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
        _mm256_fmadd_ps(even(a), even(b), _mm256_fmadd_ps(odd(a), odd(b), sum))
    }
}

impl Lanes for Avx2 {
    type V = Pair;
    type Pairs = (__m256i, __m256i);

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `self` proves the instructions.
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> Pair {
        let x = &x[..LANES];
        // SAFETY: `self` proves the instructions; 16 values are there.
        unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn load_first(self, x: &[f32], n: usize) -> Pair {
        let mut full = [0.0; LANES];
        full[..n].copy_from_slice(&x[..n]);
        self.load(&full)
    }

    #[inline(always)]
    fn load_half(self, x: &[u16]) -> Pair {
        let x = &x[..LANES];
        // SAFETY: `self` proves the instructions; 16 values are there.
        unsafe {
            let low = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_loadu_si128(x.as_ptr().add(8).cast());
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_at(self, x: *const f32) -> Pair {
        // SAFETY: `self` proves the instructions; the caller promises the values.
        unsafe { (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_half_at(self, x: *const u16) -> Pair {
        // SAFETY: `self` proves the instructions; the caller promises the values.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.cast()), _mm_loadu_si128(x.add(8).cast()));
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    fn store(self, v: Pair, out: &mut [f32]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 values.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
        }
    }

    #[inline(always)]
    fn store_first(self, v: Pair, out: &mut [f32], n: usize) {
        out[..n].copy_from_slice(&self.array(v)[..n]);
    }

    #[inline(always)]
    fn store_half(self, v: Pair, out: &mut [u16]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 values.
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1);
            _mm_storeu_si128(out.as_mut_ptr().cast(), low);
            _mm_storeu_si128(out.as_mut_ptr().add(8).cast(), high);
        }
    }

    lanewise! {
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        div(a, b) = _mm256_div_ps(a, b);
        fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
        sqrt(a) = _mm256_sqrt_ps(a);
        max(a, b) = _mm256_max_ps(a, b);
        min(a, b) = _mm256_min_ps(a, b);
        round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale_by_power(a, n) = {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(n, half)))
        };
        where_less(a, b, yes, no) = _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
        nan_to_zero(a) = _mm256_and_ps(a, _mm256_cmp_ps::<_CMP_ORD_Q>(a, a));
    }

    #[inline(always)]
    fn largest_magnitude(self, a: Pair, b: Pair) -> f32 {
        let mut most = [0u32; 8];
        // SAFETY: `self` proves the instructions; there is room for 8 values.
        unsafe {
            let bits = _mm256_set1_epi32(i32::MAX);
            let low = _mm256_max_epu32(and(a.0, bits), and(a.1, bits));
            let high = _mm256_max_epu32(and(b.0, bits), and(b.1, bits));
            _mm256_storeu_si256(most.as_mut_ptr().cast(), _mm256_max_epu32(low, high));
        }
        f32::from_bits(most.into_iter().fold(0, u32::max))
    }

    #[inline(always)]
    fn store_bytes(self, a: Pair, out: &mut [i8]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 bytes. Packing works in each half of 128 bits.
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    unsafe fn load_pairs_at(self, x: *const u32) -> Self::Pairs {
        // SAFETY: `self` proves the instructions; the caller promises the words.
        unsafe { (_mm256_loadu_si256(x.cast()), _mm256_loadu_si256(x.add(8).cast())) }
    }

    #[inline(always)]
    fn splat_pair(self, x: u32) -> Self::Pairs {
        // SAFETY: `self` proves the instructions.
        unsafe { (_mm256_set1_epi32(x as i32), _mm256_set1_epi32(x as i32)) }
    }

    #[inline(always)]
    fn dot_pairs(self, a: Self::Pairs, b: Self::Pairs, sum: Pair) -> Pair {
        (dot_half(self, a.0, b.0, sum.0), dot_half(self, a.1, b.1, sum.1))
    }

    #[inline(always)]
    fn array(self, a: Pair) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        self.store(a, &mut out);
        out
    }
}

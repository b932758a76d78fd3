//! Sixteen lanes in one AVX-512 register.
//!
//! Each block below is sound for one reason: an [`Avx512`] value is made only by [`enter`], whose caller vouches
//! for the instructions, and slices are cut to length before their pointer is taken.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Lanes};

/// Proof of AVX-512 F, BW, VL, DQ and BF16, made by [`enter`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs `kernel` with these lanes.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.call(Avx512(()))
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    assert!(n <= LANES);
    ((1u32 << n) - 1) as __mmask16
}

macro_rules! lanewise {
    ($($name:ident($($a:ident),+) = $body:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($a: __m512),+) -> __m512 {
            // SAFETY: `self` proves the instructions; registers only.
            unsafe { $body }
        }
    )+};
}

impl Lanes for Avx512 {
    type V = __m512;
    type Pairs = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512 {
        let x = &x[..LANES];
        // SAFETY: `self` proves the instructions; 16 values are there.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_first(self, x: &[f32], n: usize) -> __m512 {
        let x = &x[..n];
        // SAFETY: `self` proves the instructions; the mask leaves out what is past `n`.
        unsafe { _mm512_maskz_loadu_ps(first(n), x.as_ptr()) }
    }

    #[inline(always)]
    fn load_half(self, x: &[u16]) -> __m512 {
        let x = &x[..LANES];
        // SAFETY: `self` proves the instructions; 16 values are there.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn load_at(self, x: *const f32) -> __m512 {
        // SAFETY: `self` proves the instructions; the caller promises the values.
        unsafe { _mm512_loadu_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_half_at(self, x: *const u16) -> __m512 {
        // SAFETY: `self` proves the instructions; the caller promises the values.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.cast())) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn store_first(self, v: __m512, out: &mut [f32], n: usize) {
        let out = &mut out[..n];
        // SAFETY: `self` proves the instructions; the mask leaves out what is past `n`.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first(n), v) }
    }

    #[inline(always)]
    fn store_half(self, v: __m512, out: &mut [u16]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 values.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        }
    }

    lanewise! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
        sqrt(a) = _mm512_sqrt_ps(a);
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale_by_power(a, n) = _mm512_scalef_ps(a, n);
        where_less(a, b, yes, no) = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes);
        nan_to_zero(a) = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(a, a), a);
    }

    #[inline(always)]
    fn largest_magnitude(self, a: __m512, b: __m512) -> f32 {
        // SAFETY: `self` proves the instructions; registers only.
        unsafe {
            let sign = _mm512_set1_epi32(i32::MIN);
            let a = _mm512_andnot_si512(sign, _mm512_castps_si512(a));
            let b = _mm512_andnot_si512(sign, _mm512_castps_si512(b));
            f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b)) as u32)
        }
    }

    #[inline(always)]
    fn store_bytes(self, a: __m512, out: &mut [i8]) {
        let out = &mut out[..LANES];
        // SAFETY: `self` proves the instructions; there is room for 16 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))) }
    }

    #[inline(always)]
    unsafe fn load_pairs_at(self, x: *const u32) -> __m512i {
        // SAFETY: `self` proves the instructions; the caller promises the words.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }

    #[inline(always)]
    fn splat_pair(self, x: u32) -> __m512i {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_set1_epi32(x as i32) }
    }

    #[inline(always)]
    fn dot_pairs(self, a: __m512i, b: __m512i, sum: __m512) -> __m512 {
        // SAFETY: `self` proves the instructions; any 512 bits are 32 bf16 numbers.
        unsafe {
            let pairs = std::mem::transmute::<__m512i, __m512bh>;
            _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
        }
    }

    #[inline(always)]
    unsafe fn round_neighbours_at(self, x: *const f32, out: *mut u32) {
        // SAFETY: `self` proves the instructions; the caller promises 32 values and room for 16 words.
        unsafe {
            let pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x.add(LANES)), _mm512_loadu_ps(x));
            _mm512_storeu_si512(out.cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
        }
    }

    #[inline(always)]
    unsafe fn round_rows_at(self, even: *const f32, odd: *const f32, out: *mut u32) {
        // SAFETY: `self` proves the instructions; the caller promises 16 values each and room for 16 words.
        unsafe {
            let round = |x| {
                let half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(half))
            };
            let pairs = _mm512_or_si512(round(even), _mm512_slli_epi32::<16>(round(odd)));
            _mm512_storeu_si512(out.cast(), pairs);
        }
    }

    #[inline(always)]
    unsafe fn transpose_at(self, x: *const u32, stride: usize, out: *mut u32, out_stride: usize) {
        // SAFETY: `self` proves the instructions; the caller promises both squares.
        unsafe {
            let mut a = [_mm512_setzero_si512(); LANES];
            for (row, a) in a.iter_mut().enumerate() {
                *a = _mm512_loadu_si512(x.add(row * stride).cast());
            }
            // Neighbours of 32 bits, then of 64, then quarters of the register, twice.
            let mut b = a;
            for i in (0..LANES).step_by(2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for i in (0..LANES).step_by(4) {
                a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
                a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
                a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
            for i in [0, 1, 2, 3, 8, 9, 10, 11] {
                b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[i + 4]);
                b[i + 4] = _mm512_shuffle_i32x4::<0xDD>(a[i], a[i + 4]);
            }
            for i in 0..LANES / 2 {
                a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[i + 8]);
                a[i + 8] = _mm512_shuffle_i32x4::<0xDD>(b[i], b[i + 8]);
            }
            for (row, a) in a.iter().enumerate() {
                _mm512_storeu_si512(out.add(row * out_stride).cast(), *a);
            }
        }
    }

    #[inline(always)]
    fn array(self, a: __m512) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        self.store(a, &mut out);
        out
    }

    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the instructions; registers only.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the instructions; registers only. Halves of halves, as the tree in `Lanes::sum`.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

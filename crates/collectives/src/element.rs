//! What a buffer may hold, and how two numbers of it become one.
//!
//! Every rank must end with the same bits, whichever operand came from the network. So both reductions are
//! commutative to the bit: a sum that is not a number becomes *the* NaN (hardware would keep whichever payload came
//! first), and a maximum is taken in IEEE's total order (`-0 < +0`), where a NaN wins over every number.
//! bf16 and f16 are added in f32 and rounded to nearest even at each addition. i32 and i64 wrap around, so their
//! sums are associative: the same for any algorithm and any division of the terms among ranks. A caller that puts
//! numbers on a fixed-point grid and must notice an overflow leaves room for log₂(ranks) bits and checks its inputs.
//!
//! Loops are plain and the compiler vectorises them, once for the baseline and once for AVX2 and AVX-512.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum DType {
    /// No elements (a barrier).
    None = 0,
    /// 32-bit float.
    F32 = 1,
    /// Brain float, 16 bits.
    Bf16 = 2,
    /// IEEE half, 16 bits.
    F16 = 3,
    /// 32-bit signed integer.
    I32 = 4,
    /// Byte: moved, never reduced.
    U8 = 5,
    /// 64-bit unsigned integer: moved, never reduced.
    U64 = 6,
    /// 64-bit signed integer.
    I64 = 7,
}

/// How elements of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReduceOp {
    /// Addition.
    Sum = 1,
    /// The larger one.
    Max = 2,
}

mod sealed {
    pub trait Sealed {}
}

/// A number that ranks can exchange. Plain old memory: every bit pattern is a value.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {
    /// Which of the types it is.
    const DTYPE: DType;
}

/// An element that can also be reduced.
pub trait Reduce: Element {}

macro_rules! element {
    ($($t:ty => $d:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t { const DTYPE: DType = DType::$d; }
    )*};
}
element!(f32 => F32, bf16 => Bf16, f16 => F16, i32 => I32, u8 => U8, u64 => U64, i64 => I64);
impl Reduce for f32 {}
impl Reduce for bf16 {}
impl Reduce for f16 {}
impl Reduce for i32 {}
impl Reduce for i64 {}

impl DType {
    /// Bytes of one element; 0 for [`DType::None`].
    pub fn bytes(self) -> usize {
        match self {
            Self::None => 0,
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::U64 | Self::I64 => 8,
        }
    }

    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::I32 => "i32",
            Self::U8 => "u8",
            Self::U64 => "u64",
            Self::I64 => "i64",
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::None, Self::F32, Self::Bf16, Self::F16, Self::I32, Self::U8, Self::U64, Self::I64]
            .into_iter()
            .find(|d| *d as u8 == code)
    }
}

/// The bytes of a slice of elements.
pub(crate) fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: `Element` is sealed to types without padding; any memory may be read as bytes, and the length is exact.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements)) }
}

/// The bytes of a slice of elements, writable.
pub(crate) fn bytes_of_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and for every sealed type any bit pattern is a valid value, so bytes may be written freely.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast::<u8>(), size_of_val(elements)) }
}

/// `into[i] = into[i] ∘ from[i]`, over bytes of equal length that hold whole elements at any alignment.
pub(crate) type Reducer = fn(into: &mut [u8], from: &[u8]);

/// The loop for a type and an operation.
pub(crate) fn reducer<T: Reduce>(op: ReduceOp) -> Reducer {
    match (T::DTYPE, op) {
        (DType::F32, ReduceOp::Sum) => sum_f32,
        (DType::F32, ReduceOp::Max) => max_f32,
        (DType::Bf16, ReduceOp::Sum) => sum_bf16,
        (DType::Bf16, ReduceOp::Max) => max_bf16,
        (DType::F16, ReduceOp::Sum) => sum_f16,
        (DType::F16, ReduceOp::Max) => max_f16,
        (DType::I64, ReduceOp::Sum) => sum_i64,
        (DType::I64, ReduceOp::Max) => max_i64,
        (_, ReduceOp::Sum) => sum_i32,
        (_, ReduceOp::Max) => max_i32,
    }
}

const NAN_F32: u32 = 0x7fc0_0000;

#[inline(always)]
fn add_f32(a: u32, b: u32) -> u32 {
    let sum = (f32::from_bits(a) + f32::from_bits(b)).to_bits();
    if sum & 0x7fff_ffff > 0x7f80_0000 { NAN_F32 } else { sum }
}

#[inline(always)]
fn larger_f32(a: u32, b: u32) -> u32 {
    // Total order: negative numbers count down, so all their bits but the sign are flipped; NaNs are made one first.
    let one = |x: u32| if x & 0x7fff_ffff > 0x7f80_0000 { NAN_F32 } else { x };
    let key = |x: u32| (x as i32) ^ (((x as i32) >> 31) as u32 >> 1) as i32;
    let (a, b) = (one(a), one(b));
    if key(a) > key(b) { a } else { b }
}

#[inline(always)]
fn narrow_bf16(x: u32) -> u16 {
    // Round to nearest even by adding just under half a unit; the NaN is the one above and stays one.
    ((x + 0x7fff + ((x >> 16) & 1)) >> 16) as u16
}

#[inline(always)]
fn add_bf16(a: u16, b: u16) -> u16 {
    let sum = add_f32(u32::from(a) << 16, u32::from(b) << 16);
    if sum == NAN_F32 { (NAN_F32 >> 16) as u16 } else { narrow_bf16(sum) }
}

#[inline(always)]
fn larger_16<const INFINITY: u16, const NAN: u16>(a: u16, b: u16) -> u16 {
    let one = |x: u16| if x & 0x7fff > INFINITY { NAN } else { x };
    let key = |x: u16| (x as i16) ^ (((x as i16) >> 15) as u16 >> 1) as i16;
    let (a, b) = (one(a), one(b));
    if key(a) > key(b) { a } else { b }
}

/// Makes a loop over elements of `$bytes` bytes, compiled for three instruction sets and chosen when it runs.
macro_rules! elementwise {
    ($name:ident, $word:ty, $bytes:literal, $combine:expr) => {
        fn $name(into: &mut [u8], from: &[u8]) {
            #[inline(always)]
            fn body(into: &mut [u8], from: &[u8]) {
                let (into, _) = into.as_chunks_mut::<$bytes>();
                let (from, _) = from.as_chunks::<$bytes>();
                for (into, from) in into.iter_mut().zip(from) {
                    let combine: fn($word, $word) -> $word = $combine;
                    *into =
                        combine(<$word>::from_ne_bytes(*into), <$word>::from_ne_bytes(*from)).to_ne_bytes();
                }
            }
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512(into: &mut [u8], from: &[u8]) {
                    body(into, from);
                }
                #[target_feature(enable = "avx2")]
                fn avx2(into: &mut [u8], from: &[u8]) {
                    body(into, from);
                }
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
                    // SAFETY: the features were just found on this machine (avx512f is implied by them).
                    return unsafe { avx512(into, from) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the feature was just found on this machine.
                    return unsafe { avx2(into, from) };
                }
            }
            body(into, from);
        }
    };
}

elementwise!(sum_f32, u32, 4, add_f32);
elementwise!(max_f32, u32, 4, larger_f32);
elementwise!(sum_bf16, u16, 2, add_bf16);
elementwise!(max_bf16, u16, 2, larger_16::<0x7f80, 0x7fc0>);
elementwise!(max_f16, u16, 2, larger_16::<0x7c00, 0x7e00>);
elementwise!(sum_i32, i32, 4, i32::wrapping_add);
elementwise!(max_i32, i32, 4, i32::max);
elementwise!(sum_i64, i64, 8, i64::wrapping_add);
elementwise!(max_i64, i64, 8, i64::max);

/// f16 goes through f32 in blocks on the stack, with the machine's conversion instructions where it has them.
fn sum_f16(into: &mut [u8], from: &[u8]) {
    const BLOCK: usize = 256;
    for (into, from) in into.chunks_mut(2 * BLOCK).zip(from.chunks(2 * BLOCK)) {
        let n = into.len().min(from.len()) / 2;
        let mut bits = [[0u16; BLOCK]; 2];
        for (bits, bytes) in bits.iter_mut().zip([&*into, from]) {
            for (bits, bytes) in bits.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *bits = u16::from_ne_bytes(*bytes);
            }
        }
        let mut wide = [[0f32; BLOCK]; 2];
        bits[0].reinterpret_cast::<f16>()[..n].convert_to_f32_slice(&mut wide[0][..n]);
        bits[1].reinterpret_cast::<f16>()[..n].convert_to_f32_slice(&mut wide[1][..n]);
        let [left, right] = &mut wide;
        for (a, b) in left.iter_mut().zip(right.iter()) {
            *a = f32::from_bits(add_f32(a.to_bits(), b.to_bits()));
        }
        bits[0].reinterpret_cast_mut::<f16>()[..n].convert_from_f32_slice(&left[..n]);
        for (bytes, bits) in into.as_chunks_mut::<2>().0.iter_mut().zip(&bits[0]) {
            *bytes = bits.to_ne_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reduced<T: Reduce>(op: ReduceOp, a: &[T], b: &[T]) -> Vec<T> {
        let mut out = a.to_vec();
        reducer::<T>(op)(bytes_of_mut(&mut out), bytes_of(b));
        out
    }

    #[test]
    fn either_order_gives_the_same_bits_even_for_what_is_not_a_number() {
        let strange = [
            0x7fc0_1234u32,
            0xffc0_0001,
            0x7f80_0001,
            0x8000_0000,
            0,
            0x7f80_0000,
            0xff80_0000,
            0x3f80_0000,
            1,
        ];
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            for x in strange {
                for y in strange {
                    let (a, b) = (vec![f32::from_bits(x); 19], vec![f32::from_bits(y); 19]);
                    assert_eq!(
                        bytes_of(&reduced(op, &a, &b)),
                        bytes_of(&reduced(op, &b, &a)),
                        "{op:?} {x:x} {y:x}"
                    );
                }
            }
        }
        assert!(reduced(ReduceOp::Max, &[f32::NAN], &[1.0])[0].is_nan());
        assert_eq!(reduced(ReduceOp::Max, &[-0.0f32], &[0.0])[0].to_bits(), 0);
        assert_eq!(reduced(ReduceOp::Max, &[-3.0f32, -1.0], &[-2.0, f32::NEG_INFINITY]), [-2.0, -1.0]);
    }

    #[test]
    fn sixteen_bit_sums_are_rounded_as_the_half_crate_rounds() {
        // Every pattern against a few partners, compared with the library's scalar conversions.
        for b in [0u16, 0x3f80, 0xbf81, 0x0001, 0x7f7f, 0x3555] {
            let left: Vec<u16> = (0..=u16::MAX).collect();
            let a: Vec<bf16> = left.iter().map(|x| bf16::from_bits(*x)).collect();
            let sum = reduced(ReduceOp::Sum, &a, &vec![bf16::from_bits(b); a.len()]);
            for (x, got) in a.iter().zip(sum) {
                let want = bf16::from_f32(x.to_f32() + bf16::from_bits(b).to_f32());
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x:?} {b:x}");
            }
            let a: Vec<f16> = left.iter().map(|x| f16::from_bits(*x)).collect();
            let sum = reduced(ReduceOp::Sum, &a, &vec![f16::from_bits(b); a.len()]);
            for (x, got) in a.iter().zip(sum) {
                let want = f16::from_f32(x.to_f32() + f16::from_bits(b).to_f32());
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x:?} {b:x}");
            }
        }
    }

    #[test]
    fn integers_wrap() {
        assert_eq!(reduced(ReduceOp::Sum, &[i32::MAX, 2], &[1, 3]), [i32::MIN, 5]);
        assert_eq!(reduced(ReduceOp::Max, &[i32::MIN, 2], &[1, -3]), [1, 2]);
        assert_eq!(reduced(ReduceOp::Sum, &[i64::MAX, 1 << 40], &[1, 1 << 40]), [i64::MIN, 1 << 41]);
        assert_eq!(reduced(ReduceOp::Max, &[i64::MIN, 2], &[1, -3]), [1, 2]);
    }
}

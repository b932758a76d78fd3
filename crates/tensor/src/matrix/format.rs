//! How each block format looks once packed: which bit planes hold its codes and which table its scales.
//!
//! Every quantized type becomes 32 unsigned codes a block, minus a power-of-two offset, times a scale, plus a
//! minimum; the types differ only in the fields of [`IntFormat`]. Kernels are generic over [`Format`], so a field is
//! a constant in them, and a new type needs no new kernel.
//!
//! **Codes.** A panel is 16 output rows (lanes). A *plane* is 64 bytes: four bytes for each lane, byte `j` of a lane
//! belonging to input column `4g + j` of every group `g` (0..8) it stores. So one group of one panel is one 512-bit
//! register of codes, as the four-way byte dot product wants it.

use crate::DType;

/// The planes that make up a block's codes, in the order they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Eight planes: plane `g` is group `g`.
    Byte,
    /// Four planes: plane `i` has group `i` in its low nibbles and `i + 4` in its high ones.
    Nibble,
    /// As `Nibble`, then one plane: bit `g` is bit 4 of group `g`.
    NibbleOne,
    /// As `Nibble`, then two planes: bits `2i..2i + 2` of plane `h` are bits 4 and 5 of group `4h + i`.
    NibbleTwo,
    /// Two planes: bits `2i..2i + 2` of plane `h` are group `4h + i`.
    Two,
    /// As `Two`, then one plane: bit `g` is bit 2 of group `g`.
    TwoOne,
}

/// Where a block's scale and minimum come from. All tables follow a panel's codes; `f16` and bytes of 16 lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// A block: `d`.
    Plain,
    /// A block: `d`, then `m`.
    PlainMin,
    /// Eight blocks: `d`, `-dmin`, then eight times (6-bit scales, 6-bit minimums).
    SubMin,
    /// Eight blocks: `d`, then sixteen times signed 8-bit scales, one for each half of a block.
    HalfSigned,
    /// Eight blocks: `d`, `-dmin`, then sixteen bytes with a scale in the low nibble and a minimum in the high one.
    HalfMin,
}

/// A packed block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IntFormat {
    pub(crate) codes: Codes,
    pub(crate) scales: Scales,
    /// Codes stand for `code - 2^offset_bits`; `None` where the minimum does that.
    pub(crate) offset_bits: Option<u32>,
}

/// Bytes of one plane of a panel.
pub(crate) const PLANE: usize = 64;

impl IntFormat {
    /// Planes a block of 32 columns has.
    pub(crate) const fn planes(self) -> usize {
        match self.codes {
            Codes::Byte => 8,
            Codes::Nibble => 4,
            Codes::NibbleOne => 5,
            Codes::NibbleTwo => 6,
            Codes::Two => 2,
            Codes::TwoOne => 3,
        }
    }

    /// Whether each half of a block has its own scale.
    pub(crate) const fn halves(self) -> bool {
        matches!(self.scales, Scales::HalfSigned | Scales::HalfMin)
    }

    /// Whether there is a minimum to add.
    pub(crate) const fn min(self) -> bool {
        matches!(self.scales, Scales::PlainMin | Scales::SubMin | Scales::HalfMin)
    }

    /// Bytes of one entry of the scale table and how many blocks it serves.
    pub(crate) const fn scale_entry(self) -> (usize, usize) {
        match self.scales {
            Scales::Plain => (32, 1),
            Scales::PlainMin => (64, 1),
            Scales::SubMin | Scales::HalfMin => (64 + 256, 8),
            Scales::HalfSigned => (32 + 256, 8),
        }
    }
}

/// The packed form of a quantized type; `None` for floats.
pub(crate) const fn int_format(dtype: DType) -> Option<IntFormat> {
    let (codes, scales, offset_bits) = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => return None,
        DType::Q4_0 => (Codes::Nibble, Scales::Plain, Some(3)),
        DType::Q4_1 => (Codes::Nibble, Scales::PlainMin, None),
        DType::Q5_0 => (Codes::NibbleOne, Scales::Plain, Some(4)),
        DType::Q5_1 => (Codes::NibbleOne, Scales::PlainMin, None),
        DType::Q8_0 => (Codes::Byte, Scales::Plain, Some(7)),
        DType::Q2_K => (Codes::Two, Scales::HalfMin, None),
        DType::Q3_K => (Codes::TwoOne, Scales::HalfSigned, Some(2)),
        DType::Q4_K => (Codes::Nibble, Scales::SubMin, None),
        DType::Q5_K => (Codes::NibbleOne, Scales::SubMin, None),
        DType::Q6_K => (Codes::NibbleTwo, Scales::HalfSigned, Some(5)),
    };
    Some(IntFormat { codes, scales, offset_bits })
}

/// A quantized type as a type, for kernels that are compiled once for each.
pub(crate) trait Format {
    /// Its packed form.
    const INT: IntFormat;
}

macro_rules! formats {
    ($($name:ident),*) => {$(
        /// The format of the same name.
        #[allow(non_camel_case_types)]
        pub(crate) struct $name;
        impl Format for $name {
            const INT: IntFormat = match int_format(DType::$name) {
                Some(format) => format,
                None => panic!("a float type has no packed codes"),
            };
        }
    )*};
}

formats!(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K);

/// Evaluates `$body` with `$F` standing for the [`Format`] of a quantized `$dtype`; `$float` for the others.
macro_rules! with_format {
    ($dtype:expr, $F:ident => $body:expr, _ => $float:expr) => {{
        use $crate::matrix::format as f;
        match $dtype {
            $crate::DType::Q4_0 => {
                type $F = f::Q4_0;
                $body
            }
            $crate::DType::Q4_1 => {
                type $F = f::Q4_1;
                $body
            }
            $crate::DType::Q5_0 => {
                type $F = f::Q5_0;
                $body
            }
            $crate::DType::Q5_1 => {
                type $F = f::Q5_1;
                $body
            }
            $crate::DType::Q8_0 => {
                type $F = f::Q8_0;
                $body
            }
            $crate::DType::Q2_K => {
                type $F = f::Q2_K;
                $body
            }
            $crate::DType::Q3_K => {
                type $F = f::Q3_K;
                $body
            }
            $crate::DType::Q4_K => {
                type $F = f::Q4_K;
                $body
            }
            $crate::DType::Q5_K => {
                type $F = f::Q5_K;
                $body
            }
            $crate::DType::Q6_K => {
                type $F = f::Q6_K;
                $body
            }
            $crate::DType::F32 | $crate::DType::F16 | $crate::DType::BF16 => $float,
        }
    }};
}
pub(crate) use with_format;

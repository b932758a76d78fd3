//! Weights, repacked at load into rows interleaved for the widest dot product.

use crate::{DType, Error, Pool};

/// What a matrix wants its inputs to be: the cheaper form of the same rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InputKind {
    /// 32-bit floats, as they are.
    F32,
    /// Rounded to bf16.
    Bf16,
    /// Blocks of 32 signed bytes with one `f32` scale each.
    Int8,
}

/// A weight matrix of `rows` output features by `cols` input features, packed for this pool's kernels.
pub struct Matrix {
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl Matrix {
    /// Packs `bytes`, which hold `rows` rows of `cols` values of `dtype` in file order.
    ///
    /// # Errors
    /// [`Error::WrongLength`], [`Error::PartialBlock`], [`Error::OutOfMemory`].
    pub fn pack(pool: &Pool, dtype: DType, bytes: &[u8], rows: usize, cols: usize) -> Result<Matrix, Error> {
        let _ = (pool, bytes);
        if false {
            return Ok(Matrix { rows, cols, dtype });
        }
        todo!()
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type the file stored it in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of memory the packed form takes.
    pub fn packed_bytes(&self) -> usize {
        todo!()
    }

    /// What [`crate::linear::Inputs::prepare`] must make for this matrix.
    pub fn input_kind(&self) -> InputKind {
        todo!()
    }

    /// Row `row` (an embedding, say) as `f32` into `out[..cols]`: the same values as [`crate::quant::dequantize`].
    ///
    /// # Panics
    /// If `row >= rows` or `out.len() != cols`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let _ = (row, out);
        todo!()
    }
}

/// A gate and an up projection of one shape, interleaved so that one pass computes `act(gate·x) * (up·x)`.
pub struct GatedMatrix {}

impl GatedMatrix {
    /// Joins two matrices' file bytes (their types may differ).
    ///
    /// # Errors
    /// As [`Matrix::pack`].
    pub fn pack(
        pool: &Pool,
        gate: (DType, &[u8]),
        up: (DType, &[u8]),
        rows: usize,
        cols: usize,
    ) -> Result<GatedMatrix, Error> {
        let _ = (pool, gate, up, rows, cols);
        todo!()
    }

    /// What [`crate::linear::Inputs::prepare`] must make for it.
    pub fn input_kind(&self) -> InputKind {
        todo!()
    }

    /// Bytes of memory the packed form takes.
    pub fn packed_bytes(&self) -> usize {
        todo!()
    }
}

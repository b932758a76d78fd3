//! Weights, repacked at load into rows interleaved for the widest dot product.
//!
//! Sixteen output rows lie side by side (see `panel`), so one load feeds sixteen independent sums and no kernel
//! ever adds across a register. The packed form is as large as the file's (scales of the K types excepted: up to
//! 4 bytes for each 256 weights more), and packing is one pass over it on all threads.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::pool::Disjoint;
use crate::{DType, Error, Pool, quant};
use pack::pack_panel;
use panel::{LANES, Layout};

pub(crate) mod format;
mod pack;
pub(crate) mod panel;

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

/// Whether a product's bits depend on the kernel family that computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// Every family gives the same bits.
    Shared,
    /// AVX-512's own bf16 dot product rounds differently from the other families' `f32` chain.
    ByFamily,
}

impl InputKind {
    /// The inputs that weights of `dtype` want.
    pub fn of(dtype: DType) -> InputKind {
        match dtype {
            DType::F32 | DType::F16 => InputKind::F32,
            DType::BF16 => InputKind::Bf16,
            _ => InputKind::Int8,
        }
    }

    /// Whether products with such inputs differ between kernel families.
    pub fn numerics(self) -> Numerics {
        match self {
            InputKind::F32 | InputKind::Int8 => Numerics::Shared,
            InputKind::Bf16 => Numerics::ByFamily,
        }
    }
}

/// A weight matrix of `rows` output features by `cols` input features, packed for this pool's kernels.
pub struct Matrix {
    rows: usize,
    layout: Layout,
    panels: Buffer<u8>,
}

impl Matrix {
    /// Packs `bytes`, which hold `rows` rows of `cols` values of `dtype` in file order.
    ///
    /// # Errors
    /// [`Error::WrongLength`], [`Error::PartialBlock`], [`Error::OutOfMemory`].
    pub fn pack(pool: &Pool, dtype: DType, bytes: &[u8], rows: usize, cols: usize) -> Result<Matrix, Error> {
        let source = Source::new(dtype, bytes, rows, cols)?;
        let layout = source.layout(dtype)?;
        let mut panels = Buffer::zeroed(packed_len(rows, layout.bytes)?)?;
        each_panel(pool, rows, layout.bytes, &mut panels, |rows, panel| source.pack(&layout, rows, panel));
        Ok(Matrix { rows, layout, panels })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.layout.cols
    }

    /// The type the file stored it in.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// Bytes of memory the packed form takes.
    pub fn packed_bytes(&self) -> usize {
        self.panels.len()
    }

    /// What [`crate::linear::Inputs::prepare`] must make for this matrix.
    pub fn input_kind(&self) -> InputKind {
        InputKind::of(self.layout.dtype)
    }

    /// Row `row` (an embedding, say) as `f32` into `out[..cols]`: the same values as [`crate::quant::dequantize`].
    ///
    /// # Panics
    /// If `row >= rows` or `out.len() != cols`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.layout.cols, "a row's length");
        let panel = &self.panels[row / LANES * self.layout.bytes..][..self.layout.bytes];
        self.layout.lane(panel, row % LANES, out);
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn panels(&self) -> &[u8] {
        &self.panels
    }
}

/// A gate and an up projection of one shape, interleaved so that one pass computes `act(gate·x) * (up·x)`.
pub struct GatedMatrix {
    rows: usize,
    gate: Layout,
    up: Layout,
    /// For each sixteen rows a gate panel, then an up panel.
    panels: Buffer<u8>,
}

impl GatedMatrix {
    /// Joins two matrices' file bytes (their types may differ). Two types that want different inputs
    /// ([`InputKind::of`]) are both stored as `f32`; no model file that we know mixes them.
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
        let sources = (Source::new(gate.0, gate.1, rows, cols)?, Source::new(up.0, up.1, rows, cols)?);
        let agree = InputKind::of(gate.0) == InputKind::of(up.0);
        let stored = |dtype| if agree { dtype } else { DType::F32 };
        let (gate, up) = (sources.0.layout(stored(gate.0))?, sources.1.layout(stored(up.0))?);
        let unit = gate.bytes.checked_add(up.bytes).ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        let mut panels = Buffer::zeroed(packed_len(rows, unit)?)?;
        each_panel(pool, rows, unit, &mut panels, |rows, panel| {
            let (gate_panel, up_panel) = panel.split_at_mut(gate.bytes);
            sources.0.pack(&gate, rows.clone(), gate_panel);
            sources.1.pack(&up, rows, up_panel);
        });
        Ok(GatedMatrix { rows, gate, up, panels })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.gate.cols
    }

    /// What [`crate::linear::Inputs::prepare`] must make for it.
    pub fn input_kind(&self) -> InputKind {
        InputKind::of(self.gate.dtype)
    }

    /// Bytes of memory the packed form takes.
    pub fn packed_bytes(&self) -> usize {
        self.panels.len()
    }

    pub(crate) fn layouts(&self) -> (&Layout, &Layout) {
        (&self.gate, &self.up)
    }

    pub(crate) fn panels(&self) -> &[u8] {
        &self.panels
    }
}

/// A matrix in file order, its length checked.
struct Source<'a> {
    dtype: DType,
    bytes: &'a [u8],
    cols: usize,
    row_bytes: usize,
}

impl<'a> Source<'a> {
    fn new(dtype: DType, bytes: &'a [u8], rows: usize, cols: usize) -> Result<Source<'a>, Error> {
        if !cols.is_multiple_of(dtype.block_len()) {
            return Err(Error::PartialBlock { cols, dtype: dtype.name(), block: dtype.block_len() });
        }
        // A product that overflows is more than any file has.
        let row_bytes = dtype.bytes(cols).unwrap_or(usize::MAX);
        let expected = row_bytes.saturating_mul(rows);
        if expected != bytes.len() {
            return Err(Error::WrongLength { rows, cols, dtype: dtype.name(), expected, got: bytes.len() });
        }
        Ok(Source { dtype, bytes, cols, row_bytes })
    }

    fn layout(&self, stored: DType) -> Result<Layout, Error> {
        Layout::new(stored, self.cols).ok_or(Error::OutOfMemory { bytes: usize::MAX })
    }

    /// Packs `rows` (sixteen or fewer) into a zeroed panel of `layout`, which may store them as `f32` instead.
    fn pack(&self, layout: &Layout, rows: Range<usize>, panel: &mut [u8]) {
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        if layout.dtype == self.dtype {
            return pack_panel(layout, bytes, panel);
        }
        let mut values = vec![0f32; rows.len() * self.cols];
        quant::dequantize(self.dtype, bytes, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        pack_panel(layout, &bytes, panel);
    }
}

/// Bytes of the panels that `rows` rows need.
fn packed_len(rows: usize, panel_bytes: usize) -> Result<usize, Error> {
    rows.div_ceil(LANES).checked_mul(panel_bytes).ok_or(Error::OutOfMemory { bytes: usize::MAX })
}

/// Calls `pack` with each panel and the rows that go into it, on all threads.
fn each_panel(
    pool: &Pool,
    rows: usize,
    panel_bytes: usize,
    panels: &mut [u8],
    pack: impl Fn(Range<usize>, &mut [u8]) + Sync,
) {
    if panels.is_empty() {
        return;
    }
    let panels = Disjoint::new(panels);
    pool.run(|worker| {
        for index in worker.split(rows.div_ceil(LANES), 1) {
            // SAFETY: the shares of the workers are disjoint, and so are the panels of one.
            let panel = unsafe { panels.part(index * panel_bytes..(index + 1) * panel_bytes) };
            pack(index * LANES..(index * LANES + LANES).min(rows), panel);
        }
    });
}

//! What can go wrong below the model.

/// An error of this crate; each variant says what the caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel family was asked for that this machine can't run.
    #[error("this CPU can't run the {family} kernels; it has: {available}")]
    FamilyUnavailable {
        /// The family that was asked for.
        family: &'static str,
        /// Comma-separated names of the families that run here.
        available: String,
    },
    /// A tensor's bytes don't fit its shape and type.
    #[error("{rows}×{cols} of {dtype} needs {expected} bytes, got {got}")]
    WrongLength {
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// The type's name.
        dtype: &'static str,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
    /// A row's length isn't a whole number of the type's blocks.
    #[error("a row of {cols} values is not a whole number of {dtype} blocks ({block} values each)")]
    PartialBlock {
        /// Values in a row.
        cols: usize,
        /// The type's name.
        dtype: &'static str,
        /// Values in a block.
        block: usize,
    },
    /// The system refused memory.
    #[error("out of memory: {bytes} bytes were refused")]
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
}

//! What a model file offers to those who build a model from it, whatever its format.

use std::path::Path;

use consort_tensor::DType;

use crate::Error;

/// A tensor in a file: its bytes are known to be exactly what its type and shape need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: DType,
    /// Outermost first: a matrix has rows (output features), then columns (input features).
    pub(crate) dims: &'a [usize],
    pub(crate) bytes: &'a [u8],
}

/// A file, or a folder of files, with named tensors.
pub(crate) trait Weights: Sync {
    /// What error messages call it.
    fn path(&self) -> &Path;

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where its type is none that runs here.
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, Error>;

    /// All tensors' names, in no order.
    fn names(&self) -> Vec<&str>;

    /// Whether no file was truncated since it was opened; asked before weights are read.
    fn still_whole(&self) -> bool;

    /// Says that the tensor's bytes aren't needed any more.
    fn release(&self, name: &str);

    /// Adds the tokenizer's and template's text to the hash.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn hash_text(&self, hasher: &mut blake3::Hasher) -> Result<(), Error>;
}

//! Model files: GGUF and Hugging Face folders, behind one face.

use std::path::Path;

use crate::arch::{Model, ModelConfig};
use crate::{ChatTemplate, Error, Tokenizer};
use consort_tensor::Pool;

/// A model whose headers are read and checked; weights are still in the file.
pub struct Opened {}

/// Opens a `.gguf` file or a Hugging Face folder (`config.json`, `tokenizer.json`, `*.safetensors`).
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`], [`Error::Unsupported`].
pub fn open(path: &Path) -> Result<Opened, Error> {
    let _ = path;
    todo!()
}

impl Opened {
    /// The architecture's numbers.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// Builds the tokenizer (about 100 ms for 50,000 tokens: do it beside [`Opened::load`]).
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`].
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        todo!()
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// [`Error::Template`] where it doesn't parse.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, Error> {
        todo!()
    }

    /// Reads, hashes and packs the weights.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Tensor`].
    pub fn load(&self, pool: &Pool) -> Result<Model, Error> {
        let _ = pool;
        todo!()
    }
}

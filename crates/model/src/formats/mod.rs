//! Model files: GGUF and Hugging Face folders, behind one face.
//!
//! Both are read by hardened parsers of our own: model files come from strangers. What PyTorch's pickle holds is a
//! program that runs when it is opened, so it is refused, always.

pub mod gguf;
mod hugging_face;
pub(crate) mod names;
pub mod safetensors;
pub(crate) mod weights;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use consort_tensor::Pool;

use self::gguf::Gguf;
use self::hugging_face::Folder;
use self::hugging_face::TEXT_FILES as TOKENIZER_FILES;
use self::names::Names;
use self::weights::Weights;
use crate::arch::{Model, ModelConfig};
use crate::train::Layout;
use crate::{ChatTemplate, Error, Tokenizer};

/// What error messages list.
pub(crate) const SUPPORTED_FAMILIES: &str = "llama (Llama 2 and 3, SmolLM2), mistral, qwen2, qwen3, gemma3";

/// A model whose headers are read and checked; weights are still in the file.
pub struct Opened {
    config: ModelConfig,
    names: Names,
    source: Source,
}

enum Source {
    Gguf(Gguf),
    Folder { path: PathBuf, folder: Folder },
}

/// Opens a `.gguf` file or a Hugging Face folder (`config.json`, `tokenizer.json`, `*.safetensors`).
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`], [`Error::Unsupported`].
pub fn open(path: &Path) -> Result<Opened, Error> {
    if path.is_dir() {
        let folder = Folder::open(path)?;
        let (config, names) = folder.config()?;
        return Ok(Opened { config, names, source: Source::Folder { path: path.to_path_buf(), folder } });
    }
    refuse_other_files(path)?;
    Opened::from_gguf(Gguf::open(path)?)
}

/// Looks at a file's first bytes, so that what is no GGUF file is called by its name.
fn refuse_other_files(path: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "neither a file nor a folder");
        return Err(io(source));
    }
    let mut start = Vec::new();
    File::open(path).map_err(io)?.take(16).read_to_end(&mut start).map_err(io)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if start.starts_with(gguf::MAGIC) {
        return Ok(());
    }
    // PyTorch's files are a zip archive around a pickle, older ones the pickle itself.
    if start.starts_with(b"PK\x03\x04") || start.starts_with(&[0x80, 0x02]) || is_pickle_name(&name) {
        return Err(pickle_refused(path));
    }
    if name.ends_with(".safetensors") {
        return Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: "a .safetensors file alone".into(),
            supported: "the folder it is in, with config.json and tokenizer.json".into(),
        });
    }
    if name.ends_with(".gguf") {
        let reason = "it doesn't start with GGUF".into();
        return Err(Error::Malformed { path: path.to_path_buf(), reason });
    }
    Err(Error::Unsupported {
        path: path.to_path_buf(),
        what: "this kind of file".into(),
        supported: "GGUF files, and folders with config.json and *.safetensors".into(),
    })
}

/// Names under which PyTorch saves pickles.
fn is_pickle_name(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".pkl", ".ckpt"].iter().any(|suffix| name.ends_with(suffix))
}

fn pickle_refused(path: &Path) -> Error {
    Error::Unsupported {
        path: path.to_path_buf(),
        what: "a PyTorch pickle, a program that runs when it is opened,".into(),
        supported:
            "safetensors and GGUF (most models are published in one of them; `save_pretrained` of a recent \
                    transformers writes safetensors)"
                .into(),
    }
}

impl Opened {
    /// A GGUF file that is already read.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`].
    pub fn from_gguf(gguf: Gguf) -> Result<Opened, Error> {
        let config = gguf::config(&gguf)?;
        let names = gguf::names(&config);
        Ok(Opened { config, names, source: Source::Gguf(gguf) })
    }

    /// The file, if it is one of GGUF.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::Folder { .. } => None,
        }
    }

    /// The folder, if it is one of Hugging Face.
    pub fn folder(&self) -> Option<&Path> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::Folder { path, .. } => Some(path),
        }
    }

    /// The architecture's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Builds the tokenizer (about 100 ms for 50,000 tokens: do it beside [`Opened::load`]).
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`].
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        match &self.source {
            Source::Gguf(gguf) => Tokenizer::from_gguf(gguf),
            Source::Folder { path, .. } => Tokenizer::from_folder(path),
        }
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// [`Error::Template`] where it doesn't parse.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, Error> {
        ChatTemplate::of(self)
    }

    /// The files of a Hugging Face folder that say how this model's text becomes tokens: copies, or made from a GGUF's
    /// metadata.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Unsupported`] where a GGUF's tokenizer can't be written that way.
    pub(crate) fn tokenizer_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, Error> {
        match &self.source {
            Source::Gguf(gguf) => {
                let files = crate::tokenizer::export::files(gguf)?;
                Ok(files.into_iter().map(|(name, text)| (name, text.into_bytes())).collect())
            }
            Source::Folder { path, .. } => {
                let paths = TOKENIZER_FILES.iter().map(|name| (*name, path.join(name)));
                let read = |(name, path): (&'static str, PathBuf)| match std::fs::read(&path) {
                    Ok(content) => Ok((name, content)),
                    Err(source) => Err(Error::Io { path, source }),
                };
                paths.filter(|(_, path)| path.is_file()).map(read).collect()
            }
        }
    }

    /// Reads the weights into a flat buffer of `layout`, as `f32` (block formats are dequantized).
    ///
    /// # Errors
    /// [`Error::Malformed`] where a tensor is missing or has another shape, [`Error::Untrainable`] where a layer has a
    /// tensor that the layout doesn't.
    ///
    /// # Panics
    /// If `weights` doesn't have the layout's length.
    pub fn read_weights(&self, layout: &Layout, weights: &mut [f32]) -> Result<(), Error> {
        let (source, names): (&dyn Weights, _) = match &self.source {
            Source::Gguf(gguf) => (gguf, &self.names),
            Source::Folder { folder, .. } => (folder, &self.names),
        };
        layout.read(&self.config, names, source, weights)
    }

    /// Reads, hashes and packs the weights.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Tensor`].
    pub fn load(&self, pool: &Pool) -> Result<Model, Error> {
        let weights: &dyn Weights = match &self.source {
            Source::Gguf(gguf) => gguf,
            Source::Folder { folder, .. } => folder,
        };
        Model::build(&self.config, &self.names, weights, pool)
    }
}

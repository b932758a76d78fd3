//! A trained model as a GGUF file.

use std::path::Path;

use anyhow::Result;
use consort_tensor::DType;
use consort_training::export_gguf;
use consort_training::job::GgufType;

/// Writes the model of a Hugging Face folder to `path`.
pub(crate) fn export(folder: &Path, path: &Path, kind: GgufType) -> Result<()> {
    let dtype = match kind {
        GgufType::F32 => DType::F32,
        GgufType::Bf16 => DType::BF16,
        GgufType::Q8_0 => DType::Q8_0,
    };
    Ok(export_gguf(folder, path, dtype)?)
}

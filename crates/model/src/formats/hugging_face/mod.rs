//! A Hugging Face folder: `config.json`, `tokenizer.json` and weights in one safetensors file or several.

mod config;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::names::Names;
use super::safetensors::Safetensors;
use super::weights::{Tensor, Weights};
use crate::Error;
use crate::arch::ModelConfig;

/// A config is a few kilobytes, an index a few hundred; more than this is something else.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Files of one model.
const MAX_SHARDS: usize = 4096;
/// Files whose text decides which tokens go in and which come out.
pub(crate) const TEXT_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// An opened folder: its config read, its weights' headers checked.
pub(crate) struct Folder {
    path: PathBuf,
    shards: Vec<Safetensors>,
    /// Which shard has a tensor.
    shard_of: HashMap<String, usize>,
}

impl Folder {
    /// Opens the weights that the folder holds.
    pub(crate) fn open(path: &Path) -> Result<Folder, Error> {
        let single = path.join("model.safetensors");
        if single.is_file() {
            let shard = Safetensors::open(&single)?;
            let shard_of = shard.names().map(|name| (name.to_string(), 0)).collect();
            return Ok(Folder { path: path.to_path_buf(), shards: vec![shard], shard_of });
        }
        let index = path.join("model.safetensors.index.json");
        if index.is_file() {
            return Folder::open_sharded(path, &index);
        }
        Err(no_weights(path))
    }

    fn open_sharded(path: &Path, index_path: &Path) -> Result<Folder, Error> {
        let malformed = |reason: String| Error::Malformed { path: index_path.to_path_buf(), reason };
        let index = read_json(index_path)?;
        let Some(weight_map) = index.get("weight_map").and_then(|map| map.as_object()) else {
            return Err(malformed("it has no weight_map".into()));
        };
        let mut numbers = BTreeMap::new();
        let mut shards: Vec<Safetensors> = Vec::new();
        let mut shard_of = HashMap::new();
        for (tensor, file) in weight_map {
            let file = file.as_str().filter(|name| is_plain_file_name(name)).ok_or_else(|| {
                malformed(format!(
                    "it puts {tensor} into {file}, which is no .safetensors file of this folder"
                ))
            })?;
            let number = match numbers.get(file) {
                Some(&number) => number,
                None if shards.len() == MAX_SHARDS => {
                    return Err(malformed("it names too many files".into()));
                }
                None => {
                    shards.push(Safetensors::open(&path.join(file))?);
                    numbers.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            shard_of.insert(tensor.clone(), number);
        }
        // The files may hold more than the index says; what the index says, they must hold.
        for (tensor, &number) in &shard_of {
            if !shards[number].has(tensor) {
                return Err(malformed(format!("its file for the tensor {tensor} doesn't have it")));
            }
        }
        Ok(Folder { path: path.to_path_buf(), shards, shard_of })
    }

    /// The architecture's numbers and the names this folder uses.
    pub(crate) fn config(&self) -> Result<(ModelConfig, Names), Error> {
        let path = self.path.join("config.json");
        config::read(self, &path, &read_json(&path)?)
    }

    fn has(&self, tensor: &str) -> bool {
        self.shard_of.contains_key(tensor)
    }

    fn shard(&self, tensor: &str) -> Option<&Safetensors> {
        self.shard_of.get(tensor).map(|&number| &self.shards[number])
    }
}

impl Weights for Folder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, Error> {
        self.shard(name).map_or(Ok(None), |shard| shard.tensor(name))
    }

    fn names(&self) -> Vec<&str> {
        self.shard_of.keys().map(String::as_str).collect()
    }

    fn still_whole(&self) -> bool {
        self.shards.iter().all(Safetensors::still_whole)
    }

    fn release(&self, name: &str) {
        if let Some(shard) = self.shard(name) {
            shard.release(name);
        }
    }

    fn hash_text(&self, hasher: &mut blake3::Hasher) -> Result<(), Error> {
        for name in TEXT_FILES {
            let path = self.path.join(name);
            let Ok(file) = File::open(&path) else { continue };
            let mut content = blake3::Hasher::new();
            content.update_reader(file).map_err(|source| Error::Io { path, source })?;
            hasher.update(name.as_bytes());
            hasher.update(content.finalize().as_bytes());
        }
        Ok(())
    }
}

/// A JSON file of sensible length.
fn read_json(path: &Path) -> Result<serde_json::Value, Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let malformed = |reason| Error::Malformed { path: path.to_path_buf(), reason };
    let mut text = Vec::new();
    File::open(path).map_err(io)?.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(malformed(format!("it is longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|e| malformed(format!("it is not JSON: {e}")))
}

/// A name that can't leave the folder, whichever system reads it.
fn is_plain_file_name(name: &str) -> bool {
    name.ends_with(".safetensors")
        && !name.starts_with('.')
        && !name.contains(['/', '\\', ':', '\0'])
        && name.len() <= 255
}

/// Why a folder has no weights that run, as helpfully as its contents allow.
fn no_weights(path: &Path) -> Error {
    let names: Vec<String> = std::fs::read_dir(path)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let pickle = names.iter().find(|name| super::is_pickle_name(name));
    if let Some(name) = pickle {
        return super::pickle_refused(&path.join(name));
    }
    if let Some(name) = names.iter().find(|name| name.ends_with(".gguf")) {
        return Error::Unsupported {
            path: path.to_path_buf(),
            what: "a folder of GGUF files".into(),
            supported: format!("the file itself: {}", path.join(name).display()),
        };
    }
    Error::Unsupported {
        path: path.to_path_buf(),
        what: "a folder without model.safetensors or model.safetensors.index.json".into(),
        supported: "a .gguf file, or a Hugging Face folder (config.json, tokenizer.json, *.safetensors)"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_of_an_index_stay_in_the_folder() {
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
        for name in
            ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "c:x.safetensors"]
        {
            assert!(!is_plain_file_name(name), "{name}");
        }
        assert!(!is_plain_file_name("pytorch_model.bin"));
        assert!(!is_plain_file_name(".safetensors"));
    }
}

//! The ways to say which model.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::{Catalog, Error};

/// Which model: a name, a place on the model hub, or a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// An entry of the catalog, by its name.
    Catalog(String),
    /// `hf:org/repo[@revision][/file]`: one file, or the repository's safetensors folder.
    HuggingFace {
        /// `org/repo`.
        repo: String,
        /// Branch, tag or commit; `main` where none was given.
        revision: String,
        /// A file in it.
        file: Option<String>,
    },
    /// A `.gguf` file or a Hugging Face folder on this machine.
    Path(PathBuf),
}

impl ModelRef {
    /// Reads what a user typed. Order: `hf:`, a catalog name, a path that exists.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] with near names, [`Error::BadReference`], [`Error::BadPath`].
    pub fn parse(text: &str, catalog: &Catalog) -> Result<ModelRef, Error> {
        let text = text.trim();
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hf(rest)
                .map_err(|reason| Error::BadReference { reference: text.to_string(), reason });
        }
        if let Some(entry) = catalog.find(text) {
            return Ok(ModelRef::Catalog(entry.name.clone()));
        }
        let path = Path::new(text);
        if path.exists() {
            return check_path(path).map(ModelRef::Path);
        }
        if text.contains(std::path::MAIN_SEPARATOR) || text.ends_with(".gguf") {
            let reason = if text.split('/').count() == 2 && !text.starts_with('.') && !text.ends_with(".gguf")
            {
                format!("no such file or folder; for a repository on the model hub write hf:{text}")
            } else {
                "no such file or folder".to_string()
            };
            return Err(Error::BadPath { path: path.to_path_buf(), reason });
        }
        Err(Error::UnknownModel { name: text.to_string(), near: catalog.near(text) })
    }

    /// The name a server shows for it: the catalog name, the repository, or the file's stem.
    pub fn short_name(&self) -> String {
        match self {
            ModelRef::Catalog(name) => name.clone(),
            ModelRef::HuggingFace { repo, file: None, .. } => repo.clone(),
            ModelRef::HuggingFace { file: Some(file), .. } => stem(Path::new(file)),
            ModelRef::Path(path) => stem(path),
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelRef::Catalog(name) => f.write_str(name),
            ModelRef::HuggingFace { repo, revision, file } => {
                write!(f, "hf:{repo}")?;
                if revision != "main" {
                    write!(f, "@{revision}")?;
                }
                file.as_ref().map_or(Ok(()), |file| write!(f, "/{file}"))
            }
            ModelRef::Path(path) => path.display().fmt(f),
        }
    }
}

fn stem(path: &Path) -> String {
    let resolved = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = if resolved.is_dir() { resolved.file_name() } else { resolved.file_stem() };
    name.map_or_else(|| "model".to_string(), |n| n.to_string_lossy().into_owned())
}

fn check_path(path: &Path) -> Result<PathBuf, Error> {
    let bad = |reason: &str| Err(Error::BadPath { path: path.to_path_buf(), reason: reason.to_string() });
    if path.is_dir() {
        if !path.join("config.json").is_file() {
            return bad(
                "this folder has no config.json; a Hugging Face folder holds config.json, tokenizer.json and *.safetensors (or name the .gguf file itself)",
            );
        }
    } else if path.extension().is_some_and(|e| e == "safetensors") {
        return bad("name the folder that holds it (with config.json and tokenizer.json), not the file");
    }
    Ok(path.to_path_buf())
}

fn parse_hf(rest: &str) -> Result<ModelRef, String> {
    const SHAPE: &str = "write hf:org/repo, hf:org/repo/file.gguf or hf:org/repo@revision/file.gguf";
    let mut parts = rest.splitn(3, '/');
    let org = parts.next().unwrap_or("");
    let repo = parts.next().ok_or_else(|| SHAPE.to_string())?;
    let file = parts.next().filter(|f| !f.is_empty());
    let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
    for (what, value) in [("organisation", org), ("repository", repo), ("revision", revision)] {
        if !hub_name(value) {
            return Err(format!("{value:?} is no {what}; {SHAPE}"));
        }
    }
    if let Some(file) = file {
        safe_relative(file).ok_or_else(|| format!("{file:?} is no file in a repository; {SHAPE}"))?;
    }
    Ok(ModelRef::HuggingFace {
        repo: format!("{org}/{repo}"),
        revision: revision.to_string(),
        file: file.map(str::to_string),
    })
}

/// Organisations, repositories and revisions: what the hub allows, and nothing that a path or URL would read otherwise.
fn hub_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with(['.', '-'])
        && !name.contains("..")
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// A repository's file name as a relative path that stays below where it is put, or nothing.
pub(crate) fn safe_relative(name: &str) -> Option<PathBuf> {
    let fine = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.len() <= 255
            && !part.contains(['\\', ':', '\0'])
            && !part.chars().any(char::is_control)
    };
    (!name.is_empty() && name.len() <= 1024 && name.split('/').all(fine)).then(|| name.split('/').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelRef, Error> {
        ModelRef::parse(text, Catalog::builtin())
    }

    #[test]
    fn names_repositories_and_paths_are_told_apart() {
        assert_eq!(parse("SMOLLM2-135m-instruct").unwrap().to_string(), "smollm2-135m-instruct");
        let hf = parse("hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf").unwrap();
        assert_eq!(hf.short_name(), "Qwen3-0.6B-Q8_0");
        assert_eq!(parse("hf:org/repo@v1").unwrap().to_string(), "hf:org/repo@v1");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("some.gguf");
        std::fs::write(&file, b"GGUF").unwrap();
        assert_eq!(parse(file.to_str().unwrap()).unwrap(), ModelRef::Path(file));
        assert!(matches!(parse(folder.path().to_str().unwrap()), Err(Error::BadPath { .. })));
        std::fs::write(folder.path().join("config.json"), b"{}").unwrap();
        assert!(parse(folder.path().to_str().unwrap()).is_ok());
    }

    #[test]
    fn a_near_name_is_offered() {
        let text = parse("smollm2").unwrap_err().to_string();
        assert!(text.contains("did you mean smollm2-135m-instruct?"), "{text}");
        let text = parse("Qwen/Qwen3-0.6B").unwrap_err().to_string();
        assert!(text.contains("hf:Qwen/Qwen3-0.6B"), "{text}");
    }

    #[test]
    fn references_that_would_leave_the_cache_or_the_url_are_refused() {
        for bad in [
            "hf:",
            "hf:org",
            "hf:/repo",
            "hf:../repo",
            "hf:org/..",
            "hf:org/repo/../../x",
            "hf:org/repo//x",
            "hf:org/repo/a\\b",
            "hf:o rg/repo",
            "hf:org/repo@a?b",
            "hf:org/re#po",
            "hf:org/repo/x\n",
        ] {
            // A trailing newline is trimmed by parse; give it to the parser itself.
            assert!(parse_hf(&bad[3..]).is_err(), "{bad}");
        }
        assert!(safe_relative("sub/model.safetensors").is_some());
        assert!(safe_relative("/etc/passwd").is_none());
    }
}

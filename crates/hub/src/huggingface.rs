//! A model hub that speaks Hugging Face's HTTP API: what a repository holds, and which of it a model needs.
//!
//! The listing pins the commit, so that all files are of one revision, and states the SHA-256 of every large file.

use serde_json::Value;

use crate::download::Failure;
use crate::http::{Http, host};
use crate::reference::safe_relative;

/// What a repository holds at one commit.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) licence: Option<String>,
    pub(crate) files: Vec<RemoteFile>,
}

/// One file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) path: String,
    pub(crate) bytes: Option<u64>,
    /// Stated for large files only; small ones are kept in git itself.
    pub(crate) sha256: Option<String>,
}

/// Small files that a folder of safetensors may come with.
const SIDE_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The address of a file's bytes.
pub(crate) fn file_url(endpoint: &str, repo: &str, revision: &str, path: &str) -> String {
    format!("{}/{repo}/resolve/{revision}/{}", endpoint.trim_end_matches('/'), escape(path))
}

/// Asks what `repo` holds.
pub(crate) fn list(
    http: &Http,
    endpoint: &str,
    repo: &str,
    revision: &str,
    authorization: Option<&str>,
) -> Result<Listing, Failure> {
    let url = format!("{}/api/models/{repo}/revision/{revision}?blobs=true", endpoint.trim_end_matches('/'));
    let mut headers = vec![("accept", "application/json")];
    headers.extend(authorization.map(|value| ("authorization", value)));
    let (body, _) = http.small(&url, &headers, 32 << 20)?;
    parse(&body).ok_or_else(|| Failure::Source(format!("{} sent no listing of {repo}", host(&url))))
}

fn parse(body: &[u8]) -> Option<Listing> {
    let listing: Value = serde_json::from_slice(body).ok()?;
    let commit = listing["sha"].as_str().filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()))?.to_string();
    let licence = listing["cardData"]["license"].as_str().map(str::to_string);
    let files = listing["siblings"]
        .as_array()?
        .iter()
        .filter_map(|f| {
            Some(RemoteFile {
                path: f["rfilename"].as_str()?.to_string(),
                bytes: f["size"].as_u64().or_else(|| f["lfs"]["size"].as_u64()),
                sha256: f["lfs"]["sha256"].as_str().map(str::to_lowercase).filter(|s| s.len() == 64),
            })
        })
        .collect();
    Some(Listing { commit, licence, files })
}

impl Listing {
    /// The file with this path, held to the rule that it stays below the folder it is put in.
    pub(crate) fn find(&self, path: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|f| f.path == path && safe_relative(path).is_some())
    }

    /// What `hf:org/repo` without a file means: a safetensors folder, or the one `.gguf` file.
    pub(crate) fn choose(&self, repo: &str) -> Result<Choice, String> {
        if self.find("config.json").is_some()
            && self.files.iter().any(|f| f.path.ends_with(".safetensors") && !f.path.contains('/'))
        {
            let mut files: Vec<RemoteFile> = ["config.json"]
                .iter()
                .chain(&SIDE_FILES)
                .filter_map(|name| self.find(name).cloned())
                .collect();
            let sharded = self.find(INDEX).cloned();
            match (&sharded, self.find("model.safetensors")) {
                (Some(index), _) => files.push(index.clone()),
                (None, Some(weights)) => files.push(weights.clone()),
                (None, None) => {
                    return Err(format!("{repo} has safetensors but neither model.safetensors nor {INDEX}"));
                }
            }
            return Ok(Choice::Folder { files, sharded: sharded.is_some() });
        }
        let ggufs: Vec<&RemoteFile> = self.files.iter().filter(|f| f.path.ends_with(".gguf")).collect();
        match ggufs.as_slice() {
            [] => Err(format!("{repo} has no .gguf file and no config.json with safetensors")),
            [one] if safe_relative(&one.path).is_some() => Ok(Choice::File((*one).clone())),
            many => {
                let names: Vec<String> =
                    many.iter().take(12).map(|f| format!("hf:{repo}/{}", f.path)).collect();
                Err(format!("{repo} holds {} .gguf files; name one: {}", many.len(), names.join(", ")))
            }
        }
    }

    /// The shards that an index names, each of which must be in the listing.
    pub(crate) fn shards(&self, index: &[u8]) -> Result<Vec<RemoteFile>, String> {
        let index: Value = serde_json::from_slice(index).map_err(|e| format!("{INDEX}: {e}"))?;
        let map = index["weight_map"].as_object().ok_or_else(|| format!("{INDEX} has no weight_map"))?;
        let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
            .into_iter()
            .map(|name| {
                self.find(name)
                    .cloned()
                    .ok_or_else(|| format!("{INDEX} names {name:?}, which the repository lacks"))
            })
            .collect()
    }
}

/// What a repository offers as a model.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// One `.gguf` file.
    File(RemoteFile),
    /// A folder; where `sharded`, the weights are what the index names.
    Folder {
        /// Files to fetch.
        files: Vec<RemoteFile>,
        /// Whether an index among them names more.
        sharded: bool,
    },
}

/// Percent-encodes a path, keeping its slashes.
fn escape(path: &str) -> String {
    path.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                (b as char).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(files: &[&str]) -> Listing {
        let siblings: Vec<Value> =
            files.iter().map(|f| serde_json::json!({ "rfilename": f, "size": 1 })).collect();
        parse(&serde_json::to_vec(&serde_json::json!({ "sha": "abc", "siblings": siblings })).unwrap())
            .unwrap()
    }

    #[test]
    fn a_folder_takes_what_a_model_needs_and_nothing_else() {
        let l = listing(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "pytorch_model.bin",
        ]);
        let Ok(Choice::Folder { files, sharded: false }) = l.choose("o/r") else { panic!() };
        let names: Vec<_> = files.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(names, ["config.json", "tokenizer.json", "model.safetensors"]);
    }

    #[test]
    fn one_gguf_is_taken_and_several_are_listed() {
        assert!(matches!(listing(&["a.gguf", "README.md"]).choose("o/r"), Ok(Choice::File(_))));
        let text = listing(&["a.gguf", "b.gguf"]).choose("o/r").unwrap_err();
        assert!(text.contains("hf:o/r/b.gguf"), "{text}");
        assert!(listing(&["../a.gguf"]).choose("o/r").is_err());
    }

    #[test]
    fn an_index_can_name_only_what_is_listed() {
        let l = listing(&["config.json", INDEX, "model-1.safetensors", "../x.safetensors"]);
        assert_eq!(
            l.shards(br#"{"weight_map":{"a":"model-1.safetensors","b":"model-1.safetensors"}}"#)
                .unwrap()
                .len(),
            1
        );
        assert!(l.shards(br#"{"weight_map":{"a":"../x.safetensors"}}"#).is_err());
        assert!(l.shards(br#"{"weight_map":{"a":"/etc/passwd"}}"#).is_err());
        assert!(l.shards(b"[]").is_err());
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(
            file_url("https://h/", "o/r", "main", "a b/c#.gguf"),
            "https://h/o/r/resolve/main/a%20b/c%23.gguf"
        );
    }
}

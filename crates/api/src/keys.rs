//! API keys as they are stored and handed to the gateway: never the secret, only its hash.

use serde::{Deserialize, Serialize};

/// One API key and what its bearer may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyRecord {
    /// Names the key in logs, metrics and `consort key revoke`; no secret.
    pub id: String,
    /// Whose it is, for people.
    #[serde(default)]
    pub name: String,
    /// BLAKE3 of the secret's bytes, as 64 lower-case hexadecimal digits.
    pub hash: String,
    /// What its bearer may do.
    #[serde(default)]
    pub limits: KeyLimits,
    /// Seconds since 1970: when it was made.
    #[serde(default)]
    pub created: u64,
}

/// Limits of one key. Absent means without limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyLimits {
    /// Requests in any minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Tokens in any minute, prompt and answer together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Requests at one time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Its share where requests have to wait: a key of weight 2 gets twice the tokens of a key of weight 1.
    pub weight: u32,
    /// Models it may ask; empty means all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
}

impl Default for KeyLimits {
    fn default() -> KeyLimits {
        KeyLimits {
            requests_per_minute: None,
            tokens_per_minute: None,
            concurrency: None,
            weight: 1,
            models: Vec::new(),
        }
    }
}

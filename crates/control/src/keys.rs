//! API keys: made here, shown once, kept as hashes.
//!
//! A key is `sk-consort-` and 48 hexadecimal digits from the system's random numbers. 192 random bits need no slow
//! hash: nobody guesses them, and a gateway checks one with every request.

use std::time::{SystemTime, UNIX_EPOCH};

use consort_api::{ApiKeyRecord, KeyLimits};

/// Longest name of a key, in bytes.
const MOST_NAME: usize = 128;

/// Why no key was made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The name can't be meant.
    #[error("a key's name must have 1 to {MOST_NAME} bytes and no control characters")]
    Name,
    /// A limit of zero would make a key that can do nothing.
    #[error("{0} must be at least 1; a key that may do nothing is one that was revoked")]
    Zero(&'static str),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A new key: what its bearer is told, once, and what is stored.
pub struct Minted {
    /// The secret.
    pub secret: String,
    /// Without the secret.
    pub record: ApiKeyRecord,
}

/// Makes a key.
///
/// # Errors
/// [`KeyError`]
pub fn mint(name: &str, limits: KeyLimits) -> Result<Minted, KeyError> {
    if name.trim().is_empty() || name.len() > MOST_NAME || name.chars().any(char::is_control) {
        return Err(KeyError::Name);
    }
    let zero = [
        ("requests-per-minute", limits.requests_per_minute == Some(0)),
        ("tokens-per-minute", limits.tokens_per_minute == Some(0)),
        ("concurrency", limits.concurrency == Some(0)),
        ("weight", limits.weight == 0),
    ];
    if let Some((field, _)) = zero.into_iter().find(|(_, is_zero)| *is_zero) {
        return Err(KeyError::Zero(field));
    }
    let secret = secret().map_err(KeyError::Random)?;
    let mut id = [0u8; 6];
    getrandom::fill(&mut id).map_err(KeyError::Random)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let record = ApiKeyRecord {
        id: format!("key-{}", hex(&id)),
        name: name.to_owned(),
        hash: blake3::hash(secret.as_bytes()).to_hex().to_string(),
        limits,
        created,
    };
    Ok(Minted { secret, record })
}

/// 192 random bits as a key that nobody has seen.
///
/// # Errors
/// Where the system gives no random numbers.
pub fn secret() -> Result<String, getrandom::Error> {
    let mut bytes = [0u8; 24];
    getrandom::fill(&mut bytes)?;
    Ok(format!("sk-consort-{}", hex(&bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_holds_the_hash_and_nothing_of_the_secret() {
        let minted = mint("alice", KeyLimits::default()).unwrap();
        let stored = serde_json::to_string(&minted.record).unwrap();
        assert!(!stored.contains(&minted.secret["sk-consort-".len()..]));
        assert_eq!(minted.record.hash, blake3::hash(minted.secret.as_bytes()).to_hex().to_string());
        assert_eq!(minted.secret.len(), 11 + 48);
        let other = mint("alice", KeyLimits::default()).unwrap();
        assert!(other.secret != minted.secret && other.record.id != minted.record.id);
    }

    #[test]
    fn keys_that_cannot_be_meant_are_refused() {
        for name in ["", " ", "a\nb", &"x".repeat(129)] {
            assert!(matches!(mint(name, KeyLimits::default()), Err(KeyError::Name)), "{name:?}");
        }
        let nothing = KeyLimits { requests_per_minute: Some(0), ..KeyLimits::default() };
        assert!(matches!(mint("a", nothing), Err(KeyError::Zero("requests-per-minute"))));
    }
}

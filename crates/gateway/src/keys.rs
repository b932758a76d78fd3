//! API keys, replaced live: who asks, and what of its limits is left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use consort_api::{ApiKeyRecord, KeyLimits};
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};

use crate::error::{Outcome, Refusal};
use crate::policy::limits::{Exceeded, Left, Use, written};
use crate::telemetry::Usual;

/// A stored key is unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the API key {id:?} has no proper hash: 64 hexadecimal digits of its secret's BLAKE3 are needed")]
pub struct KeyError {
    /// The key's id.
    pub id: String,
}

/// One key.
pub(crate) struct Key {
    pub(crate) id: String,
    pub(crate) limits: KeyLimits,
    /// What it is counted by.
    pub(crate) usual: Usual,
    /// Shared with what the key was before its limits changed.
    used: Arc<Mutex<Use>>,
}

/// All keys.
#[derive(Default)]
struct Ring {
    required: bool,
    /// By the secret's hash: finding one takes the same time whatever part of the hash is right.
    by_hash: HashMap<[u8; 32], Arc<Key>>,
}

/// All keys, live.
#[derive(Default)]
pub(crate) struct Keys(RwLock<Arc<Ring>>);

impl Key {
    fn used(&self) -> MutexGuard<'_, Use> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a request of about `tokens`.
    ///
    /// # Errors
    /// 429 where a limit is reached.
    pub(crate) fn take(&self, now: Instant, tokens: u64) -> Outcome<()> {
        let refused = |message: String, retry: Duration| {
            Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message)
                .retry_after(retry))
        };
        let taken = self.used().take(now, tokens);
        match taken {
            Ok(()) => Ok(()),
            Err(Exceeded::Requests { limit, retry }) => refused(
                format!("this API key may send {limit} requests a minute; try again in {}", written(retry)),
                retry,
            ),
            Err(Exceeded::Tokens { limit, wanted, retry }) => refused(
                format!(
                    "this API key may use {limit} tokens a minute, and this request may need {wanted}; try again in {}, or \
                     with a smaller max_tokens",
                    written(retry)
                ),
                retry,
            ),
            Err(Exceeded::Concurrency { limit }) => {
                let message =
                    format!("this API key may have {limit} requests at one time; wait for one of them");
                refused(message, Duration::from_secs(1))
            }
        }
    }

    /// The request is over.
    pub(crate) fn settle(&self, now: Instant, estimate: u64, actual: u64) {
        self.used().settle(now, estimate, actual);
    }

    /// The `x-ratelimit-*` headers, as OpenAI names them.
    pub(crate) fn headers(&self, now: Instant, headers: &mut HeaderMap) {
        const REQUESTS: [HeaderName; 3] = [
            HeaderName::from_static("x-ratelimit-limit-requests"),
            HeaderName::from_static("x-ratelimit-remaining-requests"),
            HeaderName::from_static("x-ratelimit-reset-requests"),
        ];
        const TOKENS: [HeaderName; 3] = [
            HeaderName::from_static("x-ratelimit-limit-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-tokens"),
            HeaderName::from_static("x-ratelimit-reset-tokens"),
        ];
        let (requests, tokens) = self.used().remaining(now);
        for (left, names) in [(requests, REQUESTS), (tokens, TOKENS)] {
            let Some(Left { limit, remaining, reset }) = left else { continue };
            let [limits, remains, resets] = names;
            headers.insert(limits, HeaderValue::from(limit));
            headers.insert(remains, HeaderValue::from(remaining));
            if let Ok(reset) = HeaderValue::from_str(&written(reset)) {
                headers.insert(resets, reset);
            }
        }
    }

    /// Whether it may ask this model.
    pub(crate) fn allows(&self, model: &str) -> bool {
        self.limits.models.is_empty() || self.limits.models.iter().any(|allowed| allowed == model)
    }
}

impl Keys {
    fn ring(&self) -> Arc<Ring> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces all keys. What a key has used stays used.
    pub(crate) fn replace(&self, records: &[ApiKeyRecord], required: bool) -> Result<(), KeyError> {
        let (before, now) = (self.ring(), Instant::now());
        let mut by_hash = HashMap::with_capacity(records.len());
        for record in records {
            let wrong = |_| KeyError { id: record.id.clone() };
            let hash = *blake3::Hash::from_hex(&record.hash).map_err(wrong)?.as_bytes();
            let known = before.by_hash.get(&hash).map(|key| key.used.clone());
            let used = known.unwrap_or_else(|| Arc::new(Mutex::new(Use::new(now, &record.limits))));
            used.lock().unwrap_or_else(PoisonError::into_inner).change(now, &record.limits);
            let key =
                Key { id: record.id.clone(), limits: record.limits.clone(), usual: Usual::default(), used };
            by_hash.insert(hash, Arc::new(key));
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Ring { required, by_hash });
        Ok(())
    }

    /// Whether nobody may ask without one.
    pub(crate) fn required(&self) -> bool {
        self.ring().required
    }

    /// Who asks; none where nobody says who and nobody has to.
    ///
    /// # Errors
    /// 401 where a key is needed and there is none, or a wrong one.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Outcome<Option<Arc<Key>>> {
        let unauthorized = |message: &str| Refusal::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
        let ring = self.ring();
        let Some(header) = headers.get(AUTHORIZATION) else {
            return if ring.required {
                Err(unauthorized("an API key is needed: send the header Authorization: Bearer KEY"))
            } else {
                Ok(None)
            };
        };
        let presented = header.to_str().ok().and_then(|h| {
            let (scheme, token) = h.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let key = presented.and_then(|token| ring.by_hash.get(blake3::hash(token.as_bytes()).as_bytes()));
        match (key, presented) {
            (Some(key), _) => Ok(Some(key.clone())),
            // Clients that can't do without a key send anything; where none is needed, none is wrong.
            (None, _) if !ring.required => Ok(None),
            (None, Some(_)) => Err(unauthorized("the API key is wrong")),
            (None, None) => Err(unauthorized("the Authorization header must read Bearer KEY")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, secret: &str, limits: KeyLimits) -> ApiKeyRecord {
        let hash = blake3::hash(secret.as_bytes()).to_hex().to_string();
        ApiKeyRecord { id: id.to_owned(), name: String::new(), hash, limits, created: 0 }
    }

    fn bearing(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn keys_are_known_by_their_secret_and_replaced_live() {
        let keys = Keys::default();
        assert!(keys.check(&HeaderMap::new()).unwrap().is_none());
        assert!(keys.check(&bearing("Bearer anything")).unwrap().is_none());
        let limits = KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() };
        keys.replace(&[record("a", "sk-a", limits.clone())], true).unwrap();
        let key = keys.check(&bearing("bearer sk-a")).unwrap().unwrap();
        assert_eq!(key.id, "a");
        for wrong in ["Bearer sk-b", "sk-a", "Basic sk-a", "Bearer"] {
            assert_eq!(keys.check(&bearing(wrong)).err().unwrap().status, 401, "{wrong}");
        }
        assert_eq!(keys.check(&HeaderMap::new()).err().unwrap().status, 401);
        let now = Instant::now();
        key.take(now, 1).unwrap();
        keys.replace(&[record("a", "sk-a", limits)], true).unwrap();
        let key = keys.check(&bearing("Bearer sk-a")).unwrap().unwrap();
        key.take(now, 1).unwrap();
        let refused = key.take(now, 1).unwrap_err();
        assert_eq!(refused.status, 429);
        assert!(refused.message.contains("2 requests a minute"), "{}", refused.message);
        let mut headers = HeaderMap::new();
        key.headers(now, &mut headers);
        assert_eq!(headers["x-ratelimit-limit-requests"], "2");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "0");
        assert_eq!(headers["x-ratelimit-reset-requests"], "1m0s");
        let bad = ApiKeyRecord { hash: "short".to_owned(), ..record("b", "", KeyLimits::default()) };
        assert!(keys.replace(&[bad], true).is_err());
        assert!(keys.check(&bearing("Bearer sk-a")).unwrap().is_some(), "a bad list changes nothing");
    }
}

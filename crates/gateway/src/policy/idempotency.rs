//! Which requests with an `Idempotency-Key` are repeats: of one that runs, or of one that is done.
//!
//! A key belongs to the client that sent it. The same key with the same body is a repeat, with another body a mistake
//! of the client's. Keys are kept for a day, within bounds of count and bytes; past them the oldest that is done goes.
//! What failed is forgotten: a repeat of it is a new try.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// How long and how much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdempotencySettings {
    /// A key lives this long.
    pub lifetime: Duration,
    /// Keys at one time.
    pub max_keys: usize,
    /// Bytes of stored answers.
    pub max_bytes: usize,
}

impl Default for IdempotencySettings {
    fn default() -> IdempotencySettings {
        IdempotencySettings {
            lifetime: Duration::from_secs(24 * 3600),
            max_keys: 100_000,
            max_bytes: 64 << 20,
        }
    }
}

/// Whose key, and which.
pub(crate) type Id = (String, String);

/// What a request is.
#[derive(Debug, PartialEq)]
pub(crate) enum Lookup<T> {
    /// The first with its key; what was offered is kept for repeats.
    New,
    /// A repeat of this.
    Repeat(T),
    /// Another body under the same key.
    Mismatch,
    /// More keys run than are kept.
    Full,
}

#[derive(Debug)]
struct Entry<T> {
    body: [u8; 32],
    what: T,
    number: u64,
    at: Instant,
    /// Bytes, once it is done.
    done: Option<usize>,
}

/// The keys.
#[derive(Debug)]
pub(crate) struct Idempotency<T> {
    entries: HashMap<Id, Entry<T>>,
    /// Oldest first.
    order: BTreeMap<u64, Id>,
    next: u64,
    bytes: usize,
}

impl<T> Default for Idempotency<T> {
    fn default() -> Idempotency<T> {
        Idempotency { entries: HashMap::new(), order: BTreeMap::new(), next: 0, bytes: 0 }
    }
}

impl<T: Clone> Idempotency<T> {
    /// A request came; `body` is its hash.
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        id: &Id,
        body: [u8; 32],
        what: &T,
        settings: &IdempotencySettings,
    ) -> Lookup<T> {
        while let Some((_, oldest)) = self.order.first_key_value()
            && self.entries.get(oldest).is_some_and(|entry| now - entry.at >= settings.lifetime)
        {
            let oldest = oldest.clone();
            self.forget(&oldest);
        }
        match self.entries.get(id) {
            Some(entry) if entry.body == body => return Lookup::Repeat(entry.what.clone()),
            Some(_) => return Lookup::Mismatch,
            None => {}
        }
        while self.entries.len() >= settings.max_keys.max(1) {
            if !self.evict() {
                return Lookup::Full;
            }
        }
        self.order.insert(self.next, id.clone());
        self.entries
            .insert(id.clone(), Entry { body, what: what.clone(), number: self.next, at: now, done: None });
        self.next += 1;
        Lookup::New
    }

    /// It is answered, in so many bytes.
    pub(crate) fn done(&mut self, id: &Id, bytes: usize, settings: &IdempotencySettings) {
        if let Some(entry) = self.entries.get_mut(id)
            && entry.done.is_none()
        {
            entry.done = Some(bytes);
            self.bytes += bytes;
        }
        while self.bytes > settings.max_bytes && self.evict() {}
    }

    /// It failed.
    pub(crate) fn forget(&mut self, id: &Id) {
        if let Some(entry) = self.entries.remove(id) {
            self.order.remove(&entry.number);
            self.bytes -= entry.done.unwrap_or(0);
        }
    }

    /// Drops the oldest that is done.
    fn evict(&mut self) -> bool {
        let oldest =
            self.order.values().find(|id| self.entries.get(*id).is_some_and(|e| e.done.is_some())).cloned();
        oldest.is_some_and(|id| {
            self.forget(&id);
            true
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(key: &str) -> Id {
        ("client".to_owned(), key.to_owned())
    }

    #[test]
    fn repeats_are_known_and_mistakes_told() {
        let (now, settings) = (Instant::now(), IdempotencySettings::default());
        let mut keys = Idempotency::default();
        let mut begin = |now, key: &str, body, what| keys.begin(now, &id(key), [body; 32], &what, &settings);
        assert_eq!(begin(now, "a", 1, 10), Lookup::New);
        assert_eq!(begin(now, "a", 1, 11), Lookup::Repeat(10));
        assert_eq!(begin(now, "a", 2, 12), Lookup::Mismatch);
        assert_eq!(begin(now + Duration::from_secs(86_399), "a", 1, 13), Lookup::Repeat(10));
        assert_eq!(begin(now + Duration::from_secs(86_400), "a", 1, 14), Lookup::New, "a day later");
        keys.forget(&id("a"));
        assert_eq!(keys.begin(now, &id("a"), [1; 32], &15, &settings), Lookup::New);
    }

    #[test]
    fn bounds_hold_and_what_runs_stays() {
        let now = Instant::now();
        let settings = IdempotencySettings { max_keys: 3, max_bytes: 100, ..IdempotencySettings::default() };
        let mut keys = Idempotency::default();
        for key in ["a", "b", "c"] {
            assert_eq!(keys.begin(now, &id(key), [0; 32], &0, &settings), Lookup::New);
        }
        assert_eq!(keys.begin(now, &id("d"), [0; 32], &0, &settings), Lookup::Full);
        keys.done(&id("b"), 60, &settings);
        assert_eq!(keys.begin(now, &id("d"), [0; 32], &0, &settings), Lookup::New);
        assert!(!keys.entries.contains_key(&id("b")) && keys.entries.contains_key(&id("a")));
        keys.done(&id("a"), 60, &settings);
        keys.done(&id("c"), 60, &settings);
        assert!(!keys.entries.contains_key(&id("a")), "the oldest answer makes room");
        assert_eq!(keys.bytes, 60);
    }
}

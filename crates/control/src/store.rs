//! What outlasts a process: API keys, rollouts, counters, and which children were running.
//!
//! One redb file in the state folder. Every write is a transaction that is on disk before the call returns, so a
//! process that dies in one leaves the state before or the state after. redb locks the file for one process; others
//! ask the process that holds it (see [`StoreError::InUse`]).
//!
//! Values are JSON: they are few, and a later version reads what an earlier one wrote.

use std::path::{Path, PathBuf};

use consort_api::ApiKeyRecord;
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The file's name within the state folder.
pub const FILE: &str = "state.redb";

/// Keys that are kept at most: a gateway holds them all in memory.
pub const MOST_KEYS: usize = 10_000;

const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");
const CHILDREN: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("children");
const ROLLOUTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rollouts");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

/// Why the store couldn't do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("{} is in use by another `consort up`; end that one, or name another state folder in CONSORT_STATE", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The folder can't be made or used.
    #[error("can't use the state folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is damaged, or the disk fails.
    #[error("the state in {} can't be read or written: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// There are too many keys.
    #[error("there are {MOST_KEYS} keys already; revoke some")]
    TooManyKeys,
}

/// A child process that was started, so that it can be found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    /// Its process id, which the system gives to another one later.
    pub pid: u32,
    /// When it began, as [`crate::process::identity`] tells it: a pid with another beginning is another process.
    pub began: String,
}

/// The store. Calls block for as long as the disk takes.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
}

impl Store {
    /// Opens the store in `folder`, made where it is missing (readable by its owner alone).
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn open(folder: &Path) -> Result<Store, StoreError> {
        private_folder(folder).map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let path = folder.join(FILE);
        let broken = |reason: String| StoreError::Broken { path: path.clone(), reason };
        let database = Database::create(&path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.clone() },
            other => broken(other.to_string()),
        })?;
        let store = Store { database, path: path.clone() };
        // Reading a table that was never written is an error; so all of them exist from the beginning.
        store.write(|write| {
            write.open_table(KEYS)?;
            write.open_table(CHILDREN)?;
            write.open_table(ROLLOUTS)?;
            write.open_table(COUNTERS)?;
            Ok(())
        })?;
        Ok(store)
    }

    fn broken(&self, reason: impl ToString) -> StoreError {
        StoreError::Broken { path: self.path.clone(), reason: reason.to_string() }
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let write = self.database.begin_write().map_err(|e| self.broken(e))?;
        let result = change(&write).map_err(|e| self.broken(e))?;
        write.commit().map_err(|e| self.broken(e))?;
        Ok(result)
    }

    fn all<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &str, &[u8]>,
    ) -> Result<Vec<(String, T)>, StoreError> {
        let read = self.database.begin_read().map_err(|e| self.broken(e))?;
        let table = read.open_table(table).map_err(|e| self.broken(e))?;
        let mut all = Vec::new();
        for entry in table.iter().map_err(|e| self.broken(e))? {
            let (name, value) = entry.map_err(|e| self.broken(e))?;
            let value = serde_json::from_slice(value.value()).map_err(|e| self.broken(e))?;
            all.push((name.value().to_owned(), value));
        }
        Ok(all)
    }

    fn put(
        &self,
        table: TableDefinition<'_, &str, &[u8]>,
        name: &str,
        value: &impl Serialize,
    ) -> Result<(), StoreError> {
        let json = serde_json::to_vec(value).map_err(|e| self.broken(e))?;
        self.write(|write| {
            write.open_table(table)?.insert(name, json.as_slice())?;
            Ok(())
        })
    }

    fn delete(&self, table: TableDefinition<'_, &str, &[u8]>, name: &str) -> Result<bool, StoreError> {
        self.write(|write| Ok(write.open_table(table)?.remove(name)?.is_some()))
    }

    /// All keys, the oldest first.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn keys(&self) -> Result<Vec<ApiKeyRecord>, StoreError> {
        let mut keys: Vec<ApiKeyRecord> = self.all(KEYS)?.into_iter().map(|(_, key)| key).collect();
        keys.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(keys)
    }

    /// Keeps a key.
    ///
    /// # Errors
    /// [`StoreError::TooManyKeys`], [`StoreError::Broken`]
    pub fn add_key(&self, key: &ApiKeyRecord) -> Result<(), StoreError> {
        if self.keys()?.len() >= MOST_KEYS {
            return Err(StoreError::TooManyKeys);
        }
        self.put(KEYS, &key.id, key)
    }

    /// Forgets a key; whether there was one.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn revoke_key(&self, id: &str) -> Result<bool, StoreError> {
        self.delete(KEYS, id)
    }

    /// The children noted.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn children(&self) -> Result<Vec<(String, Child)>, StoreError> {
        self.all(CHILDREN)
    }

    /// Notes a child that was started.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn note_child(&self, id: &str, child: &Child) -> Result<(), StoreError> {
        self.put(CHILDREN, id, child)
    }

    /// Forgets a child that is gone.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn forget_child(&self, id: &str) -> Result<(), StoreError> {
        self.delete(CHILDREN, id).map(|_| ())
    }

    /// A rollout's state, as whoever runs it wrote it.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn rollouts(&self) -> Result<Vec<(String, serde_json::Value)>, StoreError> {
        self.all(ROLLOUTS)
    }

    /// Keeps a rollout's state under its model's name; `None` forgets it.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn set_rollout(&self, model: &str, state: Option<&serde_json::Value>) -> Result<(), StoreError> {
        match state {
            Some(state) => self.put(ROLLOUTS, model, state),
            None => self.delete(ROLLOUTS, model).map(|_| ()),
        }
    }

    /// Adds to counters, all in one transaction, and returns what they have come to.
    ///
    /// # Errors
    /// [`StoreError::Broken`]
    pub fn count(&self, add: &[(&str, u64)]) -> Result<Vec<u64>, StoreError> {
        self.write(|write| {
            let mut table = write.open_table(COUNTERS)?;
            let mut totals = Vec::with_capacity(add.len());
            for (name, by) in add {
                let before = table.get(*name)?.map_or(0, |value| value.value());
                let total = before.saturating_add(*by);
                table.insert(*name, total)?;
                totals.push(total);
            }
            Ok(totals)
        })
    }
}

fn private_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use consort_api::KeyLimits;

    use super::*;

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let minted = crate::keys::mint("alice", KeyLimits::default()).unwrap();
        let child = Child { pid: 7, began: "then".into() };
        {
            let store = Store::open(&state).unwrap();
            store.add_key(&minted.record).unwrap();
            store.note_child("chat-0.1", &child).unwrap();
            store.set_rollout("chat", Some(&serde_json::json!({"weight": 5}))).unwrap();
            assert_eq!(store.count(&[("restarts", 2)]).unwrap(), [2]);
            assert!(matches!(Store::open(&state), Err(StoreError::InUse { .. })));
        }
        let store = Store::open(&state).unwrap();
        assert_eq!(store.keys().unwrap(), std::slice::from_ref(&minted.record));
        assert_eq!(store.children().unwrap(), [("chat-0.1".to_owned(), child)]);
        assert_eq!(store.rollouts().unwrap()[0].1["weight"], 5);
        assert_eq!(store.count(&[("restarts", 1), ("other", 0)]).unwrap(), [3, 0]);
        assert!(store.revoke_key(&minted.record.id).unwrap());
        assert!(!store.revoke_key(&minted.record.id).unwrap());
        store.forget_child("chat-0.1").unwrap();
        assert!(store.keys().unwrap().is_empty() && store.children().unwrap().is_empty());
    }

    #[test]
    fn the_secret_is_nowhere_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let minted = crate::keys::mint("alice", KeyLimits::default()).unwrap();
        Store::open(folder.path()).unwrap().add_key(&minted.record).unwrap();
        let bytes = std::fs::read(folder.path().join(FILE)).unwrap();
        let holds = |text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
        assert!(holds(&minted.record.hash) && !holds(&minted.secret["sk-consort-".len()..]));
    }

    #[test]
    fn damage_is_an_error_and_no_panic() {
        let folder = tempfile::tempdir().unwrap();
        Store::open(folder.path()).unwrap();
        let path = folder.path().join(FILE);
        let good = std::fs::read(&path).unwrap();
        for (at, value) in [(0, 0), (9, 0xff), (64, 0xff), (good.len() - 1, 0xff)] {
            let mut bad = good.clone();
            bad[at] = value;
            std::fs::write(&path, &bad).unwrap();
            let _ = Store::open(folder.path());
        }
        std::fs::write(&path, b"this is no database").unwrap();
        let error = Store::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }
}

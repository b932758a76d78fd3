//! Which groups have been there: a number below which all have, and those above it.
//!
//! Groups are handed out nearly in order, so the list stays as short as there are groups in flight, however long a job.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// A set of groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    below: u64,
    above: BTreeSet<u64>,
}

impl Seen {
    /// All groups below `below`.
    pub fn below(below: u64) -> Seen {
        Seen { below, above: BTreeSet::new() }
    }

    /// Whether `group` is among them.
    pub fn contains(&self, group: u64) -> bool {
        group < self.below || self.above.contains(&group)
    }

    /// Takes a group in; `false` if it was there.
    pub fn insert(&mut self, group: u64) -> bool {
        if self.contains(group) {
            return false;
        }
        self.above.insert(group);
        while self.above.remove(&self.below) {
            self.below += 1;
        }
        true
    }

    /// Takes a group out again; `false` if it was not there.
    pub fn remove(&mut self, group: u64) -> bool {
        if group < self.below {
            self.above.extend(group + 1..self.below);
            self.below = group;
            return true;
        }
        self.above.remove(&group)
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.below + self.above.len() as u64
    }

    /// Those of `self` that are not in `other`, in order.
    pub fn without(&self, other: &Seen) -> Vec<u64> {
        let first = other.below.min(self.below);
        (first..self.below)
            .chain(self.above.iter().copied())
            .filter(|&group| !other.contains(group))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_set() {
        let mut seen = Seen::default();
        for group in [3, 0, 1, 5, 2] {
            assert!(seen.insert(group) && !seen.insert(group));
        }
        assert_eq!(seen, Seen { below: 4, above: BTreeSet::from([5]) });
        assert_eq!(seen.count(), 5);
        assert_eq!(seen.without(&Seen::below(2)), [2, 3, 5]);
        assert_eq!(Seen::below(2).without(&seen), [0; 0]);
        assert!(seen.remove(1) && !seen.remove(1) && seen.remove(5));
        assert_eq!(seen, Seen { below: 1, above: BTreeSet::from([2, 3]) });
        assert!(seen.insert(1));
        assert_eq!(seen, Seen::below(4));
    }
}

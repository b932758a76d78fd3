//! Which algorithm a call takes when nobody names one: the one that was fastest when it was measured.
//!
//! The table is [`MEASURED`], made by `cargo xtask tune` on one machine, whose name stands in it. Short vectors want few
//! rounds and long ones few bytes; where one turns into the other depends on what a round and a byte cost, which nobody
//! can say without measuring. `consort bench collectives --tune` shows what the same measurement says elsewhere.
//!
//! All ranks must choose the same: the choice is a function of what they all know.

use super::Algorithm;
use super::measured::MEASURED;
use crate::call::Operation;
use crate::transport::TransportKind;

/// What was measured for one operation, transport and number of ranks.
pub(super) struct Row {
    pub(super) operation: Operation,
    /// [`TransportKind::Mixed`] means several ranks on each of several hosts.
    pub(super) transport: TransportKind,
    pub(super) ranks: usize,
    /// The fastest for vectors of up to so many bytes; the last for any.
    pub(super) up_to: &'static [(usize, Algorithm)],
}

/// Bytes beyond which links decide and not rounds, in worlds larger than any that was measured.
const LONG: usize = 256 << 10;

impl Algorithm {
    /// The fastest for a vector of `bytes` among ranks on these hosts (one entry a rank), as far as is known.
    pub fn choose(operation: Operation, transport: TransportKind, hosts: &[usize], bytes: usize) -> Self {
        if Self::of(operation).len() == 1 {
            return Self::of(operation)[0];
        }
        let transport = match transport {
            TransportKind::Mixed if alone(hosts) => TransportKind::Tls,
            TransportKind::Mixed if hosts.iter().all(|host| *host == hosts[0]) => TransportKind::SharedMemory,
            other => other,
        };
        let rows = || MEASURED.iter().filter(|row| (row.operation, row.transport) == (operation, transport));
        // The largest world that is no larger than this one, else the smallest.
        let below = rows().filter(|row| row.ranks <= hosts.len()).max_by_key(|row| row.ranks);
        let row = below.or_else(|| rows().min_by_key(|row| row.ranks));
        // What two or four ranks measured says little of many: there a long vector wants the least bytes for each link.
        if row.is_some_and(|row| hosts.len() > 2 * row.ranks) && bytes > LONG {
            let shared =
                transport == TransportKind::Mixed && Self::of(operation).contains(&Self::Hierarchical);
            return if shared { Self::Hierarchical } else { Self::Ring };
        }
        let best = row.and_then(|row| row.up_to.iter().find(|(most, _)| bytes <= *most));
        best.map_or(Self::of(operation)[0], |(_, algorithm)| *algorithm)
    }
}

/// Whether no two ranks are on one host.
fn alone(hosts: &[usize]) -> bool {
    hosts.iter().enumerate().all(|(rank, host)| !hosts[..rank].contains(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_case_once_in_order_and_names_what_there_is() {
        let operations = Operation::ALL.into_iter().filter(|operation| Algorithm::of(*operation).len() > 1);
        for (operation, transport) in
            operations.flat_map(|operation| TransportKind::ALL.map(|transport| (operation, transport)))
        {
            let rows = MEASURED.iter().filter(|row| (row.operation, row.transport) == (operation, transport));
            let mut ranks: Vec<usize> = rows.map(|row| row.ranks).collect();
            assert!(!ranks.is_empty(), "nothing about {operation:?} over {transport:?}");
            ranks.dedup();
            assert!(ranks.is_sorted_by(|a, b| a < b), "{operation:?} over {transport:?}: {ranks:?}");
        }
        for row in MEASURED {
            let known = Algorithm::of(row.operation);
            assert!(row.up_to.iter().all(|(_, algorithm)| known.contains(algorithm)), "{:?}", row.operation);
            assert!(row.up_to.is_sorted_by(|a, b| a.0 < b.0));
            assert_eq!(row.up_to.last().map(|(most, _)| *most), Some(usize::MAX));
        }
    }

    #[test]
    fn the_layout_of_hosts_decides_what_a_mixed_group_is() {
        let choose =
            |kind, hosts: &[usize], bytes| Algorithm::choose(Operation::AllReduce, kind, hosts, bytes);
        let lengths = || (6..30).map(|power| 1 << power);
        assert!(lengths().all(|bytes| {
            choose(TransportKind::Mixed, &[4, 4], bytes)
                == choose(TransportKind::SharedMemory, &[0, 0], bytes)
                && choose(TransportKind::Mixed, &[0, 1], bytes) == choose(TransportKind::Tls, &[0, 0], bytes)
        }));
        // Many ranks, of whom nothing was measured.
        assert_eq!(choose(TransportKind::Tls, &(0..64).collect::<Vec<_>>(), 8 << 20), Algorithm::Ring);
        let pairs: Vec<usize> = (0..64).map(|rank| rank / 2).collect();
        assert_eq!(choose(TransportKind::Mixed, &pairs, 8 << 20), Algorithm::Hierarchical);
        // Two thirds of a ring's bytes over the slow link, from where bytes count.
        let two_and_two = |bytes| choose(TransportKind::Mixed, &[0, 0, 1, 1], bytes);
        assert!((16..30).all(|power| two_and_two(1 << power) == Algorithm::Hierarchical));
    }
}

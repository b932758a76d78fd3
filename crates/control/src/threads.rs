//! Dividing one machine's cores among its replicas.
//!
//! The kernels' threads spin for a moment before they park, so two replicas with as many threads as the machine has
//! cores steal from each other what each needs to finish its step: the second would make both slower than one alone.
//! With `cores / replicas` threads each, all of them together use the machine once. Threads don't change an answer,
//! so a replica may be restarted with another number at any time.
//!
//! No pinning: the kernel's scheduler keeps `cores` busy threads on `cores` cores by itself, and a fixed set would
//! leave a core idle whenever one replica has nothing to do.

/// Threads of a replica that doesn't ask for a number of its own. `asked` has for each version its replicas and the
/// threads that each of them was given in the file.
pub fn share(cores: u16, asked: &[(u32, Option<u16>)]) -> u16 {
    let fixed: u32 = asked.iter().map(|(replicas, threads)| replicas * threads.map_or(0, u32::from)).sum();
    let sharing: u32 =
        asked.iter().filter(|(_, threads)| threads.is_none()).map(|(replicas, _)| replicas).sum();
    let left = u32::from(cores).saturating_sub(fixed);
    u16::try_from((left / sharing.max(1)).max(1)).unwrap_or(u16::MAX)
}

/// What to say about more threads than cores, where it is so.
pub fn warning(cores: u16, threads: u32, replicas: u32) -> Option<String> {
    (threads > u32::from(cores)).then(|| {
        format!(
            "{replicas} replicas with {threads} threads in all share {cores} core{}: together they answer no faster than \
             {cores} would; fewer replicas are faster, and one more than one is enough to survive a crash",
            if cores == 1 { "" } else { "s" }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_used_once_and_every_replica_has_one() {
        let auto = |replicas| (replicas, None);
        assert_eq!(share(8, &[auto(1)]), 8);
        assert_eq!(share(8, &[auto(2)]), 4);
        assert_eq!(share(8, &[auto(3)]), 2);
        assert_eq!(share(2, &[auto(2), auto(2)]), 1);
        assert_eq!(share(8, &[(2, Some(3)), auto(2)]), 1);
        assert_eq!(share(8, &[auto(0)]), 8);
        assert_eq!(share(1, &[(4, Some(1024)), auto(256)]), 1);
        for cores in 1..64 {
            for replicas in 1..64 {
                let threads = u32::from(share(cores, &[auto(replicas)]));
                assert!(threads * replicas <= u32::from(cores) || threads == 1);
            }
        }
        assert!(warning(2, 2, 2).is_none());
        assert!(warning(2, 4, 4).is_some_and(|said| said.contains("2 cores")));
    }
}

//! Which version of a model a client gets: by weight, and the same client the same version.
//!
//! Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): each version draws a number from the client's key and
//! its own name, and the weights decide how large it may be. Raising a canary's weight moves clients to it and no
//! client elsewhere; a client that was on the canary at 5 % is on it at 10 %.

/// The index of the version with the highest draw; none where all weights are 0. `key` names the client.
pub(crate) fn choose<'a>(key: u64, versions: impl Iterator<Item = (&'a str, u32)>) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (index, (name, weight)) in versions.enumerate() {
        if weight == 0 {
            continue;
        }
        // Uniform in (0, 1); −w / ln u is the draw whose maximum falls to each version in proportion to w.
        let uniform = ((mix(key, name) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let draw = -f64::from(weight) / uniform.ln();
        if best.is_none_or(|(most, _)| draw > most) {
            best = Some((draw, index));
        }
    }
    best.map(|(_, index)| index)
}

/// FNV-1a over the name, finished as in SplitMix64 so that every bit depends on every other.
pub(crate) fn mix(key: u64, name: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ key;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    #[test]
    fn shares_follow_weights_and_clients_stay() {
        let mut rng = Philox::new(8, 0);
        let keys: Vec<u64> = (0..20_000).map(|_| rng.next_u64()).collect();
        let at = |weight: u32| -> Vec<usize> {
            let versions = [("stable", 100 - weight), ("canary", weight)];
            keys.iter().map(|key| choose(*key, versions.into_iter()).unwrap()).collect()
        };
        let (five, ten) = (at(5), at(10));
        let canaries = |all: &[usize]| all.iter().filter(|index| **index == 1).count();
        assert!((850..1150).contains(&canaries(&five)), "{}", canaries(&five));
        assert!((1800..2200).contains(&canaries(&ten)), "{}", canaries(&ten));
        assert!(
            five.iter().zip(&ten).all(|(before, after)| *before == 0 || *after == 1),
            "nobody moves back"
        );
        assert_eq!(at(0).iter().max(), Some(&0));
        assert_eq!(choose(1, [("a", 0)].into_iter()), None);
    }
}

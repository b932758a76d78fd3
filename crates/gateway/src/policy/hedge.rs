//! Whether a request whose first token is slow may be sent a second time (Dean and Barroso, "The Tail at Scale", 2013).
//!
//! Only the first token is hedged: what makes it late (a queue, a long prompt before it) is over when it is there. Every
//! request pays a small share of a hedge into a purse, and a hedge takes a whole one out, so that hedges never add more
//! than that share of load, also when everything is slow and hedging would make it slower.

use std::time::Duration;

/// When a request is hedged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HedgeSettings {
    /// Off by default.
    pub enabled: bool,
    /// A first token later than this is hedged.
    pub after: Duration,
    /// Hedges a request, on average.
    pub budget: f64,
}

impl Default for HedgeSettings {
    fn default() -> HedgeSettings {
        HedgeSettings { enabled: false, after: Duration::from_secs(1), budget: 0.05 }
    }
}

/// Hedges that may be had at once after a quiet time.
const MOST: f64 = 5.0;

/// The purse.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Purse(f64);

impl Purse {
    /// A request came.
    pub(crate) fn pay_in(&mut self, settings: &HedgeSettings) {
        self.0 = (self.0 + settings.budget).min(MOST);
    }

    /// A hedge, if there is one.
    pub(crate) fn take(&mut self, settings: &HedgeSettings) -> bool {
        let there = settings.enabled && self.0 >= 1.0;
        if there {
            self.0 -= 1.0;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hedges_stay_a_share_of_requests() {
        let settings = HedgeSettings { enabled: true, ..HedgeSettings::default() };
        let mut purse = Purse::default();
        let mut hedges = 0;
        for _ in 0..1000 {
            purse.pay_in(&settings);
            hedges += u32::from(purse.take(&settings));
        }
        assert!((48..=50).contains(&hedges), "{hedges}");
        for _ in 0..1000 {
            purse.pay_in(&settings);
        }
        assert_eq!((0..100).filter(|_| purse.take(&settings)).count(), 5, "what is saved is bounded");
        assert!(!Purse(3.0).take(&HedgeSettings::default()), "off");
    }
}

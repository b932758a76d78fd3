//! How many requests may be under way for a second time: a share of those that are active, and a small floor.
//!
//! Retries add load where something fails for want of it. A budget bounds what they add whatever fails (Envoy's retry
//! budgets; Google's SRE book, "Handling Overload"). Here a retry past the budget waits its turn, within the request's
//! own time, instead of failing: the request is still the client's, only later.

/// The budget's size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetSettings {
    /// Share of active requests.
    pub ratio: f64,
    /// So many in any case.
    pub floor: u32,
}

/// Retries under way.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Budget {
    retrying: u64,
}

impl Budget {
    /// Takes a place, where there is one while `active` requests are under way.
    pub(crate) fn take(&mut self, active: u64, settings: &BudgetSettings) -> bool {
        let most = (active as f64 * settings.ratio).max(f64::from(settings.floor));
        let fits = ((self.retrying + 1) as f64) <= most;
        self.retrying += u64::from(fits);
        fits
    }

    /// Gives it back.
    pub(crate) fn give_back(&mut self) {
        self.retrying = self.retrying.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_what_is_active() {
        let settings = BudgetSettings { ratio: 0.2, floor: 3 };
        let most = |active: u64| {
            let mut budget = Budget::default();
            (0..1000).take_while(|_| budget.take(active, &settings)).count()
        };
        assert_eq!([0, 1, 15, 20, 100].map(most), [3, 3, 3, 4, 20]);
        let mut budget = Budget::default();
        assert!((0..3).all(|_| budget.take(1, &settings)) && !budget.take(1, &settings));
        budget.give_back();
        assert!(budget.take(1, &settings));
    }
}

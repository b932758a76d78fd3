//! Where a forward pass's time goes, for those who make it faster.
//!
//! Off by default, and then a branch a part. On, it reads the clock a few hundred times a pass (about 10 µs).

use std::time::{Duration, Instant};

/// A part of the forward pass, over all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Tokens to embeddings.
    Embed,
    /// Norms before matrices and the rounding of rows to what the matrices want.
    Prepare,
    /// Query, key and value projections.
    QueryKeyValue,
    /// Norms of heads, rotation, and storing keys and values.
    RotateStore,
    /// Attention itself.
    Attention,
    /// The projection after attention, added to the residual stream.
    Output,
    /// Gate and up projections and the activation.
    GateUp,
    /// The projection back, added to the residual stream.
    Down,
    /// The last states to logits.
    Head,
}

impl Part {
    /// In the order in which they run.
    pub const ALL: [Part; 9] = [
        Part::Embed,
        Part::Prepare,
        Part::QueryKeyValue,
        Part::RotateStore,
        Part::Attention,
        Part::Output,
        Part::GateUp,
        Part::Down,
        Part::Head,
    ];
}

/// Time spent in each part so far.
#[derive(Clone, Debug, Default)]
pub struct PartTimes {
    spent: [Duration; Part::ALL.len()],
    since: Option<Instant>,
}

impl PartTimes {
    /// Time spent in `part`.
    pub fn of(&self, part: Part) -> Duration {
        self.spent[part as usize]
    }

    /// A pass begins: what follows belongs to the first part that ends.
    pub(super) fn begin(times: &mut Option<PartTimes>) {
        if let Some(times) = times {
            times.since = Some(Instant::now());
        }
    }

    /// `part` ends, and the next begins.
    pub(super) fn end(times: &mut Option<PartTimes>, part: Part) {
        if let Some(times) = times {
            let now = Instant::now();
            if let Some(since) = times.since.replace(now) {
                times.spent[part as usize] += now - since;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_the_part_that_ends() {
        let mut times = Some(PartTimes::default());
        PartTimes::begin(&mut times);
        PartTimes::end(&mut times, Part::Down);
        let times = times.unwrap();
        assert!(Part::ALL.iter().all(|&part| part == Part::Down || times.of(part).is_zero()));
        assert_eq!(Part::ALL.map(|part| part as usize), std::array::from_fn(|i| i));
    }
}

//! Some sequences, packed without padding, and what each of their rows should predict.

use crate::Error;

/// Packed sequences. A row is one token; its target is the token that should come next, its weight multiplies the
/// row's loss (0 leaves the row out: a prompt, the end of a sequence).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// Token ids of all rows.
    pub tokens: Vec<u32>,
    /// What each row should predict; any value where the weight is 0.
    pub targets: Vec<u32>,
    /// Each row's weight.
    pub weights: Vec<f32>,
    /// The row at which each sequence begins, ascending from 0.
    pub starts: Vec<usize>,
}

impl MicroBatch {
    /// No rows.
    pub fn new() -> MicroBatch {
        MicroBatch::default()
    }

    /// Appends a sequence whose every token is to be predicted from those before it. A sequence of `n + 1` tokens
    /// makes `n` rows; one of fewer than two tokens makes none.
    pub fn push(&mut self, tokens: &[u32]) {
        self.push_weighted(tokens, |_| 1.0);
    }

    /// As [`MicroBatch::push`]; `weight(i)` is the weight of predicting `tokens[i]`, for `i` from 1.
    pub fn push_weighted(&mut self, tokens: &[u32], weight: impl Fn(usize) -> f32) {
        let rows = tokens.len().saturating_sub(1);
        if rows == 0 {
            return;
        }
        self.starts.push(self.tokens.len());
        self.tokens.extend_from_slice(&tokens[..rows]);
        self.targets.extend_from_slice(&tokens[1..]);
        self.weights.extend((1..=rows).map(weight));
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Every row's position in its sequence.
    pub(super) fn positions(&self) -> Vec<u32> {
        let ends = self.starts.iter().skip(1).copied().chain([self.rows()]);
        self.starts.iter().zip(ends).flat_map(|(&start, end)| 0..(end - start) as u32).collect()
    }

    /// Everything that a kernel would otherwise have to trust.
    ///
    /// # Errors
    /// [`Error::Batch`] with what doesn't fit a model of that vocabulary and context.
    pub(super) fn check(&self, vocab: usize, max_context: usize) -> Result<(), Error> {
        let fail = |reason: String| Err(Error::Batch { reason });
        let rows = self.rows();
        if rows == 0 || self.targets.len() != rows || self.weights.len() != rows {
            let (targets, weights) = (self.targets.len(), self.weights.len());
            return fail(format!(
                "a micro-batch of {rows} rows with {targets} targets and {weights} weights: all three are the same \
                 and at least 1"
            ));
        }
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= vocab) {
            return fail(format!("token {token} is not below the vocabulary's {vocab}"));
        }
        let wrong = self.targets.iter().zip(&self.weights).position(|(&target, &weight)| {
            !weight.is_finite() || weight < 0.0 || (weight > 0.0 && target as usize >= vocab)
        });
        if let Some(row) = wrong {
            let (target, weight) = (self.targets[row], self.weights[row]);
            return fail(format!(
                "row {row} has the target {target} with the weight {weight}: a weight is a number from 0 on, and a \
                 target with a weight is below the vocabulary's {vocab}"
            ));
        }
        let first = self.starts.first() == Some(&0);
        let ascending = self.starts.windows(2).all(|pair| pair[0] < pair[1]);
        if !first || !ascending || self.starts.last().is_some_and(|&last| last >= rows) {
            return fail(format!("sequences begin at rows that ascend from 0 and stay below {rows}"));
        }
        let ends = self.starts.iter().skip(1).copied().chain([rows]);
        let longest = self.starts.iter().zip(ends).map(|(start, end)| end - start).max().unwrap_or(0);
        if longest > max_context {
            return fail(format!(
                "a sequence of {longest} rows is longer than the model's {max_context} positions"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_predicts_its_next_tokens() {
        let mut batch = MicroBatch::new();
        batch.push(&[5, 6, 7]);
        batch.push(&[9]);
        batch.push_weighted(&[1, 2, 3, 4], |i| if i < 3 { 0.0 } else { 1.0 });
        assert_eq!(batch.tokens, [5, 6, 1, 2, 3]);
        assert_eq!(batch.targets, [6, 7, 2, 3, 4]);
        assert_eq!(batch.weights, [1.0, 1.0, 0.0, 0.0, 1.0]);
        assert_eq!(batch.starts, [0, 2]);
        assert_eq!(batch.positions(), [0, 1, 0, 1, 2]);
        assert!(batch.check(10, 3).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let mut good = MicroBatch::new();
        good.push(&[1, 2, 3]);
        good.push(&[1, 2]);
        let broken = |change: &dyn Fn(&mut MicroBatch)| {
            let mut batch = good.clone();
            change(&mut batch);
            batch.check(4, 2).map_err(|e| e.to_string()).err().unwrap_or_default()
        };
        assert_eq!(broken(&|_| {}), "");
        assert!(broken(&|b| b.tokens[1] = 4).contains("token 4"));
        assert!(broken(&|b| b.targets[1] = 4).contains("target 4"));
        assert_eq!(broken(&|b| (b.targets[1], b.weights[1]) = (4, 0.0)), "");
        assert!(broken(&|b| b.weights[0] = f32::NAN).contains("weight NaN"));
        assert!(broken(&|b| b.weights[0] = -1.0).contains("weight -1"));
        assert!(broken(&|b| b.targets.truncate(1)).contains("1 targets"));
        assert!(broken(&|b| b.starts = vec![1]).contains("ascend"));
        assert!(broken(&|b| b.starts = vec![0, 2, 2]).contains("ascend"));
        assert!(broken(&|b| b.starts = vec![0, 3]).contains("ascend"));
        assert!(broken(&|b| b.starts = vec![0]).contains("longer than"));
        assert!(broken(&|b| *b = MicroBatch::new()).contains("0 rows"));
    }
}

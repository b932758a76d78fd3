//! Whether a candidate is worse than the incumbent: a pure function of what both have done, with its reason.
//!
//! Two questions, asked at different times. *Is it surely worse?* may be answered as soon as the numbers say so, by
//! bounds that chance rarely crosses: Wilson's lower bound for a share of failures, two standard errors for a mean.
//! *Is it good enough?* waits for as many samples as the plan demands. A candidate is compared with the incumbent under
//! the same traffic and never with a number from another day: where both are slow, neither is worse.
//!
//! Latencies compare at the median, and at the 95th percentile with twice the allowance, because a tail is noisier.
//!
//! Sources: Wilson, "Probable inference, the law of succession, and statistical inference" (1927), for the bound;
//! Google SRE workbook, "Canarying releases", for comparing with a control at the same time.

use std::time::Duration;

use consort_base::Histogram;
use serde::{Deserialize, Serialize};

/// What a candidate may do worse, and how much must be seen before it is good enough.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Requests that the candidate must have had in a step (where the step gives it any).
    pub requests: u64,
    /// Answers that it must have scored, in all.
    pub scored: u64,
    /// By how much its share of failed requests may be higher, 0 to 1.
    pub errors: f64,
    /// By how much its latencies may be higher, relative to the incumbent's: 0.5 for half as much again.
    pub slowdown: f64,
    /// How much less likely it may find the incumbent's answers, in nats a token on average.
    pub disagreement: f64,
    /// So often may its replicas be lost; one time more ends the rollout.
    pub lost: u64,
}

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds { requests: 50, scored: 20, errors: 0.01, slowdown: 0.5, disagreement: 0.5, lost: 2 }
    }
}

/// What a version did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Requests it got.
    pub requests: u64,
    /// Of them, those that failed for a reason that wasn't the client's, also where another version answered instead.
    pub errors: u64,
    /// To the first token.
    pub first_token: Histogram,
    /// Between tokens.
    pub inter_token: Histogram,
    /// Answers of the incumbent that it scored.
    pub scored: u64,
    /// Answers that it refused to score.
    pub refused: u64,
    /// The disagreements added up, in nats a token.
    pub disagreement_sum: f64,
    /// Their squares.
    pub disagreement_squares: f64,
}

impl Sample {
    /// What was done after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Sample) -> Sample {
        Sample {
            requests: self.requests.saturating_sub(earlier.requests),
            errors: self.errors.saturating_sub(earlier.errors),
            first_token: self.first_token.since(&earlier.first_token),
            inter_token: self.inter_token.since(&earlier.inter_token),
            scored: self.scored.saturating_sub(earlier.scored),
            refused: self.refused.saturating_sub(earlier.refused),
            disagreement_sum: self.disagreement_sum - earlier.disagreement_sum,
            disagreement_squares: self.disagreement_squares - earlier.disagreement_squares,
        }
    }

    /// The mean disagreement and its standard error; none where nothing was scored.
    pub fn disagreement(&self) -> Option<(f64, f64)> {
        let n = self.scored as f64;
        if self.scored == 0 {
            return None;
        }
        let mean = self.disagreement_sum / n;
        let variance = (self.disagreement_squares / n - mean * mean).max(0.0);
        Some((mean, (variance / n).sqrt()))
    }
}

/// What the judge makes of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Judgement {
    /// It must not go on; why.
    Worse(String),
    /// It is good enough for the next step.
    Fine,
    /// Nothing is wrong yet, and too little has been seen; what is missing.
    Waiting(String),
}

/// Fewer answers say nothing about latency; a median of so many is within a rank or two of the truth. It is answers that
/// count for the time between tokens too: the tokens of one answer are slow together.
const FEW: u64 = 20;
/// And for the 95th percentile.
const FEW_FOR_TAIL: u64 = 100;
/// A difference that nobody feels is none: 20 ms to the first token, 5 ms between two.
const SLACK_MS: [f64; 2] = [20.0, 5.0];
/// Answers of the incumbent that a candidate may refuse, as a share.
const REFUSALS: f64 = 0.05;
/// Standard deviations: one in 700, one in 20.
const SURE: f64 = 3.0;
const LIKELY: f64 = 1.64;

/// Judges a candidate. `share` is its share of requests in percent, `shadow` whether it scores answers.
pub fn judge(t: &Thresholds, share: u32, shadow: bool, incumbent: &Sample, candidate: &Sample) -> Judgement {
    let worse = errors(t, incumbent, candidate)
        .or_else(|| answers(t, candidate))
        .or_else(|| slow(t, "first token", 0, incumbent, candidate, |sample| &sample.first_token))
        .or_else(|| slow(t, "time between tokens", 1, incumbent, candidate, |sample| &sample.inter_token));
    if let Some(reason) = worse {
        return Judgement::Worse(reason);
    }
    let mut missing = Vec::new();
    if share > 0 && candidate.requests < t.requests {
        missing.push(format!("{} of {} requests", candidate.requests, t.requests));
    }
    if shadow && candidate.scored < t.scored {
        missing.push(format!("{} of {} scored answers", candidate.scored, t.scored));
    }
    if missing.is_empty() { Judgement::Fine } else { Judgement::Waiting(missing.join(", ")) }
}

fn errors(t: &Thresholds, incumbent: &Sample, candidate: &Sample) -> Option<String> {
    let share = |sample: &Sample| sample.errors as f64 / sample.requests.max(1) as f64;
    let (theirs, own) = (share(candidate), share(incumbent));
    let above = |z| wilson_lower(candidate.errors, candidate.requests, z) > own + t.errors;
    // Asked again and again, a bound is crossed by chance more often than its name says: so a wide one, and three
    // failures at least. With all the samples that were asked for a narrower one will do.
    let sure = candidate.errors > 2 && above(SURE);
    let enough = candidate.requests >= t.requests && candidate.errors > 1 && above(LIKELY);
    (sure || enough).then(|| {
        format!(
            "{} of {} requests failed ({:.1} %), against {:.1} % with the incumbent; {:.1} % more are allowed",
            candidate.errors,
            candidate.requests,
            theirs * 100.0,
            own * 100.0,
            t.errors * 100.0
        )
    })
}

fn answers(t: &Thresholds, candidate: &Sample) -> Option<String> {
    let asked = candidate.scored + candidate.refused;
    if wilson_lower(candidate.refused, asked, LIKELY) > REFUSALS {
        return Some(format!(
            "it refuses {} of {asked} answers that the incumbent gave (another tokenizer, or a shorter context)",
            candidate.refused
        ));
    }
    let (mean, error) = candidate.disagreement()?;
    let sure = candidate.scored >= 5 && mean - 2.0 * error > t.disagreement;
    let enough = candidate.scored >= t.scored && mean > t.disagreement;
    (sure || enough).then(|| {
        format!(
            "it disagrees with the incumbent's answers by {mean:.2} nats a token over {} answers; {:.2} are allowed",
            candidate.scored, t.disagreement
        )
    })
}

fn slow(
    t: &Thresholds,
    what: &str,
    slack: usize,
    own: &Sample,
    theirs: &Sample,
    of: impl Fn(&Sample) -> &Histogram,
) -> Option<String> {
    let answers = own.first_token.count().min(theirs.first_token.count());
    let tests = [("median", 0.5, FEW, t.slowdown), ("95th percentile", 0.95, FEW_FOR_TAIL, 2.0 * t.slowdown)];
    tests.into_iter().filter(|(_, _, few, _)| answers >= *few).find_map(|(name, quantile, _, slowdown)| {
        let (own, theirs) = (of(own).quantile_ms(quantile)?, of(theirs).quantile_ms(quantile)?);
        // A step of the histogram is a fifth: without it a value at a bucket's edge would look slow.
        let most = own * 1.2 * (1.0 + slowdown) + SLACK_MS[slack];
        (theirs > most).then(|| {
            format!(
                "its {what} takes {theirs:.0} ms ({name}), against {own:.0} ms with the incumbent; {most:.0} ms are allowed"
            )
        })
    })
}

/// The lower end of a share's confidence interval, `z` standard deviations wide to each side.
fn wilson_lower(hits: u64, of: u64, z: f64) -> f64 {
    if of == 0 {
        return 0.0;
    }
    let n = of as f64;
    let share = hits as f64 / n;
    let middle = share + z * z / (2.0 * n);
    let width = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    ((middle - width) / (1.0 + z * z / n)).max(0.0)
}

/// A latency as a sample, for tests and simulations.
impl Extend<Duration> for Sample {
    fn extend<I: IntoIterator<Item = Duration>>(&mut self, latencies: I) {
        latencies.into_iter().for_each(|latency| self.first_token.add(latency));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(requests: u64, errors: u64) -> Sample {
        Sample { requests, errors, ..Sample::default() }
    }

    fn scored(nats: &[f64]) -> Sample {
        Sample {
            scored: nats.len() as u64,
            disagreement_sum: nats.iter().sum(),
            disagreement_squares: nats.iter().map(|n| n * n).sum(),
            ..sample(100, 0)
        }
    }

    fn of(share: u32, incumbent: &Sample, candidate: &Sample) -> Judgement {
        judge(&Thresholds::default(), share, candidate.scored > 0, incumbent, candidate)
    }

    fn worse(judgement: &Judgement, word: &str) -> bool {
        matches!(judgement, Judgement::Worse(reason) if reason.contains(word))
    }

    #[test]
    fn it_waits_for_samples_and_fails_early_where_it_is_sure() {
        assert_eq!(of(5, &sample(900, 0), &sample(10, 0)), Judgement::Waiting("10 of 50 requests".into()));
        assert_eq!(
            of(0, &sample(900, 0), &sample(0, 0)),
            Judgement::Fine,
            "a step without requests needs none"
        );
        assert_eq!(of(5, &sample(900, 0), &sample(50, 1)), Judgement::Fine, "one failure is no trend");
        assert!(matches!(of(5, &sample(900, 0), &sample(1, 0)), Judgement::Waiting(_)));
        let three = of(5, &sample(900, 0), &sample(3, 3));
        assert!(worse(&three, "3 of 3 requests failed"), "{three:?}");
        assert!(worse(&of(5, &sample(900, 0), &sample(60, 2)), "3.3 %"));
        assert_eq!(of(5, &sample(900, 90), &sample(60, 6)), Judgement::Fine, "the incumbent fails as often");
    }

    #[test]
    fn disagreement_is_a_mean_with_its_error() {
        assert_eq!(of(5, &sample(900, 0), &scored(&[0.0; 20])), Judgement::Fine);
        assert_eq!(
            of(5, &sample(900, 0), &scored(&[0.1; 8])),
            Judgement::Waiting("8 of 20 scored answers".into())
        );
        assert!(worse(
            &of(5, &sample(900, 0), &scored(&[5.0, 4.0, 6.0, 5.0, 4.5])),
            "nats a token over 5 answers"
        ));
        let wild = scored(&[0.0, 0.0, 0.0, 0.0, 3.0]);
        assert!(matches!(of(5, &sample(900, 0), &wild), Judgement::Waiting(_)), "one odd answer is no proof");
        let refusing = Sample { refused: 3, ..sample(100, 0) };
        assert!(worse(&of(5, &sample(900, 0), &refusing), "refuses 3 of 3"));
    }

    #[test]
    fn latencies_compare_with_the_incumbents_of_the_same_time() {
        let with = |ms: u64, count: usize| {
            let mut sample = sample(100, 0);
            sample.extend(vec![Duration::from_millis(ms); count]);
            sample
        };
        assert_eq!(of(5, &with(100, 50), &with(140, 50)), Judgement::Fine);
        assert!(worse(&of(5, &with(100, 50), &with(400, 50)), "first token takes"));
        assert_eq!(of(5, &with(100, 50), &with(400, 19)), Judgement::Fine, "too few to say");
        assert_eq!(of(5, &with(400, 50), &with(400, 50)), Judgement::Fine, "both are slow");
        assert_eq!(of(5, &with(1, 50), &with(15, 50)), Judgement::Fine, "nobody feels it");
        let mut tail = with(100, 180);
        tail.extend(vec![Duration::from_secs(9); 20]);
        assert!(worse(&of(5, &with(100, 200), &tail), "95th percentile"));
    }
}

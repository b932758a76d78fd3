//! Gradients of several workers become one although some of them may be wrong.
//!
//! The mean follows a single worker that is wrong enough. The median and the trimmed mean of each value stand as long as
//! fewer than half are wrong (Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018); Krum takes the one
//! gradient that has most of the others near it (Blanchard et al., "Machine Learning with Adversaries", NIPS 2017).
//! Each group's gradient is its own mean over tokens, so a worker can't buy weight with a count. What is no number
//! sorts to an end, or is far from everything.
//!
//! Cost: median and trimmed mean sort `groups` values for each weight; Krum reads every two gradients once.

/// Of each value, the median over `groups`; of an even number, the mean of the middle two.
pub(super) fn median(groups: &[&[f32]], out: &mut [f32]) {
    let middle = groups.len() / 2;
    each_sorted(groups, out, |sorted| match sorted.len() % 2 {
        0 => ((f64::from(sorted[middle - 1]) + f64::from(sorted[middle])) / 2.0) as f32,
        _ => sorted[middle],
    });
}

/// Of each value, the mean over `groups` without the `wrong` smallest and largest.
pub(super) fn trimmed_mean(groups: &[&[f32]], wrong: usize, out: &mut [f32]) {
    each_sorted(groups, out, |sorted| {
        let kept = &sorted[wrong..sorted.len() - wrong];
        (kept.iter().map(|&x| f64::from(x)).sum::<f64>() / kept.len() as f64) as f32
    });
}

fn each_sorted(groups: &[&[f32]], out: &mut [f32], of: impl Fn(&[f32]) -> f32) {
    let mut column = vec![0.0; groups.len()];
    for (i, out) in out.iter_mut().enumerate() {
        for (value, group) in column.iter_mut().zip(groups) {
            *value = group[i];
        }
        // The total order: NaNs of either sign are at the ends.
        column.sort_unstable_by(f32::total_cmp);
        *out = of(&column);
    }
}

/// `Σ (a − b)²` of every two of `groups`, and `Σ a²` of each on the diagonal: row after row. Infinite where it is no
/// number.
pub(super) fn distances(groups: &[&[f32]]) -> Vec<f64> {
    let n = groups.len();
    let mut matrix = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let zip = groups[i].iter().zip(groups[j]);
            let sum: f64 = match i == j {
                true => groups[i].iter().map(|&a| f64::from(a) * f64::from(a)).sum(),
                false => zip.map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum(),
            };
            let sum = if sum.is_finite() { sum } else { f64::INFINITY };
            (matrix[i * n + j], matrix[j * n + i]) = (sum, sum);
        }
    }
    matrix
}

/// Krum's choice among the groups of a matrix of [`distances`]; `None` where nobody has enough neighbours at a finite
/// distance.
pub(super) fn krum(matrix: &[f64], groups: usize, wrong: usize) -> Option<usize> {
    let score = |i: usize| {
        let mut others: Vec<f64> = (0..groups).filter(|&j| j != i).map(|j| matrix[i * groups + j]).collect();
        others.sort_unstable_by(f64::total_cmp);
        others.iter().take(groups.saturating_sub(wrong + 2).max(1)).sum::<f64>()
    };
    (0..groups)
        .map(|i| (score(i), i))
        .filter(|(score, _)| score.is_finite())
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|best| best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_one_of_five_moves_none_of_them() {
        let honest =
            [vec![1.0f32, -2.0, 0.5], vec![1.1, -2.1, 0.4], vec![0.9, -1.9, 0.6], vec![1.0, -2.0, 0.5]];
        for garbage in [1e30, -1e30, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..5 {
                let wrong = vec![garbage; 3];
                let mut groups: Vec<&[f32]> = honest.iter().map(Vec::as_slice).collect();
                groups.insert(place, &wrong);
                let mut out = [0.0; 3];
                median(&groups, &mut out);
                let near = |out: &[f32]| out.iter().zip([1.0, -2.0, 0.5]).all(|(a, b)| (a - b).abs() <= 0.11);
                assert!(near(&out), "{garbage} at {place}: {out:?}");
                trimmed_mean(&groups, 1, &mut out);
                assert!(near(&out), "{garbage} at {place}: {out:?}");
                let choice = krum(&distances(&groups), 5, 1).unwrap();
                assert!(choice != place && near(groups[choice]), "{garbage} at {place}: {choice}");
            }
        }
    }

    #[test]
    fn they_are_their_definitions() {
        let groups: [&[f32]; 4] = [&[4.0], &[1.0], &[2.0], &[10.0]];
        let mut out = [0.0];
        median(&groups, &mut out);
        assert_eq!(out, [3.0]);
        trimmed_mean(&groups, 1, &mut out);
        assert_eq!(out, [3.0]);
        trimmed_mean(&groups, 0, &mut out);
        assert_eq!(out, [4.25]);
        let matrix = distances(&groups);
        assert_eq!(matrix[..4], [16.0, 9.0, 4.0, 36.0]);
        assert_eq!(krum(&matrix, 4, 0), Some(2), "2 has 1 and 4 near");
        assert_eq!(krum(&[f64::INFINITY; 9], 3, 0), None);
    }
}

//! Pairs of measurements, and the table they become.
//!
//! Speeds of a small machine drift by a fifth within minutes, so a figure alone says little. Both sides take turns
//! (A B A B), each pair stands close in time, and what is quoted is the median of the pairs' ratios.

use serde::Serialize;

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// One thing measured on both sides.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) model: String,
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    /// (ours, theirs), in the order they were taken.
    pub(crate) pairs: Vec<(f64, f64)>,
}

/// The middle value; the mean of both where there are two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[half],
        _ => (values[half - 1] + values[half]) / 2.0,
    }
}

impl Row {
    pub(crate) fn ours(&self) -> f64 {
        median(self.pairs.iter().map(|p| p.0).collect())
    }

    pub(crate) fn theirs(&self) -> f64 {
        median(self.pairs.iter().map(|p| p.1).collect())
    }

    /// How many times better we are, pair by pair; below 1 they are.
    fn ratios(&self) -> Vec<f64> {
        let ratio = |(ours, theirs): &(f64, f64)| match self.better {
            Better::Higher => ours / theirs,
            Better::Lower => theirs / ours,
        };
        self.pairs.iter().map(ratio).collect()
    }

    /// Lowest, median and highest ratio.
    pub(crate) fn ratio(&self) -> (f64, f64, f64) {
        let ratios = self.ratios();
        let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let high = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (low, median(ratios), high)
    }
}

fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// An aligned Markdown table: readable in a terminal as it is.
pub(crate) fn markdown(rows: &[Row], peer: &str) -> String {
    let head = ["model", "measured", "unit", "Consort", peer, "times better (lowest–highest pair)"];
    let mut table = vec![head.map(str::to_owned)];
    for row in rows {
        let (low, middle, high) = row.ratio();
        table.push([
            row.model.clone(),
            row.what.clone(),
            row.unit.to_owned(),
            figure(row.ours()),
            figure(row.theirs()),
            format!("{middle:.2} ({low:.2}–{high:.2})"),
        ]);
    }
    let width = |column: usize| table.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for (number, row) in table.iter().enumerate() {
        text.push('|');
        for (column, cell) in row.iter().enumerate() {
            let space = " ".repeat(widths[column] - cell.chars().count());
            // Figures stand at the right of their column.
            if column >= 3 {
                text += &format!(" {space}{cell} |")
            } else {
                text += &format!(" {cell}{space} |")
            }
        }
        text.push('\n');
        if number == 0 {
            text.push('|');
            for (column, width) in widths.iter().enumerate() {
                text += &if column >= 3 {
                    format!("{}:|", "-".repeat(width + 1))
                } else {
                    format!("{}|", "-".repeat(width + 2))
                };
            }
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_pairs_and_point_the_right_way() {
        let row = |better, pairs| Row { model: "m".into(), what: "w".into(), unit: "u", better, pairs };
        // The machine slowed down by half after the first pair; the ratio doesn't notice.
        let up = row(Better::Higher, vec![(300.0, 100.0), (150.0, 50.0), (160.0, 50.0)]);
        assert_eq!(up.ratio(), (3.0, 3.0, 3.2));
        assert_eq!((up.ours(), up.theirs()), (160.0, 50.0));
        let down = row(Better::Lower, vec![(1.0, 4.0), (2.0, 4.0)]);
        assert_eq!(down.ratio(), (2.0, 3.0, 4.0));
    }

    #[test]
    fn columns_line_up() {
        let rows = [Row {
            model: "Gemma – Q4_K_M".into(),
            what: "decode".into(),
            unit: "tok/s",
            better: Better::Higher,
            pairs: vec![(250.25, 84.5)],
        }];
        let table = markdown(&rows, "llama.cpp");
        let widths: Vec<_> = table.lines().map(|l| l.chars().count()).collect();
        assert_eq!(widths, [widths[0]; 3], "{table}");
        assert!(table.contains("250 |      84.5 |"), "{table}");
    }
}

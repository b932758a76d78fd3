//! `--plot FILE`: a table's figures as an SVG picture, in the reader's light or dark.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::UsageError;
use crate::terminal::note;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 340.0;
/// Room around the axes for what is written there.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 42.0;
const STYLE: &str = "<style>text{font:15px sans-serif;fill:#57606a}.title{font-weight:600;fill:#1f2328}\
    .grid{stroke:#d0d7de}.s0{stroke:#0969da;fill:#0969da}.s1{stroke:#bc4c00;fill:#bc4c00}\
    .s2{stroke:#8250df;fill:#8250df}.s3{stroke:#1a7f37;fill:#1a7f37}.s4{stroke:#bf3989;fill:#bf3989}\
    .s5{stroke:#6e7781;fill:#6e7781}polyline{fill:none!important;stroke-width:2}\
    @media(prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#9198a1}.title{fill:#f0f6fc}\
    .grid{stroke:#3d444d}}</style>";

/// Refuses a file that can't be written, before anything is measured for it.
///
/// # Errors
/// [`UsageError`] where the name is a folder's, or its folder isn't there.
pub(super) fn check(file: Option<&Path>) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let what = match (file.is_dir(), folder.is_dir()) {
        (true, _) => "is a folder",
        (_, false) => "is in no folder that is there",
        _ => return Ok(()),
    };
    let what = format!("--plot {} {what}; name a file such as bench.svg", file.display());
    Err(UsageError(what).into())
}

/// Figures over a few places on an axis.
pub(super) struct Chart {
    pub(super) title: String,
    /// What is written at each place.
    pub(super) places: Vec<String>,
    /// A name and a figure for each place; what isn't finite is left out.
    pub(super) series: Vec<(String, Vec<f64>)>,
    /// Bars instead of lines: where places are no scale.
    pub(super) bars: bool,
}

impl Chart {
    /// Writes the picture.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub(super) fn write(&self, file: &Path) -> Result<()> {
        std::fs::write(file, self.svg()).with_context(|| format!("cannot write {}", file.display()))?;
        note(&format!("drawn in {}", file.display()));
        Ok(())
    }

    fn svg(&self) -> String {
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let figures = self.series.iter().flat_map(|(_, figures)| figures);
        let most = rounded(figures.copied().filter(|y| y.is_finite()).fold(0.0, f64::max));
        let x = |place: usize| LEFT + width * (place as f64 + 0.5) / self.places.len().max(1) as f64;
        let y = |figure: f64| TOP + height * (1.0 - figure / most);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">{STYLE}\n\
             <text class=\"title\" x=\"{LEFT}\" y=\"20\">{}</text>\n",
            escaped(&self.title)
        );
        for quarter in 0..=4 {
            let figure = most * f64::from(quarter) / 4.0;
            let (at, end) = (y(figure), WIDTH - RIGHT);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{end}\" y2=\"{at:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                at + 5.0,
                written(figure)
            );
        }
        for (place, name) in self.places.iter().enumerate() {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x(place),
                HEIGHT - BOTTOM + 24.0,
                escaped(name)
            );
        }
        let mut legend = LEFT;
        for (index, (name, figures)) in self.series.iter().enumerate() {
            let class = format!("s{}", index % 6);
            let all = figures.iter().enumerate().filter(|(_, figure)| figure.is_finite());
            let points: Vec<(f64, f64)> = all.map(|(place, figure)| (x(place), y(*figure))).collect();
            if self.bars {
                let bar = width / self.places.len().max(1) as f64 / (self.series.len() + 1) as f64;
                for (x, y) in &points {
                    let from = x + bar * (index as f64 - self.series.len() as f64 / 2.0);
                    let tall = HEIGHT - BOTTOM - y;
                    let _ = writeln!(
                        svg,
                        "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"/>",
                        bar * 0.9
                    );
                }
            } else {
                let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                let _ = writeln!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", line.join(" "));
                for (x, y) in &points {
                    let _ = writeln!(svg, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
                }
            }
            if self.series.len() > 1 {
                let _ = writeln!(
                    svg,
                    "<rect class=\"{class}\" x=\"{legend:.1}\" y=\"32\" width=\"12\" height=\"6\"/>\
                     <text x=\"{:.1}\" y=\"40\">{}</text>",
                    legend + 17.0,
                    escaped(name)
                );
                legend += 34.0 + 8.5 * name.chars().count() as f64;
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// The next of 1, 2, 4 and 8 times a power of ten, so that quarters are short numbers.
fn rounded(most: f64) -> f64 {
    if most <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(most.log10().floor());
    [1.0, 2.0, 4.0, 6.0, 8.0].map(|n| n * power).into_iter().find(|n| *n >= most).unwrap_or(10.0 * power)
}

fn written(figure: f64) -> String {
    match figure {
        0.0 => "0".into(),
        f if f >= 100.0 => format!("{f:.0}"),
        f => format!("{f:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_a_point_and_nothing_is_drawn_outside() {
        for bars in [false, true] {
            let chart = Chart {
                title: "a < b".into(),
                places: ["1k", "2k", "4k"].map(str::to_owned).into(),
                series: vec![("one".into(), vec![1.0, f64::NAN, 3.0]), ("two".into(), vec![0.0, 5.9, 2.0])],
                bars,
            };
            let svg = chart.svg();
            assert_eq!(
                svg.matches(if bars { "<rect" } else { "<circle" }).count(),
                if bars { 5 + 2 } else { 5 }
            );
            assert!(svg.contains("a &lt; b") && svg.contains(">6</text>") && !svg.contains("NaN"), "{svg}");
            assert!(!svg.contains("\"-"), "{svg}");
        }
        assert_eq!([rounded(0.0), rounded(5.9), rounded(99.0), rounded(0.03)], [1.0, 6.0, 100.0, 0.04]);
        let nowhere = Chart { title: String::new(), places: vec![], series: vec![], bars: false };
        assert!(nowhere.svg().ends_with("</svg>\n"));
        let error = nowhere.write(Path::new("/nowhere/at/all.svg")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all.svg"), "{error}");
        let refused = |file: &str| check(Some(Path::new(file))).unwrap_err().to_string();
        assert!(refused("/nowhere/at/all.svg").contains("is in no folder that is there; name a file"));
        assert!(refused("/").contains("is a folder; name a file"));
        assert!(check(Some(Path::new("bench.svg"))).is_ok() && check(None).is_ok());
    }
}

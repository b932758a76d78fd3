//! The report's pictures: SVG, drawn by `plotters`, whose colours the page decides.
//!
//! A picture is drawn in colours that nobody would choose; each stands for a role (ink, grid, line) and is replaced by a
//! variable of the page's style. So one drawing is right in light and in dark.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Event, Step, What};

const WIDTH: u32 = 760;
const HEIGHT: u32 = 340;
/// Roles.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
const LINE: RGBColor = RGBColor(3, 3, 3);
const PALE: RGBColor = RGBColor(4, 4, 4);
const BAD: RGBColor = RGBColor(5, 5, 5);
const GOOD: RGBColor = RGBColor(6, 6, 6);
const ROLES: [(&str, &str); 6] = [
    ("\"#010101\"", "\"var(--muted)\""),
    ("\"#020202\"", "\"var(--grid)\""),
    ("\"#030303\"", "\"var(--line)\""),
    ("\"#040404\"", "\"var(--pale)\""),
    ("\"#050505\"", "\"var(--bad)\""),
    ("\"#060606\"", "\"var(--good)\""),
];
/// Points of one line; more can't be seen.
const MOST_POINTS: usize = 1500;

/// A curve over an axis.
pub(super) struct Plot<'a> {
    /// What is said of it to those who can't see it.
    pub(super) title: &'a str,
    /// The unit of x.
    pub(super) x: &'a str,
    /// Every value.
    pub(super) points: Vec<(f64, f64)>,
    /// The curve is drawn through means of this many neighbours, and the values themselves behind it; 1 for the values.
    pub(super) smooth: usize,
    /// Equal ratios are equal lengths.
    pub(super) logarithmic: bool,
    /// The axis begins at 0.
    pub(super) from_zero: bool,
    /// The axis ends here at least.
    pub(super) to: Option<f64>,
    /// How a value is written.
    pub(super) label: fn(f64) -> String,
    /// Places that are marked.
    pub(super) marks: Vec<(f64, What)>,
    /// The area below the curve is filled.
    pub(super) filled: bool,
}

/// The loss of each step.
pub(super) fn loss(steps: &[Step], events: &[Event]) -> Option<String> {
    let points: Vec<(f64, f64)> = steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    let (low, high) = bounds(points.iter().map(|p| p.1).filter(|loss| loss.is_finite()));
    // What a model learns last would lie flat below what it learns first.
    let logarithmic = low > 0.0 && high > 4.0 * low;
    let marks = marks(events, |e| e.step as f64);
    draw(&Plot {
        title: "Loss by step",
        x: "step",
        points,
        smooth: (steps.len() / 40).clamp(1, 100),
        logarithmic,
        from_zero: false,
        to: None,
        label: |v| format!("{v:.2}"),
        marks,
        filled: false,
    })
}

/// Tokens a second over time.
pub(super) fn throughput(steps: &[Step], events: &[Event]) -> Option<String> {
    let points = steps.iter().map(|s| (s.at, s.rate())).collect();
    draw(&Plot {
        title: "Tokens a second over time",
        x: "seconds",
        points,
        smooth: (steps.len() / 60).clamp(1, 50),
        logarithmic: false,
        from_zero: true,
        to: None,
        label: |v| if v >= 1000.0 { format!("{:.1}k", v / 1e3) } else { format!("{v:.0}") },
        marks: marks(events, |e| e.at),
        filled: false,
    })
}

/// The share of communication that backward hid.
pub(super) fn overlap(steps: &[Step], events: &[Event]) -> Option<String> {
    let points: Vec<(f64, f64)> =
        steps.iter().filter_map(|s| Some((s.step as f64, 100.0 * s.overlap()?))).collect();
    let smooth = (points.len() / 60).clamp(1, 50);
    draw(&Plot {
        title: "Share of communication hidden behind backward, by step",
        x: "step",
        points,
        smooth,
        logarithmic: false,
        from_zero: true,
        to: Some(100.0),
        label: |v| format!("{v:.0} %"),
        marks: marks(events, |e| e.step as f64),
        filled: true,
    })
}

/// How far weights are moved.
pub(super) fn gradient(steps: &[Step], events: &[Event]) -> Option<String> {
    draw(&Plot {
        title: "Length of the gradient by step",
        x: "step",
        points: steps.iter().map(|s| (s.step as f64, s.gradient_norm)).collect(),
        smooth: (steps.len() / 40).clamp(1, 100),
        logarithmic: false,
        from_zero: true,
        to: None,
        label: |v| format!("{v:.2}"),
        marks: marks(events, |e| e.step as f64),
        filled: false,
    })
}

fn marks(events: &[Event], x: impl Fn(&Event) -> f64) -> Vec<(f64, What)> {
    let shown =
        |e: &&Event| matches!(e.what, What::Lost | What::Joined | What::CheckpointFailed | What::Stopped);
    events.iter().filter(shown).map(|e| (x(e), e.what)).take(200).collect()
}

/// Draws it; `None` where there are fewer than two points.
fn draw(plot: &Plot<'_>) -> Option<String> {
    let finite: Vec<(f64, f64)> =
        plot.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    if finite.len() < 2 {
        return None;
    }
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        on(&root, plot, &finite).is_ok() && root.present().is_ok()
    };
    drawn.then(|| {
        for (colour, role) in ROLES {
            svg = svg.replace(colour, role);
        }
        // The page's width decides its size.
        let sized = format!("<svg width=\"{WIDTH}\" height=\"{HEIGHT}\"");
        let title = plot.title;
        let svg = svg.replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1);
        svg.replacen(&sized, &format!("<svg role=\"img\" aria-label=\"{title}\""), 1)
    })
}

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn on<'a>(root: &DrawingArea<SVGBackend<'a>, Shift>, plot: &Plot<'_>, points: &[(f64, f64)]) -> Drawn<'a> {
    let logarithms: Vec<(f64, f64)>;
    let points = if plot.logarithmic {
        logarithms = points.iter().map(|(x, y)| (*x, y.log10())).collect();
        &logarithms[..]
    } else {
        points
    };
    let written = |y: f64| (plot.label)(if plot.logarithmic { 10f64.powf(y) } else { y });
    let (x0, x1) = bounds(points.iter().map(|p| p.0));
    let (low, high) = bounds(points.iter().map(|p| p.1));
    let room = (high - low) * 0.06;
    let low = if plot.from_zero { 0.0 } else { low - room };
    let high = plot.to.map_or(high + room, |to| to.max(high));
    let text = || ("sans-serif", 19).into_font().color(&INK);
    let mut chart = ChartBuilder::on(root)
        .margin_top(14)
        .margin_right(18)
        .x_label_area_size(46)
        .y_label_area_size(72)
        .build_cartesian_2d(x0..x1, low..high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID.stroke_width(1))
        .light_line_style(TRANSPARENT)
        .axis_style(GRID.stroke_width(1))
        .label_style(text())
        .x_labels(6)
        .y_labels(5)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| written(*y))
        .draw()?;
    for (x, what) in plot.marks.iter().filter(|(x, _)| (x0..=x1).contains(x)) {
        let colour = if *what == What::Joined { GOOD } else { BAD };
        chart.draw_series(DashedLineSeries::new([(*x, low), (*x, high)], 3, 3, colour.stroke_width(1)))?;
    }
    let smooth = thinned(&means(points, plot.smooth));
    if plot.filled {
        chart.draw_series(AreaSeries::new(smooth.iter().copied(), low, PALE.mix(0.6)))?;
    } else if plot.smooth > 1 {
        chart.draw_series(LineSeries::new(thinned(points), PALE.stroke_width(1)))?;
    }
    chart.draw_series(LineSeries::new(smooth, LINE.stroke_width(2)))?;
    let unit = text().pos(Pos::new(HPos::Right, VPos::Bottom));
    root.draw(&Text::new(plot.x.to_owned(), (WIDTH as i32 - 18, HEIGHT as i32 - 2), unit))?;
    Ok(())
}

/// The smallest and the largest, apart.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if high > low { (low, high) } else { (low - 0.5, low + 0.5) }
}

/// Means over windows that are centred on each point, narrower at both ends.
fn means(points: &[(f64, f64)], width: usize) -> Vec<(f64, f64)> {
    let half = width / 2;
    let mean = |i: usize| {
        let reach = half.min(i).min(points.len() - 1 - i);
        let window = &points[i - reach..=i + reach];
        window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// Evenly chosen points, the last among them.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.last().copied().filter(|_| !(points.len() - 1).is_multiple_of(every));
    points.iter().copied().step_by(every).chain(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_smoothed_and_thinned_without_losing_their_ends() {
        let points: Vec<(f64, f64)> = (0..4000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = means(&points, 100);
        assert_eq!((smooth[0].1, smooth[3999].1), (0.0, 1.0));
        assert!((smooth[2000].1 - 0.5).abs() < 0.01);
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS + 1 && thin[0].0 == 0.0 && thin.last().unwrap().0 == 3999.0);
    }

    #[test]
    fn no_values_can_break_a_drawing() {
        let step = |step, loss, seconds| Step {
            step,
            at: step as f64,
            seconds,
            loss,
            tokens: 10.0,
            gradient_norm: loss,
            learning_rate: 0.1,
            workers: 1,
            epoch: 0,
            communication: 0.0,
            exposed: 0.0,
        };
        assert!(loss(&[], &[]).is_none() && loss(&[step(1, 1.0, 1.0)], &[]).is_none());
        assert!(loss(&[step(1, f64::NAN, 1.0), step(2, f64::INFINITY, 1.0)], &[]).is_none());
        let same = loss(&[step(1, 2.0, 0.0), step(2, 2.0, 0.0)], &[]).unwrap();
        assert!(
            same.starts_with("<svg role") && same.contains("var(--line)") && !same.contains("#0"),
            "{same}"
        );
        assert!(throughput(&[step(1, 2.0, 0.0), step(2, 2.0, 0.0)], &[]).is_some());
        assert!(overlap(&[step(1, 2.0, 0.0), step(2, 2.0, 0.0)], &[]).is_none(), "nothing was sent");
    }
}

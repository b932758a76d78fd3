//! The page: a table, a plot, and why it comes out so.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Curve, Row, SHARE, WORKERS};

/// Steps a second between a tenth of the time and its end.
fn rate(curve: &Curve, seconds: f64) -> f64 {
    let from = seconds / 10.0;
    curve.iter().filter(|(at, _)| (from..seconds).contains(at)).count() as f64 / (seconds - from)
}

/// The mean loss of the last tenth of the time.
fn last(curve: &Curve, seconds: f64) -> f64 {
    let late: Vec<f64> = curve.iter().filter(|(at, _)| *at >= 0.9 * seconds).map(|(_, loss)| *loss).collect();
    late.iter().sum::<f64>() / late.len().max(1) as f64
}

/// A way's row of the table.
pub(super) fn row(row: &Row, seconds: f64) -> String {
    let (before, after) = (rate(&row.alike, seconds), rate(&row.slowed, seconds));
    format!(
        "| {} | {before:.1} | {after:.1} | {:.0} % | {:.2} | {:.2} |\n",
        row.name,
        100.0 * after / before.max(1e-9),
        last(&row.alike, seconds),
        last(&row.slowed, seconds)
    )
}

/// Writes the page and its plot.
pub(super) fn write(folder: &Path, rows: &[Row], seconds: f64) -> Result<()> {
    let put = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    fs::create_dir_all(folder.join("images"))?;
    put("images/stragglers.svg", plot(rows, seconds))?;
    let table: String = rows.iter().map(|one| row(one, seconds)).collect();
    let (share, slow) = (100.0 * SHARE, 100.0 * SHARE / 4.0);
    put(
        "stragglers.md",
        format!(
            "# One slow worker of four\n\n\
             Written by `cargo xtask stragglers`; edit that, not this.\n\n\
             {WORKERS} workers of `consort train` train a small model (4 layers of 96, 8 micro-batches of 4 samples a step) for \
             {seconds:.0} s. Each is a process with {share:.0} % of a core, which the kernel keeps it to (a control group); in \
             the columns of the slow one, one of them has {slow:.1} %. Servers and launcher have what they need. The \
             parameter servers are two shards with a backup each, replication `sync`, and micro-batches are claimed one by \
             one (`claim = 1`).\n\n\
             | how | steps/s, four alike | steps/s, one at a quarter | kept | loss, four alike | loss, one at a quarter \
             |\n|---|---:|---:|---:|---:|---:|\n{table}\n\
             ![Loss over time with one of four workers at a quarter of its speed](images/stragglers.svg)\n\n\
             Why it comes out so:\n\n\
             - **Ring.** Every worker has two micro-batches of each step, and all wait for the one that needs four times as \
             long.\n\
             - **Server, synchronous.** The same weights, to the bit, as the ring's after as many steps. But micro-batches are \
             claimed one by one, so the fast workers take most of them, and wait only for the last one that the slow one \
             has.\n\
             - **With backup workers.** A worker that has nothing left computes a micro-batch that has taken 150 ms elsewhere. \
             Whoever pushes first counts; the bits are the same. That helps against a worker that is slow now and then. One \
             that is always slow comes out of a micro-batch that nobody needs any more in the middle of the next step, and \
             claims one there.\n\
             - **Bounded by 2.** Nobody is more than two micro-batches ahead of the slowest. Against a worker that is slow now \
             and then that is enough; behind one that is always slow, all are slow in the end.\n\
             - **Asynchronous.** Nobody waits. Every push moves the weights, so these are eight updates a step, on gradients \
             of weights that others have moved meanwhile. What the others lose is the slow one's own share.\n\n\
             One run each. A loss is the mean of the last tenth of the time, of data that no step had seen before; where \
             weights move with every push, it is the loss that each micro-batch had under the weights of its moment. What the \
             modes promise stands in [parameter-server.md](parameter-server.md).\n"
        ),
    )
}

const COLOURS: [&str; 5] = ["#6b7280", "#2563eb", "#0891b2", "#d97706", "#16a34a"];

/// Loss over time, a line a way.
fn plot(rows: &[Row], seconds: f64) -> String {
    let (width, height, left, top, right, bottom) = (760.0, 340.0, 50.0, 20.0, 200.0, 40.0);
    let most = rows.iter().flat_map(|row| &row.slowed).map(|(_, loss)| *loss).fold(0.0, f64::max) * 1.05;
    let x = |at: f64| left + at / seconds * (width - left - right);
    let y = |loss: f64| height - bottom - loss / most * (height - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\" role=\"img\"><title>Loss over time with one of four workers at a quarter of its speed</title>\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    );
    for tick in 0..=(most as usize) {
        let (at, loss) = (y(tick as f64), tick);
        let _ = write!(
            svg,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#e5e7eb\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#374151\">{loss}</text>",
            width - right,
            left - 8.0,
            at + 4.0
        );
    }
    for tick in 0..=5 {
        let at = seconds * f64::from(tick) / 5.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#374151\">{at:.0} s</text>",
            x(at),
            height - bottom + 18.0
        );
    }
    for (i, Row { name, slowed: curve, .. }) in rows.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        // Means of a fiftieth of the time.
        let mut points = String::new();
        for bin in 0..50 {
            let (from, to) = (seconds * f64::from(bin) / 50.0, seconds * f64::from(bin + 1) / 50.0);
            let inside: Vec<f64> =
                curve.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, loss)| *loss).collect();
            if !inside.is_empty() {
                let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                let _ = write!(points, "{:.1},{:.1} ", x((from + to) / 2.0), y(mean));
            }
        }
        let row = top + 16.0 + 18.0 * i as f64;
        let mark = row - 4.0;
        let _ = write!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <line x1=\"{}\" x2=\"{}\" y1=\"{mark}\" y2=\"{mark}\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{row}\" fill=\"#374151\">{name}</text>",
            points.trim_end(),
            width - right + 12.0,
            width - right + 30.0,
            width - right + 36.0
        );
    }
    let _ = write!(svg, "<text x=\"{}\" y=\"{}\" fill=\"#374151\">loss</text>", 8.0, top - 6.0);
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_rates_and_losses_of_the_end() {
        let curve = |every: f64| -> Curve {
            (0..(10.0 / every) as usize).map(|i| (i as f64 * every, 5.0 - i as f64 * every / 10.0)).collect()
        };
        let one = Row { name: "ring", alike: curve(0.1), slowed: curve(0.5) };
        assert_eq!(row(&one, 10.0), "| ring | 10.0 | 2.0 | 20 % | 4.05 | 4.07 |\n");
        let svg = plot(&[one], 10.0);
        assert!(
            svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.matches("<polyline").count() == 1
        );
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}

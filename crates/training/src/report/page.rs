//! The report: one HTML file with its pictures and its style inside, light or dark as its reader has it, without a script.

use std::fmt::Write as _;

use super::{Event, Record, Step, What, joined, plots};
use crate::job::in_count;

/// Rows of the table of events; the first and the last ones are shown.
const MOST_EVENTS: usize = 60;

/// What the page says beside the records.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// The job's name.
    pub name: String,
    /// What was trained on what, in a sentence.
    pub about: String,
    /// Names and values, such as the model's shape.
    pub facts: Vec<(String, String)>,
    /// What the model writes.
    pub samples: Vec<Sample>,
    /// How the model is run.
    pub command: String,
    /// The job's file.
    pub job: String,
}

/// A beginning and what the model makes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// What it was given.
    pub prompt: String,
    /// What it wrote.
    pub answer: String,
    /// The answer continues the prompt's sentence.
    pub continues: bool,
}

/// The page of a job with these records, in the order in which they were written.
pub fn html(page: &Page, records: &[Record]) -> String {
    let records = joined(records);
    let steps: Vec<Step> =
        records.iter().filter_map(|r| if let Record::Step(step) = r { Some(*step) } else { None }).collect();
    let events: Vec<Event> = records
        .iter()
        .filter_map(|r| if let Record::Event(event) = r { Some(event.clone()) } else { None })
        .collect();
    let mut body = String::new();
    // Writing to a String doesn't fail.
    let _ = write!(
        body,
        "<header><h1>{}</h1><p>{}</p></header>\n<section class=\"tiles\">{}</section>\n",
        escaped(&page.name),
        escaped(&page.about),
        tiles(&steps, &events, &records)
    );
    body.push_str("<section class=\"plots\">\n");
    for (title, note, picture) in [
        (
            "Loss",
            "Mean loss of each step (pale) and its running mean, in nats a token.",
            plots::loss(&steps, &events),
        ),
        (
            "Throughput",
            "Tokens a second. Dashed lines: a worker was lost (red) or joined (green).",
            plots::throughput(&steps, &events),
        ),
        (
            "Overlap",
            "The share of the time in which gradients were under way that backward hid.",
            plots::overlap(&steps, &events),
        ),
        ("Gradient", "Length of the mean gradient before clipping.", plots::gradient(&steps, &events)),
    ] {
        if let Some(picture) = picture {
            let _ =
                write!(body, "<figure><figcaption><b>{title}</b> {note}</figcaption>\n{picture}</figure>\n");
        }
    }
    body.push_str("</section>\n");
    samples(&mut body, page);
    table(&mut body, &events);
    facts(&mut body, page, &records);
    let title = escaped(&page.name);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title} · training report</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}</main></body></html>\n"
    )
}

/// Figures at a glance.
fn tiles(steps: &[Step], events: &[Event], records: &[Record]) -> String {
    let mut out = String::new();
    let mut tile = |name: &str, value: String, note: String| {
        let _ = write!(
            out,
            "<div><span>{name}</span><strong>{}</strong><small>{}</small></div>",
            escaped(&value),
            escaped(&note)
        );
    };
    if let (Some(first), Some(_)) = (steps.first(), steps.last()) {
        let last = &steps[steps.len().saturating_sub((steps.len() / 20).max(1))..];
        let end = last.iter().map(|s| s.loss).sum::<f64>() / last.len() as f64;
        tile("Loss", format!("{end:.3}"), format!("from {:.3}", first.loss));
    }
    let planned =
        records.iter().rev().find_map(|r| if let Record::Start(s) = r { Some(s.steps) } else { None });
    let taken = steps.last().map_or(0, |s| s.step);
    let seconds = steps.last().map_or(0.0, |s| s.at);
    tile("Steps", taken.to_string(), format!("of {}, in {}", planned.unwrap_or(taken), duration(seconds)));
    let tokens: f64 = steps.iter().map(|s| s.tokens).sum();
    tile("Tokens", in_count(tokens as u64), "predicted, each repetition counted".into());
    let mut rates: Vec<f64> = steps.iter().map(Step::rate).collect();
    rates.sort_by(f64::total_cmp);
    let median = rates.get(rates.len() / 2).copied().unwrap_or(0.0);
    tile("Tokens a second", in_count(median as u64), "median of the steps".into());
    let count = |what| events.iter().filter(|e| e.what == what).count();
    let workers = steps.last().map_or(0, |s| s.workers);
    let (lost, joined) = (count(What::Lost), count(What::Joined));
    let note = if lost + joined == 0 {
        "none lost".to_owned()
    } else {
        format!("{lost} lost, {joined} joined on the way")
    };
    tile("Workers", workers.to_string(), note);
    let overlaps: Vec<f64> = steps.iter().filter_map(Step::overlap).collect();
    if !overlaps.is_empty() {
        let mean = overlaps.iter().sum::<f64>() / overlaps.len() as f64;
        tile("Overlap", format!("{:.0} %", 100.0 * mean), "of communication hidden".into());
    }
    out
}

fn samples(body: &mut String, page: &Page) {
    if page.samples.is_empty() {
        return;
    }
    body.push_str("<section><h2>What it writes</h2>\n");
    for sample in &page.samples {
        let (prompt, answer) = (escaped(&sample.prompt), escaped(sample.answer.trim_end()));
        let _ = match sample.continues {
            true => writeln!(body, "<blockquote><em>{prompt}</em>{answer}</blockquote>"),
            false => writeln!(body, "<blockquote><em>{prompt}</em><br>{answer}</blockquote>"),
        };
    }
    if !page.command.is_empty() {
        let _ = writeln!(body, "<p>Run it: <code>{}</code></p>", escaped(&page.command));
    }
    body.push_str("</section>\n");
}

fn table(body: &mut String, events: &[Event]) {
    if events.is_empty() {
        return;
    }
    body.push_str(
        "<section><h2>What happened</h2>\n<div class=\"scroll\"><table><thead><tr><th>Time</th><th>Step</th><th></th><th></th></tr></thead><tbody>\n",
    );
    let left_out = events.len().saturating_sub(MOST_EVENTS);
    let (first, last) = events.split_at(if left_out > 0 { MOST_EVENTS / 2 } else { events.len() });
    let mut row = |event: &Event| {
        let (class, word) = match event.what {
            What::Lost => ("bad", "lost"),
            What::Joined => ("good", "joined"),
            What::Checkpoint => ("", "checkpoint"),
            What::CheckpointFailed => ("bad", "checkpoint"),
            What::Stopped => ("bad", "stopped"),
            What::Note => ("", ""),
        };
        let _ = writeln!(
            body,
            "<tr><td>{}</td><td>{}</td><td class=\"{class}\">{word}</td><td>{}</td></tr>",
            duration(event.at),
            event.step,
            escaped(&event.text)
        );
    };
    first.iter().for_each(&mut row);
    last.iter().skip(left_out).for_each(&mut row);
    body.push_str("</tbody></table></div>\n");
    if left_out > 0 {
        let _ = writeln!(body, "<p>{left_out} more between them are in metrics.jsonl.</p>");
    }
    body.push_str("</section>\n");
}

fn facts(body: &mut String, page: &Page, records: &[Record]) {
    let hash =
        records.iter().rev().find_map(|r| if let Record::End(end) = r { end.weights.clone() } else { None });
    body.push_str("<section><h2>The job</h2>\n<dl>\n");
    for (name, value) in &page.facts {
        let _ = writeln!(body, "<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value));
    }
    if let Some(hash) = hash {
        let _ = writeln!(body, "<dt>Weights</dt><dd><code>{}</code> (BLAKE3)</dd>", escaped(&hash));
    }
    body.push_str("</dl>\n");
    if !page.job.is_empty() {
        let _ = writeln!(
            body,
            "<details><summary>The job's file</summary><pre>{}</pre></details>",
            escaped(&page.job)
        );
    }
    body.push_str("</section>\n");
}

/// Text as HTML shows it.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push('\n'),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Seconds for people: `48.2 s`, `3 min 20 s`, `2 h 5 min`.
fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{:.1} s", seconds.max(0.0)),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1d2330;--muted:#667085;--grid:#e4e7ec;--line:#2456d6;--pale:#b9c9f5;--bad:#c4320a;--good:#0e7a4b}
@media(prefers-color-scheme:dark){:root{--bg:#12151c;--card:#191d27;--ink:#e6e9ef;--muted:#97a1b3;--grid:#2b3140;--line:#7ea2ff;--pale:#36477d;--bad:#ff8a65;--good:#5bd69a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:36px 0 12px}
header p{margin:0;color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin:28px 0}
.tiles div,figure,blockquote,.scroll,dl,pre{background:var(--card);border:1px solid var(--grid);border-radius:10px}
.tiles div{padding:14px 16px;display:flex;flex-direction:column}
.tiles span,.tiles small,figcaption,th,dt{color:var(--muted);font-size:13px}
.tiles strong{font-size:26px;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px}
figure{margin:0;padding:14px 14px 6px}
figcaption b{color:var(--ink);font-size:15px;margin-right:6px}
svg{width:100%;height:auto;display:block}
svg text{font-family:inherit}
blockquote{margin:0 0 12px;padding:14px 18px;white-space:pre-wrap}
blockquote em{color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px}
th,td{text-align:left;padding:7px 14px;border-bottom:1px solid var(--grid);white-space:nowrap;font-variant-numeric:tabular-nums}
td:last-child{white-space:normal;width:100%}
tr:last-child td{border-bottom:0}
.bad{color:var(--bad)}.good{color:var(--good)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;padding:14px 18px;margin:0 0 14px}
dt{padding-top:2px}dd{margin:0;overflow-wrap:anywhere}
code,pre{font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{padding:14px 18px;overflow-x:auto}
summary{cursor:pointer;color:var(--muted)}
@media print{.plots figure{break-inside:avoid}}
";

#[cfg(test)]
mod tests {
    use super::super::tests::{start, step};
    use super::super::{End, Start};
    use super::*;

    fn event(what: What, text: &str) -> Record {
        Record::Event(Event { at: 0.7, step: 2, what, text: text.into() })
    }

    #[test]
    fn a_page_says_what_happened_and_nothing_in_it_is_markup() {
        let page = Page {
            name: "tiny <b>".into(),
            about: "a & b".into(),
            facts: vec![("Shape".into(), "4 layers".into())],
            samples: vec![Sample { prompt: "Once".into(), answer: " upon <script>".into(), continues: true }],
            command: "consort run out/tiny".into(),
            job: "out = \"x\"".into(),
        };
        let end = End { at: 1.5, step: 3, complete: true, weights: Some("abc123".into()) };
        let records = [
            start(None),
            step(1, 0.5, 4.0),
            event(What::Lost, "worker 1 (pid 7) was killed"),
            step(2, 1.0, 3.0),
            event(What::Joined, "worker 2 joined"),
            step(3, 1.5, 2.0),
            Record::End(end),
        ];
        let html = html(&page, &records);
        for wanted in [
            "tiny &lt;b&gt;",
            "a &amp; b",
            " upon &lt;script&gt;",
            "<strong>2.000</strong><small>from 4.000",
            "1 lost, 1 joined",
            "worker 1 (pid 7) was killed",
            "<code>abc123</code>",
            "<b>Loss</b>",
            "<b>Overlap</b>",
            "out = &quot;x&quot;",
        ] {
            assert!(html.contains(wanted), "{wanted} is missing");
        }
        assert!(!html.contains("<script") && !html.contains("http://") && !html.contains("https://"));
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    }

    #[test]
    fn a_job_that_said_nothing_has_a_page_too() {
        let none = Start { unix_ms: 0, steps: 5, resumed: None, workers: 1, parameters: 1 };
        let html = html(&Page::default(), &[Record::Start(none)]);
        assert!(html.contains("of 5, in 0.0 s") && !html.contains("<svg"));
    }

    #[test]
    fn many_events_are_cut_in_the_middle() {
        let records: Vec<Record> =
            (0..200).map(|i| event(What::Checkpoint, &format!("number {i}."))).collect();
        let html = html(&Page::default(), &records);
        assert!(html.contains("number 29.") && !html.contains("number 30.") && html.contains("number 199."));
        assert!(html.contains("140 more"));
    }
}

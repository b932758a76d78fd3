//! The `[models.NAME]` tables.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use consort_api::deployment::{Autoscale, Canary, ModelDeployment, Version};
use toml::de::DeValue;

use consort_config::Problem;
use consort_config::Section;
use consort_config::values::{Wrong, bytes, count, duration, flag, printable, share, text};

/// More could not be meant for one machine.
const MOST_MODELS: usize = 64;
const MOST_REPLICAS: u32 = 256;

/// All models, in the file's order.
pub(super) fn models(
    file: &mut Section<'_>,
    source: &str,
    problems: &mut Vec<Problem>,
) -> Vec<ModelDeployment> {
    let end = source.trim_end().len();
    let missing = Problem {
        span: end..end,
        message: "the file names no model".into(),
        label: "there is nothing to run".into(),
        help: Some("add [models.chat] with `source = \"smollm2-135m-instruct\"`".into()),
    };
    let before = problems.len();
    let Some(section) = file.table("models", problems) else {
        if problems.len() == before {
            problems.push(missing);
        }
        return Vec::new();
    };
    let mut found: BTreeMap<usize, ModelDeployment> = BTreeMap::new();
    for (name, span, value) in section.entries() {
        if let Some(why) = bad_name(name) {
            problems.push(Problem {
                span,
                message: format!("`{}` is no name for a model", printable(name)),
                label: why.into(),
                help: Some("use letters, digits, `-`, `_`, `.` and `:`; one with a dot needs quotes: [models.\"qwen2.5\"]".into()),
            });
            continue;
        }
        match value.get_ref() {
            DeValue::Table(table) => {
                let section = Section::new(format!("models.{name}"), table);
                found.insert(span.start, model(name, span, section, problems));
            }
            _ => problems.push(Problem {
                span: value.span(),
                message: format!("model `{name}` must be a table"),
                label: "this is a single value".into(),
                help: Some(format!("write it as [models.{name}] with `source = …` below")),
            }),
        }
    }
    if found.is_empty() && problems.len() == before {
        problems.push(missing);
    }
    if let Some(at) = found.keys().nth(MOST_MODELS) {
        problems.push(Problem {
            span: *at..*at + 1,
            message: "too many models".into(),
            label: format!("at most {MOST_MODELS} can run"),
            help: None,
        });
    }
    found.into_values().collect()
}

fn bad_name(name: &str) -> Option<&'static str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    match name.as_bytes() {
        [] => Some("it is empty"),
        [first, ..] if !first.is_ascii_alphanumeric() => Some("it must begin with a letter or digit"),
        bytes if bytes.len() > 96 => Some("it is longer than 96 characters"),
        bytes if !bytes.iter().copied().all(plain) => Some("it holds a character that names can't"),
        _ => None,
    }
}

fn model(
    name: &str,
    header: Range<usize>,
    mut section: Section<'_>,
    problems: &mut Vec<Problem>,
) -> ModelDeployment {
    let stable = version(&mut section, Version::new("stable", "", 1), &header, problems);
    let canary = section.table("canary", problems).map(|mut section| {
        let base = Version { name: "canary".into(), min: 1, max: 1, ..stable.clone() };
        let weight = section.get("weight", 5, problems, count(0, 100)).value;
        let version = version(&mut section, base, &header, problems);
        section.finish(problems);
        Canary { version, weight }
    });
    section.finish(problems);
    if canary.as_ref().is_some_and(|c| c.version.name == stable.name) {
        problems.push(Problem {
            span: header,
            message: format!("both versions of model `{name}` are called `{}`", stable.name),
            label: "versions of a model need names of their own".into(),
            help: Some(format!("set another `version` in [models.{name}.canary]")),
        });
    }
    ModelDeployment { name: name.to_owned(), stable, canary }
}

/// The keys that a version has. The canary begins with its incumbent's values.
fn version(
    section: &mut Section<'_>,
    base: Version,
    header: &Range<usize>,
    problems: &mut Vec<Problem>,
) -> Version {
    if !section.has("source") {
        problems.push(Problem {
            span: header.clone(),
            message: format!("{} has no `source`", section.name()),
            label: "which model is to run isn't said".into(),
            help: Some(
                "add `source = …`: a name from `consort models`, \"hf:org/repo\", a .gguf file or a folder"
                    .into(),
            ),
        });
    }
    let source = section.get("source", String::new(), problems, text).value;
    let name = section.get("version", base.name.clone(), problems, |value| {
        let name = text(value)?;
        bad_name(&name).map_or(Ok(name), |why| Err((why.to_owned(), None)))
    });
    let (min, max) = section.get("replicas", (base.min, base.max), problems, replicas).value;
    let threads = |value: &DeValue<'_>| count(1, 1024)(value).map(|n| u16::try_from(n).ok());
    let defaults = base.autoscale;
    Version {
        name: name.value,
        source,
        min,
        max,
        threads: section.get("threads", base.threads, problems, threads).value,
        context: section.get("context", base.context, problems, |v| count(16, 1 << 24)(v).map(Some)).value,
        kv_bytes: section
            .get("kv_cache", base.kv_bytes, problems, |v| bytes(1 << 20, 1 << 42)(v).map(Some))
            .value,
        max_running: section.get("max_running", base.max_running, problems, count(1, 4096)).value,
        max_queued: section.get("max_queued", base.max_queued, problems, count(0, 1_000_000)).value,
        prefix_cache: section.get("prefix_cache", base.prefix_cache, problems, flag).value,
        autoscale: section
            .table("autoscale", problems)
            .map_or(defaults, |s| autoscale(s, defaults, problems)),
    }
}

/// `replicas = 2`, or `replicas = { min = 0, max = 4 }`.
fn replicas(value: &DeValue<'_>) -> Result<(u32, u32), Wrong> {
    const SHAPE: &str = "write a number, or { min = 1, max = 4 }";
    let DeValue::Table(table) = value else {
        return count(1, MOST_REPLICAS)(value)
            .map(|n| (n, n))
            .map_err(|(label, _)| (label, Some(SHAPE.to_owned())));
    };
    let mut problems = Vec::new();
    let mut bounds = Section::new("replicas", table);
    let min = bounds.get("min", 1, &mut problems, count(0, MOST_REPLICAS)).value;
    let max = bounds.get("max", min.max(1), &mut problems, count(1, MOST_REPLICAS)).value;
    bounds.finish(&mut problems);
    if let Some(problem) = problems.pop() {
        return Err((format!("{}: {}", problem.message, problem.label), problem.help));
    }
    if min > max {
        return Err((
            format!("`min` is {min} and `max` is {max}"),
            Some(format!("make `max` at least {min}")),
        ));
    }
    Ok((min, max))
}

fn autoscale(mut section: Section<'_>, default: Autoscale, problems: &mut Vec<Problem>) -> Autoscale {
    let time = || duration(Duration::ZERO, super::DAY);
    let autoscale = Autoscale {
        target_tokens: section.get("target_tokens", default.target_tokens, problems, count(1, 1 << 30)).value,
        tolerance: section.get("tolerance", default.tolerance, problems, share(0.0, 0.9)).value,
        up_window: section.get("up_window", default.up_window, problems, time()).value,
        down_window: section.get("down_window", default.down_window, problems, time()).value,
        idle: section.get("idle", default.idle, problems, time()).value,
    };
    section.finish(problems);
    autoscale
}

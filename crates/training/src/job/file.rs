//! The job's file, key by key.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use consort_collectives::Algorithm;
use consort_config::values::{
    Wrong, bytes, choice, count, duration, flag, printable, share, text, texts, whole,
};
use consort_config::{Placed, Problem, Problems, Section};
use consort_model::train::{Precision, SavedType};

use super::servers::{Sync, servers};
use super::{Checkpoints, Data, Family, GgufType, Job, Length, ModelSource, Rates, Shape, Train};
use crate::data::{BadLines, TextDocuments};
use crate::parallel::{Outer, Wire};
use crate::{Decay, OptimizerConfig};

const WORDS_OF_TEXT: &[(&str, TextDocuments)] =
    &[("file", TextDocuments::File), ("paragraph", TextDocuments::Paragraph), ("line", TextDocuments::Line)];
const WORDS_OF_LINES: &[(&str, BadLines)] = &[("fatal", BadLines::Fatal), ("skip", BadLines::Skip)];
const WORDS_OF_DECAY: &[(&str, Decay)] =
    &[("cosine", Decay::Cosine), ("linear", Decay::Linear), ("constant", Decay::Constant)];
const WORDS_OF_GGUF: &[(&str, GgufType)] =
    &[("f32", GgufType::F32), ("bf16", GgufType::Bf16), ("q8_0", GgufType::Q8_0)];

/// Reads a job from the text of `file`. Relative paths of data become paths beside it.
///
/// # Errors
/// [`Problems`]: everything that is wrong with it, each with its place and its cure.
pub fn read(file: &Path, source: &str) -> Result<Job, Problems> {
    let beside = file.parent().unwrap_or(Path::new(""));
    consort_config::read(&file.display().to_string(), source, |section, problems| {
        job(section, source, beside, problems)
    })
}

fn job(mut file: Section<'_>, source: &str, beside: &Path, problems: &mut Vec<Problem>) -> Job {
    let end = source.trim_end().len();
    let out = file.get("out", None, problems, |value| text(value).map(Some));
    if out.value.is_none() && !file.has("out") {
        missing(end, "the job doesn't say where its result goes", "out = \"out/my-model\"", problems);
    }
    let seed = file.get("seed", 1, problems, whole(0, i64::MAX as u64)).value;
    let workers = file.get("workers", 1, problems, count(1, 1024)).value as usize;
    let threads = file.get("threads", None, problems, |value| count(1, 4096)(value).map(Some)).value;
    let saved = &[("f32", SavedType::F32), ("bf16", SavedType::Bf16)];
    let save = file.get("save", SavedType::Bf16, problems, choice(saved)).value;
    let prompts = file.get("prompts", Vec::new(), problems, texts).value;
    let gguf = file.get("gguf", None, problems, |value| choice(WORDS_OF_GGUF)(value).map(Some)).value;
    let model = match file.table("model", problems) {
        Some(section) => model(section, problems),
        None => {
            if !file.has("model") {
                let example =
                    "[model] with `from = \"smollm2-135m-instruct\"`, or with the shape of a new one";
                missing(end, "the job names no model", example, problems);
            }
            ModelSource::From(String::new())
        }
    };
    let longest = match &model {
        ModelSource::New(shape) => Some(shape.context),
        ModelSource::From(_) => None,
    };
    let data = match file.table("data", problems) {
        Some(section) => data(section, beside, longest, problems),
        None => {
            if !file.has("data") {
                missing(end, "the job has no data", "[data] with `paths = [\"texts\"]`", problems);
            }
            Data::default()
        }
    };
    let (train, sync) = match file.table("train", problems) {
        Some(section) => train(section, problems),
        None => {
            if !file.has("train") {
                let example = "[train] with `steps = 100` or `epochs = 1`";
                missing(end, "the job doesn't say how long it is", example, problems);
            }
            (Train::default(), Sync::default())
        }
    };
    let optimizer =
        file.table("optimizer", problems).map_or_else(OptimizerConfig::default, |s| optimizer(s, problems));
    let schedule = match file.table("schedule", problems) {
        Some(section) => schedule(section, &model, problems),
        None => Rates::of(&model),
    };
    let checkpoints = file.table("checkpoints", problems).map_or_else(Checkpoints::default, |mut s| {
        let default = Checkpoints::default();
        let checkpoints = Checkpoints {
            every: s.get("every", default.every, problems, whole(1, u64::from(u32::MAX))).value,
            keep: s.get("keep", default.keep as u32, problems, count(1, 1000)).value as usize,
            location: s.get("location", None, problems, |value| location(value).map(Some)).value,
        };
        s.finish(problems);
        checkpoints
    });
    let table = file.table("servers", problems);
    let servers = servers(table, &train, &sync, problems);
    file.finish(problems);
    Job {
        out: PathBuf::from(out.value.unwrap_or_default()),
        seed,
        workers,
        threads: threads.map(|n| n as usize),
        model,
        data,
        train,
        optimizer,
        schedule,
        checkpoints,
        servers,
        save,
        gguf,
        prompts,
    }
}

/// Where checkpoints go.
fn location(value: &toml::de::DeValue<'_>) -> Result<String, Wrong> {
    let location = text(value)?;
    match crate::checkpoint::place(&location) {
        Ok(_) => Ok(location),
        Err(why) => Err((why, Some("like \"checkpoints\" or \"s3://bucket/prefix\"".into()))),
    }
}

fn missing(end: usize, message: &str, example: &str, problems: &mut Vec<Problem>) {
    problems.push(Problem {
        span: end..end,
        message: message.into(),
        label: "nothing here says it".into(),
        help: Some(format!("add {example}")),
    });
}

fn model(mut section: Section<'_>, problems: &mut Vec<Problem>) -> ModelSource {
    if section.has("from") {
        let from = section.get("from", String::new(), problems, text).value;
        for key in SHAPE.iter().filter(|key| section.has(key)) {
            problems.push(Problem {
                span: section.place(key),
                message: format!("`{key}` beside `from`"),
                label: "a model that is there has its shape already".into(),
                help: Some("remove it, or `from`: without it a new model is made".into()),
            });
        }
        // Those keys were named; they are not unknown ones.
        section.know(SHAPE);
        section.finish(problems);
        return ModelSource::From(from);
    }
    let size = |high| move |value: &_| count(1, high)(value).map(|n| n as usize);
    let families: &[(&str, Family)] = &[("llama", Family::Llama), ("qwen3", Family::Qwen3)];
    let family = section.get("family", Family::Llama, problems, choice(families)).value;
    let layers = section.get("layers", 4, problems, size(1000)).value;
    let hidden = section.get("hidden", 256, problems, size(1 << 16));
    let heads = section.get("heads", 4, problems, size(1024));
    let kv_heads = section.get("kv_heads", heads.value, problems, size(1024));
    // Two thirds of four times the width, as Llama has it, in whole cache lines.
    let usual = (hidden.value * 8 / 3).next_multiple_of(64);
    let ffn = section.get("ffn", usual, problems, size(1 << 18)).value;
    let context = section.get("context", 256, problems, size(1 << 20)).value;
    let vocabulary =
        section.get("vocabulary", 2048, problems, |value| count(259, 1 << 20)(value).map(|n| n as usize));
    let tied = section.get("tied", true, problems, flag).value;
    section.know(&["from"]);
    section.finish(problems);
    let mut refuse = |span: Option<Range<usize>>, message: String, label: &str, help: String| {
        problems.push(Problem { span: span.unwrap_or(0..0), message, label: label.into(), help: Some(help) });
    };
    let (width, count) = (hidden.value, heads.value);
    if width % count != 0 || (width / count) % 2 != 0 {
        let near = (2 * count..).step_by(2 * count).find(|n| *n >= width).unwrap_or(width);
        refuse(
            heads.span.clone().or(hidden.span.clone()),
            format!(
                "{count} heads don't divide a width of {width}: {width} / {count} = {:.2}",
                width as f64 / count as f64
            ),
            "each head has the same even number of values",
            format!("`hidden = {near}` would do"),
        );
    } else if width / count > 256 {
        refuse(
            heads.span.clone().or(hidden.span.clone()),
            format!("heads of {width} / {count} = {} values", width / count),
            "at most 256 can be trained",
            format!("at least {} heads would do", width.div_ceil(256)),
        );
    }
    if count % kv_heads.value != 0 {
        refuse(
            kv_heads.span.clone(),
            format!("{count} heads can't share {} key-value heads", kv_heads.value),
            "each key-value head serves as many heads as every other",
            format!("a divisor of {count} would do"),
        );
    }
    ModelSource::New(Shape {
        family,
        layers,
        hidden: width,
        heads: count,
        kv_heads: kv_heads.value,
        ffn,
        context,
        vocabulary: vocabulary.value,
        tied,
    })
}

/// Keys of a new model.
const SHAPE: &[&str] =
    &["family", "layers", "hidden", "heads", "kv_heads", "ffn", "context", "vocabulary", "tied"];

fn data(
    mut section: Section<'_>,
    beside: &Path,
    longest: Option<usize>,
    problems: &mut Vec<Problem>,
) -> Data {
    let default = Data::default();
    let paths = section.get("paths", Vec::new(), problems, texts);
    let stories = section.get("stories", 0, problems, bytes(1 << 10, 1 << 32));
    let text = section.get("text", default.text, problems, choice(WORDS_OF_TEXT)).value;
    let bad_lines = section.get("bad_lines", default.bad_lines, problems, choice(WORDS_OF_LINES)).value;
    let usual = longest.unwrap_or(default.context);
    let context = section.get("context", usual as u32, problems, count(2, 1 << 24));
    let (none, header) = (paths.value.is_empty() && stories.value == 0, section.header());
    let wrong =
        section.has("paths") && paths.span.is_none() || section.has("stories") && stories.span.is_none();
    section.finish(problems);
    if none && !wrong {
        problems.push(Problem {
            span: header,
            message: "[data] names nothing to learn from".into(),
            label: "no `paths` and no `stories`".into(),
            help: Some("add `paths = [\"texts\", \"chats.jsonl\"]`".into()),
        });
    }
    if let Some(longest) = longest.filter(|longest| context.value as usize > *longest) {
        problems.push(Problem {
            span: context.span.unwrap_or(0..0),
            message: format!("samples of {} rows for a model of {longest} positions", context.value),
            label: "a sample is longer than the model's context".into(),
            help: Some(format!(
                "make it at most {longest}, or [model]'s `context` at least {}",
                context.value
            )),
        });
    }
    Data {
        paths: paths.value.into_iter().map(|path| beside.join(path)).collect(),
        stories: stories.value,
        text,
        bad_lines,
        context: context.value as usize,
    }
}

/// And what it says of adding gradients.
fn train(mut section: Section<'_>, problems: &mut Vec<Problem>) -> (Train, Sync) {
    let default = Train::default();
    let around = section.get("sync", false, problems, choice(&[("ring", false), ("server", true)])).value;
    let steps = section.get("steps", None, problems, |value| whole(1, 1 << 40)(value).map(Some));
    let epochs = section.get("epochs", None, problems, |value| share(1e-6, 1e6)(value).map(Some));
    let batch = section.get("batch", default.batch as u32, problems, count(1, 1 << 20));
    let micro_batch = section.get("micro_batch", 0, problems, count(1, 1 << 20));
    let precision = section.get("precision", default.precision, problems, precision).value;
    let recompute = section.get("recompute", default.recompute, problems, flag).value;
    let dropout = section.get("dropout", 0.0, problems, share(0.0, 0.99)).value as f32;
    // 0 clips nothing.
    let clip = section.get("clip", 1.0, problems, share(0.0, 1e9)).value;
    let exact = section.get("exact", true, problems, flag).value;
    let wires = &[("f32", Wire::F32), ("bf16", Wire::Bf16), ("int8", Wire::Int8)];
    let wire = section.get("wire", Wire::F32, problems, choice(wires));
    let algorithm = section.get("algorithm", None, problems, algorithm).value;
    let (second, day) = (Duration::from_secs(1), Duration::from_secs(86_400));
    let deadline = section.get("deadline", default.deadline, problems, duration(second, day));
    let quarter = duration(second / 4, day);
    let silence = section.get("silence", None, problems, |value| quarter(value).map(Some)).value;
    let outer =
        section.table("local_steps", problems).map(|table| (table.header(), local_steps(table, problems)));
    let ring = ["wire", "algorithm", "local_steps"].into_iter().filter(|key| section.has(key));
    let sync = Sync {
        servers: around,
        exact: section.has("exact").then(|| section.place("exact")),
        ring: ring.map(|key| (key, section.place(key))).collect(),
    };
    let (asked, header) = (section.has("steps") || section.has("epochs"), section.header());
    section.finish(problems);
    let inexact = [
        (wire.value != Wire::F32).then(|| (wire.span.clone(), "rounding on the way")),
        outer.as_ref().map(|(span, _)| (Some(span.clone()), "steps that workers take by themselves")),
    ];
    for (span, what) in inexact.into_iter().flatten().filter(|_| exact && !around) {
        problems.push(Problem {
            span: span.unwrap_or(0..0),
            message: format!("{what} with exact sums"),
            label: "who computed what would change the result".into(),
            help: Some("set `exact = false` in [train] to allow that, or remove this".into()),
        });
    }
    match (&steps.value, &epochs.value) {
        (Some(_), Some(_)) => problems.push(Problem {
            span: epochs.span.clone().unwrap_or(0..0),
            message: "both `steps` and `epochs`".into(),
            label: "each of them says how long the job is".into(),
            help: Some("remove one of them".into()),
        }),
        (None, None) if !asked => problems.push(Problem {
            span: header,
            message: "[train] doesn't say how long the job is".into(),
            label: "neither `steps` nor `epochs`".into(),
            help: Some("add `steps = 100` or `epochs = 1`".into()),
        }),
        _ => {}
    }
    let batch_size = batch.value as usize;
    let micro = match micro_batch.value as usize {
        // The largest divisor up to four: small enough to share among workers, large enough for the kernels.
        0 => (1..=batch_size.min(4)).rev().find(|n| batch_size.is_multiple_of(*n)).unwrap_or(1),
        n => n,
    };
    divides(&batch, batch_size, micro, micro_batch.span, problems);
    let train = Train {
        length: steps.value.map(Length::Steps).or(epochs.value.map(Length::Epochs)).unwrap_or(default.length),
        batch: batch_size,
        micro_batch: micro,
        precision,
        recompute,
        dropout,
        clip: (clip > 0.0).then_some(clip),
        exact,
        wire: wire.value,
        algorithm,
        outer: outer.map(|(_, outer)| outer),
        deadline: deadline.value,
        silence,
    };
    (train, sync)
}

/// A step is made of whole micro-batches.
fn divides(
    batch: &Placed<u32>,
    size: usize,
    micro: usize,
    span: Option<Range<usize>>,
    problems: &mut Vec<Problem>,
) {
    if size.is_multiple_of(micro) {
        return;
    }
    let (whole, left) = (size / micro, size % micro);
    let near = match whole {
        0 => format!("{micro}"),
        _ => format!("{} or {}", whole * micro, (whole + 1) * micro),
    };
    problems.push(Problem {
        span: span.or(batch.span.clone()).unwrap_or(0..0),
        message: format!("a batch of {size} can't be cut into micro-batches of {micro}"),
        label: format!("{size} = {whole} × {micro} + {left}"),
        help: Some(format!("make `batch` {near}, or `micro_batch` a divisor of {size}")),
    });
}

fn precision(value: &toml::de::DeValue<'_>) -> Result<Precision, Wrong> {
    choice(&[("f32", Precision::F32), ("bf16", Precision::Bf16)])(value)
}

fn algorithm(value: &toml::de::DeValue<'_>) -> Result<Option<Algorithm>, Wrong> {
    let name = text(value)?;
    Algorithm::by_name(&name).map(Some).ok_or_else(|| {
        let names: Vec<&str> = Algorithm::ALL.into_iter().map(Algorithm::name).collect();
        (
            format!("there is no \"{}\" here", printable(&name)),
            Some(format!("write one of {}", names.join(", "))),
        )
    })
}

fn local_steps(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Outer {
    let default = Outer::default();
    let outer = Outer {
        every: section.get("every", default.every, problems, whole(1, 1 << 32)).value,
        learning_rate: section
            .get("learning_rate", f64::from(default.learning_rate), problems, share(1e-6, 10.0))
            .value as f32,
        momentum: section.get("momentum", f64::from(default.momentum), problems, share(0.0, 0.999)).value
            as f32,
    };
    section.finish(problems);
    outer
}

fn optimizer(mut section: Section<'_>, problems: &mut Vec<Problem>) -> OptimizerConfig {
    let adamw = section.get("name", true, problems, choice(&[("adamw", true), ("sgd", false)])).value;
    let below_one = share(0.0, 0.999_999_9);
    let decay = share(0.0, 10.0);
    let config = if adamw {
        OptimizerConfig::AdamW {
            beta1: section.get("beta1", 0.9, problems, &below_one).value as f32,
            beta2: section.get("beta2", 0.95, problems, &below_one).value as f32,
            epsilon: section.get("epsilon", 1e-8, problems, share(1e-30, 1.0)).value as f32,
            weight_decay: section.get("weight_decay", 0.1, problems, decay).value as f32,
        }
    } else {
        OptimizerConfig::Sgd {
            momentum: section.get("momentum", 0.9, problems, below_one).value as f32,
            nesterov: section.get("nesterov", true, problems, flag).value,
            weight_decay: section.get("weight_decay", 0.0, problems, decay).value as f32,
        }
    };
    section.finish(problems);
    config
}

fn schedule(mut section: Section<'_>, model: &ModelSource, problems: &mut Vec<Problem>) -> Rates {
    let usual = Rates::of(model);
    let rates = Rates {
        learning_rate: section.get("learning_rate", usual.learning_rate, problems, share(1e-12, 100.0)).value,
        warmup: section.get("warmup", usual.warmup, problems, share(0.0, 1.0)).value,
        decay: section.get("decay", usual.decay, problems, choice(WORDS_OF_DECAY)).value,
        final_share: section.get("final_share", usual.final_share, problems, share(0.0, 1.0)).value,
    };
    section.finish(problems);
    rates
}

impl Rates {
    /// What a model usually learns at: a new one faster than one that knows something.
    fn of(model: &ModelSource) -> Rates {
        let learning_rate = match model {
            ModelSource::New(_) => 1e-3,
            ModelSource::From(_) => 5e-5,
        };
        Rates { learning_rate, warmup: 0.05, decay: Decay::Cosine, final_share: 0.1 }
    }
}

impl Default for Data {
    fn default() -> Data {
        let (text, bad_lines) = (TextDocuments::default(), BadLines::default());
        Data { paths: Vec::new(), stories: 0, text, bad_lines, context: 256 }
    }
}

impl Default for Train {
    fn default() -> Train {
        Train {
            length: Length::Steps(1),
            batch: 8,
            micro_batch: 4,
            precision: Precision::Bf16,
            recompute: false,
            dropout: 0.0,
            clip: Some(1.0),
            exact: true,
            wire: Wire::F32,
            algorithm: None,
            outer: None,
            deadline: Duration::from_secs(600),
            silence: None,
        }
    }
}

impl Default for Checkpoints {
    fn default() -> Checkpoints {
        Checkpoints { every: 100, keep: 2, location: None }
    }
}

use std::path::Path;

use super::*;
use crate::data::Report;

const SMALL: &str = r#"
out = "out/x"
workers = 2
[model]
layers = 2
hidden = 64
heads = 4
context = 128
vocabulary = 300
[data]
paths = ["texts"]
[train]
steps = 10
batch = 8
micro_batch = 2
"#;

fn refused(source: &str) -> String {
    read(Path::new("jobs/job.toml"), source).unwrap_err().to_string()
}

fn with(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from}");
    SMALL.replacen(from, to, 1)
}

fn planned(job: &Job, memory: Option<u64>) -> Result<Plan, Refusal> {
    let ModelSource::New(shape) = &job.model else { panic!("a new model") };
    let report = Report { samples: 100, predicted: 12_000, ..Report::default() };
    plan(job, &shape.config(300), &report, Machine { memory, cores: 4, workers: job.workers })
}

#[test]
fn a_job_is_what_its_file_says() {
    let job = read(Path::new("jobs/job.toml"), SMALL).unwrap();
    assert_eq!(job.data.paths, [Path::new("jobs/texts")]);
    assert_eq!(job.data.context, 128, "samples fill the model's context");
    assert_eq!(job.train.length, Length::Steps(10));
    assert!(job.train.exact);
    let ModelSource::New(shape) = job.model else { panic!("{:?}", job.model) };
    assert_eq!((shape.kv_heads, shape.ffn), (4, 192));
    for example in ["tiny", "finetune"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../examples/train")
            .join(format!("{example}.toml"));
        let text = std::fs::read_to_string(&path).unwrap();
        read(&path, &text).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn what_cannot_be_meant_is_shown_with_its_place_and_cure() {
    for (from, to, said) in [
        ("workers = 2", "wrokers = 2", "did you mean `workers`?"),
        ("batch = 8", "batch = 9", "9 = 4 × 2 + 1"),
        ("steps = 10", "steps = 0", "must be from 1"),
        ("steps = 10", "steps = 10\nepochs = 1", "both `steps` and `epochs`"),
        ("steps = 10", "", "neither `steps` nor `epochs`"),
        ("heads = 4", "heads = 5", "64 / 5 = 12.80"),
        ("heads = 4", "heads = 4\nkv_heads = 3", "4 heads can't share 3 key-value heads"),
        (
            "paths = [\"texts\"]",
            "paths = [\"texts\"]\ncontext = 200",
            "a sample is longer than the model's context",
        ),
        ("paths = [\"texts\"]", "", "no `paths` and no `stories`"),
        ("out = \"out/x\"", "", "add out = "),
        ("[model]\n", "[model]\nfrom = \"a\"\n", "has its shape already"),
        ("[train]\n", "[train]\nprecision = \"bf61\"\n", "did you mean \"bf16\"?"),
        ("[train]\n", "[optimizer]\nname = \"sgd\"\nbeta1 = 0.9\n[train]\n", "unknown key `beta1`"),
    ] {
        let message = refused(&with(from, to));
        assert!(message.contains(said), "{said:?} is not in:\n{message}");
    }
}

#[test]
fn the_plan_is_counted() {
    let job = read(Path::new("job.toml"), SMALL).unwrap();
    let plan = planned(&job, Some(8 << 30)).unwrap();
    assert_eq!((plan.steps, plan.micro_batches, plan.threads), (10, 4, 2));
    assert!((plan.epochs - 0.8).abs() < 1e-9 && (plan.tokens - 960.0).abs() < 1e-9);
    let text = plan.to_string();
    assert!(text.contains("2 for each of 2 workers with 2 threads") && text.contains("of 8.0 GiB"), "{text}");
    let epochs = Job { train: Train { length: Length::Epochs(2.0), ..job.train }, ..job.clone() };
    assert_eq!(planned(&epochs, None).unwrap().steps, 25);
}

#[test]
fn what_does_not_fit_is_refused_with_the_arithmetic() {
    let job = read(Path::new("job.toml"), SMALL).unwrap();
    let refusal = planned(&job, Some(200 << 20)).unwrap_err().to_string();
    assert!(refusal.contains("2 such workers on this machine"), "{refusal}");
    for part in ["weights", "gradients", "exact sums", "optimizer", "activations", "take 1 workers"] {
        assert!(refusal.contains(part), "{part} is not in:\n{refusal}");
    }
    let many = Job { workers: 6, ..job.clone() };
    let refusal = planned(&many, None).unwrap_err().to_string();
    assert!(refusal.contains("8 / 2 = 4 micro-batches") && refusal.contains("2 of them"), "{refusal}");
    let long = Job { data: Data { context: 500, ..job.data.clone() }, ..job };
    assert!(planned(&long, None).unwrap_err().to_string().contains("500 rows"));
}

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
    for example in ["tiny", "finetune", "servers"] {
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
        ("[train]", "[checkpoints]\nlocation = \"s3://\"\n[train]", "this names no bucket"),
        ("[train]", "[checkpoints]\nlocation = \"ftp://host/x\"\n[train]", "not to ftp://"),
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

/// [`SMALL`] around servers, with these lines in [train] and in [servers].
fn served(train: &str, servers: &str) -> String {
    format!(
        "{}\n[servers]\n{servers}\n",
        with("[train]\n", &format!("[train]\nsync = \"server\"\n{train}\n"))
    )
}

#[test]
fn servers_are_what_the_file_says() {
    use crate::server::{Aggregate, Mode, Replication};
    let read = |source: &str| read(Path::new("job.toml"), source).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(read(SMALL).servers, None);
    let usual = read(&with("[train]\n", "[train]\nsync = \"server\"\n"));
    assert_eq!(usual.servers, Some(Servers::default()));
    let text =
        "count = 3\nmode = \"bounded\"\nstaleness = 4\nreplication = \"async\"\nmax_lag = 8\nclaim = 2";
    let job = read(&served("exact = false", text));
    let servers = job.servers.unwrap();
    assert_eq!((servers.count, servers.mode), (3, Mode::Bounded { staleness: 4 }));
    assert_eq!(servers.replication, Replication::Async { max_lag: 8 });
    assert_eq!(servers.groups(&job.train, 2), Ok((2, 2)));
    let krum = read(&served("exact = false", "aggregate = \"krum\"\nwrong = 2")).servers.unwrap();
    assert_eq!(krum.aggregate, Aggregate::Krum { wrong: 2 });
    let none = read(&served("", "mode = \"bounded\"\nstaleness = 0")).servers.unwrap();
    assert!(none.exact(), "no staleness at all is the synchronous mode");
}

#[test]
fn servers_that_cannot_be_are_refused_with_key_and_cure() {
    for (train, servers, said) in [
        ("wire = \"int8\"", "", "`wire` in a job with parameter servers"),
        ("algorithm = \"tree\"", "", "`algorithm` in a job with parameter servers"),
        ("local_steps = { every = 4 }", "", "`local_steps` in a job with parameter servers"),
        (
            "",
            "mode = \"asynchronous\"",
            "set `exact = false` in [train] to allow that, or `mode = \"synchronous\"`",
        ),
        ("", "mode = \"bounded\"", "set `exact = false` in [train]"),
        ("", "aggregate = \"median\"", "gradients that are compared with exact sums"),
        ("exact = false", "", "`exact = false` with servers whose sums are exact"),
        (
            "exact = false",
            "mode = \"asynchronous\"\naggregate = \"krum\"",
            "only a synchronous step has gradients",
        ),
        (
            "exact = false",
            "mode = \"asynchronous\"\nstaleness = 3",
            "`staleness` without `mode = \"bounded\"`",
        ),
        ("", "wrong = 1", "`wrong` without"),
        ("", "max_lag = 4", "`max_lag` without `replication = \"async\"`"),
        ("", "claim = 3", "a step of 8 / 2 = 4 micro-batches, claimed 3 at a time"),
        ("", "cuont = 3", "did you mean `count`?"),
        ("", "count = 0", "must be from 1"),
    ] {
        let message = refused(&served(train, servers));
        assert!(message.contains(said), "{said:?} is not in:\n{message}");
    }
    let none = refused(&format!("{SMALL}\n[servers]\ncount = 2\n"));
    assert!(none.contains("set `sync = \"server\"` in [train]"), "{none}");
}

#[test]
fn too_few_workers_to_compare_are_refused_with_the_arithmetic() {
    let planned = |servers: &str, workers: usize| {
        let job =
            read(Path::new("job.toml"), &served("exact = false", servers)).unwrap_or_else(|e| panic!("{e}"));
        planned(&Job { workers, ..job }, None).map(|plan| plan.micro_batches).map_err(|refusal| refusal.0)
    };
    let krum = planned("aggregate = \"krum\"", 4).unwrap_err();
    assert!(krum.contains("at least 5 workers (2 × wrong + 3, and wrong = 1); this job has 4"), "{krum}");
    assert!(planned("aggregate = \"median\"", 2).unwrap_err().contains("at least 3 workers"));
    let uneven = planned("aggregate = \"trimmed_mean\"", 3).unwrap_err();
    assert!(uneven.contains("3 workers can't share 8 / 2 = 4") && uneven.contains("`batch` 12"), "{uneven}");
    assert_eq!(planned("aggregate = \"trimmed_mean\"", 4), Ok(4));
    let idle = planned("mode = \"asynchronous\"\nclaim = 2", 3).unwrap_err();
    assert!(idle.contains("`claim` at most 1, or take 2 workers"), "{idle}");
}

#[test]
fn the_memory_of_servers_is_counted() {
    let bytes = |source: &str| {
        let plan = planned(&read(Path::new("job.toml"), source).unwrap(), None).unwrap();
        let part = |what: &str| {
            let parts = plan.around[0].parts.iter().find(|part| part.what == what);
            parts.map_or(0, |part| part.bytes)
        };
        (plan.clone(), part("weights"), part("optimizer"), part("sums"), part("backup"))
    };
    let (ring, two, one) = (
        planned(&read(Path::new("job.toml"), SMALL).unwrap(), None).unwrap(),
        bytes(&served("", "count = 2")),
        bytes(&served("", "count = 1")),
    );
    let values = one.1 / 4;
    assert!(values >= ring.parameters && values < ring.parameters + 4096, "one shard has them all");
    assert_eq!((one.2, one.3, one.4), (8 * values, 12 * values, 0), "AdamW, sums and their total, no backup");
    assert!(two.1 >= one.1 / 2 && two.1 < one.1, "the larger shard of two");
    assert_eq!(two.4, two.1 + two.2 + two.3, "a backup holds the same");
    let process = |name: &str| two.0.around.iter().find(|process| process.name == name).unwrap();
    let around = 2 * process("a server").bytes() + process("the launcher").bytes();
    assert_eq!(two.0.machine_bytes(), 2 * two.0.worker_bytes() + around);
    assert!(!two.0.memory.iter().any(|part| part.what == "optimizer"), "which is the servers'");
    let job = read(Path::new("job.toml"), &served("", "count = 2")).unwrap();
    let refusal = planned(&job, Some(200 << 20)).unwrap_err().to_string();
    assert!(refusal.contains("2 × a server") && refusal.contains("backup"), "{refusal}");
}

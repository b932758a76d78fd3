//! `consort train` asked for what can't be: each message names the thing and what to do, and nothing panics.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use crate::support::{Consort, err};

/// A model of some thousand weights on stories. `OUT` and `FROM` become paths.
const JOB: &str = r#"
out = "OUT"
[model]
layers = 1
hidden = 16
heads = 2
context = 32
vocabulary = 260
[data]
stories = "4K"
[train]
steps = 2
batch = 4
micro_batch = 2
"#;

/// A folder with a job in it.
struct Scene {
    consort: Consort,
    folder: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let consort = Consort::new();
        let folder = consort.home.path().join("work");
        std::fs::create_dir_all(folder.join("empty")).unwrap();
        Scene { consort, folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.folder.join(name), content).unwrap();
        self.path(name)
    }

    /// The job with one line of it replaced.
    fn job(&self, from: &str, to: &str) -> String {
        assert!(JOB.contains(from), "{from}");
        self.file("job.toml", JOB.replacen(from, to, 1).replace("OUT", &self.path("out")))
    }

    /// Runs it; what it said, where it ended with this code.
    fn said(&self, arguments: &[&str], code: i32) -> String {
        let output = self.consort.run(arguments);
        let said = err(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        said
    }

    fn refuses(&self, arguments: &[&str], code: i32, named: &[&str]) {
        let said = self.said(arguments, code);
        for part in named {
            assert!(said.contains(part), "{arguments:?}: no {part:?} in: {said}");
        }
    }
}

#[test]
fn files_that_are_none_are_named_with_the_cure() {
    let scene = Scene::new();
    let latin = scene.file("latin.toml", b"out = \"caf\xe9\"");
    for (path, why) in [
        (scene.path("none.toml"), "there is no file "),
        (scene.path("empty"), "is a folder; name"),
        (latin, "is not text: byte 10 is no UTF-8; name"),
    ] {
        for command in [&["train"][..], &["up"], &["bench", "train", "--job"], &["train", "status"]] {
            // A folder is what `status` may have.
            if command == ["train", "status"] && (why.contains("folder") || why.starts_with("there")) {
                continue;
            }
            let arguments: Vec<&str> = command.iter().copied().chain([path.as_str()]).collect();
            scene.refuses(&arguments, 2, &[why, &path, "such as examples/"]);
        }
    }
    scene.refuses(&["train", "status", &scene.path("none")], 2, &["name the job's file, or the folder"]);
    scene.refuses(
        &["train", "status", &scene.path("empty")],
        1,
        &["no job has run in", "consort train JOB.toml"],
    );
    scene.refuses(&["train", "export", &scene.path("none")], 2, &["there is no folder", "a job's result"]);
}

#[test]
fn data_that_is_none_is_named_with_the_cure() {
    let scene = Scene::new();
    scene.file("empty.txt", "");
    scene.file("latin.txt", b"caf\xe9 au lait\n");
    scene.file("bad.jsonl", "{\"text\": \"good\"}\n{\"text\": 3}\n");
    for (name, code, named) in [
        ("none.txt", 2, &["there is no file", "none.txt", "[data]'s `paths`"][..]),
        ("empty", 1, &["no file in this folder ends in .txt", "name a file itself"]),
        ("empty.txt", 1, &["no text to learn a vocabulary from in ", "empty.txt", "name other data"]),
        ("latin.txt", 1, &["latin.txt:1: not UTF-8 text: byte 4", "bad_lines = \"skip\""]),
        ("bad.jsonl", 1, &["bad.jsonl:2: `text` is no string", "bad_lines = \"skip\""]),
        ("/dev/null", 1, &["not a regular file; name one"]),
    ] {
        let job = scene.job("stories = \"4K\"", &format!("paths = [\"{name}\"]"));
        scene.refuses(&["train", &job], code, named);
    }
}

#[test]
fn places_that_take_nothing_are_named_with_the_cure() {
    let scene = Scene::new();
    let file = scene.file("file", "");
    for out in [file.clone(), format!("{file}/below")] {
        let job = scene.job("OUT", &out);
        scene.refuses(&["train", &job], 2, &[&out, "`out` in the job's file names"]);
    }
    let cases = [("s3://", "this names no bucket"), ("ftp://host/x", "not to ftp://")];
    for (location, why) in cases {
        let job = scene.job("[train]", &format!("[checkpoints]\nlocation = \"{location}\"\n[train]"));
        scene.refuses(&["train", &job], 2, &[why, "s3://bucket/prefix"]);
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let job = scene.job("OUT", "OUT");
    scene.refuses(&["train", &job, "--metrics", &address], 1, &[&address, "--metrics with port 0"]);
    // Known before the data is read.
    assert!(!Path::new(&scene.path("out/job/samples")).exists());
}

#[test]
fn a_model_that_nobody_can_hold_is_refused_with_its_arithmetic() {
    let scene = Scene::new();
    let job = scene.job("layers = 1\nhidden = 16\nheads = 2", "layers = 1000\nhidden = 65536\nheads = 512");
    scene.refuses(&["train", &job], 2, &["of memory on this machine", "make the model smaller"]);
}

#[test]
fn a_resumption_that_cannot_be_says_why_once_and_not_to_do_it_again() {
    let scene = Scene::new();
    let job = scene.job("OUT", "OUT");
    let first = scene.said(&["train", &job, "--resume"], 0);
    assert!(
        first.contains("there is no checkpoint at ") && first.contains("begins at its first step"),
        "{first}"
    );
    for (from, to, named) in [
        ("hidden = 16", "hidden = 32", &["no checkpoint is good", "Put back what was changed"][..]),
        (
            "micro_batch = 2",
            "micro_batch = 4",
            &["has micro_batches = 2, this job has 1", "put the setting back"],
        ),
        ("stories = \"4K\"", "stories = \"8K\"", &["this job has", "put the setting back"]),
    ] {
        scene.job(from, to);
        let said = scene.said(&["train", &job, "--resume"], 1);
        for part in named {
            assert!(said.contains(part), "no {part:?} in: {said}");
        }
        // The worker's words and the last line; not the same command as the cure.
        assert_eq!(said.matches(named[0]).count(), 2, "{said}");
        assert!(!said.contains("go on behind step"), "{said}");
    }
}

#[test]
fn ports_of_a_starter_that_are_none_are_named() {
    let scene = Scene::new();
    let job = scene.job("OUT", "OUT");
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (port, code, why) in
        [("nonsense", 2, "is no port"), ("99999", 2, "is no port"), (&port, 1, "give one that is free")]
    {
        let variables =
            [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")];
        let mut command = scene.consort.command(&["train", &job]);
        let output = command.envs(variables).env("MASTER_PORT", port).output().unwrap();
        let said = err(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains("MASTER_PORT") && said.contains(port) && said.contains(why), "{said}");
    }
}

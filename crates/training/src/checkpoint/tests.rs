use std::fs;
use std::path::Path;

use consort_model::train::{Decoder, Layout, Options};
use serde_json::json;

use super::*;
use crate::Error;

fn layout() -> Layout {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train/llama");
    let opened = consort_model::open(&folder).unwrap();
    Decoder::new(opened.config(), Options::default()).unwrap().layout().clone()
}

/// A job's numbers at a step.
struct Job {
    layout: Layout,
    weights: Vec<f32>,
    state: Vec<consort_tensor::buffer::Buffer<f32>>,
}

impl Job {
    fn new() -> Job {
        let layout = layout();
        let state = (0..2).map(|_| consort_tensor::buffer::Buffer::zeroed(layout.len()).unwrap()).collect();
        Job { weights: vec![0.0; layout.len()], state, layout }
    }

    /// The numbers that it has after `step`; what lies between tensors stays 0.
    fn at(step: u64) -> Job {
        let mut job = Job::new();
        for parameter in job.layout.parameters().to_vec() {
            for i in parameter.range.clone() {
                job.weights[i] = i as f32 + step as f32 * 1000.0;
                job.state[0][i] = job.weights[i] * 2.0;
                job.state[1][i] = job.weights[i] * 3.0;
            }
        }
        job
    }

    fn save(&self, writer: &mut Writer, step: u64) {
        writer.save(step, &self.layout, &self.weights, &self.state, json!({"cursor": step * 10}));
    }

    fn load(&mut self, location: &Path) -> Result<Option<Loaded>, Error> {
        load(location.to_str().unwrap(), &[], &self.layout, &mut self.weights, &mut self.state)
    }

    fn is(&self, step: u64) -> bool {
        let other = Job::at(step);
        self.weights == other.weights && self.state.iter().zip(&other.state).all(|(a, b)| a[..] == b[..])
    }
}

fn config(location: &Path, worker: usize, workers: usize) -> CheckpointConfig {
    CheckpointConfig {
        location: location.to_str().unwrap().to_owned(),
        options: Vec::new(),
        keep: 2,
        worker,
        workers,
        patience: Duration::from_secs(20),
        files: BTreeMap::from([("config.json".to_owned(), b"{}".to_vec())]),
    }
}

/// Saves a step by several workers, each waiting for its own.
fn save(location: &Path, workers: usize, step: u64) {
    let job = Job::at(step);
    let mut writers: Vec<Writer> = (0..workers)
        .map(|worker| Writer::new(config(location, worker, workers), &job.layout).unwrap())
        .collect();
    writers.iter_mut().for_each(|writer| job.save(writer, step));
    for (worker, writer) in writers.into_iter().enumerate() {
        let events = writer.finish();
        match &events[..] {
            [Event::Complete { step: done, bytes, .. }] if worker == 0 => {
                assert!(*done == step && *bytes > 0)
            }
            [Event::Written { step: done, .. }] if worker > 0 => assert_eq!(*done, step),
            other => panic!("worker {worker}: {other:?}"),
        }
    }
}

#[test]
fn any_number_of_workers_writes_what_any_number_reads() {
    for workers in [1, 2, 3, 7] {
        let folder = tempfile::tempdir().unwrap();
        assert!(Job::new().load(folder.path()).unwrap().is_none());
        save(folder.path(), workers, 3);
        let mut job = Job::new();
        let loaded = job.load(folder.path()).unwrap().unwrap();
        assert!(job.is(3), "{workers} workers");
        assert_eq!((loaded.step, loaded.job, loaded.refused.len()), (3, json!({"cursor": 30}), 0));
        let index = fs::read(folder.path().join("step-0000000003/model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), job.layout.parameters().len());
    }
}

#[test]
fn the_last_ones_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    // What a crash left of an older one goes too; what isn't ours stays.
    fs::create_dir_all(folder.path().join("step-0000000001")).unwrap();
    fs::write(folder.path().join("step-0000000001/model-00001-of-00002-001.safetensors"), "x").unwrap();
    fs::create_dir_all(folder.path().join("notes")).unwrap();
    fs::write(folder.path().join("notes/mine.txt"), "x").unwrap();
    for step in [2, 4, 6] {
        save(folder.path(), 2, step);
    }
    let mut names: Vec<String> =
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["notes", "step-0000000004", "step-0000000006"]);
}

#[test]
fn a_bad_one_is_refused_by_name_and_the_one_before_it_taken() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 2, 1);
    save(folder.path(), 2, 2);
    let newest = folder.path().join("step-0000000002");
    let files: Vec<_> = fs::read_dir(&newest).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 10, "{files:?}");
    for path in files {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("worker-") {
            // Notes have done their work.
            continue;
        }
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for (bad, gone) in [(flipped, false), (good[..good.len() - 1].to_vec(), false), (Vec::new(), true)] {
            if gone {
                fs::remove_file(&path).unwrap()
            } else {
                fs::write(&path, bad).unwrap()
            }
            let mut job = Job::new();
            let loaded = job.load(folder.path()).unwrap().unwrap();
            assert!(job.is(1), "{name}");
            assert_eq!(loaded.step, 1);
            if gone && name == MANIFEST {
                assert!(loaded.refused.is_empty(), "without a manifest it is no checkpoint");
            } else {
                assert!(loaded.refused[0].contains("step-0000000002/"), "{name}: {:?}", loaded.refused);
                assert!(name == MANIFEST || loaded.refused[0].contains(name), "{name}: {:?}", loaded.refused);
            }
            fs::write(&path, &good).unwrap();
        }
    }
    let mut job = Job::new();
    assert!(job.load(folder.path()).unwrap().is_some_and(|loaded| loaded.step == 2) && job.is(2));
    for step in ["step-0000000001", "step-0000000002"] {
        fs::write(folder.path().join(step).join(MANIFEST), "{").unwrap();
    }
    let error = Job::new().load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("step-0000000001/manifest.json") && error.contains("step-0000000002/"), "{error}");
}

#[test]
fn a_manifest_is_believed_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, 1);
    let good = fs::read(folder.path().join("step-0000000001").join(MANIFEST)).unwrap();
    Manifest::read(&good).unwrap();
    for i in 0..good.len() {
        let mut flipped = good.clone();
        flipped[i] ^= 1;
        assert!(Manifest::read(&flipped).is_err(), "byte {i}");
        assert!(Manifest::read(&good[..i]).is_err(), "the first {i} bytes");
    }
}

#[test]
fn a_manifest_leads_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, 1);
    let path = folder.path().join("step-0000000001").join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(folder.path().join("secret"), "x").unwrap();
    let mut manifest = Manifest::read(text.as_bytes()).unwrap();
    manifest.files.push(Sum::of("../secret", b"x"));
    fs::write(&path, manifest.text().unwrap()).unwrap();
    let error = Job::new().load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("\"../secret\" is no file's name"), "{error}");
}

#[test]
fn a_store_that_fails_costs_checkpoints_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    // A file where the folder should be: nothing can be written, whoever asks.
    let location = folder.path().join("checkpoints");
    fs::write(&location, "").unwrap();
    let job = Job::at(5);
    let mut writer = Writer::new(config(&location, 0, 1), &job.layout).unwrap();
    let next = |writer: &Writer| loop {
        if let Some(event) = writer.events().next() {
            return event;
        }
        std::thread::yield_now();
    };
    job.save(&mut writer, 5);
    match next(&writer) {
        Event::Failed { step: 5, reason } => {
            assert!(
                reason.contains("checkpoints/step-0000000005/model-00001-of-00001-001.safetensors: "),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
    fs::remove_file(&location).unwrap();
    // Its memory comes back right behind the event.
    let done = loop {
        job.save(&mut writer, 6);
        match next(&writer) {
            Event::Skipped { step: 6 } => {}
            event => break event,
        }
    };
    assert!(matches!(done, Event::Complete { step: 6, .. }), "{done:?}");
    assert_eq!(Job::new().load(&location).unwrap().unwrap().step, 6);
}

#[test]
fn a_worker_that_never_writes_makes_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 2, 1);
    let job = Job::at(2);
    let config = CheckpointConfig { patience: Duration::from_millis(1), ..config(folder.path(), 0, 2) };
    let mut writer = Writer::new(config, &job.layout).unwrap();
    job.save(&mut writer, 2);
    match &writer.finish()[..] {
        [Event::Failed { step: 2, reason }] => {
            assert!(reason.starts_with("worker 1 didn't write"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert!(!folder.path().join("step-0000000002").exists(), "nothing is left of it");
    assert_eq!(Job::new().load(folder.path()).unwrap().unwrap().step, 1);
}

#[test]
fn another_model_or_optimizer_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, 1);
    let mut job = Job::new();
    job.state.pop();
    let error = job.load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("the optimizer has 2 numbers a weight, this job's has 1"), "{error}");
}

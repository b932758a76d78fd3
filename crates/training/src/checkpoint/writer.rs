//! Writing checkpoints behind the job's back.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use consort_model::train::{Layout, Parameter};
use consort_tensor::buffer::Buffer;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::part::{Part, Tensor};
use super::store::Store;
use super::{CheckpointConfig, FORMAT, JobState, MANIFEST, MAX_MANIFEST, Manifest, Note, PART_BYTES, Sum};
use super::{folder, note, step_of};
use crate::Error;

/// How long shares of a checkpoint are still waited for once the last one of a job waits for it.
const SETTLING: Duration = Duration::from_secs(2);
/// The same once a later one was left out for it, and for a job's last one: at least so long.
const OVERDUE: Duration = Duration::from_secs(20);
/// How often the first worker looks for the others' notes.
const LOOK: Duration = Duration::from_millis(50);

/// What became of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Event {
    /// It is complete: all workers' shares are there.
    Complete {
        /// The step.
        step: u64,
        /// Bytes that this worker wrote.
        bytes: u64,
        /// How long that took.
        took: Duration,
    },
    /// This worker's share is written; the first worker completes it.
    Written {
        /// The step.
        step: u64,
        /// Bytes that this worker wrote.
        bytes: u64,
        /// How long that took.
        took: Duration,
    },
    /// It was not written. The job goes on; the next one is tried when it is due.
    Failed {
        /// The step.
        step: u64,
        /// Why, with the file's name.
        reason: String,
    },
    /// The one before it was still being written.
    Skipped {
        /// The step.
        step: u64,
    },
}

/// Writes checkpoints on a thread of its own.
pub struct Writer {
    config: CheckpointConfig,
    /// The parameters of this worker's share, cut into files.
    share: Vec<Range<usize>>,
    work: Option<SyncSender<Box<Snapshot>>>,
    /// Memory of snapshots that are written.
    spare: Receiver<Vec<Part>>,
    parts: Vec<Part>,
    events: Receiver<Event>,
    own: Sender<Event>,
    busy: bool,
    /// When the first worker gives up a checkpoint whose shares don't come: sooner, once a newer one waits for it.
    give_up: Arc<Mutex<Option<Instant>>>,
    /// No later checkpoint comes.
    last: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A worker's share at one step.
struct Snapshot {
    step: u64,
    job: JobState,
    buffers: usize,
    parts: Vec<Part>,
    tensors: BTreeMap<String, String>,
}

impl Writer {
    /// Opens the place and starts the thread.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the location makes no sense; [`Error::Setting`].
    pub fn new(config: CheckpointConfig, layout: &Layout) -> Result<Writer, Error> {
        if config.keep == 0 {
            let expected = "at least 1 checkpoint is kept";
            return Err(Error::Setting { name: "keep", value: "0".to_owned(), expected });
        }
        let store = Store::open(&config.location, &config.options);
        let store = store.map_err(|error| Error::Checkpoint(format!("{}: {error}", config.location)))?;
        let (work, snapshots) = mpsc::sync_channel(1);
        let (give_back, spare) = mpsc::channel();
        let (own, events) = mpsc::channel();
        let share = cut(layout.parameters(), config.worker, config.workers);
        let (give_up, last) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(false)));
        let thread = Thread {
            config: config.clone(),
            store,
            snapshots,
            give_back,
            events: own.clone(),
            give_up: Arc::clone(&give_up),
            last: Arc::clone(&last),
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(move || thread.run());
        let thread = thread.map_err(|error| Error::Checkpoint(format!("no thread: {error}")))?;
        let (work, thread) = (Some(work), Some(thread));
        Ok(Writer {
            config,
            share,
            work,
            spare,
            parts: Vec::new(),
            events,
            own,
            busy: false,
            give_up,
            last,
            thread,
        })
    }

    /// Waits until the checkpoint before is written, or has failed, so that the next one isn't skipped; at most `limit`.
    pub fn settle(&mut self, limit: Duration) {
        if !self.busy {
            return;
        }
        self.hurry(SETTLING);
        if let Ok(parts) = self.spare.recv_timeout(limit) {
            (self.parts, self.busy) = (parts, false);
        }
    }

    /// Whether the last one is still being written: [`Writer::save`] would skip. Where several workers write, one that
    /// skips makes the others' shares worthless, so they should agree first.
    pub fn is_busy(&mut self) -> bool {
        if self.busy
            && let Ok(parts) = self.spare.try_recv()
        {
            (self.parts, self.busy) = (parts, false);
        }
        self.busy
    }

    /// Leaves the checkpoint of `step` out, for this worker or another one is still writing the one before.
    pub fn skip(&mut self, step: u64) {
        if self.is_busy() {
            self.hurry(OVERDUE);
        }
        // Nobody may listen.
        let _ = self.own.send(Event::Skipped { step });
    }

    /// Copies this worker's share and has it written; returns when it is copied. A checkpoint that would have to wait for
    /// the one before it is skipped.
    ///
    /// # Panics
    /// If lengths are not the layout's.
    pub fn save(
        &mut self,
        step: u64,
        layout: &Layout,
        weights: &[f32],
        state: &[Buffer<f32>],
        job: JobState,
    ) {
        assert!(weights.len() == layout.len() && state.iter().all(|s| s.len() == layout.len()), "lengths");
        if self.is_busy() {
            self.skip(step);
            return;
        }
        let mut parts = std::mem::take(&mut self.parts);
        let mut tensors = BTreeMap::new();
        let count = self.share.len() * (1 + state.len());
        parts.resize_with(count, Part::default);
        let mut free = parts.iter_mut();
        let CheckpointConfig { worker, workers, .. } = self.config;
        for (i, share) in self.share.iter().enumerate() {
            let parameters = &layout.parameters()[share.clone()];
            let suffix = format!("{:05}-of-{workers:05}-{:03}.safetensors", worker + 1, i + 1);
            let sets =
                [("model", weights)].into_iter().chain(state.iter().map(|buffer| ("optimizer", &buffer[..])));
            for (set, (kind, values)) in sets.enumerate() {
                let Some(part) = free.next() else { break };
                let name = match set {
                    0 => format!("{kind}-{suffix}"),
                    _ => format!("{kind}-{}-{suffix}", set - 1),
                };
                if set == 0 {
                    tensors.extend(parameters.iter().map(|p| (p.name.clone(), name.clone())));
                }
                let list: Vec<Tensor<'_>> = parameters.iter().map(|p| tensor(p, values)).collect();
                part.fill(name, &list);
            }
        }
        let snapshot = Box::new(Snapshot { step, job, buffers: state.len(), parts, tensors });
        self.busy = true;
        *self.give_up.lock().unwrap_or_else(PoisonError::into_inner) = None;
        match self.work.as_ref().map(|work| work.try_send(snapshot)) {
            Some(Ok(())) => {}
            Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) | None => {
                let reason = "the thread that writes checkpoints is gone".to_owned();
                let _ = self.own.send(Event::Failed { step, reason });
            }
        }
    }

    /// Shares that haven't come `after` now don't come: a worker may be gone, or have left this checkpoint out.
    fn hurry(&self, after: Duration) {
        let mut give_up = self.give_up.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + after;
        *give_up = Some(give_up.map_or(until, |earlier| earlier.min(until)));
    }

    /// What became of checkpoints since the last call.
    pub fn events(&self) -> impl Iterator<Item = Event> + '_ {
        self.events.try_iter()
    }

    /// Waits until what was saved is written, or has failed, and returns the last events. Shares of others are waited for as
    /// long as this worker's own took to write, and 20 s at least.
    pub fn finish(mut self) -> Vec<Event> {
        self.last.store(true, Ordering::Relaxed);
        self.end();
        self.events.try_iter().collect()
    }

    fn end(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported as it happened; there is nothing left to write.
            let _ = thread.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

fn tensor<'a>(parameter: &'a Parameter, values: &'a [f32]) -> Tensor<'a> {
    let name = parameter.name.clone();
    Tensor { name, shape: &parameter.shape, values: &values[parameter.range.clone()] }
}

/// A worker's parameters, in files: shares of about equal size, in the layout's order.
fn cut(parameters: &[Parameter], worker: usize, workers: usize) -> Vec<Range<usize>> {
    let total: usize = parameters.iter().map(|p| p.range.len()).sum();
    let owner = |before: usize, len: usize| (before + len / 2) * workers / total.max(1);
    let mut files: Vec<Range<usize>> = Vec::new();
    let (mut before, mut bytes) = (0, 0);
    for (i, parameter) in parameters.iter().enumerate() {
        let len = parameter.range.len();
        if owner(before, len).min(workers - 1) == worker {
            match files.last_mut() {
                Some(file) if bytes + 4 * len <= PART_BYTES => {
                    file.end = i + 1;
                    bytes += 4 * len;
                }
                _ => {
                    files.push(i..i + 1);
                    bytes = 4 * len;
                }
            }
        }
        before += len;
    }
    files
}

/// What the thread owns.
struct Thread {
    config: CheckpointConfig,
    store: Store,
    snapshots: Receiver<Box<Snapshot>>,
    give_back: Sender<Vec<Part>>,
    events: Sender<Event>,
    give_up: Arc<Mutex<Option<Instant>>>,
    last: Arc<AtomicBool>,
}

impl Thread {
    fn run(self) {
        while let Ok(snapshot) = self.snapshots.recv() {
            let begun = Instant::now();
            let step = snapshot.step;
            let event = match self.write(&snapshot) {
                Ok(bytes) if self.config.worker == 0 => {
                    Event::Complete { step, bytes, took: begun.elapsed() }
                }
                Ok(bytes) => Event::Written { step, bytes, took: begun.elapsed() },
                Err(reason) => {
                    // Room for the next one; what can't be removed is removed after the next complete one.
                    self.remove_own(step);
                    Event::Failed { step, reason }
                }
            };
            // The job may have ended.
            let _ = self.events.send(event);
            let _ = self.give_back.send(snapshot.parts);
        }
    }

    fn write(&self, snapshot: &Snapshot) -> Result<u64, String> {
        let CheckpointConfig { worker, workers, .. } = self.config;
        let begun = Instant::now();
        let folder = folder(snapshot.step);
        let mut own = Note { files: Vec::new(), tensors: snapshot.tensors.clone() };
        for part in &snapshot.parts {
            self.put(&format!("{folder}/{}", part.name), &part.bytes)?;
            own.files.push(Sum::of(&part.name, &part.bytes));
        }
        let bytes = own.files.iter().map(|sum| sum.bytes).sum();
        let text = serde_json::to_vec(&own).map_err(|e| e.to_string())?;
        self.put(&format!("{folder}/{}", note(worker, workers)), &text)?;
        if worker == 0 {
            self.complete(snapshot, begun.elapsed())?;
        }
        Ok(bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        self.store.put(name, bytes).map_err(|error| self.said(name, &error))
    }

    fn said(&self, name: &str, error: &io::Error) -> String {
        format!("{}/{name}: {error}", self.config.location.trim_end_matches('/'))
    }

    /// Whether shares have been waited for long enough, `since` this worker's own was written, which took `own`.
    fn given_up(&self, since: Instant, own: Duration) -> bool {
        let patience = match self.last.load(Ordering::Relaxed) {
            true => own.max(OVERDUE).min(self.config.patience),
            false => self.config.patience,
        };
        let newer = *self.give_up.lock().unwrap_or_else(PoisonError::into_inner);
        since.elapsed() >= patience || newer.is_some_and(|when| Instant::now() >= when)
    }

    /// Waits for all shares and makes a checkpoint of them. This worker's `own` took so long.
    fn complete(&self, snapshot: &Snapshot, own: Duration) -> Result<(), String> {
        let written = Instant::now();
        let folder = folder(snapshot.step);
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for worker in 0..self.config.workers {
            let name = format!("{folder}/{}", note(worker, self.config.workers));
            let text = loop {
                match self.store.get(&name, MAX_MANIFEST).map_err(|error| self.said(&name, &error))? {
                    Some(text) => break text,
                    None if self.given_up(written, own) => {
                        let seconds = written.elapsed().as_secs_f64();
                        return Err(format!(
                            "worker {worker} didn't write its share within {seconds:.0} s of the first worker's"
                        ));
                    }
                    None => std::thread::sleep(LOOK),
                }
            };
            let note: Note = serde_json::from_slice(&text).map_err(|e| format!("{name}: {e}"))?;
            files.extend(note.files);
            tensors.extend(note.tensors);
        }
        let total: u64 = files.iter().filter(|f| f.name.starts_with("model-")).map(|f| f.bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": tensors});
        let index = serde_json::to_vec_pretty(&index).map_err(|e| e.to_string())?;
        let mut small = self.config.files.clone();
        small.insert("model.safetensors.index.json".to_owned(), index);
        for (name, bytes) in &small {
            self.put(&format!("{folder}/{name}"), bytes)?;
            files.push(Sum::of(name, bytes));
        }
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            step: snapshot.step,
            buffers: snapshot.buffers,
            job: snapshot.job.clone(),
            files,
        };
        let text = manifest.text().map_err(|e| e.to_string())?;
        self.put(&format!("{folder}/{MANIFEST}"), text.as_bytes())?;
        self.prune(snapshot.step);
        Ok(())
    }

    /// Removes what is older than the checkpoints that are kept: complete ones, and what failed ones left.
    fn prune(&self, newest: u64) {
        let Ok(names) = self.store.list() else { return };
        let complete = names.iter().filter_map(|name| name.strip_suffix(MANIFEST)?.strip_suffix('/'));
        let mut steps: Vec<u64> = complete.filter_map(step_of).filter(|&step| step <= newest).collect();
        steps.sort_unstable();
        let Some(&oldest) = steps.get(steps.len().saturating_sub(self.config.keep)) else { return };
        let old = |name: &&String| {
            let step = name.split_once('/').and_then(|(folder, _)| step_of(folder));
            step.is_some_and(|step| step < oldest || (step < newest && !steps.contains(&step)))
        };
        let (manifests, others): (Vec<&String>, Vec<&String>) =
            names.iter().filter(old).partition(|name| name.ends_with(MANIFEST));
        for name in manifests.into_iter().chain(others) {
            if let Err(error) = self.store.remove(name) {
                tracing::warn!(name, %error, "an old checkpoint's file can't be removed");
            }
        }
    }

    /// Removes what this worker wrote of a checkpoint that failed.
    fn remove_own(&self, step: u64) {
        let Ok(names) = self.store.list() else { return };
        let folder = format!("{}/", folder(step));
        let own = format!("{:05}-of-{:05}", self.config.worker + 1, self.config.workers);
        let first = self.config.worker == 0;
        for name in names.iter().filter(|name| name.starts_with(&folder)) {
            let shared = !name.contains("-of-");
            if name.contains(&own) || (first && shared) {
                let _ = self.store.remove(name);
            }
        }
    }
}

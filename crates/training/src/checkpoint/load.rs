//! Reading a checkpoint, or the one before it.

use consort_model::train::Layout;
use consort_tensor::buffer::Buffer;

use super::store::Store;
use super::{FORMAT, JobState, MANIFEST, MAX_MANIFEST, Manifest, Sum, folder, part, step_of};
use crate::Error;

/// What was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// The step behind which the job goes on.
    pub step: u64,
    /// What the job said of itself.
    pub job: JobState,
    /// Newer checkpoints that are no good, as `file: reason`.
    pub refused: Vec<String>,
}

/// Loads the newest good checkpoint at `location` into `weights` and the optimizer's `state`, whoever wrote it: shares
/// are put together by the tensors' names. `None` where there is no checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] where there are checkpoints and none of them is good, with what is wrong with each; then weights
/// and state may have changed.
///
/// # Panics
/// If lengths are not the layout's.
pub fn load(
    location: &str,
    options: &[(String, String)],
    layout: &Layout,
    weights: &mut [f32],
    state: &mut [Buffer<f32>],
) -> Result<Option<Loaded>, Error> {
    assert!(weights.len() == layout.len() && state.iter().all(|s| s.len() == layout.len()), "lengths");
    let (store, names) = names(location, options)?;
    let complete = names.iter().filter_map(|name| name.strip_suffix(MANIFEST)?.strip_suffix('/'));
    let mut steps: Vec<u64> = complete.filter_map(step_of).collect();
    steps.sort_unstable_by_key(|&step| std::cmp::Reverse(step));
    if steps.is_empty() {
        return Ok(None);
    }
    let mut refused = Vec::new();
    for step in steps {
        match one(&store, step, layout, weights, state) {
            Ok(job) => return Ok(Some(Loaded { step, job, refused })),
            Err(reason) => {
                refused.push(format!("{}/{}/{reason}", location.trim_end_matches('/'), folder(step)))
            }
        }
    }
    Err(Error::Checkpoint(format!(
        "no checkpoint is good: {}. Put back what was changed, the job or these files; or remove them and begin anew",
        refused.join("; ")
    )))
}

/// Steps of the checkpoints at `location` that have a manifest, ascending; whether they are good, [`load`] finds out.
///
/// # Errors
/// [`Error::Checkpoint`] where the place can't be read.
pub fn steps(location: &str, options: &[(String, String)]) -> Result<Vec<u64>, Error> {
    let names = names(location, options)?.1;
    let complete = names.iter().filter_map(|name| name.strip_suffix(MANIFEST)?.strip_suffix('/'));
    let mut steps: Vec<u64> = complete.filter_map(step_of).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Removes every checkpoint at `location`, manifests first, and parts of ones that were never complete.
///
/// # Errors
/// [`Error::Checkpoint`] where the place can't be read or a file can't be removed.
pub fn remove(location: &str, options: &[(String, String)]) -> Result<(), Error> {
    let (store, names) = names(location, options)?;
    let ours = |name: &&String| name.split_once('/').is_some_and(|(folder, _)| step_of(folder).is_some());
    let (manifests, others): (Vec<&String>, Vec<&String>) =
        names.iter().filter(ours).partition(|name| name.ends_with(MANIFEST));
    for name in manifests.into_iter().chain(others) {
        store.remove(name).map_err(|error| Error::Checkpoint(format!("{location}/{name}: {error}")))?;
    }
    Ok(())
}

/// The place, and all that lies there.
fn names(location: &str, options: &[(String, String)]) -> Result<(Store, Vec<String>), Error> {
    let cure = match location.starts_with("s3://") {
        true => {
            "; the bucket and what lets one in are named by [checkpoints]' `location`, AWS_ENDPOINT_URL, AWS_REGION, \
             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        }
        false => "; name another place with [checkpoints]' `location`",
    };
    let fail = |error: std::io::Error| Error::Checkpoint(format!("{location}: {error}{cure}"));
    let store = Store::open(location, options).map_err(fail)?;
    let names = store.list().map_err(fail)?;
    Ok((store, names))
}

/// Loads one checkpoint.
///
/// # Errors
/// The file that is wrong, and how.
fn one(
    store: &Store,
    step: u64,
    layout: &Layout,
    weights: &mut [f32],
    state: &mut [Buffer<f32>],
) -> Result<JobState, String> {
    let folder = folder(step);
    let text =
        store.get(&format!("{folder}/{MANIFEST}"), MAX_MANIFEST).map_err(|e| format!("{MANIFEST}: {e}"))?;
    let text = text.ok_or_else(|| format!("{MANIFEST}: it is gone"))?;
    let manifest: Manifest = Manifest::read(&text).map_err(|e| format!("{MANIFEST}: {e}"))?;
    if manifest.format != FORMAT {
        return Err(format!("{MANIFEST}: its format is {:?}; {FORMAT:?} can be read", manifest.format));
    }
    if manifest.step != step {
        return Err(format!("{MANIFEST}: it is of step {}", manifest.step));
    }
    if manifest.buffers != state.len() {
        let (has, wants) = (manifest.buffers, state.len());
        return Err(format!("{MANIFEST}: the optimizer has {has} numbers a weight, this job's has {wants}"));
    }
    // All files are verified before the first value changes: what is no good leaves the job as it was.
    let mut missing: Vec<bool> = vec![true; layout.parameters().len() * (1 + state.len())];
    for sum in &manifest.files {
        verified(store, &folder, sum)?;
    }
    for sum in &manifest.files {
        let Some(set) = set_of(&sum.name) else { continue };
        let bytes = verified(store, &folder, sum)?;
        let tensors =
            safetensors::SafeTensors::deserialize(&bytes).map_err(|e| format!("{}: {e}", sum.name))?;
        for (i, parameter) in layout.parameters().iter().enumerate() {
            if tensors.tensor(&parameter.name).is_err() {
                continue;
            }
            let values = match set {
                0 => &mut weights[parameter.range.clone()],
                set => match state.get_mut(set - 1) {
                    Some(buffer) => &mut buffer[parameter.range.clone()],
                    None => {
                        return Err(format!("{}: of a buffer that this optimizer doesn't have", sum.name));
                    }
                },
            };
            part::read(&tensors, &parameter.name, &parameter.shape, values)
                .map_err(|reason| format!("{}: {reason}", sum.name))?;
            missing[set * layout.parameters().len() + i] = false;
        }
    }
    if let Some(i) = missing.iter().position(|&missing| missing) {
        let (set, i) = (i / layout.parameters().len(), i % layout.parameters().len());
        let of = if set == 0 { "weights" } else { "optimizer's numbers" };
        return Err(format!("{MANIFEST}: the {of} of {} are in no file", layout.parameters()[i].name));
    }
    Ok(manifest.job)
}

/// The set of numbers that a file is of: 0 the weights, then the optimizer's buffers; `None` for other files.
fn set_of(name: &str) -> Option<usize> {
    if !name.ends_with(".safetensors") {
        return None;
    }
    if name.starts_with("model-") {
        return Some(0);
    }
    let (buffer, _) = name.strip_prefix("optimizer-")?.split_once('-')?;
    buffer.parse::<usize>().ok()?.checked_add(1)
}

fn verified(store: &Store, folder: &str, sum: &Sum) -> Result<Vec<u8>, String> {
    // A name is a name: nothing of a manifest leads out of its folder.
    if sum.name.is_empty() || sum.name.starts_with('.') || sum.name.contains(['/', '\\']) {
        return Err(format!("{MANIFEST}: {:?} is no file's name", sum.name));
    }
    let bytes =
        store.get(&format!("{folder}/{}", sum.name), sum.bytes).map_err(|e| format!("{}: {e}", sum.name))?;
    let bytes = bytes.ok_or_else(|| format!("{}: it is missing", sum.name))?;
    if bytes.len() as u64 != sum.bytes {
        return Err(format!("{}: torn, it has {} of {} bytes", sum.name, bytes.len(), sum.bytes));
    }
    if blake3::hash(&bytes).to_hex().as_str() != sum.blake3 {
        return Err(format!("{}: its bytes are not those that were written", sum.name));
    }
    Ok(bytes)
}

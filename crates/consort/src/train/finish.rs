//! The end of a job: a model that runs, a report, and words on what to do next.
//!
//! The model is made from the last checkpoint, whose every byte is verified on the way, and not by one of the workers:
//! whoever of them died last, the result is whole. Its weights must have the hash that the workers ended with.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use consort_inference::EngineOptions;
use consort_tensor::buffer::Buffer;
use consort_tensor::{Cpu, Pool};
use consort_training::checkpoint;
use consort_training::job::{Job, ModelSource, Plan, in_count};
use consort_training::parallel::{Finished, HOLD, Reason, weights_hash};
use consort_training::report::{Page, Sample, html};
use consort_training::{Layout, Optimizer, save};
use serde_json::json;

use super::again::quoted;
use super::metrics::Metrics;
use super::prepare::{self, Begun, Prepared};
use super::show::{Show, duration};
use super::{Source, publish};
use crate::cli::run::session::{Limits, Session};
use crate::terminal::{line, note, said};
use crate::{environment, loading};

/// How often another process's checkpoint is looked for, in the end.
const LOOK: Duration = Duration::from_secs(1);
/// How long it may take, beside the time for which its weights are kept.
const PATIENCE: Duration = Duration::from_secs(180);
/// Tokens of a sample in the report.
const SAMPLE_TOKENS: usize = 120;

/// What there is at the end.
pub(crate) struct Ended<'a> {
    pub(crate) source: &'a Source,
    pub(crate) plan: &'a Plan,
    pub(crate) prepared: &'a Prepared,
    pub(crate) metrics: Metrics,
    pub(crate) show: Show,
    pub(crate) finished: Option<Finished>,
    /// Why a worker couldn't go on.
    pub(crate) failed: Option<String>,
    /// The user asked for the end.
    pub(crate) stopped: bool,
    /// Another worker than this launcher's may be writing the last checkpoint.
    pub(crate) elsewhere: bool,
    /// The command that goes on with the job.
    pub(crate) again: String,
    /// It was to go on from a checkpoint.
    pub(crate) resumed: bool,
    pub(crate) json: bool,
}

/// Ends a job.
pub(crate) fn finish(ended: Ended<'_>) -> Result<()> {
    let Ended {
        source,
        plan,
        prepared,
        mut metrics,
        show,
        finished,
        failed,
        stopped,
        elsewhere,
        again: resume,
        resumed,
        json,
    } = ended;
    let job = &source.job;
    let newest = checkpoint::steps(&job.checkpoint_location(), &environment::s3_options())
        .ok()
        .and_then(|steps| steps.last().copied());
    let Some(finished) = finished else {
        let step = metrics.counts.last.map_or(0, |step| step.step);
        metrics.end(step, false, None);
        // What couldn't go on from its checkpoint can't do it by trying again.
        let barred = resumed && failed.is_some() && metrics.counts.last.is_none();
        let how = match newest.filter(|_| !barred) {
            Some(newest) => format!("; go on behind step {newest} with: {resume}"),
            None => String::new(),
        };
        match failed {
            Some(reason) => bail!("{reason}{how}"),
            None if stopped => bail!("stopped before the first step was done{how}"),
            None => bail!("all workers are gone{how}"),
        }
    };
    let complete = finished.reason == Reason::Done;
    metrics.end(finished.steps, complete, Some(finished.weights_hash.clone()));
    let begun = prepare::begin(job, prepared)?;
    if !complete {
        report(source, plan, &begun, &metrics, Vec::new())?;
        if newest != Some(finished.steps) {
            let has = newest.map_or("there is no checkpoint".to_owned(), |step| {
                format!("the newest checkpoint is of step {step}")
            });
            show.say(&format!("the checkpoint of step {} was not written: {has}", finished.steps));
        }
        if json {
            let result = json!({"complete": false, "step": finished.steps, "checkpoint": newest, "weights": finished.weights_hash, "resume": resume});
            return Ok(line(result)?);
        }
        line(format_args!("stopped behind step {} of {}; go on with: {resume}", finished.steps, plan.steps))?;
        return Ok(());
    }
    if elsewhere {
        wait(job, finished.steps, &show);
    }
    model(job, &begun, prepared, &finished, &resume)?;
    if let Some(kind) = job.gguf {
        let path = job.out.join("model.gguf");
        super::export::export(&job.out, &path, kind)?;
        show.say(&format!("{} is the same as GGUF", path.display()));
    }
    let samples = match samples(job) {
        Ok(samples) => samples,
        Err(error) => {
            // The model is there; only its words are missing in the report.
            note(&format!("the report has no samples of what the model writes: {}", said(&error)));
            Vec::new()
        }
    };
    report(source, plan, &begun, &metrics, samples)?;
    let (out, page) = (job.out.display().to_string(), job.out.join("report.html"));
    let counts = metrics.counts;
    if json {
        let result = json!({
            "complete": true,
            "step": finished.steps,
            "weights": finished.weights_hash,
            "loss": counts.last.map(|step| step.loss),
            "tokens": counts.tokens,
            "seconds": counts.last.map(|step| step.at),
            "workers_lost": counts.lost,
            "model": out,
            "report": page,
        });
        return Ok(line(result)?);
    }
    if let Some(last) = counts.last {
        line(format_args!(
            "{} steps in {}, {:.0} tokens a second, loss {:.3}",
            finished.steps,
            duration(last.at),
            counts.tokens / last.at.max(1e-9),
            last.loss
        ))?;
    }
    line(format_args!("weights  {}", finished.weights_hash))?;
    line(format_args!("model    {out}"))?;
    line(format_args!("report   {}", page.display()))?;
    line(format_args!("run it   {}", command(job)))?;
    Ok(())
}

/// Waits for the checkpoint that another process's worker completes, for as long as that one tries.
fn wait(job: &Job, step: u64, show: &Show) {
    let (location, options) = (job.checkpoint_location(), environment::s3_options());
    let (begun, mut said) = (Instant::now(), false);
    while begun.elapsed() < HOLD + PATIENCE {
        let newest = checkpoint::steps(&location, &options).ok().and_then(|steps| steps.last().copied());
        if newest.is_some_and(|newest| newest >= step) {
            return;
        }
        if !said && begun.elapsed() > LOOK {
            said = true;
            show.say(&format!("waiting for the checkpoint of step {step}, which another process completes"));
        }
        // Nobody tells of a file that another machine writes.
        std::thread::sleep(LOOK.min(Duration::from_millis(100) + begun.elapsed()));
    }
}

/// Writes the model of the last checkpoint as a Hugging Face folder.
fn model(job: &Job, begun: &Begun, prepared: &Prepared, finished: &Finished, resume: &str) -> Result<()> {
    let layout = Layout::new(&begun.config)?;
    let mut weights: Buffer<f32> = Buffer::zeroed(layout.len())?;
    let mut optimizer = Optimizer::new(job.optimizer, &layout)?;
    let location = job.checkpoint_location();
    let options = environment::s3_options();
    let (_, state) = optimizer.state_mut();
    let loaded = checkpoint::load(&location, &options, &layout, &mut weights, state)?;
    let step = loaded.map(|loaded| loaded.step);
    if step != Some(finished.steps) {
        let has =
            step.map_or("there is none".to_owned(), |step| format!("the newest good one is of step {step}"));
        bail!(
            "the last checkpoint, of step {}, was not written to {location} ({has}), so there is no model to save; mend \
             that place and take the missing steps again with: {resume}",
            finished.steps
        );
    }
    let hash = weights_hash(&weights);
    if hash != finished.weights_hash {
        bail!(
            "the checkpoint of step {} at {location} has the weights {hash}, but the workers ended with {}; don't use it",
            finished.steps,
            finished.weights_hash
        );
    }
    let out = &job.out;
    let written = (|| {
        for (name, content) in prepare::tokenizer_files(begun, prepared)? {
            let path = out.join(&name);
            fs::write(&path, content).with_context(|| format!("can't write {}", path.display()))?;
        }
        anyhow::Ok(save(out, &begun.config, &layout, &weights, job.save, None)?)
    })();
    written.with_context(|| {
        format!(
            "the model can't be saved in {}. Nothing is lost: its weights are in the checkpoint of step {} at {location}; \
             mend that folder and go on with: {resume}",
            out.display(),
            finished.steps
        )
    })
}

/// What the model writes.
fn samples(job: &Job) -> Result<Vec<Sample>> {
    if job.prompts.is_empty() {
        return Ok(Vec::new());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let options = EngineOptions { max_running: 1, ..EngineOptions::default() };
    let loaded = loading::load(&job.out, Pool::new(threads, Cpu::detect()), options)?;
    let continues = loaded.template.is_none();
    let limits =
        Limits { temperature: 0.6, top_p: 0.95, seed: Some(job.seed), max_tokens: Some(SAMPLE_TOKENS) };
    let mut session = Session::new(loaded, None, limits);
    let mut samples = Vec::new();
    for prompt in &job.prompts {
        session.reset();
        let mut answer = session.ask(prompt)?;
        let mut text = String::new();
        while let Some(event) = answer.events().blocking_recv() {
            text.push_str(&answer.take(event)?);
        }
        answer.finish()?;
        samples.push(Sample { prompt: prompt.clone(), answer: text, continues });
    }
    Ok(samples)
}

/// Writes the report.
fn report(
    source: &Source,
    plan: &Plan,
    begun: &Begun,
    metrics: &Metrics,
    samples: Vec<Sample>,
) -> Result<()> {
    let job = &source.job;
    let records = metrics.records();
    let name = job.out.file_name().map_or_else(|| "job".into(), |name| name.to_string_lossy().into_owned());
    let config = &begun.config;
    let about = match &job.model {
        ModelSource::From(from) => format!("{from}, fine-tuned on {}", names(job)),
        ModelSource::New(_) => {
            format!(
                "A {} model of {} parameters, trained from nothing on {}",
                config.family,
                in_count(plan.parameters),
                names(job)
            )
        }
    };
    let fact = |name: &str, value: String| (name.to_owned(), value);
    let facts = vec![
        fact(
            "Shape",
            format!(
                "{} layers, {} wide, {} heads ({} for keys and values), feed-forward {}, {} tokens in the vocabulary",
                config.layers, config.hidden, config.heads, config.kv_heads, config.ffn, config.vocab
            ),
        ),
        fact(
            "A step",
            format!(
                "{} micro-batches of {} samples of up to {} tokens",
                plan.micro_batches, job.train.micro_batch, job.data.context
            ),
        ),
        fact("Passes over the data", format!("{:.2}", plan.epochs)),
        fact("Precision", format!("{:?}", job.train.precision).to_lowercase()),
        fact(
            "Sums of gradients",
            if job.train.exact {
                "exact: the same weights for any number of workers".into()
            } else {
                "not exact".into()
            },
        ),
        fact("Seed", job.seed.to_string()),
        fact("Version", env!("CARGO_PKG_VERSION").into()),
    ];
    let page = Page { name, about, facts, samples, command: command(job), job: source.text.clone() };
    let path = job.out.join("report.html");
    publish(&path, &html(&page, &records)).with_context(|| format!("can't write {}", path.display()))
}

/// What the data is called.
fn names(job: &Job) -> String {
    let name = |path: &std::path::PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<String> = job.data.paths.iter().filter_map(name).collect();
    if job.data.stories > 0 {
        names.push("little stories that a grammar wrote".into());
    }
    names.join(", ")
}

/// How the result is run.
fn command(job: &Job) -> String {
    let prompt = job.prompts.first().map(|prompt| format!(" {}", quoted(prompt))).unwrap_or_default();
    format!("consort run {}{prompt}", quoted(&job.out.display().to_string()))
}

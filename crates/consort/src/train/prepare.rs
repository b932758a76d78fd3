//! What a job needs before its first step: the model it begins with, a vocabulary, the stories, the samples.
//!
//! The launcher prepares once; a worker opens what is there by [`Prepared`]'s names. Everything lies in the job's folder
//! and is made again only where what it follows from has changed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use consort_model::{ChatTemplate, ModelConfig, Opened, Tokenizer};
use consort_training::data::{
    self, DataConfig, Dataset, Progress, Reading, VocabularyConfig, stories, train_vocabulary,
};
use consort_training::job::{Job, ModelSource};
use serde::{Deserialize, Serialize};

use super::work;
use crate::cli::UsageError;
use crate::written::unreadable;
use crate::{environment, loading};

/// Names of what was prepared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Prepared {
    /// The model to begin with; `None` for a new one.
    pub(crate) model: Option<PathBuf>,
    /// The folder of the vocabulary of a new one.
    pub(crate) vocabulary: Option<PathBuf>,
    /// All data, the stories among them.
    pub(crate) data: Vec<PathBuf>,
}

/// What was prepared, opened.
pub(crate) struct Begun {
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    /// The model to begin with; its tokenizer's files go with the result.
    pub(crate) opened: Option<Opened>,
    tokenizer_hash: String,
}

/// Makes the job's folder.
pub(crate) fn folder(job: &Job) -> Result<PathBuf> {
    let work = work(job);
    match fs::create_dir_all(&work) {
        Ok(()) => Ok(work),
        Err(error) => {
            let why = format!(
                "can't make the folder {}: {error}; `out` in the job's file names where its result goes",
                work.display()
            );
            Err(match error.kind() {
                ErrorKind::NotADirectory | ErrorKind::AlreadyExists => UsageError(why).into(),
                _ => anyhow!(why),
            })
        }
    }
}

/// Makes and fetches what isn't there. `say` hears of what takes long.
pub(crate) fn prepare(job: &Job, quiet: bool, say: &mut dyn FnMut(&str)) -> Result<Prepared> {
    let mut data = job.data.paths.clone();
    for path in &data {
        // Before anything is made. The data itself is read further below.
        fs::metadata(path).map_err(|error| {
            let what = "what is there in [data]'s `paths`, which are relative to the job's file";
            UsageError(unreadable(path, what, &error))
        })?;
    }
    let from = match &job.model {
        ModelSource::From(name) => {
            let hub = environment::hub()?;
            let reference = loading::reference(&hub, name)?;
            Some(loading::fetch(&hub, &reference, false, quiet)?.path)
        }
        ModelSource::New(_) => None,
    };
    let work = folder(job)?;
    if job.data.stories > 0 {
        let path = work.join(format!("stories-{}-{}.jsonl", job.data.stories, job.seed));
        if !path.exists() {
            let count = stories::write(&path, job.data.stories, job.seed)?;
            say(&format!("wrote {count} stories to {}", path.display()));
        }
        data.push(path);
    }
    let (model, vocabulary) = match &job.model {
        ModelSource::From(_) => (from, None),
        ModelSource::New(shape) => {
            let of = data::fingerprint(&data)?;
            let folder = work.join(format!("vocabulary-{}-{}", shape.vocabulary, &of[..16]));
            // The settings are written last.
            if !folder.join("tokenizer_config.json").exists() {
                say(&format!("learning a vocabulary of {} tokens", shape.vocabulary));
                let (paths, bad_lines) = (data.clone(), job.data.bad_lines);
                let config = VocabularyConfig { paths, size: shape.vocabulary, bad_lines };
                let size = train_vocabulary(&config, &folder)?;
                if size < shape.vocabulary {
                    say(&format!("the data gives a vocabulary of {size} tokens; it has no more to merge"));
                }
            }
            (None, Some(folder))
        }
    };
    Ok(Prepared { model, vocabulary, data })
}

/// Opens the model, or the vocabulary and the shape of a new one.
pub(crate) fn begin(job: &Job, prepared: &Prepared) -> Result<Begun> {
    match (&prepared.model, &prepared.vocabulary, &job.model) {
        (Some(path), ..) => {
            let opened = consort_model::open(path)?;
            let (tokenizer, template) = (opened.tokenizer()?, opened.chat_template()?);
            let file = if path.is_dir() { path.join("tokenizer.json") } else { path.clone() };
            let tokenizer_hash = data::fingerprint(&[file])?;
            Ok(Begun {
                config: opened.config().clone(),
                tokenizer,
                template,
                opened: Some(opened),
                tokenizer_hash,
            })
        }
        (None, Some(folder), ModelSource::New(shape)) => {
            let tokenizer = Tokenizer::from_folder(folder)?;
            let template = consort_model::tokenizer::chat_template_source(folder)?;
            let template = template.map(|source| ChatTemplate::new(&source)).transpose()?;
            let tokenizer_hash = data::fingerprint(&[folder.join("tokenizer.json")])?;
            let config = shape.config(tokenizer.vocab());
            Ok(Begun { config, tokenizer, template, opened: None, tokenizer_hash })
        }
        _ => bail!("the job's folder was prepared for another job; remove {}", job.out.join("job").display()),
    }
}

/// Opens the samples, and makes them where they aren't there.
pub(crate) fn samples(
    job: &Job,
    prepared: &Prepared,
    begun: &Begun,
    threads: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Dataset> {
    let config = DataConfig {
        paths: prepared.data.clone(),
        text: job.data.text,
        bad_lines: job.data.bad_lines,
        context: job.data.context,
        cache: job.out.join("job").join("samples"),
    };
    let reading = Reading {
        tokenizer: &begun.tokenizer,
        template: begun.template.as_ref(),
        tokenizer_hash: &begun.tokenizer_hash,
    };
    Ok(Dataset::open(&config, &reading, threads, progress)?)
}

/// The files of the tokenizer, as they go with every checkpoint and the result.
pub(crate) fn tokenizer_files(begun: &Begun, prepared: &Prepared) -> Result<Vec<(String, Vec<u8>)>> {
    if let Some(opened) = &begun.opened {
        return Ok(consort_model::train::tokenizer_files(opened)?);
    }
    let folder = prepared.vocabulary.as_deref().ok_or_else(|| anyhow!("there is no vocabulary"))?;
    let names = ["tokenizer.json", "tokenizer_config.json"];
    names.into_iter().map(|name| Ok((name.to_owned(), read(&folder.join(name))?))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

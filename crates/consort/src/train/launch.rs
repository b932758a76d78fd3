//! The launcher: prepares a job, starts its workers, watches them, replaces those that die, and ends with a model.
//!
//! Here is what comes before the first process and behind the last one. [`watch`] is the main loop, [`hear`] what it does with
//! the words of workers and servers, [`child`] a process; [`follow`] is the life of a process that another one leads.

mod child;
mod follow;
mod hear;
mod watch;

use std::net::SocketAddr;
use std::sync::mpsc;

use anyhow::{Result, bail};
use consort_collectives::{JoinOptions, Store, StoreOptions};
use consort_training::checkpoint;
use consort_training::job::{Machine, Plan, plan};
use consort_training::parallel::{HOST_SETTLE, HOST_SILENCE};

use self::watch::{Begin, News, Watch};
use super::endpoint::Endpoint;
use super::meeting::Meeting;
use super::metrics::Metrics;
use super::prepare::{self, Prepared};
use super::ranks::Rank;
use super::served::{self, Served};
use super::show::Show;
use super::status::Published as Status;
use super::{Source, again, finish, secret, work};
use crate::cli::UsageError;
use crate::terminal::note;
use crate::{environment, signals};

/// Lines of workers that wait to be read.
const LINES: usize = 4096;

/// How a job is run, beside what its file says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    /// Go on from the newest checkpoint.
    pub(crate) resume: bool,
    /// Forget checkpoints of an earlier run.
    pub(crate) restart: bool,
    /// Say what it would take, and start nothing.
    pub(crate) check: bool,
    /// Where Prometheus reads.
    pub(crate) metrics: Option<SocketAddr>,
    /// The result as JSON.
    pub(crate) json: bool,
}

/// Runs a job: as the launcher, or as one of the processes that a cluster's starter started.
pub(crate) fn run(source: &Source, wishes: &Wishes, rank: Option<&Rank>) -> Result<()> {
    match rank {
        Some(rank) if rank.rank > 0 && !wishes.check => follow::follow(source, rank),
        _ => Launcher::prepare(source, wishes, rank)?.map_or(Ok(()), Launcher::launch),
    }
}

/// A job that is ready to start.
struct Launcher<'a> {
    source: &'a Source,
    wishes: &'a Wishes,
    rank: Option<&'a Rank>,
    plan: Plan,
    prepared: Prepared,
    endpoint: Option<Endpoint>,
    show: Show,
}

impl<'a> Launcher<'a> {
    /// Makes what the job needs and counts what it takes; nothing where that is all that was asked for.
    fn prepare(
        source: &'a Source,
        wishes: &'a Wishes,
        rank: Option<&'a Rank>,
    ) -> Result<Option<Launcher<'a>>> {
        let job = &source.job;
        let mut show = Show::new(wishes.json);
        prepare::folder(job)?;
        let mut endpoint = None;
        if !wishes.check {
            earlier(source, wishes)?;
            // What can't be listened on is known before the data is read, which may take long.
            endpoint = wishes.metrics.map(Endpoint::listen).transpose()?;
        }
        let prepared = prepare::prepare(job, wishes.json, &mut |text| show.say(text))?;
        let begun = prepare::begin(job, &prepared)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let dataset =
            prepare::samples(job, &prepared, &begun, cores, &mut |progress| show.reading(progress))?;
        show.clear();
        let report = dataset.report();
        show.say(&format!(
            "{}, {} of up to {} tokens",
            count(report.documents, "document"),
            count(report.samples, "sample"),
            job.data.context
        ));
        if report.skipped > 0 {
            let named: Vec<&str> = report.skipped_lines.iter().take(3).map(String::as_str).collect();
            show.say(&format!("{} lines were skipped, such as {}", report.skipped, named.join("; ")));
        }
        let here = rank.map_or(job.workers, |rank| rank.local_world_size.unwrap_or(1));
        let memory = consort_inference::machine_memory().map(|bytes| bytes as u64);
        let machine = Machine { memory, cores, workers: here };
        let plan =
            plan(job, &begun.config, report, machine).map_err(|refusal| UsageError(refusal.to_string()))?;
        if wishes.check {
            crate::terminal::line(&plan)?;
            return Ok(None);
        }
        Ok(Some(Launcher { source, wishes, rank, plan, prepared, endpoint, show }))
    }

    fn launch(self) -> Result<()> {
        let Launcher { source, wishes, rank, plan, prepared, endpoint, show } = self;
        let job = &source.job;
        let token = match environment::train_token() {
            Some(token) => token,
            None => secret()?,
        };
        let alone = rank.is_none_or(|rank| rank.local_world_size == Some(rank.world_size));
        let master = environment::master()?.filter(|_| !alone);
        let listen = match (alone, &master) {
            (true, _) => "127.0.0.1:0".to_owned(),
            (false, Some((_, port))) => format!("0.0.0.0:{port}"),
            (false, None) => "0.0.0.0:0".to_owned(),
        };
        let taken = |error: anyhow::Error| match &master {
            Some((_, port)) => {
                error.context(format!("MASTER_PORT names port {port}: give one that is free on this machine"))
            }
            None => error,
        };
        let workers = rank.map_or(job.workers, |rank| rank.world_size);
        let silence = match (alone, &job.servers) {
            (true, None) => HOST_SILENCE,
            (true, Some(_)) => served::HOST_SILENCE,
            (false, _) => JoinOptions::new("", b"").silence,
        };
        let mut meeting = Meeting {
            store: String::new(),
            token,
            file: source.path.clone(),
            text: source.text.clone(),
            workers,
            steps: plan.steps,
            threads: plan.threads,
            silence: job.train.silence.unwrap_or(silence),
            resume: wishes.resume,
            served: job.servers.is_some(),
            advertise: None,
            prepared: prepared.clone(),
        };
        let (news, inbox) = mpsc::sync_channel(LINES);
        let (store, served) = match &job.servers {
            None => {
                let mut options = StoreOptions::new(workers);
                if alone {
                    options.settle = HOST_SETTLE;
                }
                let store = Store::listen(&listen, meeting.token.as_bytes(), options);
                (Some(store.map_err(|error| taken(error.into()))?), None)
            }
            Some(servers) => {
                let told = news.clone();
                let tell = move |words| {
                    // The main loop may have ended.
                    let _ = told.send(News::Served(words));
                };
                (None, Some(Served::start(meeting.clone(), *servers, listen, tell).map_err(taken)?))
            }
        };
        let port = match (&store, &served) {
            (Some(store), _) => store.address().port(),
            (None, served) => served.as_ref().map_or(0, |served| served.port),
        };
        let host = match (alone, master) {
            (true, _) => "127.0.0.1".to_owned(),
            (false, Some((host, _))) => host,
            (false, None) => hostname()?,
        };
        meeting.store = format!("{host}:{port}");
        // Servers run beside the launcher, and workers on other machines find them there.
        meeting.advertise = (!alone).then_some(host);
        let meeting = meeting.publish(&work(job).join(follow::meeting_name(rank)))?;
        if let Some(endpoint) = &endpoint {
            show.say(&endpoint.about());
        }
        let stop = news.clone();
        signals::on_stop(move || {
            // The main loop may have ended.
            let _ = stop.send(News::Stop);
        })?;
        let metrics = Metrics::open(job, &plan, workers, wishes.resume)?;
        let trainers = if rank.is_some() { 1 } else { workers };
        let mut watch = Watch::new(Begin {
            source,
            meeting: meeting.path(),
            workers: trainers,
            external: rank.is_some(),
            served,
            store: store.as_ref(),
            news,
            metrics,
            show,
            status: Status::new(job, endpoint),
        });
        watch.show.begin(plan.steps);
        let result = watch.watch(&inbox);
        // With their input the workers' launcher ends for those that are left: they stop with a checkpoint.
        let Watch { metrics, mut show, finished, failed, stopping, held, .. } = watch;
        show.clear();
        drop(store);
        drop(meeting);
        result?;
        finish::finish(finish::Ended {
            source,
            plan: &plan,
            prepared: &prepared,
            metrics,
            show,
            finished,
            failed,
            stopped: stopping.is_some(),
            elsewhere: rank.is_some() && job.servers.is_none() && stopping.is_none() && !held.has_told(),
            again: again::command(
                std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()),
                rank,
            ),
            resumed: wishes.resume,
            json: wishes.json,
        })
    }
}

/// Refuses to begin anew over the checkpoints of an earlier run.
fn earlier(source: &Source, wishes: &Wishes) -> Result<()> {
    let (location, options) = (source.job.checkpoint_location(), environment::s3_options());
    let steps = checkpoint::steps(&location, &options)?;
    let Some(newest) = steps.last() else {
        if wishes.resume {
            note(&format!("there is no checkpoint at {location} yet: the job begins at its first step"));
        }
        return Ok(());
    };
    if wishes.restart {
        checkpoint::remove(&location, &options)?;
        note(&format!("removed the checkpoints of an earlier run at {location}"));
    } else if !wishes.resume {
        bail!(UsageError(format!(
            "{location} has a checkpoint of step {newest}, of an earlier run: go on from it with --resume, or begin anew \
             with --restart, which removes it"
        )));
    }
    Ok(())
}

/// A number of things.
fn count(number: u64, of: &str) -> String {
    if number == 1 { format!("1 {of}") } else { format!("{number} {of}s") }
}

/// This machine's name, for processes on others.
fn hostname() -> Result<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() {
        bail!(
            "this machine has no name for the other processes; give its address in MASTER_ADDR and a port in MASTER_PORT"
        );
    }
    Ok(name)
}

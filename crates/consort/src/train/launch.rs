//! The launcher: prepares a job, starts its workers, watches them, replaces those that die, and ends with a model.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use consort_collectives::{JoinOptions, Store, StoreOptions};
use consort_training::checkpoint;
use consort_training::job::{Machine, Plan, plan};
use consort_training::parallel::{Event, Finished, HOST_SETTLE, HOST_SILENCE, Reason};
use consort_training::report::What;

use super::endpoint::Endpoint;
use super::meeting::Meeting;
use super::metrics::Metrics;
use super::prepare::{self, Prepared};
use super::ranks::Rank;
use super::replace::{Decision, Replacements};
use super::said::Said;
use super::served::{self, Served, Told};
use super::show::Show;
use super::status::{Place, Published as Status};
use super::worker::{self, Attached, STOP};
use super::{Source, again, finish, holding, secret, work};
use crate::cli::UsageError;
use crate::environment;
use crate::terminal::note;

/// How often the launcher looks around when nobody says anything.
const TICK: Duration = Duration::from_millis(100);
/// How long workers that were told to stop may take for their step and its checkpoint.
const STOPPING: Duration = Duration::from_secs(300);
/// How long workers and servers whose coordinator has ended may take to follow it; they have nothing left to keep.
const LEAVING: Duration = Duration::from_secs(5);
/// How long other processes may wait for the first one to prepare the job.
const PREPARING: Duration = Duration::from_secs(3600);
/// Lines of workers that wait to be read.
const LINES: usize = 4096;
/// Characters of a line that is passed on.
const MOST_CHARS: u64 = 1 << 20;

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
        Some(rank) if rank.rank > 0 && !wishes.check => follow(source, rank),
        _ => Launcher::prepare(source, wishes, rank)?.map_or(Ok(()), Launcher::launch),
    }
}

/// What the file is called in which workers of this run meet.
fn meeting_name(rank: Option<&Rank>) -> String {
    rank.map_or_else(|| "meeting.json".to_owned(), |rank| format!("meeting-{}.json", rank.run))
}

/// A process that another one leads.
fn follow(source: &Source, rank: &Rank) -> Result<()> {
    let path = work(&source.job).join(meeting_name(Some(rank)));
    let mut meeting = Meeting::wait(&path, None, PREPARING)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = source.job.threads.unwrap_or(cores) / rank.local_world_size.unwrap_or(1).max(1);
    if meeting.served {
        return served::learn(&meeting, rank.rank, Some(threads.max(1)), |_| ());
    }
    loop {
        match worker::work(&meeting, Attached::Alone, Some(threads.max(1))) {
            // A file of an earlier run whose first process was killed: the right one comes.
            Err(error)
                if no_store(&error) && Meeting::read(&path).is_ok_and(|m| m.token == meeting.token) =>
            {
                meeting = Meeting::wait(&path, Some(&meeting.token), PREPARING).map_err(|_| error)?;
            }
            ended => return ended.map(|_| ()),
        }
    }
}

fn no_store(error: &anyhow::Error) -> bool {
    use consort_collectives::Error as Group;
    use consort_training::Error;
    let Some(Error::Group(error)) = error.downcast_ref::<Error>() else { return false };
    matches!(**error, Group::Rendezvous { .. } | Group::Refused { .. })
}

/// A job that is ready to start.
struct Launcher<'a> {
    source: &'a Source,
    wishes: &'a Wishes,
    rank: Option<&'a Rank>,
    plan: Plan,
    prepared: Prepared,
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
        if !wishes.check {
            earlier(source, wishes)?;
        }
        let prepared = prepare::prepare(job, wishes.json, &mut |text| show.say(text))?;
        let begun = prepare::begin(job, &prepared)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let dataset =
            prepare::samples(job, &prepared, &begun, cores, &mut |progress| show.reading(progress))?;
        show.clear();
        let report = dataset.report();
        show.say(&format!(
            "{} documents, {} samples of up to {} tokens",
            report.documents, report.samples, job.data.context
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
        Ok(Some(Launcher { source, wishes, rank, plan, prepared, show }))
    }

    fn launch(self) -> Result<()> {
        let Launcher { source, wishes, rank, plan, prepared, show } = self;
        let job = &source.job;
        let token = match environment::train_token() {
            Some(token) => token,
            None => secret()?,
        };
        let alone = rank.is_none_or(|rank| rank.local_world_size == Some(rank.world_size));
        let listen = match (alone, environment::master()) {
            (true, _) => "127.0.0.1:0".to_owned(),
            (false, Some((_, port))) => format!("0.0.0.0:{port}"),
            (false, None) => "0.0.0.0:0".to_owned(),
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
                (Some(Store::listen(&listen, meeting.token.as_bytes(), options)?), None)
            }
            Some(servers) => {
                let told = news.clone();
                let tell = move |words| {
                    // The main loop may have ended.
                    let _ = told.send(News::Served(words));
                };
                (None, Some(Served::start(meeting.clone(), *servers, listen, tell)?))
            }
        };
        let port = match (&store, &served) {
            (Some(store), _) => store.address().port(),
            (None, served) => served.as_ref().map_or(0, |served| served.port),
        };
        let host = match (alone, environment::master()) {
            (true, _) => "127.0.0.1".to_owned(),
            (false, Some((host, _))) => host,
            (false, None) => hostname()?,
        };
        meeting.store = format!("{host}:{port}");
        // Servers run beside the launcher, and workers on other machines find them there.
        meeting.advertise = (!alone).then_some(host);
        let meeting = meeting.publish(&work(job).join(meeting_name(rank)))?;
        let endpoint = wishes.metrics.map(Endpoint::listen).transpose()?;
        if let Some(endpoint) = &endpoint {
            show.say(&endpoint.about());
        }
        let stop = news.clone();
        on_signal(move || {
            // The main loop may have ended.
            let _ = stop.send(News::Stop);
        })?;
        let metrics = Metrics::open(job, &plan, workers, wishes.resume)?;
        let trainers = if rank.is_some() { 1 } else { workers };
        let own = trainers + job.servers.map_or(0, |servers| servers.count);
        let mut watch = Watch {
            source,
            news,
            begun: Instant::now(),
            meeting: meeting.path().to_owned(),
            workers: (0..own).map(|number| Worker::new(number, trainers)).collect(),
            trainers,
            served,
            due: VecDeque::new(),
            replacements: Replacements::default(),
            stopping: None,
            leaving: None,
            epoch: 0,
            members: 0,
            unaccounted: 0,
            step: 0,
            finished: None,
            failed: None,
            held: holding::Teller::default(),
            metrics,
            show,
            status: Status::new(job, endpoint),
            external: rank.is_some(),
        };
        watch.show.begin(plan.steps);
        for number in 0..own {
            watch.start(number)?;
        }
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
            json: wishes.json,
        })
    }
}

/// Refuses to begin anew over the checkpoints of an earlier run.
fn earlier(source: &Source, wishes: &Wishes) -> Result<()> {
    let (location, options) = (source.job.checkpoint_location(), environment::s3_options());
    let steps = checkpoint::steps(&location, &options)?;
    let Some(newest) = steps.last() else { return Ok(()) };
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

/// Calls `told` at the first SIGINT or SIGTERM, and ends the process at the second SIGINT.
pub(crate) fn on_signal(told: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("can't start the runtime that watches for Ctrl-C")?;
    let wait = move || {
        runtime.block_on(async {
            if crate::signals::stop().await.is_ok() {
                told();
                // The second one ends the process from a task of this runtime.
                std::future::pending::<()>().await;
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("can't start a thread")?;
    Ok(())
}

/// What reaches the main loop.
enum News {
    /// A line of a worker's standard output.
    Said(usize, u32, Box<Said>),
    /// The coordinator of a job around servers.
    Served(Told),
    /// A line of its standard error.
    Noted(usize, String),
    /// Its standard output has ended.
    Gone(usize, u32),
    /// The user wants it to end.
    Stop,
}

/// One worker's place.
struct Worker {
    number: usize,
    child: Option<(Child, ChildStdin)>,
    shown: Place,
    /// It said why it ends.
    failed: bool,
    /// It has had a rank in an epoch, so it has the job's state.
    member: bool,
}

impl Worker {
    fn new(number: usize, trainers: usize) -> Worker {
        let name = match number.checked_sub(trainers) {
            None => format!("worker {number}"),
            Some(server) => format!("server {server}"),
        };
        Worker { number, child: None, shown: Place::new(number, &name), failed: false, member: false }
    }
}

/// The main loop's state.
struct Watch<'a> {
    source: &'a Source,
    news: SyncSender<News>,
    begun: Instant,
    meeting: PathBuf,
    /// Trainers, then servers.
    workers: Vec<Worker>,
    trainers: usize,
    /// The coordinator of a job around servers, until it has ended.
    served: Option<Served>,
    /// Places that get a new worker, and when.
    due: VecDeque<(Duration, usize)>,
    replacements: Replacements,
    stopping: Option<Instant>,
    /// Since when the coordinator of a job around servers has ended.
    leaving: Option<Instant>,
    epoch: u64,
    members: usize,
    /// Processes that ended since the last epoch began.
    unaccounted: usize,
    step: u64,
    finished: Option<Finished>,
    failed: Option<String>,
    /// Of weights that can't be written.
    held: holding::Teller,
    metrics: Metrics,
    show: Show,
    status: Status,
    /// Others than this launcher started most workers.
    external: bool,
}

impl Watch<'_> {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Starts the process of a place.
    fn start(&mut self, number: usize) -> Result<()> {
        let itself = std::env::current_exe().context("can't find this program to start a worker")?;
        let mut command = Command::new(itself);
        let what = if number < self.trainers { "worker" } else { "server" };
        let place = if number < self.trainers { number } else { number - self.trainers };
        command.args(["train", what]).arg(&self.meeting).args(["--place", &place.to_string()]);
        // One who comes while others run gets the state from them. Where all are gone, the last checkpoint has it.
        let others =
            self.external || self.workers.iter().any(|worker| worker.child.is_some() && worker.member);
        let around_servers = self.workers.len() > self.trainers;
        if self.workers[number].shown.starts > 0 && !others && !around_servers {
            command.arg("--resume");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A Ctrl-C in the terminal is for the launcher, which tells the workers.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        environment::not_a_rank(&mut command);
        let mut child = command.spawn().context("can't start a worker")?;
        let (Some(input), Some(output), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            bail!("a worker was started without pipes");
        };
        let pid = child.id();
        let news = self.news.clone();
        thread(move || {
            for line in lines(output) {
                if let Ok(said) = serde_json::from_str(&line)
                    && news.send(News::Said(number, pid, Box::new(said))).is_err()
                {
                    return;
                }
            }
            let _ = news.send(News::Gone(number, pid));
        })?;
        let news = self.news.clone();
        thread(move || {
            for line in lines(errors) {
                if news.send(News::Noted(number, line)).is_err() {
                    return;
                }
            }
        })?;
        let worker = &mut self.workers[number];
        worker.shown.started(pid);
        (worker.child, worker.failed, worker.member) = (Some((child, input)), false, false);
        self.show.say(&format!("{} is process {pid}", self.name(number)));
        Ok(())
    }

    /// Until every worker has ended and none is due.
    fn watch(&mut self, inbox: &Receiver<News>) -> Result<()> {
        loop {
            match inbox.recv_timeout(TICK) {
                Ok(News::Said(number, pid, said)) => self.heard(number, pid, *said)?,
                // Whose coordinator has ended may say so.
                Ok(News::Noted(..)) if self.leaving.is_some() && self.finished.is_some() => {}
                Ok(News::Noted(number, line)) => self.show.say(&format!("{}: {line}", self.name(number))),
                Ok(News::Served(words)) => self.coordinated(words)?,
                Ok(News::Gone(number, pid)) => self.gone(number, pid)?,
                Ok(News::Stop) => self.stop(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.tick()?;
            let over = self.due.is_empty() && self.served.is_none();
            if over && self.workers.iter().all(|worker| worker.child.is_none()) {
                let complete = self.finished.as_ref().is_some_and(|finished| finished.reason == Reason::Done);
                self.status.end(self.step, 0, complete, &self.places(), &self.metrics);
                return Ok(());
            }
        }
    }

    fn tick(&mut self) -> Result<()> {
        let now = self.now();
        while self.due.front().is_some_and(|(when, _)| *when <= now) {
            if let Some((_, number)) = self.due.pop_front() {
                self.start(number)?;
            }
        }
        let leaving = self.leaving.is_some_and(|since| since.elapsed() > LEAVING);
        if leaving || self.stopping.is_some_and(|since| since.elapsed() > STOPPING) {
            for worker in &mut self.workers {
                if let Some((child, _)) = &mut worker.child {
                    if !leaving {
                        self.show.say(&format!("worker {} doesn't stop; it is ended", worker.number));
                    }
                    // It may have ended by itself.
                    let _ = child.kill();
                }
            }
        }
        let places = self.places();
        self.status.update(self.step, self.members, &places, &self.metrics);
        Ok(())
    }

    fn places(&self) -> Vec<Place> {
        self.workers.iter().map(|worker| worker.shown.clone()).collect()
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Instant::now());
        self.due.clear();
        self.show.say(match self.held.has_told() {
            false => "stopping behind this step, with a checkpoint (Ctrl-C again ends at once)",
            true => "giving up the weights that can't be written",
        });
        self.record(What::Stopped, "the user asked for it".into());
        if let Some(served) = &self.served {
            // Its workers and servers end with it.
            served.stop();
            return;
        }
        for worker in &mut self.workers {
            if let Some((_, input)) = &mut worker.child {
                // One that has just ended needs no word.
                let _ = writeln!(input, "{STOP}").and_then(|()| input.flush());
            }
        }
    }

    fn heard(&mut self, number: usize, pid: u32, words: Said) -> Result<()> {
        let worker = &mut self.workers[number];
        if worker.shown.pid != Some(pid) {
            // Of the process before.
            return Ok(());
        }
        worker.shown.heard();
        match words {
            Said::Status(status) => worker.shown.status = Some(status),
            Said::Failed(reason) => {
                worker.failed = true;
                self.show.say(&format!("worker {number} can't go on: {reason}"));
                self.failed.get_or_insert(reason);
            }
            Said::Resumed { step, refused } => self.resumed(step, refused),
            Said::Finished(finished) => self.ended(number, finished)?,
            Said::Event(event) => {
                worker.member |= matches!(event, Event::Started { .. });
                self.event(event)?;
            }
        }
        Ok(())
    }

    /// Newcomers come too late for a job that is over: nobody would let them in.
    fn send_home(&mut self) {
        self.due.clear();
        for worker in self.workers.iter_mut().filter(|worker| !worker.member) {
            if let Some((child, _)) = &mut worker.child {
                worker.shown.done = true;
                // It may have ended by itself.
                let _ = child.kill();
            }
        }
    }

    fn resumed(&mut self, step: u64, refused: Vec<String>) {
        for reason in refused {
            self.show.once(&format!("a checkpoint is no good and is left out: {reason}"));
        }
        self.step = self.step.max(step);
        self.metrics.resumed(step);
        self.show.once(&format!("going on behind step {step}"));
    }

    /// What the coordinator of a job around servers says. With its last word its workers and servers end.
    fn coordinated(&mut self, words: Told) -> Result<()> {
        match words {
            Told::Resumed { step, refused } => self.resumed(step, refused),
            Told::Members { workers, epoch } => {
                if self.members == 0 {
                    self.show.say(&super::show::workers_met(workers));
                }
                (self.members, self.epoch) = (workers.max(1), epoch);
                self.show.members(workers);
            }
            // A process of this launcher that ended is told of by its end.
            Told::Left { name, silent: false } if self.workers.iter().any(|w| w.shown.name == name) => {}
            Told::Left { name, silent: true } => {
                self.record(What::Lost, format!("{name} has fallen silent and the others go on"));
            }
            Told::Left { name, .. } => {
                self.record(What::Lost, format!("{name} is gone and the others go on"))
            }
            Told::Note(what, text) => self.record(what, text),
            Told::Step(step) => self.event(Event::Step(*step))?,
            Told::Checkpoint(event) => self.checkpoint(event),
            Told::View(view) => self.status.view(*view),
            Told::Finished(finished) => {
                // Where nobody asked for the end, it is a failure that has a checkpoint.
                let whole = self.stopping.is_some() || self.failed.is_none();
                self.finished = finished.filter(|finished| whole || finished.reason == Reason::Done);
                self.let_go();
            }
            Told::Failed(reason) => {
                self.failed.get_or_insert(reason);
                self.let_go();
            }
        }
        Ok(())
    }

    /// The coordinator has ended, so its workers and servers do; one that is stopped or hangs is ended.
    fn let_go(&mut self) {
        self.served = None;
        self.due.clear();
        self.leaving = Some(Instant::now());
    }

    /// What a place is called.
    fn name(&self, number: usize) -> String {
        self.workers[number].shown.name.clone()
    }

    /// The job is over but for processes that end.
    fn over(&self) -> bool {
        self.finished.is_some()
            || self.stopping.is_some()
            || (self.workers.len() > self.trainers && self.served.is_none())
    }

    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Started { workers, epoch, took_us, step, .. }
                if epoch > self.epoch || self.members == 0 =>
            {
                self.stood(workers, epoch, took_us, step);
            }
            Event::Step(step) if step.step + 1 > self.step => {
                self.step = step.step + 1;
                let record = self.metrics.step(&step, self.now())?;
                self.show.step(&record);
            }
            Event::Checkpoint(event) => self.checkpoint(event),
            Event::Holding(told) => {
                if let Some(text) = self.held.news(&told, &self.source.job.checkpoint_location()) {
                    self.show.say(&text);
                }
            }
            Event::Lost { reason, operation, .. } => {
                tracing::debug!(%reason, %operation, "a worker left its epoch")
            }
            _ => {}
        }
        Ok(())
    }

    /// A new epoch began with so many workers.
    fn stood(&mut self, workers: usize, epoch: u64, took_us: u64, step: u64) {
        let first = self.members == 0;
        let left = self.members.saturating_sub(self.unaccounted);
        if !first && workers < left {
            let silent = left - workers;
            let who = if silent == 1 { "a worker".to_owned() } else { format!("{silent} workers") };
            self.record(What::Lost, format!("{who} fell silent and the others go on"));
        }
        if !first && workers > left.min(workers) {
            let text =
                format!("{workers} workers again behind step {step}, after {:.0} ms", took_us as f64 / 1e3);
            self.record(What::Joined, text);
        }
        if first {
            self.show.say(&super::show::workers_met(workers));
        }
        (self.members, self.epoch, self.unaccounted) = (workers, epoch, 0);
        self.show.members(workers);
    }

    fn checkpoint(&mut self, event: checkpoint::Event) {
        match event {
            checkpoint::Event::Complete { step, bytes, took } => {
                let text = format!(
                    "step {step} ({} by the first worker, in {:.1} s, behind the job's back)",
                    crate::terminal::bytes(bytes),
                    took.as_secs_f64()
                );
                self.metrics.event(What::Checkpoint, text, step, self.begun.elapsed());
            }
            checkpoint::Event::Failed { step, reason } => {
                let on = if step < self.metrics.steps() { ", the job goes on" } else { "" };
                let text = format!("step {step} was not written{on}: {reason}");
                self.record_once(What::CheckpointFailed, text);
            }
            checkpoint::Event::Skipped { step } => {
                let text = format!("step {step} was left out: the one before it was still being written");
                self.record_once(What::CheckpointFailed, text);
            }
            checkpoint::Event::Written { .. } => {}
        }
    }

    /// Notes an event that several workers tell of.
    fn record_once(&mut self, what: What, text: String) {
        if self.show.once(&text) {
            self.metrics.event(what, text, self.step, self.begun.elapsed());
        }
    }

    /// Notes an event and shows it.
    fn record(&mut self, what: What, text: String) {
        self.show.say(&text);
        self.metrics.event(what, text, self.step, self.begun.elapsed());
    }

    fn ended(&mut self, number: usize, finished: Finished) -> Result<()> {
        self.workers[number].shown.done = true;
        if let Some(other) = &self.finished
            && (other.steps, &other.reason) == (finished.steps, &finished.reason)
            && other.weights_hash != finished.weights_hash
        {
            bail!(
                "two workers ended step {} with different weights ({} and {}): that is a bug of ours or of this machine's \
                 memory; don't use the result",
                finished.steps,
                other.weights_hash,
                finished.weights_hash
            );
        }
        let better = |other: &Finished| finished.reason == Reason::Done && other.reason != Reason::Done;
        if self.finished.as_ref().is_none_or(better) {
            self.finished = Some(finished);
        }
        self.send_home();
        Ok(())
    }

    /// A job around servers that has no worker left, or no server, and gets no other one, ends with what there is.
    fn deserted(&mut self) {
        let Some(served) = &self.served else { return };
        let nobody = |mut places: std::ops::Range<usize>| {
            places.all(|n| self.workers[n].child.is_none() && self.due.iter().all(|(_, due)| *due != n))
        };
        if (nobody(0..self.trainers) && !self.external) || nobody(self.trainers..self.workers.len()) {
            served.stop();
        }
    }

    /// A worker's process is ending.
    fn gone(&mut self, number: usize, pid: u32) -> Result<()> {
        let worker = &mut self.workers[number];
        if worker.shown.pid != Some(pid) {
            return Ok(());
        }
        let Some((mut child, input)) = worker.child.take() else { return Ok(()) };
        drop(input);
        let status = reap(&mut child)?;
        worker.shown.pid = None;
        if worker.shown.done || status.success() {
            return Ok(());
        }
        let how = how(status);
        self.unaccounted += usize::from(number < self.trainers);
        let name = self.name(number);
        if self.leaving.is_none() {
            let what = if number < self.trainers { What::Lost } else { What::Note };
            self.record(what, format!("{name} (process {pid}) {how}"));
        }
        if self.workers[number].failed || self.over() {
            self.deserted();
            return Ok(());
        }
        match self.replacements.gone(self.begun.elapsed(), self.step) {
            Decision::At(when) => self.due.push_back((when, number)),
            Decision::Enough => {
                let others = self.workers.iter().any(|worker| worker.child.is_some()) || self.external;
                let rest = if others { "; the others go on" } else { "" };
                self.show.say(&format!(
                    "{name} is not replaced any more: too many in a row died without a step in between{rest}"
                ));
                self.failed.get_or_insert(format!("{name} {how}, again and again"));
                self.deserted();
            }
        }
        let file = self.source.path.display();
        tracing::debug!(%file, number, "a worker is gone");
        Ok(())
    }
}

/// A process whose output has ended is about to end; one that isn't is made to.
fn reap(child: &mut Child) -> Result<ExitStatus> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(status) = child.try_wait().context("a worker is gone")? {
            return Ok(status);
        }
        if Instant::now() >= until {
            // It may have ended by itself.
            let _ = child.kill();
            return child.wait().context("a worker is gone");
        }
        // The system tells of an end only to who waits for it, and that wait has no deadline.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How a process ended.
fn how(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return match signal {
            9 => "was killed".to_owned(),
            signal => format!("was ended by signal {signal}"),
        };
    }
    match status.code() {
        Some(code) => format!("ended with status {code}"),
        None => "ended".to_owned(),
    }
}

fn thread(work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name("worker-output".into()).spawn(work).context("can't start a thread")?;
    Ok(())
}

/// Lines of bounded length, whatever they hold.
fn lines(from: impl Read) -> impl Iterator<Item = String> {
    let mut from = BufReader::new(from);
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        match (&mut from).take(MOST_CHARS).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                Some(text.chars().filter(|c| !c.is_control()).collect())
            }
        }
    })
}

//! A worker as a real process: the test binary starts itself again, and the copy that finds `WORKER_STORE` in its
//! environment trains and prints every event as a line of JSON.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use consort_collectives::TransportKind;
use consort_training::checkpoint::CheckpointConfig;
use consort_training::parallel::{Control, Event, Finished, Membership, Outer, Plan, Worker};

use super::{PATTERNS, model, options, trainer};

/// A test that waits longer than this for something has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a worker process is told.
#[derive(Clone, Debug)]
pub struct Orders {
    pub store: String,
    pub kind: TransportKind,
    pub plan: Plan,
    /// A pause behind each step, so that a job lasts long enough for something to happen to it.
    pub pause_us: u64,
    pub checkpoints: Option<String>,
    pub resume: bool,
    /// The network namespace that it lives in.
    pub namespace: Option<String>,
    /// Where it listens, and where others are told to find it.
    pub place: Option<(SocketAddr, SocketAddr)>,
}

pub fn checkpoints(location: &str) -> CheckpointConfig {
    CheckpointConfig {
        location: location.to_owned(),
        options: Vec::new(),
        keep: 2,
        worker: 0,
        workers: 1,
        patience: Duration::from_secs(30),
        files: std::collections::BTreeMap::new(),
    }
}

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// The worker's life; returns at once in a process that is none.
pub fn live() {
    let Some(store) = variable::<String>("WORKER_STORE") else { return };
    let kind = TransportKind::by_name(&variable::<String>("WORKER_TRANSPORT").unwrap()).unwrap();
    let plan = Plan {
        steps: variable("WORKER_STEPS").unwrap(),
        exact: variable("WORKER_EXACT").unwrap(),
        checkpoint_every: variable("WORKER_CHECKPOINT_EVERY"),
        outer: variable("WORKER_OUTER").map(|every| Outer { every, ..Outer::default() }),
        ..super::plan()
    };
    let pause = Duration::from_micros(variable("WORKER_PAUSE_US").unwrap());
    let place: Option<String> = variable("WORKER_CHECKPOINTS");
    let mut options = options(&store, kind);
    (options.listen, options.advertise) = (variable("WORKER_LISTEN"), variable("WORKER_ADVERTISE"));
    let membership = Membership::Group(options);
    let trainer = trainer(&model(), 0.1, 1);
    let mut worker =
        Worker::new(trainer, &PATTERNS, plan, membership, place.as_deref().map(checkpoints)).unwrap();
    if variable("WORKER_RESUME").unwrap() {
        println!("\nresumed {:?}", worker.resume().unwrap());
    }
    let finished = worker.run(&mut |event| {
        println!("\nevent {}", serde_json::to_string(event).unwrap());
        if matches!(event, Event::Step(_)) {
            std::thread::sleep(pause);
        }
        Control::Go
    });
    match finished {
        Ok(finished) => println!("\nfinished {}", serde_json::to_string(&finished).unwrap()),
        Err(error) => println!("\nfailed {error}"),
    }
}

/// What a worker said.
#[derive(Clone, Debug)]
pub enum Said {
    Event(Event),
    Finished(Finished),
    Failed(String),
    Ended,
}

/// The test's end of a worker.
pub struct Process {
    child: Child,
    lines: Receiver<Said>,
    /// All that it said so far.
    pub events: Vec<Event>,
    pub finished: Option<Finished>,
    pub failed: Option<String>,
}

impl Process {
    pub fn start(orders: &Orders) -> Process {
        let itself = std::env::current_exe().unwrap();
        let mut command = match &orders.namespace {
            None => Command::new(itself),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(itself);
                command
            }
        };
        command.args(["--exact", "worker_process", "--nocapture"]);
        command.env("WORKER_STORE", &orders.store).env("WORKER_TRANSPORT", orders.kind.name());
        command.env("WORKER_STEPS", orders.plan.steps.to_string());
        command.env("WORKER_EXACT", orders.plan.exact.to_string());
        command.env("WORKER_PAUSE_US", orders.pause_us.to_string());
        command.env("WORKER_RESUME", orders.resume.to_string());
        if let Some(every) = orders.plan.checkpoint_every {
            command.env("WORKER_CHECKPOINT_EVERY", every.to_string());
        }
        if let Some(outer) = &orders.plan.outer {
            command.env("WORKER_OUTER", outer.every.to_string());
        }
        if let Some(place) = &orders.checkpoints {
            command.env("WORKER_CHECKPOINTS", place);
        }
        if let Some((listen, advertise)) = &orders.place {
            command.env("WORKER_LISTEN", listen.to_string()).env("WORKER_ADVERTISE", advertise.to_string());
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (say, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // A process that is killed leaves half a line.
                let said = match line.split_once(' ') {
                    Some(("event", text)) => serde_json::from_str(text).ok().map(Said::Event),
                    Some(("finished", text)) => serde_json::from_str(text).ok().map(Said::Finished),
                    Some(("failed", text)) => Some(Said::Failed(text.to_owned())),
                    _ => None,
                };
                if said.is_some_and(|said| say.send(said).is_err()) {
                    return;
                }
            }
            let _ = say.send(Said::Ended);
        });
        Process { child, lines, events: Vec::new(), finished: None, failed: None }
    }

    /// Waits for an event that `wanted` takes; `None` where the process ended before.
    pub fn wait(&mut self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Said::Event(event)) => {
                    self.events.push(event.clone());
                    if wanted(&event) {
                        return Some(event);
                    }
                }
                Ok(Said::Finished(finished)) => self.finished = Some(finished),
                Ok(Said::Failed(reason)) => self.failed = Some(reason),
                Ok(Said::Ended) | Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("nothing for {PATIENCE:?}; so far {:?}", self.events)
                }
            }
        }
    }

    /// Waits for the end, but not for longer than that.
    pub fn end_within(&mut self, limit: Duration) -> Option<Finished> {
        let until = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Said::Event(event)) => self.events.push(event),
                Ok(Said::Finished(finished)) => self.finished = Some(finished),
                Ok(Said::Failed(reason)) => self.failed = Some(reason),
                Ok(Said::Ended) | Err(_) => return self.finished.clone(),
            }
        }
    }

    /// Waits for the end.
    pub fn end(&mut self) -> Option<Finished> {
        self.wait(|_| false);
        self.finished.clone()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        // It may have ended.
        let _ = Command::new("kill").args([name, &id]).stderr(Stdio::null()).status();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

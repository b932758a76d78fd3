//! Single steps; whole lives are in [`super::simulation`].

use super::*;

fn slot(index: u32) -> Slot {
    Slot { model: "chat".into(), version: "stable".into(), index }
}

pub(super) fn launch(revision: u64) -> Launch {
    Launch {
        model: "chat".into(),
        version: "stable".into(),
        path: "/model".into(),
        stamp: String::new(),
        threads: 1,
        context: None,
        kv_bytes: None,
        max_running: 1,
        max_queued: 1,
        prefix_cache: true,
        drain_tokens: 10,
        drain_seconds: 10,
        revision,
    }
}

pub(super) fn want(replicas: u32, revision: u64) -> Event {
    Event::Want((0..replicas).map(|index| (slot(index), launch(revision))).collect())
}

struct Bench {
    supervisor: Supervisor,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        Bench { supervisor: Supervisor::new(Options::default(), 7), now: Instant::now() }
    }

    fn step(&mut self, event: Event) -> Vec<Command> {
        self.supervisor.step(self.now, event)
    }

    /// Time passes, with a tick each second.
    fn after(&mut self, time: Duration) -> Vec<Command> {
        let (end, mut commands) = (self.now + time, Vec::new());
        while self.now < end {
            self.now = end.min(self.now + Duration::from_secs(1));
            commands.extend(self.step(Event::Tick));
        }
        commands
    }

    fn spawned(commands: &[Command]) -> Vec<ReplicaId> {
        commands
            .iter()
            .filter_map(|c| if let Command::Spawn(id, _) = c { Some(id.clone()) } else { None })
            .collect()
    }

    /// Starts everything that `commands` want started, and makes it ready.
    fn run(&mut self, commands: &[Command]) -> Vec<Command> {
        let mut said = Vec::new();
        for id in Bench::spawned(commands) {
            said.extend(self.step(Event::Spawned(id.clone(), 1)));
            said.extend(self.step(Event::Listening(id.clone(), ([127, 0, 0, 1], 1).into())));
            said.extend(self.step(Event::Ready(id)));
        }
        said
    }

    fn ready(&self) -> Vec<String> {
        self.supervisor.routes().iter().filter(|r| !r.draining).map(|r| r.id.to_string()).collect()
    }
}

#[test]
fn a_lost_replica_gets_a_successor_with_another_name() {
    let mut bench = Bench::new();
    let commands = bench.step(want(2, 0));
    bench.run(&commands);
    assert_eq!(bench.ready(), ["chat-0.1", "chat-1.1"]);
    let id = ReplicaId("chat-0.1".into());
    let commands = bench.step(Event::Exited(id, "killed by signal 9".into()));
    assert_eq!(commands[0], Command::Publish);
    assert_eq!(bench.ready(), ["chat-1.1"]);
    let commands = bench.after(Options::default().backoff.base);
    bench.run(&commands);
    assert_eq!(bench.ready(), ["chat-0.2", "chat-1.1"]);
    let view = &bench.supervisor.view(bench.now)[0];
    assert_eq!((view.restarts, view.state), (1, SlotState::Ready));
    assert!(view.last_failure.as_ref().unwrap().contains("signal 9"));
}

#[test]
fn a_hang_is_killed_and_replaced_before_its_process_is_gone() {
    let mut bench = Bench::new();
    let commands = bench.step(want(1, 0));
    bench.run(&commands);
    let id = ReplicaId("chat-0.1".into());
    assert!(bench.after(Duration::from_secs(4)).is_empty());
    bench.step(Event::Alive(id.clone(), 0));
    assert!(bench.after(Duration::from_secs(4)).is_empty());
    let mut commands = bench.after(Duration::from_secs(2));
    assert!(commands.contains(&Command::Kill(id.clone())), "{commands:?}");
    commands.extend(bench.after(Duration::from_secs(1)));
    assert_eq!(Bench::spawned(&commands).len(), 1, "{commands:?}");
    bench.run(&commands);
    assert_eq!(bench.ready(), ["chat-0.2"]);
    bench.step(Event::Exited(id, "killed".into()));
    assert_eq!(bench.ready(), ["chat-0.2"]);

    // Work without steps, although it answers.
    let id = ReplicaId("chat-0.2".into());
    assert!(bench.step(Event::Alive(id.clone(), 29_000)).is_empty());
    commands = bench.step(Event::Alive(id.clone(), 31_000));
    assert!(commands.contains(&Command::Kill(id)), "{commands:?}");
}

#[test]
fn our_own_absence_is_nobodys_hang() {
    let mut bench = Bench::new();
    let commands = bench.step(want(2, 0));
    bench.run(&commands);
    bench.now += Duration::from_secs(3600);
    assert!(bench.step(Event::Tick).is_empty());
    assert!(bench.after(Duration::from_secs(4)).is_empty());
    assert_eq!(
        bench.after(Duration::from_secs(1)).iter().filter(|c| matches!(c, Command::Kill(_))).count(),
        2
    );
}

#[test]
fn a_crash_loop_slows_down_and_is_said_once() {
    let mut bench = Bench::new();
    let mut commands = bench.step(want(1, 0));
    let (mut spawns, mut said) = (0, 0);
    for _ in 0..36_000 {
        for id in Bench::spawned(&commands) {
            spawns += 1;
            for command in bench.step(Event::Exited(id, "no such file".into())) {
                said += usize::from(matches!(command, Command::Say(n) if n.text.contains("again and again")));
            }
        }
        commands = bench.after(Duration::from_millis(100));
    }
    // An hour at 15 s in the mean.
    assert!((150..400).contains(&spawns), "{spawns} starts in an hour");
    assert_eq!(said, 1);
    assert_eq!(bench.supervisor.view(bench.now)[0].state, SlotState::CrashLoop);
    // Mended: tried at once.
    let commands = bench.step(want(1, 1));
    bench.run(&commands);
    assert_eq!(bench.ready().len(), 1);
    assert_eq!(bench.supervisor.view(bench.now)[0].state, SlotState::Ready);
}

#[test]
fn a_roll_starts_the_new_before_the_old_drains_one_at_a_time() {
    let mut bench = Bench::new();
    let commands = bench.step(want(2, 0));
    bench.run(&commands);
    let commands = bench.step(want(2, 1));
    assert_eq!(Bench::spawned(&commands).len(), 1, "{commands:?}");
    assert_eq!(bench.ready().len(), 2);
    let commands = bench.run(&commands);
    let at = |wanted: &Command| commands.iter().position(|c| c == wanted);
    let (publish, drain) = (at(&Command::Publish), at(&Command::Drain(ReplicaId("chat-0.1".into()))));
    assert!(publish.unwrap() < drain.unwrap(), "{commands:?}");
    assert_eq!(bench.ready(), ["chat-0.2", "chat-1.1"]);
    assert_eq!(bench.supervisor.routes().len(), 3, "the old one may finish");
    assert!(bench.after(Duration::from_secs(3)).is_empty(), "the next waits for the drain");
    let commands = bench.step(Event::Exited(ReplicaId("chat-0.1".into()), "done".into()));
    bench.run(&commands);
    assert_eq!(bench.ready(), ["chat-0.2", "chat-1.2"]);
}

#[test]
fn a_roll_that_cannot_start_leaves_the_old_one_alone() {
    let mut bench = Bench::new();
    let commands = bench.step(want(1, 0));
    bench.run(&commands);
    let mut commands = bench.step(want(1, 1));
    for _ in 0..600 {
        bench.step(Event::Alive(ReplicaId("chat-0.1".into()), 0));
        for id in Bench::spawned(&commands) {
            bench.step(Event::Exited(id, "the model is damaged".into()));
        }
        assert_eq!(bench.ready(), ["chat-0.1"]);
        commands = bench.after(Duration::from_secs(1));
    }
    assert!(bench.supervisor.view(bench.now)[0].last_failure.as_ref().unwrap().contains("damaged"));
    // Back to what runs: nothing more to do.
    let commands = bench.step(want(1, 0));
    assert!(Bench::spawned(&commands).is_empty());
}

#[test]
fn stopping_drains_everything_and_a_drain_has_an_end() {
    let mut bench = Bench::new();
    let commands = bench.step(want(2, 0));
    bench.run(&commands);
    let commands = bench.step(Event::Stop);
    assert_eq!(commands.iter().filter(|c| matches!(c, Command::Drain(_))).count(), 2);
    assert!(bench.ready().is_empty());
    bench.step(Event::Exited(ReplicaId("chat-0.1".into()), "done".into()));
    let commands = bench.after(Duration::from_secs(16));
    assert!(commands.contains(&Command::Kill(ReplicaId("chat-1.1".into()))), "{commands:?}");
    let commands = bench.step(Event::Exited(ReplicaId("chat-1.1".into()), "killed".into()));
    assert_eq!(commands.last(), Some(&Command::Stopped));
    assert!(!bench.step(Event::Tick).contains(&Command::Stopped));
}

//! Rollouts of candidates of every kind, under seeds, in virtual time.

use consort_base::Philox;

use super::*;

const TICK: Duration = Duration::from_millis(250);
const DEADLINES: Deadlines = Deadlines { start: Duration::from_secs(60), route: Duration::from_secs(600) };

/// A version that is simulated.
#[derive(Clone, Copy)]
struct Kind {
    errors: f64,
    first_ms: f64,
    nats: f64,
    /// Of 100 s, so many replicas are lost.
    losses: f64,
    starts: bool,
}

const GOOD: Kind = Kind { errors: 0.001, first_ms: 100.0, nats: 0.02, losses: 0.0, starts: true };

fn spec() -> Spec {
    Spec {
        model: "chat".into(),
        version: "v2".into(),
        source: Some("other".into()),
        threads: None,
        context: None,
        max_running: None,
        replicas: 1,
        steps: vec![5, 25, 50],
        bake: Duration::from_secs(60),
        shadow: 10,
        thresholds: Thresholds::default(),
    }
}

struct World {
    rng: Philox,
    start: Instant,
    now: Instant,
    runner: Runner,
    incumbent: Seen,
    candidate: Seen,
}

impl World {
    fn new(seed: u64, spec: Spec) -> World {
        let start = Instant::now();
        let runner = Runner::start(spec, "stable".into(), start, 0);
        let seen = Seen { wanted: 1, ready: 1, ..Seen::default() };
        World {
            rng: Philox::new(seed, 0),
            start,
            now: start,
            runner,
            candidate: Seen { ready: 0, ..seen.clone() },
            incumbent: seen,
        }
    }

    fn uniform(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn give(&mut self, event: &Event<'_>) -> bool {
        let at_ms = (self.now - self.start).as_millis() as u64;
        self.runner.step(self.now, at_ms, DEADLINES, event)
    }

    /// One request at a version of this kind.
    fn request(&mut self, kind: Kind, to_candidate: bool) {
        let (fails, wide) = (self.uniform() < kind.errors, self.uniform());
        let seen = if to_candidate { &mut self.candidate } else { &mut self.incumbent };
        seen.did.requests += 1;
        seen.did.errors += u64::from(fails);
        if !fails {
            seen.did.first_token.add(Duration::from_secs_f64(kind.first_ms * (0.5 + wide) / 1e3));
        }
    }

    /// A quarter of a second with `rate` requests a second.
    fn tick(&mut self, rate: f64, kind: Kind) {
        self.now += TICK;
        let (_, share) = self.runner.weights();
        let requests = (rate * TICK.as_secs_f64() + self.uniform()) as u64;
        for _ in 0..requests {
            let to_candidate = self.uniform() * 100.0 < f64::from(share);
            self.request(if to_candidate { kind } else { GOOD }, to_candidate);
        }
        let scores = self.uniform() < 0.1;
        if self.runner.runs_both() && self.candidate.ready > 0 && requests > 0 && scores {
            let nats = kind.nats * (0.5 + self.uniform());
            self.candidate.did.scored += 1;
            self.candidate.did.disagreement_sum += nats;
            self.candidate.did.disagreement_squares += nats * nats;
        }
        let starting = self.runner.runs_both();
        self.candidate.ready = u32::from(starting && kind.starts);
        self.candidate.failures = if starting && !kind.starts { self.candidate.failures + 1 } else { 0 };
        if starting && self.uniform() < kind.losses * TICK.as_secs_f64() / 100.0 {
            self.candidate.lost += 1;
            self.candidate.last_failure = Some("signal: 9".into());
        }
        // Streams of a version that gets nothing more end within seconds.
        self.candidate.running = if share > 0 { 3 } else { self.candidate.running.saturating_sub(1) };
        self.incumbent.running = if share < 100 { 3 } else { self.incumbent.running.saturating_sub(1) };
        let (incumbent, candidate) = (self.incumbent.clone(), self.candidate.clone());
        self.give(&Event::Tick(&incumbent, &candidate));
    }

    /// Until it is over, or for an hour.
    fn run(&mut self, rate: f64, kind: Kind) -> Stage {
        self.give(&Event::Located(Ok(())));
        for _ in 0..4 * 3600 {
            self.tick(rate, kind);
            if self.runner.rollout.stage.ended() {
                break;
            }
        }
        self.runner.rollout.stage
    }
}

#[test]
fn a_good_candidate_is_promoted_and_each_bad_one_is_withdrawn_for_its_reason() {
    let kinds = [
        ("good", GOOD, None),
        ("failing", Kind { errors: 0.2, ..GOOD }, Some("requests failed")),
        ("dead", Kind { errors: 1.0, ..GOOD }, Some("requests failed")),
        ("slow", Kind { first_ms: 400.0, ..GOOD }, Some("first token takes")),
        ("other", Kind { nats: 3.0, ..GOOD }, Some("disagrees")),
        ("dying", Kind { losses: 20.0, ..GOOD }, Some("were lost 3 times: signal: 9")),
        ("unstartable", Kind { starts: false, ..GOOD }, Some("can't be started")),
    ];
    for seed in 0..40 {
        for (name, kind, reason) in kinds {
            let mut world = World::new(seed, spec());
            let stage = world.run(20.0, kind);
            let said = &world.runner.rollout.reason;
            match reason {
                None => assert_eq!(stage, Stage::Promoted, "seed {seed}, {name}: {said}"),
                Some(reason) => {
                    assert_eq!(stage, Stage::Withdrawn, "seed {seed}, {name}: {said}");
                    assert!(said.contains(reason), "seed {seed}, {name}: {said}");
                    let share =
                        world.candidate.did.requests as f64 / world.incumbent.did.requests.max(1) as f64;
                    assert!(share < 0.6, "seed {seed}, {name}: the bad candidate got {share}");
                }
            }
        }
    }
}

#[test]
fn without_traffic_nothing_is_decided() {
    let mut world = World::new(1, spec());
    assert_eq!(world.run(0.0, GOOD), Stage::Baking { step: 0 });
    assert!(world.runner.rollout.reason.contains("0 of 50 requests"), "{}", world.runner.rollout.reason);
}

#[test]
fn steps_last_as_long_as_they_bake_and_only_grow() {
    let mut world = World::new(2, spec());
    world.give(&Event::Located(Ok(())));
    let (mut before, mut since) = (0, world.now);
    while !world.runner.rollout.stage.ended() {
        world.tick(50.0, GOOD);
        let (_, share) = world.runner.weights();
        assert!(share >= before);
        if share != before {
            assert!(before == 0 || share == 100 || world.now - since >= Duration::from_secs(60));
            (before, since) = (share, world.now);
        }
        assert_eq!(world.runner.weights().0 + world.runner.weights().1, 100);
    }
    let text: Vec<_> = world.runner.rollout.history.iter().map(|e| e.text.as_str()).collect();
    assert_eq!(text.len(), 8, "{text:?}");
}

#[test]
fn people_can_promote_and_abort_at_any_time_and_an_end_is_an_end() {
    for ticks in [0, 1, 5, 400] {
        let mut world = World::new(3, spec());
        world.give(&Event::Located(Ok(())));
        (0..ticks).for_each(|_| world.tick(20.0, GOOD));
        assert!(world.give(&Event::Abort("enough".into())));
        assert_eq!(world.runner.weights(), (100, 0), "at once");
        assert!(world.runner.runs_both(), "what runs there may finish");
        world.candidate.running = 2;
        let (incumbent, candidate) = (world.incumbent.clone(), world.candidate.clone());
        world.give(&Event::Tick(&incumbent, &candidate));
        assert_eq!(world.runner.rollout.stage, Stage::Withdrawing);
        (0..4).for_each(|_| world.tick(20.0, GOOD));
        assert_eq!(world.runner.rollout.stage, Stage::Withdrawn);
        for event in [Event::Promote, Event::Abort("again".into()), Event::Located(Ok(()))] {
            assert!(!world.give(&event), "{event:?}");
        }
        assert_eq!(world.runner.rollout.reason, "enough");
    }
    let mut world = World::new(4, spec());
    world.give(&Event::Located(Ok(())));
    (0..8).for_each(|_| world.tick(0.0, GOOD));
    assert!(world.give(&Event::Promote));
    (0..8).for_each(|_| world.tick(0.0, GOOD));
    assert_eq!(world.runner.rollout.stage, Stage::Promoted);
}

#[test]
fn a_stream_that_never_ends_holds_an_end_up_for_no_longer_than_a_request_may_take() {
    let mut world = World::new(5, spec());
    world.give(&Event::Located(Ok(())));
    (0..400).for_each(|_| world.tick(20.0, GOOD));
    world.give(&Event::Abort("enough".into()));
    let seen = (world.incumbent.clone(), Seen { running: 1, ..world.candidate.clone() });
    world.now += DEADLINES.route;
    world.give(&Event::Tick(&seen.0, &seen.1));
    assert_eq!(world.runner.rollout.stage, Stage::Withdrawing);
    world.now += Duration::from_secs(1);
    world.give(&Event::Tick(&seen.0, &seen.1));
    assert_eq!(world.runner.rollout.stage, Stage::Withdrawn);
}

#[test]
fn what_was_written_down_goes_on_after_a_restart_and_bakes_its_step_anew() {
    let mut world = World::new(6, spec());
    world.give(&Event::Located(Ok(())));
    while world.runner.rollout.stage != (Stage::Baking { step: 1 }) {
        world.tick(50.0, GOOD);
    }
    let json = serde_json::to_string(&world.runner.rollout).unwrap();
    let rollout: Rollout = serde_json::from_str(&json).unwrap();
    assert_eq!(rollout, world.runner.rollout);
    // A new process counts from 0.
    let mut next = World::new(7, spec());
    next.runner = Runner::resume(rollout, next.now);
    next.candidate.ready = 1;
    (0..4 * 50).for_each(|_| next.tick(50.0, GOOD));
    assert_eq!(next.runner.rollout.stage, Stage::Baking { step: 1 });
    (0..4 * 30).for_each(|_| next.tick(50.0, GOOD));
    assert_eq!(next.runner.rollout.stage, Stage::Baking { step: 2 });
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let with = |change: fn(&mut Spec)| {
        let mut spec = spec();
        change(&mut spec);
        spec.check().unwrap_err().to_string()
    };
    assert!(spec().check().is_ok());
    assert!(with(|s| s.steps = vec![]).contains("at least one step"));
    assert!(with(|s| s.steps = vec![50, 25]).contains("[50, 25]"));
    assert!(with(|s| s.steps = vec![5, 101]).contains("0 to 100"));
    assert!(with(|s| s.version = "a b".into()).contains("a b"));
    assert!(with(|s| s.version = String::new()).contains("name"));
    assert!(with(|s| s.replicas = 0).contains("replicas"));
    assert!(with(|s| s.shadow = 101).contains("scored answers"));
    assert!(with(|s| s.thresholds.errors = f64::NAN).contains("errors"));
    assert!(with(|s| s.thresholds.slowdown = -1.0).contains("slowdown"));
}

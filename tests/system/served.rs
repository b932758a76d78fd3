//! `consort train` around parameter servers: workers and servers that are killed or stopped, at random moments; where steps
//! are synchronous the weights are those of one worker without servers.

use std::fs;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;

use crate::train::{Place, STEPS, alive, consort, expected, send, wait};

/// A job around two servers, with these lines in [train] and in [servers].
fn around(steps: u64, train: &str, servers: &str) -> Place {
    Place::with(steps, |job| {
        let job = job.replace("[train]", &format!("[train]\nsync = \"server\"\n{train}"));
        format!("{job}\n[servers]\n{servers}\n")
    })
}

/// A step at which something happens: any one, and which it was is said.
fn some_step(what: &str) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos();
    let step = 3 + u64::from(now / 1000) % (STEPS - 20);
    println!("{what} behind step {step}");
    step
}

fn losses(place: &Place) -> Vec<f64> {
    let steps = place.metrics();
    steps.iter().filter(|r| r["kind"] == "step").filter_map(|r| r["loss"].as_f64()).collect()
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[test]
fn a_job_around_servers_has_the_bits_of_one_without() {
    let expected = expected();
    let place = around(STEPS, "", "claim = 2");
    let ended = place.train(&["--json", "--workers", "2"]).end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    let steps: Vec<u64> =
        place.metrics().iter().filter(|r| r["kind"] == "step").filter_map(|r| r["step"].as_u64()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    let report = fs::read_to_string(place.out().join("report.html")).unwrap();
    assert!(
        report.contains("hidden behind backward")
            && report.contains("2 shards on 2 servers, each with a backup")
    );
    let job = fs::read_to_string(place.job()).unwrap();
    fs::write(place.job(), job.replace("claim = 2", "claim = 1\ncount = 3")).unwrap();
    let again = place.train(&["--json", "--restart", "--workers", "4"]).end();
    assert_eq!(again.weights(), expected, "{}", again.errors);
}

#[test]
fn servers_and_workers_that_are_killed_change_no_bit() {
    let expected = expected();
    let place = around(STEPS, "", "replication = \"sync\"");
    let mut training = place.train(&["--json", "--workers", "2"]);
    let worker = training.pid(1);
    let server = training.process("server 0");
    training.hear("each with a backup");
    place.wait_for_step(some_step("kills server 0"));
    send(server, Signal::KILL);
    training.hear("server 1 has taken over shard");
    send(worker, Signal::KILL);
    assert_ne!(training.pid(1), worker);
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    assert!(!ended.errors.contains("lost with a server"), "{}", ended.errors);
    let report = fs::read_to_string(place.out().join("report.html")).unwrap();
    assert!(report.contains(&format!("worker 1 (process {worker}) was killed")), "{}", ended.errors);
}

/// At any moment between its start and the first steps: before the servers know each other, while they get the first
/// weights, while backups get their copies.
#[test]
fn a_server_that_is_killed_before_the_first_step_is_replaced() {
    let expected = expected();
    let place = around(STEPS, "", "");
    for round in 0..4u64 {
        let mut training = place.train(&["--json", "--workers", "2", "--restart"]);
        let server = training.process(&format!("server {}", round % 2));
        // What happens in between, nobody tells; so this is a time, another one each round and each day.
        let micros =
            u64::from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_micros());
        let pause = Duration::from_millis(round * 60) + Duration::from_micros(micros % 60_000);
        std::thread::sleep(pause);
        send(server, Signal::KILL);
        let ended = training.end();
        assert_eq!(ended.weights(), expected, "killed after {pause:?}\n{}", ended.errors);
    }
}

#[test]
fn what_asynchronous_replication_loses_is_counted_and_computed_again() {
    let expected = expected();
    let place = around(STEPS, "", "replication = \"async\"\nmax_lag = 8");
    let mut training = place.train(&["--json", "--workers", "3"]);
    let server = training.process("server 1");
    training.hear("each with a backup");
    place.wait_for_step(some_step("kills server 1"));
    send(server, Signal::KILL);
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    assert!(ended.errors.contains("(max_lag 8); "), "{}", ended.errors);
}

#[test]
fn a_stopped_server_and_a_stopped_worker_are_passed_over_and_named() {
    let expected = expected();
    let place = around(STEPS, "", "");
    let mut training = place.train(&["--json", "--workers", "2"]);
    let worker = training.pid(0);
    let server = training.process("server 1");
    training.hear("each with a backup");
    place.wait_for_step(4);
    let explained = || {
        let status = consort().args(["train", "status", place.out().to_str().unwrap()]).output().unwrap();
        String::from_utf8_lossy(&status.stdout).into_owned()
    };
    send(worker, Signal::STOP);
    wait("an explanation", || explained().contains(&format!("kill -CONT {worker}")));
    training.hear("worker 0 has fallen silent and the others go on");
    send(worker, Signal::CONT);
    training.hear("worker 0 has joined");
    send(server, Signal::STOP);
    training.hear("server 0 has taken over shard");
    send(server, Signal::CONT);
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
}

/// Servers that hang all at once, as on a machine that swaps, were given up all at once, and the job with them.
#[test]
fn a_job_waits_for_servers_that_all_hang() {
    let expected = expected();
    let place = around(STEPS, "", "");
    let mut training = place.train(&["--json", "--workers", "2"]);
    let servers = ["server 0", "server 1"].map(|server| training.process(server));
    training.hear("each with a backup");
    place.wait_for_step(5);
    servers.iter().for_each(|pid| send(*pid, Signal::STOP));
    training.hear("has taken over shard");
    // The one that is left hangs too.
    let status = || {
        let status = consort().args(["train", "status", place.out().to_str().unwrap()]).output().unwrap();
        String::from_utf8_lossy(&status.stdout).into_owned()
    };
    wait("an explanation", || status().contains("everybody waits for shard"));
    servers.iter().for_each(|pid| send(*pid, Signal::CONT));
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
}

#[test]
fn without_waiting_the_loss_falls_though_processes_die() {
    for servers in ["mode = \"asynchronous\"\nreplication = \"async\"", "mode = \"bounded\"\nstaleness = 2"] {
        let place = around(STEPS, "exact = false", servers);
        let mut training = place.train(&["--json", "--workers", "3"]);
        let worker = training.pid(2);
        let server = training.process("server 0");
        training.hear("each with a backup");
        place.wait_for_step(some_step("kills worker 2 and server 0"));
        send(worker, Signal::KILL);
        send(server, Signal::KILL);
        let ended = training.end();
        let json = ended.json();
        assert_eq!((&json["complete"], &json["step"]), (&true.into(), &STEPS.into()), "{}", ended.errors);
        if servers.contains("bounded") {
            let said = ended.errors.lines().find(|line| line.contains("(staleness 2)"));
            let spread =
                said.and_then(|line| line.split_whitespace().find_map(|word| word.parse::<u64>().ok()));
            assert!(spread.is_some_and(|spread| spread <= 2), "{}", ended.errors);
        }
        let losses = losses(&place);
        let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() - 5..]));
        assert!(losses.len() == STEPS as usize && last < first - 0.3, "{servers}: {first} to {last}");
    }
}

#[test]
fn a_robust_aggregate_is_chosen_in_the_file() {
    let changed = |servers: &str| {
        let place = around(30, "exact = false", servers);
        let job = fs::read_to_string(place.job()).unwrap();
        fs::write(place.job(), job.replace("batch = 8", "batch = 10")).unwrap();
        place
    };
    let place = changed("aggregate = \"krum\"\nwrong = 1");
    let few = place.train(&["--workers", "4"]).end();
    assert_eq!(few.status.code(), Some(2));
    assert!(few.errors.contains("at least 5 workers"), "{}", few.errors);
    let ended = place.train(&["--json", "--workers", "5"]).end();
    assert_eq!(ended.json()["complete"], true, "{}", ended.errors);
    let losses = losses(&place);
    assert!(mean(&losses[25..]) < mean(&losses[..5]) - 0.2, "{losses:?}");
}

#[test]
fn a_job_goes_on_with_servers_or_without() {
    let expected = expected();
    let place = around(STEPS, "", "");
    let with = fs::read_to_string(place.job()).unwrap();
    let (without, _) = with.split_once("[servers]").unwrap();
    let without = without.replace("sync = \"server\"", "sync = \"ring\"");
    for (job, step) in [(with.as_str(), 7), (without.as_str(), 20), (with.as_str(), 33)] {
        fs::write(place.job(), job).unwrap();
        let resume: &[&str] = if step == 7 { &[] } else { &["--resume"] };
        let training = place.train(&[resume, &["--workers", "2"]].concat());
        place.wait_for_step(step);
        training.signal(Signal::INT);
        let stopped = training.end();
        assert!(
            stopped.status.success() && stopped.said.starts_with("stopped behind step "),
            "{}",
            stopped.errors
        );
    }
    fs::write(place.job(), without).unwrap();
    let ended = place.train(&["--json", "--resume", "--workers", "3"]).end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
}

#[test]
fn servers_and_workers_whose_launcher_is_killed_end() {
    let expected = expected();
    let place = around(STEPS, "", "");
    let mut training = place.train(&["--workers", "2"]);
    let mut processes = vec![training.pid(0), training.pid(1)];
    processes.extend(["server 0", "server 1"].map(|server| training.process(server)));
    place.wait_for_step(6);
    training.signal(Signal::KILL);
    training.end();
    wait("their end", || !processes.iter().any(|pid| alive(*pid)));
    let resumed = place.train(&["--json", "--resume"]).end();
    assert_eq!(resumed.weights(), expected, "{}", resumed.errors);
}

#[test]
fn a_job_whose_shard_is_lost_says_how_it_goes_on() {
    let expected = expected();
    let place = around(STEPS, "", "count = 1");
    let mut training = place.train(&["--workers", "2"]);
    let server = training.process("server 0");
    wait("a checkpoint", || place.metrics().iter().any(|r| r["what"] == "checkpoint"));
    send(server, Signal::KILL);
    let ended = training.end();
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended.errors.contains("shard 0 is lost") && ended.errors.contains("--resume"),
        "{}",
        ended.errors
    );
    let resumed = place.train(&["--json", "--resume"]).end();
    assert_eq!(resumed.weights(), expected, "{}", resumed.errors);
}

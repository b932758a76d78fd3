//! `consort train` under the programs that start processes on clusters: the weights are those of one worker.

use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::train::{Place, STEPS, Training, consort, expected, wait};

/// As torchrun sets them for processes on two machines; both are this one.
#[test]
fn torchruns_variables_bring_two_machines_together() {
    let expected = expected();
    let place = Place::new(STEPS);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = |rank: &str| {
        let mut command = consort();
        command.arg("train").arg(place.job()).arg("--json");
        command.envs([
            ("RANK", rank),
            ("LOCAL_RANK", "0"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("TORCHELASTIC_RUN_ID", "none"),
        ]);
        Training::start(command)
    };
    let other = start("1");
    let first = start("0").end();
    assert_eq!(first.weights(), expected, "{}", first.errors);
    let other = other.end();
    assert!(other.status.success(), "{}", other.errors);
}

/// Once it took five minutes: a worker that waited for the others heard of nothing else.
#[test]
fn a_job_that_waits_for_others_ends_when_it_is_told_to() {
    let place = Place::new(STEPS);
    let mut command = consort();
    command.arg("train").arg(place.job());
    // One of two, so that it never begins.
    command.envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "alone")]);
    let mut training = Training::start(command);
    training.pid(0);
    let joining = || {
        let status = std::fs::read_to_string(place.out().join("job/status.json")).unwrap_or_default();
        status.contains("joining")
    };
    wait("the worker's wait", joining);
    training.signal(Signal::INT);
    let ended = training.end();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.errors);
    assert!(ended.errors.contains("stopped before the first step was done"), "{}", ended.errors);
    assert!(!ended.errors.contains("doesn't stop"), "{}", ended.errors);
}

/// As srun sets them for the tasks of a step; the step's number is part of the run's name.
#[test]
fn sruns_variables_bring_four_tasks_together() {
    let expected = expected();
    let place = Place::new(STEPS);
    let start = |task: &str| {
        let mut command = consort();
        command.arg("train").arg(place.job()).arg("--json");
        command.envs([
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", task),
            ("SLURM_NTASKS", "4"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_STEP_TASKS_PER_NODE", "4"),
        ]);
        Training::start(command)
    };
    let others = ["3", "1", "2"].map(start);
    let first = start("0").end();
    assert_eq!(first.weights(), expected, "{}", first.errors);
    for other in others {
        let other = other.end();
        assert!(other.status.success(), "{}", other.errors);
    }
}

#[test]
fn mpirun_starts_four_workers() {
    let expected = expected();
    let place = Place::new(STEPS);
    let found = Command::new("mpirun").arg("--version").output();
    assert!(found.is_ok(), "there is no mpirun (package openmpi-bin); `cargo xtask test` installs it");
    let mut command = Command::new("mpirun");
    // Containers are often root's, and have fewer cores than this test has processes.
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", "4"]);
    command.arg(env!("CARGO_BIN_EXE_consort")).arg("train").arg(place.job()).arg("--json");
    command.stdin(Stdio::null());
    let ended = Training::start(command).end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
    assert!(ended.errors.contains("4 workers have met"), "{}", ended.errors);
}

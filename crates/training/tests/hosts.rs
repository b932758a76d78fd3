//! Workers on hosts that lose each other: each lives in a network namespace of its own, with a virtual cable to a bridge in
//! this one, where the store is. Needs root and iproute2.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "../../collectives/tests/common/network.rs"]
mod network;
mod parallel_support;

use consort_collectives::{Store, StoreOptions, TransportKind};
use consort_training::parallel::{Control, Event, HOST_SETTLE, Membership, Plan, Worker};
use network::{Network, ip};
use parallel_support::process::{self, Orders, Process};
use parallel_support::{PATTERNS, TOKEN, model, plan, trainer};

#[test]
fn worker_process() {
    process::live();
}

/// One of three hosts loses its cable: the others go on without it, over TLS. Plugged in again it comes back by itself as
/// a newcomer, and all three end with the weights of one worker that nothing happened to.
#[test]
fn a_host_whose_cable_is_cut_is_fenced_and_comes_back() {
    let network = Network::new(3);
    let options = StoreOptions { settle: HOST_SETTLE, ..StoreOptions::new(3) };
    let store = Store::listen(&format!("{}:0", network.address(254)), TOKEN, options).unwrap();
    let plan = Plan { steps: 148, ..plan() };
    let mut all: Vec<Process> = (0..3)
        .map(|host| {
            Process::start(&Orders {
                store: store.address().to_string(),
                kind: TransportKind::Tls,
                plan: plan.clone(),
                pause_us: 10_000,
                checkpoints: None,
                resume: false,
                namespace: Some(network.space(host)),
                place: None,
            })
        })
        .collect();
    assert!(all[2].wait(|event| matches!(event, Event::Step(step) if step.step >= 5)).is_some());
    ip(&format!("link set {} down", network.cable(2)));
    let without = all[0].wait(|event| matches!(event, Event::Started { workers: 2, .. }));
    let Some(Event::Started { took_us, .. }) = without else { panic!("{:?}", all[0].failed) };
    println!("{:.0} ms from noticing to standing again", took_us as f64 / 1e3);
    ip(&format!("link set {} up", network.cable(2)));
    let with = all[0].wait(|event| matches!(event, Event::Started { workers: 3, .. }));
    assert!(with.is_some(), "it didn't come back: {:?}", all[0].failed);
    let alone = Worker::new(trainer(&model(), 0.1, 1), &PATTERNS, plan, Membership::Alone, None).unwrap();
    let want = alone.run(&mut |_| Control::Go).unwrap();
    for worker in &mut all {
        assert_eq!(worker.end().as_ref(), Some(&want), "{:?}", worker.failed);
    }
}

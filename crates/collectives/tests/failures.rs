//! What happens to the others when a process dies, stops, lies or is a stranger. Ranks are real processes: this test
//! starts itself again ([`common::worker`]).

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod common;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::worker::{Worker, clock_us};
use common::{KINDS, TOKEN, options, store, world};
use consort_collectives::{Algorithm, Error, Group, JoinOptions, ReduceOp, TransportKind};

#[test]
fn worker_process() {
    common::worker::live();
}

/// Four workers reduce; one gets a signal; three must fail naming it, form an epoch of three, and add.
fn one_of_four(kind: TransportKind, signal: &str) {
    let store = store(4);
    // Two and two, where that makes a difference.
    let host = |rank: usize| (kind == TransportKind::Mixed).then_some(rank / 2);
    let mut workers: Vec<Worker> = (0..4)
        .map(|rank| Worker::on_host(&store.address().to_string(), Some(kind), None, host(rank)))
        .collect();
    let ranks: Vec<usize> =
        workers.iter_mut().map(|w| w.says("joined").split(' ').next().unwrap().parse().unwrap()).collect();
    // They are in the middle of reducing: any moment will do, and each run takes another one.
    let victim = 2;
    let struck = clock_us();
    workers[victim].signal(signal);
    let mut slowest = 0;
    for (index, worker) in workers.iter_mut().enumerate() {
        if index == victim {
            continue;
        }
        let words = worker.says("failed");
        let (at, rest) = words.split_once(' ').unwrap();
        slowest = slowest.max(at.parse::<u128>().unwrap() - struck);
        assert!(rest.starts_with(&format!("Some({})", ranks[victim])), "{rest}");
        assert!(rest.contains("all_reduce (sum) of 200000 f32") && rest.contains("call "), "{rest}");
        assert!(rest.contains(&format!("rank {} of epoch 1", ranks[index])), "{rest}");
    }
    println!("{} kill {signal}: error on all three after {:.1} ms", kind.name(), slowest as f64 / 1e3);
    for (index, worker) in workers.iter_mut().enumerate() {
        if index != victim {
            assert_eq!(worker.says("reformed"), "2 3 3");
        }
    }
    // The speed is printed, not judged; this only says that nobody waited for the call's deadline of a minute.
    assert!(slowest < 20_000_000);
}

#[test]
fn a_killed_process_is_an_error_on_all_ranks_and_the_rest_goes_on_over_shared_memory() {
    one_of_four(KINDS[0], "-KILL");
}

#[test]
fn a_killed_process_is_an_error_on_all_ranks_and_the_rest_goes_on_over_tcp() {
    one_of_four(KINDS[1], "-KILL");
}

#[test]
fn a_stopped_process_is_an_error_by_the_deadline_and_is_fenced_over_shared_memory() {
    one_of_four(KINDS[0], "-STOP");
}

#[test]
fn a_stopped_process_is_an_error_by_the_deadline_and_is_fenced_over_tcp() {
    one_of_four(KINDS[1], "-STOP");
}

#[test]
fn a_killed_process_is_an_error_on_all_ranks_and_the_rest_goes_on_over_tls() {
    one_of_four(KINDS[2], "-KILL");
}

#[test]
fn a_killed_process_is_an_error_on_all_ranks_and_the_rest_goes_on_over_memory_and_tls() {
    one_of_four(KINDS[3], "-KILL");
}

#[test]
fn a_stopped_process_is_an_error_by_the_deadline_and_is_fenced_over_memory_and_tls() {
    one_of_four(KINDS[3], "-STOP");
}

#[test]
fn different_calls_are_told_apart_on_every_rank() {
    for kind in KINDS {
        let said = world(kind, 3, |mut group| {
            let mut buffer = [0f32; 40];
            let len = if group.rank() == 1 { 39 } else { 40 };
            group.all_reduce(&mut buffer[..len], ReduceOp::Sum).unwrap_err()
        });
        assert!(said.iter().any(|e| matches!(e, Error::Mismatch { .. })), "{said:?}");
        for error in &said {
            let text = error.to_string();
            assert!(text.contains("of 39 f32") && text.contains("of 40 f32"), "{text}");
        }
        let said = world(kind, 4, |mut group| {
            let mut buffer = [0f32; 40];
            let called = match group.rank() {
                2 => group.broadcast(&mut buffer, 2),
                _ => group.all_reduce(&mut buffer, ReduceOp::Sum),
            };
            // A root that has sent everything is done before anyone can object; it learns of it in its next call.
            called.and_then(|()| group.barrier()).unwrap_err()
        });
        for error in &said {
            let text = error.to_string();
            assert!(text.contains("broadcast from root 2") && text.contains("all_reduce (sum)"), "{text}");
        }
    }
}

/// What one rank shares with all lies where those who wait for it over the ring of a pair don't read. The root's call is
/// over before anyone objects, and it makes no other.
#[test]
fn a_shared_broadcast_is_found_by_those_who_wait_for_something_else() {
    for kind in KINDS {
        let said = world(kind, 4, |mut group| {
            let mut buffer = [0f32; 40];
            if group.rank() != 2 {
                group.set_algorithm(Some(Algorithm::Ring));
                return group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap_err();
            }
            group.set_algorithm(Some(Algorithm::OneShot));
            group.broadcast(&mut buffer, 2).unwrap();
            eventually("the others to object", || group.fault())
        });
        for error in &said {
            let text = error.to_string();
            assert!(
                text.contains("broadcast from root 2") && text.contains("all_reduce (sum)"),
                "{kind:?}: {text}"
            );
        }
    }
}

/// Sub-groups and pairs go on over rings of their own while the whole group shares, in any order and for any length.
#[test]
fn what_is_shared_and_what_goes_to_one_rank_do_not_hold_each_other_up() {
    world(KINDS[0], 5, |mut group| {
        group.set_algorithm(Some(Algorithm::OneShot));
        let (rank, n) = (group.rank(), group.world_size());
        let mut some = group.subgroup(&[3, 1, 4]).unwrap();
        let mut all_again = group.subgroup(&[4, 3, 2, 1, 0]).unwrap().unwrap();
        all_again.set_algorithm(Some(Algorithm::OneShot));
        for count in [0, 1, 63, 1000, 300_001, 7, 600_000] {
            let root = count % n;
            let mut buffer = vec![rank as i32; count];
            group.broadcast(&mut buffer, root).unwrap();
            assert!(buffer.iter().all(|x| *x == root as i32));
            if let Some(some) = &mut some {
                let mut sum = [rank as i32, count as i32];
                some.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                assert_eq!(sum, [8, 3 * count as i32]);
            }
            if rank == 0 {
                group.send(&buffer_of(count), 2).unwrap();
            } else if rank == 2 {
                let mut got = vec![0u8; count];
                group.recv(&mut got, 0).unwrap();
                assert_eq!(got, buffer_of(count));
            }
            let mut parts = vec![0i32; n * 100];
            parts[all_again.rank() * 100..][..100].fill(rank as i32 + 1);
            all_again.all_gather(&mut parts).unwrap();
            assert!((0..n * 100).all(|i| parts[i] == (n - i / 100) as i32));
        }
    });
}

fn buffer_of(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_rank_that_does_not_call_costs_its_deadline_and_is_named() {
    for kind in KINDS {
        let said = world(kind, 3, |mut group| {
            group.set_deadline(Duration::from_millis(150));
            let (done, wait) = (group.rank() == 1, Duration::from_millis(600));
            if done {
                // It computes for too long: no event ends that but time.
                std::thread::sleep(wait);
                return None;
            }
            Some(group.barrier().unwrap_err().to_string())
        });
        for text in said.into_iter().flatten() {
            assert!(
                text.contains("rank 1 (alive, not waiting in a call)") || text.contains("gave up"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_rank_that_leaves_is_lost_to_those_who_still_need_it_and_to_nobody_else() {
    for kind in KINDS {
        world(kind, 3, |mut group| {
            let mut buffer = [group.rank() as i32; 50_000];
            group.broadcast(&mut buffer, 0).unwrap();
            assert_eq!(buffer[49_999], 0, "what the root left behind still arrives");
            if group.rank() == 0 {
                return;
            }
            let error = group.barrier().unwrap_err();
            assert_eq!(error.lost_rank(), Some(0), "{error}");
        });
    }
}

#[test]
fn strangers_and_garbage_are_refused_and_the_job_goes_on() {
    let store = store(2);
    let address = store.address();
    let wrong = JoinOptions {
        join_deadline: Duration::from_secs(10),
        ..JoinOptions::new(address.to_string(), b"guess")
    };
    let refused = Group::join(wrong).unwrap_err();
    assert!(matches!(&refused, Error::Refused { what, .. } if what.contains("token")), "{refused}");
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096], b"CSC1\x01\0\0\0short"] {
        let mut stream = TcpStream::connect(address).unwrap();
        // The store may hang up in the middle of it.
        let _ = stream.write_all(garbage);
    }
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut group = Group::join(options(&store, TransportKind::Tcp)).unwrap();
                group.barrier().unwrap();
            });
        }
    });
}

/// Three hundred connections that say nothing take every place for strangers. Members wait until those are thrown out,
/// and the process has no thread for each of the crowd.
#[test]
fn a_flood_delays_members_and_takes_no_memory() {
    let store = store(2);
    let crowd: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(store.address()).unwrap()).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut group = Group::join(options(&store, TransportKind::Tls)).unwrap();
                group.barrier().unwrap();
            });
        }
        let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        assert!(threads < 200, "{threads} threads");
    });
    drop(crowd);
}

/// Waits for something that another process does and that only looking shows.
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Those who run hear of a newcomer without calling anything, and later that the store is gone; a rejoin then says so at
/// once instead of waiting for a store that may still come.
#[test]
fn rank_0_hears_of_newcomers_and_everyone_of_the_end_of_the_store() {
    let store = store(1);
    let mut first = Group::join(options(&store, KINDS[0])).unwrap();
    assert_eq!(first.newcomers().unwrap(), 0);
    assert!(first.fault().is_none());
    let (mut first, mut second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| Group::join(options(&store, KINDS[0])).unwrap());
        eventually("a newcomer", || first.newcomers().ok().filter(|count| *count == 1));
        let first = first.rejoin().unwrap();
        (first, second.join().unwrap())
    });
    assert_eq!((first.rank(), second.rank(), second.world_size()), (0, 1, 2));
    assert_eq!((first.newcomers().unwrap(), second.newcomers().unwrap()), (0, 0));
    drop(store);
    for group in [&mut first, &mut second] {
        let error = eventually("the end of the store", || group.newcomers().err());
        assert!(matches!(error, Error::StoreGone { .. }), "{error}");
    }
    let started = Instant::now();
    drop(second);
    let left = eventually("that its peer left", || first.barrier().err());
    assert_eq!(left.lost_rank(), Some(1), "{left}");
    assert!(first.fault().is_some());
    assert!(matches!(first.rejoin().unwrap_err(), Error::StoreGone { .. }));
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn nobody_comes_and_the_wait_ends() {
    let store = store(2);
    let limit = Duration::from_millis(200);
    let alone = JoinOptions { join_deadline: limit, ..JoinOptions::new(store.address().to_string(), TOKEN) };
    let started = Instant::now();
    assert!(matches!(Group::join(alone.clone()).unwrap_err(), Error::Rendezvous { .. }));
    drop(store);
    assert!(matches!(Group::join(alone).unwrap_err(), Error::Rendezvous { .. } | Error::Refused { .. }));
    assert!(started.elapsed() < Duration::from_secs(30));
}

/// Passes connections on to `target`, each after `delay`: a machine on which everything takes its time. It runs until the
/// test binary ends.
fn slow_road(target: SocketAddr, delay: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                std::thread::sleep(delay);
                let Ok(far) = TcpStream::connect(target) else { return };
                let (mut a, mut b) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let back = std::thread::spawn(move || {
                    let _ = std::io::copy(&mut b, &mut a);
                    let _ = a.shutdown(std::net::Shutdown::Both);
                });
                let (mut near, mut far) = (near, far);
                let _ = std::io::copy(&mut near, &mut far);
                let _ = far.shutdown(std::net::Shutdown::Both);
                let _ = back.join();
            });
        }
    });
    address
}

/// On a machine that others kept busy, connecting took longer than the half second that an epoch was given, and every
/// attempt was given the same: for minutes none came to stand. Here three connections take 0.3 s each.
#[test]
fn members_that_connect_slowly_are_given_longer_until_they_stand() {
    let store = store(2);
    let join = |rank: u16| {
        // A port that is free now; the members of this test alone listen there, again for each attempt.
        let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let advertise = Some(slow_road(listen, Duration::from_millis(300)).to_string());
        let silence = Duration::from_millis(400);
        let name = Some(format!("host {rank}"));
        let options =
            JoinOptions { silence, listen: Some(listen), advertise, host: name, ..options(&store, KINDS[2]) };
        move || {
            let mut group = Group::join(options).unwrap();
            let mut one = [1i32];
            group.all_reduce(&mut one, ReduceOp::Sum).unwrap();
            (group.epoch(), one[0])
        }
    };
    let (first, second) = (std::thread::spawn(join(0)), std::thread::spawn(join(1)));
    let (first, second) = (first.join().unwrap(), second.join().unwrap());
    assert_eq!(first, second);
    assert!(first.0 > 1, "the first attempt is over before three connections can be made");
    assert_eq!(first.1, 2);
}

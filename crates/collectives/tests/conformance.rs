//! One suite for every transport, algorithm, world size, length and type: what each operation must leave in whose
//! buffer, and that every rank has the same bits.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{KINDS, world, world_on};
use consort_base::Philox;
use consort_collectives::{
    Algorithm, Error, Group, JoinOptions, Operation, Queue, Reduce, ReduceOp, TransportKind, chunk,
};
use half::{bf16, f16};

const LENGTHS: [usize; 5] = [0, 1, 17, 2_999, 150_001];

/// A type with a reference: small integers, whose sums are exact in every type, or anything for the equality of bits.
trait Number: Reduce + PartialEq + std::fmt::Debug {
    fn small(value: i32) -> Self;
    fn any(random: u32) -> Self;
    fn bits(self) -> u32;
}

macro_rules! number {
    ($t:ty, $small:expr, $any:expr, $bits:expr) => {
        impl Number for $t {
            fn small(value: i32) -> Self {
                $small(value)
            }
            fn any(random: u32) -> Self {
                $any(random)
            }
            fn bits(self) -> u32 {
                $bits(self)
            }
        }
    };
}
number!(f32, |v| v as f32, f32::from_bits, f32::to_bits);
number!(bf16, |v| bf16::from_f32(v as f32), |r: u32| bf16::from_bits(r as u16), |x: bf16| u32::from(
    x.to_bits()
));
number!(f16, |v| f16::from_f32(v as f32), |r: u32| f16::from_bits(r as u16), |x: f16| u32::from(x.to_bits()));
number!(i64, i64::from, |r: u32| i64::from(r) << 31 | i64::from(r), |x: i64| x as u32 ^ (x >> 32) as u32);
number!(i32, |v| v, |r| r as i32, |x| x as u32);

/// Element `i` of rank `rank`: small enough that nine of them add without rounding even in bf16.
fn element(rank: usize, i: usize) -> i32 {
    ((rank * 7 + i * 3) % 25) as i32 - 12
}

fn vector<T: Number>(rank: usize, count: usize) -> Vec<T> {
    (0..count).map(|i| T::small(element(rank, i))).collect()
}

fn expected<T: Number>(n: usize, count: usize, op: ReduceOp) -> Vec<T> {
    (0..count)
        .map(|i| {
            let all = (0..n).map(|rank| element(rank, i));
            T::small(if op == ReduceOp::Sum { all.sum() } else { all.max().unwrap() })
        })
        .collect()
}

fn reductions<T: Number>(group: &mut Group) {
    let (rank, n) = (group.rank(), group.world_size());
    for algorithm in Algorithm::ALL.map(Some).into_iter().chain([None]) {
        group.set_algorithm(algorithm);
        for count in LENGTHS {
            for op in [ReduceOp::Sum, ReduceOp::Max] {
                let what = format!("{algorithm:?} {op:?} of {count} on rank {rank} of {n}");
                let mut buffer = vector::<T>(rank, count);
                group.all_reduce(&mut buffer, op).unwrap();
                assert!(buffer == expected::<T>(n, count, op), "all_reduce {what}");
                let mut buffer = vector::<T>(rank, count);
                let mine = group.reduce_scatter(&mut buffer, op).unwrap();
                assert_eq!(mine, chunk(count, n, rank));
                assert!(buffer[mine.clone()] == expected::<T>(n, count, op)[mine], "reduce_scatter {what}");
            }
        }
    }
    group.set_algorithm(None);
}

fn suite(kind: TransportKind, check: fn(&mut Group)) {
    for n in 1..=9 {
        world_on(kind, &layout(kind, n), |mut group| {
            assert_eq!(group.transport(), kind);
            check(&mut group);
            group.barrier().unwrap();
        });
    }
}

/// Which host each of `n` ranks is on. Memory is one host's; elsewhere there are one, two or three, with different numbers
/// of ranks.
fn layout(kind: TransportKind, n: usize) -> Vec<usize> {
    (0..n).map(|i| if kind == TransportKind::SharedMemory { 0 } else { i * i % (1 + n % 3) }).collect()
}

macro_rules! on_every_transport {
    ($($name:ident: $check:expr;)*) => {$(
        mod $name {
            #[test]
            fn shared_memory() {
                super::suite(super::KINDS[0], $check);
            }
            #[test]
            fn tcp() {
                super::suite(super::KINDS[1], $check);
            }
            #[test]
            fn tls() {
                super::suite(super::KINDS[2], $check);
            }
            #[test]
            fn memory_and_tls() {
                super::suite(super::KINDS[3], $check);
            }
        }
    )*};
}

on_every_transport! {
    reduces_f32: super::reductions::<f32>;
    reduces_bf16: super::reductions::<super::bf16>;
    reduces_f16: super::reductions::<super::f16>;
    reduces_i32: super::reductions::<i32>;
    reduces_i64: super::reductions::<i64>;
    gives_every_rank_the_same_bits: super::same_bits;
    moves: super::moves;
    runs_subgroups: super::subgroups;
}

/// Numbers whose sums round, overflow and are none: every rank must hold what rank 0 holds, and a second call the same.
fn same_bits(group: &mut Group) {
    fn check<T: Number>(group: &mut Group) {
        let count = 4_001;
        for algorithm in Algorithm::ALL {
            group.set_algorithm(Some(algorithm));
            for op in [ReduceOp::Sum, ReduceOp::Max] {
                let mut random = Philox::new(group.rank() as u64, 1);
                let input: Vec<T> = (0..count).map(|_| T::any(random.next_u32())).collect();
                let mut runs = [input.clone(), input];
                for run in &mut runs {
                    group.all_reduce(run, op).unwrap();
                }
                let bits = runs.map(|run| run.into_iter().map(|x| x.bits() as i32).collect::<Vec<_>>());
                assert!(bits[0] == bits[1], "{algorithm:?} {op:?}: two calls, two results");
                let mut root = bits[0].clone();
                group.broadcast(&mut root, 0).unwrap();
                assert!(bits[0] == root, "{algorithm:?} {op:?}: rank {} differs from rank 0", group.rank());
            }
        }
        group.set_algorithm(None);
    }
    check::<f32>(group);
    check::<bf16>(group);
    check::<f16>(group);
    check::<i32>(group);
    check::<i64>(group);
}

fn moves(group: &mut Group) {
    let (rank, n) = (group.rank(), group.world_size());
    let value = |rank: usize, i: usize| (rank * 1_000_003 + i) as u64;
    for algorithm in Algorithm::ALL.map(Some).into_iter().chain([None]) {
        group.set_algorithm(algorithm);
        for count in LENGTHS {
            let mine = chunk(count, n, rank);
            let mut buffer = vec![0u64; count];
            mine.for_each(|i| buffer[i] = value(rank, i));
            group.all_gather(&mut buffer).unwrap();
            for owner in 0..n {
                chunk(count, n, owner).for_each(|i| assert_eq!(buffer[i], value(owner, i)));
            }
            for root in [0, n - 1, n / 2] {
                let mut buffer: Vec<u64> = (0..count).map(|i| value(rank, i)).collect();
                group.broadcast(&mut buffer, root).unwrap();
                assert!(buffer.iter().enumerate().all(|(i, x)| *x == value(root, i)));
            }
        }
        // Uneven parts, some of them empty: rank r has r²  elements, and rank 1 none.
        let counts: Vec<usize> = (0..n).map(|r| if r == 1 { 0 } else { 3 * r * r + 5 }).collect();
        let total = counts.iter().sum();
        let start: usize = counts[..rank].iter().sum();
        let mine: Vec<u64> = (0..counts[rank]).map(|i| value(rank, i)).collect();
        let all: Vec<u64> = (0..n).flat_map(|r| (0..counts[r]).map(move |i| value(r, i))).collect();
        let mut buffer = vec![0u64; total];
        buffer[start..start + mine.len()].copy_from_slice(&mine);
        group.all_gather_uneven(&mut buffer, &counts).unwrap();
        assert_eq!(buffer, all);
        for root in [0, n - 1] {
            let mut gathered = vec![0; if rank == root { total } else { 0 }];
            group.gather(&mine, &counts, &mut gathered, root).unwrap();
            assert!(rank != root || gathered == all);
            let mut part = vec![0; counts[rank]];
            let input = if rank == root { &all[..] } else { &[] };
            group.scatter(input, &counts, &mut part, root).unwrap();
            assert_eq!(part, mine);
        }
    }
    group.set_algorithm(None);
    // From i to j go i + 2j elements of value (i, j).
    let sends: Vec<usize> = (0..n).map(|j| rank + 2 * j).collect();
    let recvs: Vec<usize> = (0..n).map(|i| i + 2 * rank).collect();
    let input: Vec<u64> = (0..n).flat_map(|j| vec![value(rank, j); sends[j]]).collect();
    let mut output = vec![0; recvs.iter().sum()];
    group.all_to_all_uneven(&input, &sends, &mut output, &recvs).unwrap();
    assert_eq!(output, (0..n).flat_map(|i| vec![value(i, rank); recvs[i]]).collect::<Vec<_>>());
    let mut output = vec![0; n * 40_000];
    let input: Vec<u64> = (0..n * 40_000).map(|i| value(rank, i)).collect();
    group.all_to_all(&input, &mut output).unwrap();
    assert!((0..n * 40_000).all(|i| output[i] == value(i / 40_000, rank * 40_000 + i % 40_000)));
    // A ring of single messages, more than a buffer holds.
    if n > 1 {
        let mut got = vec![0u64; 100_000];
        let given = vec![rank as u64; 100_000];
        let (next, before) = ((rank + 1) % n, (rank + n - 1) % n);
        if rank == 0 {
            group.send(&given, next).unwrap();
            group.recv(&mut got, before).unwrap();
        } else {
            group.recv(&mut got, before).unwrap();
            group.send(&given, next).unwrap();
        }
        assert!(got.iter().all(|x| *x == before as u64));
    }
}

fn subgroups(group: &mut Group) {
    let (rank, n) = (group.rank(), group.world_size());
    let odd: Vec<usize> = (0..n).rev().filter(|r| r % 2 == 1).collect();
    let even: Vec<usize> = (0..n).filter(|r| r % 2 == 0).collect();
    let mine = if rank % 2 == 1 { &odd } else { &even };
    let odds = group.subgroup(&odd).unwrap();
    let evens = group.subgroup(&even).unwrap();
    let mut sub = odds.or(evens).unwrap();
    assert_eq!((sub.world_size(), mine[sub.rank()]), (mine.len(), rank));
    for round in 0..20 {
        let mut sum = vec![rank as f32; 1 + round * 100];
        sub.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum[0], mine.iter().sum::<usize>() as f32);
        let mut whole = [rank as i32; 3];
        group.all_reduce(&mut whole, ReduceOp::Max).unwrap();
        assert_eq!(whole[2], n as i32 - 1);
    }
    assert!(matches!(sub.rejoin(), Err(Error::Invalid { .. })));
}

/// Vectors that no buffer between two ranks holds, and chunks so long that shared memory copies them past the caches.
#[test]
fn vectors_longer_than_every_buffer() {
    const COUNT: usize = 1_700_003;
    for kind in KINDS {
        for n in [2, 3, 5] {
            world_on(kind, &layout(kind, n), |mut group| {
                let mut random = Philox::new(group.rank() as u64, 2);
                let input: Vec<i32> = (0..COUNT).map(|_| random.next_u32() as i32).collect();
                // Integers add up to the same whatever the order: every algorithm is held against the first.
                let mut first: Option<Vec<i32>> = None;
                for algorithm in Algorithm::ALL {
                    group.set_algorithm(Some(algorithm));
                    let mut buffer = input.clone();
                    group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
                    assert!(
                        first.get_or_insert_with(|| buffer.clone()) == &buffer,
                        "{kind:?} {algorithm:?} of {n}"
                    );
                }
                let mut root = first.clone().unwrap();
                group.broadcast(&mut root, n - 1).unwrap();
                assert!(first.unwrap() == root, "{kind:?}: ranks differ");
                let mut sum = input[0];
                let mut all = vec![0; n];
                all[group.rank()] = sum;
                group.all_gather(&mut all).unwrap();
                sum = all.iter().fold(0, |a, b| a.wrapping_add(*b));
                assert_eq!(sum, root[0]);
            });
        }
    }
}

/// Nobody names a transport: what members can do together decides.
#[test]
fn ranks_that_share_a_host_share_memory() {
    for (hosts, kind) in [
        (&[0, 0, 0][..], TransportKind::SharedMemory),
        (&[0, 1, 2], TransportKind::Tls),
        (&[0, 1, 1], TransportKind::Mixed),
        (&[0, 0, 1, 2, 1], TransportKind::Mixed),
    ] {
        let store = common::store(hosts.len());
        std::thread::scope(|scope| {
            for host in hosts {
                let options = JoinOptions {
                    transport: None,
                    host: Some(host.to_string()),
                    ..common::options(&store, kind)
                };
                scope.spawn(move || {
                    let mut group = Group::join(options).unwrap();
                    assert_eq!(group.transport(), kind);
                    let together =
                        group.hosts().iter().filter(|h| **h == group.hosts()[group.rank()]).count();
                    assert_eq!(together, hosts.iter().filter(|other| *other == host).count());
                    let mut all = vec![1i32; 100_000];
                    group.all_reduce(&mut all, ReduceOp::Sum).unwrap();
                    assert_eq!(all[99_999] as usize, hosts.len());
                });
            }
        });
    }
}

#[test]
fn calls_in_the_background_run_in_order_and_give_buffers_back() {
    for kind in KINDS {
        world(kind, 3, |group| {
            let queue = Queue::new(group, 4).unwrap();
            let pending: Vec<_> =
                (1..=12).map(|i| queue.all_reduce(vec![i as f32; i * 1000], ReduceOp::Sum)).collect();
            for (i, pending) in (1..=12).zip(pending) {
                let buffer = pending.wait().unwrap();
                assert!(buffer.len() == i * 1000 && buffer.iter().all(|x| *x == 3.0 * i as f32));
            }
            let group = queue.into_group().unwrap();
            assert_eq!(group.sequence(), 12);
        });
    }
}

#[test]
fn wrong_arguments_are_named_and_cost_nothing() {
    world(KINDS[0], 2, |mut group| {
        let mut two = [0f32; 2];
        let said = [
            group.broadcast(&mut two, 2).unwrap_err(),
            group.send(&two, group.rank()).unwrap_err(),
            group.all_to_all(&[1u8; 3], &mut [0; 3]).unwrap_err(),
            group.gather(&two, &[2, 2, 2], &mut [], 0).unwrap_err(),
            group.all_gather_uneven(&mut two, &[usize::MAX, 3]).unwrap_err(),
            group.subgroup(&[0, 0]).unwrap_err(),
        ];
        assert!(said.iter().all(|e| matches!(e, Error::Invalid { .. })), "{said:?}");
        assert_eq!(said[0].to_string(), "root 2 of a group of 2: it has 0 to 1");
        group.all_reduce(&mut two, ReduceOp::Sum).unwrap();
    });
    assert!(Algorithm::of(Operation::AllReduce).contains(&Algorithm::by_name("halving_doubling").unwrap()));
}

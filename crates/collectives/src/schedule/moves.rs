//! Operations that move bytes and add nothing.
//!
//! Parts may be uneven: `offsets` has one entry a rank and one more, in bytes.

use super::all_reduce::{binomial, ring};
use super::hierarchical::{Part, hierarchical};
use super::{Action, Algorithm, Region, Shape, Span, Step};

fn part(region: Region, offsets: &[usize], rank: usize) -> Span {
    Span { region, start: offsets[rank], len: offsets[rank + 1] - offsets[rank] }
}

/// Part `rank` of the main buffer goes to everyone. `offsets` of `None` divides the vector evenly.
pub fn all_gather(algorithm: Algorithm, shape: Shape<'_>, offsets: Option<&[usize]>) -> Vec<Step> {
    let n = shape.world_size;
    let mut steps = Vec::new();
    if n < 2 {
        return steps;
    }
    let span = |rank: usize| match offsets {
        Some(offsets) => part(Region::Main, offsets, rank % n),
        None => shape.chunk(rank),
    };
    match algorithm {
        Algorithm::OneShot => {
            shape.give_all(span(shape.rank), &mut steps);
            for distance in 1..n {
                let from = shape.before(distance);
                steps.push(Step { action: shape.take(from), span: span(from) });
            }
        }
        Algorithm::Hierarchical => hierarchical(shape, Part::Gather, &span, &mut steps),
        _ => ring(shape, n - 1..2 * (n - 1), &span, &mut steps),
    }
    steps
}

/// The root's main buffer goes to everyone: along a chain (ring), a binomial tree, or straight (one-shot).
pub fn broadcast(algorithm: Algorithm, shape: Shape<'_>, root: usize) -> Vec<Step> {
    let n = shape.world_size;
    let whole = shape.whole();
    // Ranks are numbered from the root on, host by host: a chain enters each host once.
    let host = |rank: &usize| shape.hosts.get(*rank).copied().unwrap_or(0);
    let mut order: Vec<usize> = (0..n).map(|distance| (root + distance) % n).collect();
    order.sort_by_key(|rank| (host(rank) != host(&root), host(rank)));
    let number = order.iter().position(|rank| *rank == shape.rank).unwrap_or(0);
    let real = |number: usize| order[number];
    if algorithm == Algorithm::OneShot && shape.shares_with_all() {
        let action = if shape.rank == root { Action::Share } else { Action::Take(root) };
        return vec![Step { action, span: whole }];
    }
    let (parent, children) = match algorithm {
        Algorithm::Ring => {
            (number.checked_sub(1), (number + 1 < n).then_some(number + 1).into_iter().collect())
        }
        Algorithm::OneShot if number == 0 => (None, (1..n).collect()),
        Algorithm::OneShot => (Some(0), Vec::new()),
        _ => {
            let (parent, mut children) = binomial(number, n);
            children.reverse();
            (parent, children)
        }
    };
    let mut steps = Vec::new();
    if let Some(parent) = parent {
        steps.push(Step { action: Action::Recv(real(parent)), span: whole });
    }
    steps.extend(children.into_iter().map(|child| Step { action: Action::Send(real(child)), span: whole }));
    steps
}

/// Part j of the source goes to rank j, into its part `rank` of the main buffer.
pub fn all_to_all(shape: Shape<'_>, send_offsets: &[usize], recv_offsets: &[usize]) -> Vec<Step> {
    let Shape { rank, world_size, .. } = shape;
    let mut steps = Vec::new();
    for distance in 1..world_size {
        let to = shape.after(distance);
        steps.push(Step { action: Action::Send(to), span: part(Region::Source, send_offsets, to) });
    }
    for distance in 1..world_size {
        let from = shape.before(distance);
        steps.push(Step { action: Action::Recv(from), span: part(Region::Main, recv_offsets, from) });
    }
    steps.push(Step {
        action: Action::Copy(part(Region::Source, send_offsets, rank)),
        span: part(Region::Main, recv_offsets, rank),
    });
    steps
}

/// Everyone's source comes to the root's main buffer.
pub fn gather(shape: Shape<'_>, root: usize, offsets: &[usize]) -> Vec<Step> {
    let len = offsets[shape.rank + 1] - offsets[shape.rank];
    let own = Span { region: Region::Source, start: 0, len };
    if shape.rank != root {
        return vec![Step { action: Action::Send(root), span: own }];
    }
    (0..shape.world_size)
        .map(|from| {
            let action = if from == root { Action::Copy(own) } else { Action::Recv(from) };
            Step { action, span: part(Region::Main, offsets, from) }
        })
        .collect()
}

/// Part j of the root's source goes to rank j's main buffer.
pub fn scatter(shape: Shape<'_>, root: usize, offsets: &[usize]) -> Vec<Step> {
    let len = offsets[shape.rank + 1] - offsets[shape.rank];
    let own = Span { region: Region::Main, start: 0, len };
    if shape.rank != root {
        return vec![Step { action: Action::Recv(root), span: own }];
    }
    (0..shape.world_size)
        .map(|to| {
            let span = part(Region::Source, offsets, to);
            if to == root {
                Step { action: Action::Copy(span), span: own }
            } else {
                Step { action: Action::Send(to), span }
            }
        })
        .collect()
}

/// One rank's half of a send/recv: the sender reads its source, the receiver fills its main buffer.
pub fn pair(shape: Shape<'_>, from: usize, to: usize, bytes: usize) -> Vec<Step> {
    let (action, region) = if shape.rank == from {
        (Action::Send(to), Region::Source)
    } else {
        (Action::Recv(from), Region::Main)
    };
    vec![Step { action, span: Span { region, start: 0, len: bytes } }]
}

/// Dissemination (Hensgen, Finkel & Manber 1988): in round k every rank tells the one 2^k further. One byte of scratch
/// links the rounds: a round's send waits for the receipt before it.
pub fn barrier(shape: Shape<'_>) -> Vec<Step> {
    let token = Span { region: Region::Scratch, start: 0, len: 1 };
    let mut steps = Vec::new();
    let mut distance = 1;
    while distance < shape.world_size {
        steps.push(Step { action: Action::Send(shape.after(distance)), span: token });
        steps.push(Step { action: Action::Recv(shape.before(distance)), span: token });
        distance *= 2;
    }
    steps
}

//! Reductions: ring, halving and doubling, tree, one-shot, direct; the hierarchical one has a file of its own.
//!
//! With n ranks and a vector of b bytes, each rank sends: ring, halving and direct 2·(n−1)/n·b, tree b to 2·b (log n at the
//! root), one-shot (n−1)·b. The order of additions of each is given where its steps are made; it depends on nothing
//! but the world size and the element's place, so a repeated call gives the same bits.
//!
//! None of them shares ([`Action::Share`]), though the sum of `direct` and what `one_shot` hands out go to everyone. It was
//! tried among four ranks in shared memory: short vectors took as long, and long ones up to a fifth longer where nothing
//! else ran, since they are at the memory's speed already and the rings of both kinds crowd the last cache; only where
//! other programs took half of the machine it was a sixth faster.

use std::ops::Range;

use super::hierarchical::{Part, hierarchical};
use super::{Action, Algorithm, Region, Shape, Span, Step};

/// Steps of an all-reduce of the main buffer, in place.
pub fn all_reduce(algorithm: Algorithm, shape: Shape<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    if shape.world_size < 2 {
        return steps;
    }
    match algorithm {
        Algorithm::Ring => ring(shape, 0..2 * (shape.world_size - 1), &|c| shape.chunk(c), &mut steps),
        Algorithm::HalvingDoubling => halving_doubling(shape, &mut steps),
        Algorithm::Tree => tree(shape, &mut steps),
        Algorithm::OneShot => one_shot(shape, &mut steps),
        Algorithm::Direct => direct(shape, &mut steps),
        Algorithm::Hierarchical => hierarchical(shape, Part::Both, &|c| shape.chunk(c), &mut steps),
    }
    steps
}

/// Steps after which chunk `rank` of the main buffer is reduced; its other chunks are then unspecified.
pub fn reduce_scatter(algorithm: Algorithm, shape: Shape<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    if shape.world_size < 2 {
        return steps;
    }
    match algorithm {
        Algorithm::OneShot => {
            // Sum: x[r] + x[r+1] + … round the ring, from the left.
            for distance in 1..shape.world_size {
                let to = shape.after(distance);
                steps.push(Step { action: Action::Send(to), span: shape.chunk(to) });
            }
            for distance in 1..shape.world_size {
                let from = shape.after(distance);
                steps.push(Step { action: Action::RecvReduce(from), span: shape.chunk(shape.rank) });
            }
        }
        Algorithm::Hierarchical => hierarchical(shape, Part::Reduce, &|c| shape.chunk(c), &mut steps),
        _ => ring(shape, 0..shape.world_size - 1, &|c| shape.chunk(c), &mut steps),
    }
    steps
}

/// Rounds of a ring. In the first n−1 chunk c starts at rank c+1 and collects ranks in ring order,
/// ((x[c+1] + x[c+2]) + …) + x[c], and ends at rank c; in the other n−1 finished chunks go once round.
pub(super) fn ring(
    shape: Shape<'_>,
    rounds: Range<usize>,
    chunk: &dyn Fn(usize) -> Span,
    steps: &mut Vec<Step>,
) {
    let n = shape.world_size;
    let longest = (0..n).map(|c| chunk(c).len).max().unwrap_or(0);
    for (index, piece) in shape.waves(rounds.len(), shape.pieces(longest)) {
        let round = rounds.start + index;
        let (send, recv) = (shape.rank + 4 * n - round - 1, shape.rank + 4 * n - round - 2);
        if let Some(span) = shape.cut(chunk(send % n), piece) {
            steps.push(Step { action: Action::Send(shape.after(1)), span });
        }
        if let Some(span) = shape.cut(chunk(recv % n), piece) {
            let from = shape.before(1);
            let action = if round < n - 1 { Action::RecvReduce(from) } else { Action::Recv(from) };
            steps.push(Step { action, span });
        }
    }
}

/// For any world size: with p the largest power of two within it, the first 2·(n−p) ranks pair up, and of each pair the
/// odd one computes for both. Sum: pairs (2i + (2i+1)) first, then a balanced tree over the p, nearest distance last.
fn halving_doubling(shape: Shape<'_>, steps: &mut Vec<Step>) {
    let Shape { rank, world_size, count, width, .. } = shape;
    let power = 1 << world_size.ilog2();
    let extra = world_size - power;
    let whole = shape.whole();
    if rank < 2 * extra && rank % 2 == 0 {
        steps.push(Step { action: Action::Send(rank + 1), span: whole });
        steps.push(Step { action: Action::Recv(rank + 1), span: whole });
        return;
    }
    let folded = rank < 2 * extra;
    if folded {
        steps.push(Step { action: Action::RecvReduce(rank - 1), span: whole });
    }
    let me = if folded { rank / 2 } else { rank - extra };
    let real = |number: usize| if number < extra { 2 * number + 1 } else { number + extra };
    let bytes = |from: usize, to: usize| Span::main(from * width..to * width);

    let (mut from, mut to, mut distance) = (0, count, power / 2);
    let mut way_back = Vec::new();
    while distance > 0 {
        let partner = real(me ^ distance);
        let middle = from + (to - from) / 2;
        let (low, high) = (bytes(from, middle), bytes(middle, to));
        let lower = me & distance == 0;
        let (keep, give) = if lower { (low, high) } else { (high, low) };
        steps.push(Step { action: Action::Send(partner), span: give });
        steps.push(Step { action: Action::RecvReduce(partner), span: keep });
        way_back.push((partner, keep, give));
        (from, to) = if lower { (from, middle) } else { (middle, to) };
        distance /= 2;
    }
    for (partner, have, want) in way_back.into_iter().rev() {
        steps.push(Step { action: Action::Send(partner), span: have });
        steps.push(Step { action: Action::Recv(partner), span: want });
    }
    if folded {
        steps.push(Step { action: Action::Send(rank - 1), span: whole });
    }
}

/// A node's parent (none for the root) and children, nearest first, in the binomial tree over `world_size` numbers.
pub(super) fn binomial(number: usize, world_size: usize) -> (Option<usize>, Vec<usize>) {
    let mut children = Vec::new();
    let mut distance = 1;
    while distance < world_size {
        if number & distance != 0 {
            return (Some(number - distance), children);
        }
        if number + distance < world_size {
            children.push(number + distance);
        }
        distance *= 2;
    }
    (None, children)
}

/// Sum: each node adds its own, then its children's sums, nearest child first.
fn tree(shape: Shape<'_>, steps: &mut Vec<Step>) {
    let whole = shape.whole();
    let (parent, children) = binomial(shape.rank, shape.world_size);
    for child in &children {
        steps.push(Step { action: Action::RecvReduce(*child), span: whole });
    }
    if let Some(parent) = parent {
        steps.push(Step { action: Action::Send(parent), span: whole });
        steps.push(Step { action: Action::Recv(parent), span: whole });
    }
    for child in children.iter().rev() {
        steps.push(Step { action: Action::Send(*child), span: whole });
    }
}

/// Sum, for chunk c: ((x[c] + x[c−1]) + x[c−2]) + …, ranks modulo n.
fn direct(shape: Shape<'_>, steps: &mut Vec<Step>) {
    let n = shape.world_size;
    let own = shape.chunk(shape.rank);
    for (round, piece) in shape.waves(2, shape.pieces(shape.chunk(0).len)) {
        for to in (1..n).map(|distance| shape.after(distance)) {
            let chunk = if round == 0 { shape.chunk(to) } else { own };
            let span = shape.cut(chunk, piece);
            steps.extend(span.map(|span| Step { action: Action::Send(to), span }));
        }
        for from in (1..n).map(|distance| shape.before(distance)) {
            let (chunk, action) = match round {
                0 => (own, Action::RecvReduce(from)),
                _ => (shape.chunk(from), Action::Recv(from)),
            };
            let span = shape.cut(chunk, piece);
            steps.extend(span.map(|span| Step { action, span }));
        }
    }
}

/// Sum: (((x[0] + x[1]) + x[2]) + …), on every rank. Ranks from 2 on keep a copy of their own, to add it in its turn.
fn one_shot(shape: Shape<'_>, steps: &mut Vec<Step>) {
    let Shape { rank, world_size, .. } = shape;
    let whole = shape.whole();
    let copy = Span { region: Region::Scratch, ..whole };
    let keeps = rank >= 2;
    if keeps {
        steps.push(Step { action: Action::Copy(whole), span: copy });
    }
    for distance in 1..world_size {
        let span = if keeps { copy } else { whole };
        steps.push(Step { action: Action::Send(shape.after(distance)), span });
    }
    for from in 0..world_size {
        if from == rank {
            if keeps {
                steps.push(Step { action: Action::Reduce(copy), span: whole });
            }
        } else if from == 0 && keeps {
            steps.push(Step { action: Action::Recv(0), span: whole });
        } else {
            steps.push(Step { action: Action::RecvReduce(from), span: whole });
        }
    }
}

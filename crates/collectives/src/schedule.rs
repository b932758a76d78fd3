//! Algorithms as lists of steps: what one rank sends, receives and adds, in which order.
//!
//! A schedule is a pure function of (rank, world size, element count). It says *what*; the engine decides *when*, from
//! one rule: a byte may be worked on as soon as no earlier step of the list still has to read or write it. Chunks of a
//! ring are pipelined in segments by that rule alone, and so are trees and halvings; no algorithm has pipelining code
//! of its own (gloo's `allreduce.cc` alternates two buffers by hand; NCCL's primitives count slots).
//!
//! Steps with the same peer and direction run in list order, and both sides list them in the same order. They do,
//! and no order of any transport's buffers can make them wait for each other in a circle, because every algorithm lists
//! its exchanges in one order that all ranks have in common and each rank takes those that it takes part in: the first
//! exchange that isn't done has both its ends waiting for nothing but each other.

mod all_reduce;
mod choice;
mod hierarchical;
mod measured;
mod moves;
mod pace;
mod plan;

pub use all_reduce::{all_reduce, reduce_scatter};
pub use moves::{all_gather, all_to_all, barrier, broadcast, gather, pair, scatter};
pub use pace::Pace;
pub use plan::{Lane, Plan, Route};

use crate::call::Operation;

/// How an operation is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Algorithm {
    /// Each rank talks to its neighbours; least bytes, n−1 rounds (Patarasuk & Yuan 2009).
    Ring = 1,
    /// Halves are exchanged at shrinking distance and gathered back; least bytes, log n rounds (Thakur,
    /// Rabenseifner & Gropp 2005).
    HalvingDoubling = 2,
    /// To a root and back along a binomial tree: log n rounds, whole vectors.
    Tree = 3,
    /// Everyone talks to everyone at once: one round, n−1 times the bytes.
    OneShot = 4,
    /// Every chunk's owner collects it from all and hands it out: least bytes, two rounds, n−1 partners at once.
    Direct = 5,
    /// Inside each host first, then round the hosts, then inside each host again: least bytes between hosts.
    Hierarchical = 6,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Ring, Self::HalvingDoubling, Self::Tree, Self::OneShot, Self::Direct, Self::Hierarchical];

    /// The name by which it can be asked for.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::HalvingDoubling => "halving_doubling",
            Self::Tree => "tree",
            Self::OneShot => "one_shot",
            Self::Direct => "direct",
            Self::Hierarchical => "hierarchical",
        }
    }

    /// The algorithm of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name)
    }

    /// The ones that `operation` can be carried out by.
    pub fn of(operation: Operation) -> &'static [Self] {
        match operation {
            Operation::AllReduce => &Self::ALL,
            Operation::ReduceScatter | Operation::AllGather => {
                &[Self::Ring, Self::OneShot, Self::Hierarchical]
            }
            Operation::Broadcast => &[Self::Ring, Self::Tree, Self::OneShot],
            _ => &[Self::OneShot],
        }
    }
}

/// One of the buffers that steps work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// The buffer that ends with the result.
    Main,
    /// The caller's input, where it is another buffer.
    Source,
    /// Room that the engine lends.
    Scratch,
}

/// A range of bytes of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which buffer.
    pub region: Region,
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl Span {
    /// A range of the main buffer.
    pub fn main(range: std::ops::Range<usize>) -> Self {
        Self { region: Region::Main, start: range.start, len: range.len() }
    }
}

/// What a step does with its span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The span goes to a rank.
    Send(usize),
    /// A rank's bytes come into the span.
    Recv(usize),
    /// A rank's bytes are reduced into the span.
    RecvReduce(usize),
    /// The span goes to every other rank of this one's host, once for all of them; only where [`Shape::shares`].
    Share,
    /// What a rank shares comes into the span.
    Take(usize),
    /// This other span (of equal length) is copied into the span.
    Copy(Span),
    /// This other span is reduced into the span.
    Reduce(Span),
}

/// One line of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// With which bytes.
    pub span: Span,
}

impl Step {
    /// The span that is read, and the span that is written.
    fn touches(&self) -> (Option<Span>, Option<Span>) {
        match self.action {
            Action::Send(_) | Action::Share => (Some(self.span), None),
            Action::Recv(_) | Action::RecvReduce(_) | Action::Take(_) => (None, Some(self.span)),
            Action::Copy(from) | Action::Reduce(from) => (Some(from), Some(self.span)),
        }
    }
}

/// Where a rank stands in a vector: what every schedule is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// This rank.
    pub rank: usize,
    /// Ranks in all.
    pub world_size: usize,
    /// Elements of the vector.
    pub count: usize,
    /// Bytes of an element.
    pub width: usize,
    /// How long chunks are cut.
    pub pace: Pace,
    /// The number of each rank's host; where it is empty, all are on one.
    pub hosts: &'a [usize],
    /// Whether what a rank says once can reach all others of its host: where the group is everyone who has the memory.
    /// Each share must be taken by all of them.
    pub shares: bool,
}

impl Shape<'_> {
    /// The bytes of chunk `chunk` (modulo the world size) of the vector, divided as evenly as can be.
    fn chunk(&self, chunk: usize) -> Span {
        let range = crate::group::chunk(self.count, self.world_size, chunk % self.world_size);
        Span::main(range.start * self.width..range.end * self.width)
    }

    fn whole(&self) -> Span {
        Span::main(0..self.count * self.width)
    }

    /// Whether one share reaches all other ranks, of whom there are so many that it pays.
    fn shares_with_all(&self) -> bool {
        self.shares && self.world_size > 2 && self.hosts.iter().all(|host| *host == self.hosts[0])
    }

    /// `span` goes to all other ranks.
    fn give_all(&self, span: Span, steps: &mut Vec<Step>) {
        if self.shares_with_all() {
            steps.push(Step { action: Action::Share, span });
            return;
        }
        let sends = (1..self.world_size).map(|distance| Action::Send(self.after(distance)));
        steps.extend(sends.map(|action| Step { action, span }));
    }

    /// How what `from` gives to all others is taken.
    fn take(&self, from: usize) -> Action {
        if self.shares_with_all() { Action::Take(from) } else { Action::Recv(from) }
    }

    /// The rank `distance` further round the ring.
    fn after(&self, distance: usize) -> usize {
        (self.rank + distance) % self.world_size
    }

    /// The rank `distance` before on the ring (`distance` ≤ world size).
    fn before(&self, distance: usize) -> usize {
        (self.rank + self.world_size - distance) % self.world_size
    }
}

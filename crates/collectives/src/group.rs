//! The public face: a group of ranks and its operations.

mod join;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use join::JoinOptions;
use join::Ticket;

use crate::call::{Call, Operation};
use crate::control::Control;
use crate::element::{DType, Element, Reduce, ReduceOp, Reducer, bytes_of, bytes_of_mut, reducer};
use crate::error::{Error, Where};
use crate::flow::{Buffers, Flow, fault_error};
use crate::schedule::{self, Algorithm, Pace, Plan, Shape, Step};
use crate::transport::{Transport, TransportKind};

/// Plans kept for calls that come again.
const PLANS: usize = 32;
/// Calls remembered, to say what this rank did where a peer still is.
const EARLIER: usize = 8;
const NO_ROOT: u32 = u32::MAX;
/// How long the store may take to hear that all is done.
const CONCLUDING: Duration = Duration::from_secs(2);

/// The elements of `chunk` when `count` elements are divided among `world_size` ranks as evenly as can be: the first
/// `count % world_size` chunks have one more.
pub fn chunk(count: usize, world_size: usize, chunk: usize) -> Range<usize> {
    let (each, more) = (count / world_size, count % world_size);
    let start = chunk * each + chunk.min(more);
    start..start + each + usize::from(chunk < more)
}

/// What groups of one epoch share. Dropping it closes the connections.
struct Core {
    transport: Box<dyn Transport>,
    control: Control,
    /// Ranks of the epoch.
    world_size: usize,
    scratch: Vec<u8>,
    plans: Vec<(PlanKey, Plan)>,
    broken: Option<String>,
    /// The last calls, in a ring.
    earlier: Vec<Call>,
    calls: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct PlanKey {
    group: u64,
    operation: Operation,
    algorithm: Algorithm,
    count: usize,
    width: usize,
    root: u32,
    layout: u64,
}

/// A group of ranks: they call the same operations in the same order, and each call returns on every rank with the
/// same result, or with an error, before its deadline.
///
/// A call blocks its thread. Sub-groups share their parent's connections, so two groups of one epoch take turns; to
/// overlap communication with work, give a group to a [`crate::Queue`].
pub struct Group {
    core: Arc<Mutex<Core>>,
    /// Rank of the epoch for each rank of the group.
    members: Vec<usize>,
    /// A number for each rank's host.
    hosts: Vec<usize>,
    rank: usize,
    id: u64,
    epoch: u64,
    sequence: u64,
    splits: u64,
    sent: Vec<u64>,
    received: Vec<u64>,
    limit: Duration,
    forced: Option<Algorithm>,
    kind: TransportKind,
    ticket: Option<Ticket>,
}

/// What a call needs beside its steps.
struct Spec {
    operation: Operation,
    algorithm: Algorithm,
    dtype: DType,
    reduce: Option<(ReduceOp, Reducer)>,
    count: usize,
    root: u32,
    layout: u64,
    /// Whether equal calls have equal steps.
    repeats: bool,
}

impl Spec {
    fn new<T: Element>(operation: Operation, algorithm: Algorithm, count: usize) -> Self {
        let dtype = T::DTYPE;
        Self { operation, algorithm, dtype, reduce: None, count, root: NO_ROOT, layout: 0, repeats: true }
    }
}

impl Group {
    /// Joins the job whose store is named in `options`, and waits for the next epoch to begin.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] when not enough members come in time, [`Error::Refused`] for another token.
    pub fn join(options: JoinOptions) -> Result<Self, Error> {
        join::join(options)
    }

    /// Leaves this epoch and joins the next one, over the same connection to the store: after an error, with those who
    /// are left; at any other time, when all others do the same (newcomers are then taken in). Sub-groups end.
    ///
    /// # Errors
    /// As [`Group::join`]; [`Error::Invalid`] for a sub-group.
    pub fn rejoin(self) -> Result<Self, Error> {
        let Self { core, ticket, .. } = self;
        let ticket = ticket.ok_or_else(|| Error::invalid("a sub-group cannot rejoin; its parent can"))?;
        // Last words to a peer that is stopped take their time; those who are left shouldn't wait for them.
        let farewell = std::thread::Builder::new().name("collectives-farewell".into());
        if let Err(error) = farewell.spawn(move || drop(core)) {
            tracing::debug!(%error, "no thread to take leave in; it was done here");
        }
        join::rejoin(ticket)
    }

    /// What has ended this epoch, if anything has: between calls too, a peer may be lost or have given up. Doesn't wait.
    pub fn fault(&self) -> Option<Error> {
        let core = lock(&self.core);
        if let Some(reason) = &core.broken {
            return Some(Error::Broken { reason: reason.clone() });
        }
        let fault = if core.control.changes() == 0 { None } else { core.control.fault() }?;
        let rank = self.members[self.rank];
        Some(fault_error(fault, Where { rank, epoch: self.epoch, call: None, bytes_done: 0 }))
    }

    /// How many newcomers wait at the store for the next epoch. It tells rank 0 alone; others get 0. Doesn't wait.
    ///
    /// # Errors
    /// [`Error::StoreGone`] where the store has ended, or has fenced this member; [`Error::Invalid`] for a sub-group.
    pub fn newcomers(&mut self) -> Result<usize, Error> {
        match &mut self.ticket {
            Some(ticket) => ticket.membership.newcomers(),
            None => Err(Error::invalid("a sub-group has no store; its parent has")),
        }
    }

    /// Says at the store that what this group's members came for is done: whoever comes later, such as a member that was
    /// fenced, gets [`Error::Concluded`] with this `note` (64 KiB at most) instead of waiting for others who never come.
    /// One member that says so is enough. The group stays as it is.
    ///
    /// # Errors
    /// [`Error::System`] where the store doesn't hear it within two seconds; [`Error::Invalid`] for a sub-group or a longer
    /// note.
    pub fn conclude(&mut self, note: &str) -> Result<(), Error> {
        match &mut self.ticket {
            Some(ticket) => ticket.membership.conclude(note, Instant::now() + CONCLUDING),
            None => Err(Error::invalid("a sub-group has no store; its parent has")),
        }
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks the group has.
    pub fn world_size(&self) -> usize {
        self.members.len()
    }

    /// The number of the epoch: it grows with every [`Group::rejoin`].
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// How many collective calls were made. Equal on all ranks between calls.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The host of each rank: ranks of one host have the same number.
    pub fn hosts(&self) -> &[usize] {
        &self.hosts
    }

    /// What the bytes go over.
    pub fn transport(&self) -> TransportKind {
        self.kind
    }

    /// Uses one algorithm for every operation that it can carry out; `None` lets the length decide. All ranks must set
    /// the same.
    pub fn set_algorithm(&mut self, algorithm: Option<Algorithm>) {
        self.forced = algorithm;
    }

    /// Sets how long a call may take, from the moment when it first has to wait.
    pub fn set_deadline(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Reduces `buffer` element by element over all ranks, in place. All ranks end with the same bits; the order of
    /// additions is that of the algorithm ([`schedule::all_reduce`]).
    ///
    /// # Errors
    /// Any but [`Error::Rendezvous`]. `buffer` is then unspecified: keep a copy of what must survive.
    pub fn all_reduce<T: Reduce>(&mut self, buffer: &mut [T], op: ReduceOp) -> Result<(), Error> {
        let algorithm = self.algorithm(Operation::AllReduce, size_of_val(buffer));
        let mut spec = Spec::new::<T>(Operation::AllReduce, algorithm, buffer.len());
        spec.reduce = Some((op, reducer::<T>(op)));
        self.run(spec, |shape| schedule::all_reduce(algorithm, shape), bytes_of_mut(buffer), &[])
    }

    /// Reduces `buffer` over all ranks, leaving this rank's [`chunk`] of the result in its place; returns that range.
    /// The rest of the buffer is then unspecified.
    ///
    /// # Errors
    /// As [`Group::all_reduce`].
    pub fn reduce_scatter<T: Reduce>(
        &mut self,
        buffer: &mut [T],
        op: ReduceOp,
    ) -> Result<Range<usize>, Error> {
        let algorithm = self.algorithm(Operation::ReduceScatter, size_of_val(buffer));
        let mut spec = Spec::new::<T>(Operation::ReduceScatter, algorithm, buffer.len());
        spec.reduce = Some((op, reducer::<T>(op)));
        let mine = chunk(buffer.len(), self.world_size(), self.rank);
        self.run(spec, |shape| schedule::reduce_scatter(algorithm, shape), bytes_of_mut(buffer), &[])?;
        Ok(mine)
    }

    /// Fills `buffer` with every rank's [`chunk`] of it. Each rank brings its own in its place.
    ///
    /// # Errors
    /// As [`Group::all_reduce`].
    pub fn all_gather<T: Element>(&mut self, buffer: &mut [T]) -> Result<(), Error> {
        let algorithm = self.algorithm(Operation::AllGather, size_of_val(buffer));
        let spec = Spec::new::<T>(Operation::AllGather, algorithm, buffer.len());
        self.run(spec, |shape| schedule::all_gather(algorithm, shape, None), bytes_of_mut(buffer), &[])
    }

    /// As [`Group::all_gather`], where rank r brings `counts[r]` elements, one rank's after the other's.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Invalid`] where `counts` and `buffer` don't fit.
    pub fn all_gather_uneven<T: Element>(&mut self, buffer: &mut [T], counts: &[usize]) -> Result<(), Error> {
        let offsets = self.offsets::<T>(counts, buffer.len(), "all_gather")?;
        let algorithm = self.algorithm(Operation::AllGather, size_of_val(buffer));
        let mut spec = Spec::new::<T>(Operation::AllGather, algorithm, buffer.len());
        (spec.layout, spec.repeats) = (digest(counts), false);
        self.run(
            spec,
            |shape| schedule::all_gather(algorithm, shape, Some(&offsets)),
            bytes_of_mut(buffer),
            &[],
        )
    }

    /// Fills every rank's `buffer` with the root's.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Invalid`] for a root that isn't there.
    pub fn broadcast<T: Element>(&mut self, buffer: &mut [T], root: usize) -> Result<(), Error> {
        self.peer(root, "root")?;
        let algorithm = self.algorithm(Operation::Broadcast, size_of_val(buffer));
        let mut spec = Spec::new::<T>(Operation::Broadcast, algorithm, buffer.len());
        spec.root = root as u32;
        self.run(spec, |shape| schedule::broadcast(algorithm, shape, root), bytes_of_mut(buffer), &[])
    }

    /// Sends part j of `input` to rank j, and fills part i of `output` from rank i. Parts are equal: both lengths are
    /// the same multiple of the world size.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Invalid`] for other lengths.
    pub fn all_to_all<T: Element>(&mut self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        if !input.len().is_multiple_of(self.world_size()) {
            let (len, n) = (input.len(), self.world_size());
            return Err(Error::invalid(format!(
                "all_to_all of {len} elements among {n} ranks: not a multiple"
            )));
        }
        let counts = vec![input.len() / self.world_size(); self.world_size()];
        self.all_to_all_uneven(input, &counts, output, &counts)
    }

    /// As [`Group::all_to_all`], with `send_counts[j]` elements for rank j and `recv_counts[i]` from rank i.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Mismatch`] where a pair doesn't agree on what goes between the two.
    pub fn all_to_all_uneven<T: Element>(
        &mut self,
        input: &[T],
        send_counts: &[usize],
        output: &mut [T],
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        let sends = self.offsets::<T>(send_counts, input.len(), "all_to_all's input")?;
        let recvs = self.offsets::<T>(recv_counts, output.len(), "all_to_all's output")?;
        if send_counts[self.rank] != recv_counts[self.rank] {
            let (sent, received) = (send_counts[self.rank], recv_counts[self.rank]);
            let what =
                format!("all_to_all: {sent} elements from this rank to itself, but {received} from itself");
            return Err(Error::invalid(what));
        }
        let mut spec = Spec::new::<T>(Operation::AllToAll, Algorithm::OneShot, 0);
        spec.repeats = false;
        self.run(
            spec,
            |shape| schedule::all_to_all(shape, &sends, &recvs),
            bytes_of_mut(output),
            bytes_of(input),
        )
    }

    /// Brings every rank's `input` (`counts[r]` elements of rank r) to the root's `output`, one after the other. Other
    /// ranks give an empty `output`.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Invalid`] where counts and buffers don't fit.
    pub fn gather<T: Element>(
        &mut self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
        root: usize,
    ) -> Result<(), Error> {
        self.peer(root, "root")?;
        let total = counts.iter().fold(0usize, |sum, count| sum.saturating_add(*count));
        let expected = if self.rank == root { total } else { 0 };
        let offsets = self.offsets::<T>(counts, total, "gather")?;
        self.fits("gather", [(input.len(), counts[self.rank]), (output.len(), expected)])?;
        let mut spec = Spec::new::<T>(Operation::Gather, Algorithm::OneShot, total);
        (spec.root, spec.layout, spec.repeats) = (root as u32, digest(counts), false);
        self.run(spec, |shape| schedule::gather(shape, root, &offsets), bytes_of_mut(output), bytes_of(input))
    }

    /// Brings part r (`counts[r]` elements) of the root's `input` to rank r's `output`. Other ranks give an empty
    /// `input`.
    ///
    /// # Errors
    /// As [`Group::gather`].
    pub fn scatter<T: Element>(
        &mut self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
        root: usize,
    ) -> Result<(), Error> {
        self.peer(root, "root")?;
        let total = counts.iter().fold(0usize, |sum, count| sum.saturating_add(*count));
        let expected = if self.rank == root { total } else { 0 };
        let offsets = self.offsets::<T>(counts, total, "scatter")?;
        self.fits("scatter", [(input.len(), expected), (output.len(), counts[self.rank])])?;
        let mut spec = Spec::new::<T>(Operation::Scatter, Algorithm::OneShot, total);
        (spec.root, spec.layout, spec.repeats) = (root as u32, digest(counts), false);
        self.run(
            spec,
            |shape| schedule::scatter(shape, root, &offsets),
            bytes_of_mut(output),
            bytes_of(input),
        )
    }

    /// Sends `elements` to one rank, which must call [`Group::recv`] with as many. Returns when they are on their way.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; [`Error::Invalid`] for a rank that isn't there, or is this one.
    pub fn send<T: Element>(&mut self, elements: &[T], to: usize) -> Result<(), Error> {
        self.pair::<T>(self.rank, to, elements.len(), &mut [], bytes_of(elements))
    }

    /// Fills `elements` with what rank `from` sends to this one.
    ///
    /// # Errors
    /// As [`Group::send`].
    pub fn recv<T: Element>(&mut self, elements: &mut [T], from: usize) -> Result<(), Error> {
        self.pair::<T>(from, self.rank, elements.len(), bytes_of_mut(elements), &[])
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`Group::all_reduce`].
    pub fn barrier(&mut self) -> Result<(), Error> {
        let mut spec = Spec::new::<u8>(Operation::Barrier, Algorithm::OneShot, 0);
        spec.dtype = DType::None;
        self.run(spec, schedule::barrier, &mut [], &[])
    }

    /// A group of some of this group's ranks, which get new numbers in the order given; `None` on the others. Every
    /// rank of this group must call it, in the same order with other calls; nothing is sent.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank that isn't there or comes twice.
    pub fn subgroup(&mut self, ranks: &[usize]) -> Result<Option<Self>, Error> {
        for (index, rank) in ranks.iter().enumerate() {
            self.peer(*rank, "member of a sub-group")?;
            if ranks[..index].contains(rank) {
                return Err(Error::invalid(format!("rank {rank} comes twice in a sub-group")));
            }
        }
        self.splits += 1;
        let Some(rank) = ranks.iter().position(|rank| *rank == self.rank) else { return Ok(None) };
        let mut hasher = blake3::Hasher::new();
        for number in [self.id, self.splits].into_iter().chain(ranks.iter().map(|rank| *rank as u64)) {
            hasher.update(&number.to_le_bytes());
        }
        Ok(Some(Self {
            core: Arc::clone(&self.core),
            members: ranks.iter().map(|rank| self.members[*rank]).collect(),
            hosts: ranks.iter().map(|rank| self.hosts[*rank]).collect(),
            rank,
            id: first_word(&hasher),
            epoch: self.epoch,
            sequence: 0,
            splits: 0,
            sent: vec![0; ranks.len()],
            received: vec![0; ranks.len()],
            limit: self.limit,
            forced: self.forced,
            kind: self.kind,
            ticket: None,
        }))
    }

    fn algorithm(&self, operation: Operation, bytes: usize) -> Algorithm {
        self.forced
            .filter(|forced| Algorithm::of(operation).contains(forced))
            .unwrap_or_else(|| Algorithm::choose(operation, self.kind, &self.hosts, bytes))
    }

    fn peer(&self, rank: usize, role: &str) -> Result<(), Error> {
        let n = self.world_size();
        if rank < n {
            Ok(())
        } else {
            Err(Error::invalid(format!("{role} {rank} of a group of {n}: it has 0 to {}", n - 1)))
        }
    }

    fn fits(&self, operation: &str, lengths: [(usize, usize); 2]) -> Result<(), Error> {
        match (lengths[0], lengths[1]) {
            ((input, i), (output, o)) if input == i && output == o => Ok(()),
            ((input, i), (output, o)) => Err(Error::invalid(format!(
                "{operation} on rank {}: input of {input} elements and output of {output}, but counts say {i} and {o}",
                self.rank
            ))),
        }
    }

    /// Byte offsets of parts of `counts` elements that make up `total`.
    fn offsets<T: Element>(&self, counts: &[usize], total: usize, what: &str) -> Result<Vec<usize>, Error> {
        let n = self.world_size();
        let sum = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
        if counts.len() != n || sum != Some(total) {
            let sum = sum.map_or("too many".into(), |sum| sum.to_string());
            return Err(Error::invalid(format!(
                "{what}: {} counts of {sum} elements in all, for {n} ranks and {total} elements",
                counts.len()
            )));
        }
        let mut at = 0;
        let ends = counts.iter().map(|count| {
            at += count * size_of::<T>();
            at
        });
        Ok(std::iter::once(0).chain(ends).collect())
    }

    fn pair<T: Element>(
        &mut self,
        from: usize,
        to: usize,
        count: usize,
        main: &mut [u8],
        source: &[u8],
    ) -> Result<(), Error> {
        self.peer(from, "rank")?;
        self.peer(to, "rank")?;
        if from == to {
            return Err(Error::invalid(format!("rank {from} cannot send to itself")));
        }
        let mut spec = Spec::new::<T>(Operation::SendRecv, Algorithm::OneShot, count);
        (spec.root, spec.layout, spec.repeats) = (from as u32, to as u64, false);
        let bytes = count * size_of::<T>();
        self.run(spec, |shape| schedule::pair(shape, from, to, bytes), main, source)
    }

    /// The call as it goes on the wire. Pairs count by themselves: a send is no step of the whole group.
    fn call(&mut self, spec: &Spec) -> Call {
        let (group, counter) = if spec.operation == Operation::SendRecv {
            let (from, to) = (spec.root as usize, spec.layout as usize);
            let counter = if from == self.rank { &mut self.sent[to] } else { &mut self.received[from] };
            (self.id ^ digest(&[from + 1, to + 1]), counter)
        } else {
            (self.id, &mut self.sequence)
        };
        let sequence = *counter;
        *counter += 1;
        Call {
            group,
            sequence,
            operation: spec.operation,
            algorithm: spec.algorithm,
            dtype: spec.dtype,
            reduce: spec.reduce.map_or(0, |(op, _)| op as u8),
            count: spec.count as u64,
            root: spec.root,
            layout: spec.layout,
        }
    }

    fn run(
        &mut self,
        spec: Spec,
        steps: impl FnOnce(Shape<'_>) -> Vec<Step>,
        main: &mut [u8],
        source: &[u8],
    ) -> Result<(), Error> {
        let call = self.call(&spec);
        let width = spec.dtype.bytes().max(1);
        let key = PlanKey {
            group: self.id,
            operation: spec.operation,
            algorithm: spec.algorithm,
            count: spec.count,
            width,
            root: spec.root,
            layout: spec.layout,
        };
        let mut core = lock(&self.core);
        let core = &mut *core;
        if let Some(reason) = &core.broken {
            return Err(Error::Broken { reason: reason.clone() });
        }
        let mut plan = match core.plans.iter().position(|(k, _)| spec.repeats && *k == key) {
            Some(index) => core.plans.swap_remove(index).1,
            None => Plan::new(steps(Shape {
                rank: self.rank,
                world_size: self.members.len(),
                count: spec.count,
                width,
                pace: Pace::of(self.kind, &self.hosts),
                hosts: &self.hosts,
                shares: core.transport.shares() && self.members.len() == core.world_size,
            })),
        };
        plan.reset();
        if core.scratch.len() < plan.scratch_bytes {
            core.scratch.resize(plan.scratch_bytes, 0);
        }
        let mut buffers = Buffers {
            main,
            source,
            scratch: &mut core.scratch,
            width,
            reduce: spec.reduce.map_or(|_, _| {}, |(_, reduce)| reduce),
        };
        let mut flow = Flow {
            transport: &mut *core.transport,
            control: &core.control,
            members: &self.members,
            epoch: self.epoch,
            rank: self.rank,
            call,
            earlier: &core.earlier,
            limit: self.limit,
        };
        let known = if core.control.changes() == 0 { None } else { core.control.fault() };
        let result = match known {
            Some(fault) => {
                let at = Where {
                    rank: self.members[self.rank],
                    epoch: self.epoch,
                    call: Some(call),
                    bytes_done: 0,
                };
                Err(fault_error(fault, at))
            }
            None => flow.run(&mut plan, &mut buffers),
        };
        match core.earlier.get_mut(core.calls % EARLIER) {
            Some(slot) => *slot = call,
            None => core.earlier.push(call),
        }
        core.calls += 1;
        if spec.repeats {
            if core.plans.len() == PLANS {
                core.plans.remove(0);
            }
            core.plans.push((key, plan));
        }
        if let Err(error) = &result {
            let reason = error.to_string();
            core.control.abort(error.lost_rank(), &reason);
            core.broken = Some(reason);
        }
        result
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (rank, n, epoch) = (self.rank, self.world_size(), self.epoch);
        write!(f, "Group(rank {rank} of {n}, epoch {epoch}, {})", self.kind.name())
    }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

fn first_word(hasher: &blake3::Hasher) -> u64 {
    let hash = hasher.finalize();
    u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
}

fn digest(counts: &[usize]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for count in counts {
        hasher.update(&(*count as u64).to_le_bytes());
    }
    first_word(&hasher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_element_once() {
        for count in [0, 1, 7, 64, 65] {
            for n in 1..10 {
                let mut next = 0;
                for index in 0..n {
                    let range = chunk(count, n, index);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, count);
            }
        }
    }
}

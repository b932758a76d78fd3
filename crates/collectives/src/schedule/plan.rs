//! A schedule ready to run: who waits for whose bytes, and how far each step is.
//!
//! A step may work up to the first byte that an earlier step, touching the same bytes (one of the two writing), has not
//! come past. That is the whole of the pipelining: a ring's second round sends what its first has added so far.
//! Steps are kept by where their bytes begin, so that finding the pairs costs a look at the neighbours of each; plans are
//! kept and reset between equal calls.

use std::collections::BTreeMap;

use super::{Action, Region, Span, Step};

/// Where the bytes of a step go or come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// They stay within this rank.
    Within,
    /// To one rank.
    To(usize),
    /// From one rank.
    From(usize),
    /// To all other ranks of the host at once.
    ToAll,
    /// From what a rank gives to all others of its host at once.
    Shared(usize),
}

impl Route {
    fn of(action: Action) -> Self {
        match action {
            Action::Send(to) => Self::To(to),
            Action::Recv(from) | Action::RecvReduce(from) => Self::From(from),
            Action::Share => Self::ToAll,
            Action::Take(from) => Self::Shared(from),
            Action::Copy(_) | Action::Reduce(_) => Self::Within,
        }
    }
}

/// Steps that run in order: those of one route.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Which.
    pub route: Route,
    /// Indices of its steps, in order.
    pub steps: Vec<usize>,
    /// The sum of their lengths.
    pub bytes: usize,
    /// How many are done.
    pub finished: usize,
    /// Whether the call's header has gone or come.
    pub open: bool,
}

#[derive(Clone, Copy, Debug)]
struct Hazard {
    /// The earlier step.
    earlier: usize,
    /// Where its bytes begin, in the region that both touch.
    from: usize,
    /// Where this step's bytes begin there.
    mine: usize,
}

/// A schedule with its progress.
#[derive(Clone, Debug)]
pub struct Plan {
    steps: Vec<Step>,
    done: Vec<usize>,
    hazards: Vec<Vec<Hazard>>,
    /// What runs side by side.
    pub lanes: Vec<Lane>,
    /// Bytes of scratch that the steps use.
    pub scratch_bytes: usize,
}

impl Plan {
    /// Prepares `steps`.
    pub fn new(steps: Vec<Step>) -> Self {
        let mut lanes: Vec<Lane> = Vec::new();
        let mut hazards = Vec::with_capacity(steps.len());
        let mut scratch_bytes = 0;
        let mut touched = Touched::default();
        for (index, step) in steps.iter().enumerate() {
            let route = Route::of(step.action);
            let lane = match lanes.iter().position(|lane| lane.route == route) {
                Some(lane) => &mut lanes[lane],
                None => {
                    let open = route == Route::Within;
                    lanes.push(Lane { route, steps: Vec::new(), bytes: 0, finished: 0, open });
                    let last = lanes.len() - 1;
                    &mut lanes[last]
                }
            };
            lane.steps.push(index);
            lane.bytes += step.span.len;
            hazards.push(touched.add(index, step));
            if step.span.region == Region::Scratch {
                scratch_bytes = scratch_bytes.max(step.span.start + step.span.len);
            }
        }
        let done = vec![0; steps.len()];
        Self { steps, done, hazards, lanes, scratch_bytes }
    }

    /// As before the first byte.
    pub fn reset(&mut self) {
        self.done.fill(0);
        for lane in &mut self.lanes {
            lane.finished = 0;
            lane.open = lane.route == Route::Within;
        }
    }

    /// The step that a lane is at; `None` when the lane is done.
    pub fn front(&self, lane: usize) -> Option<usize> {
        let lane = &self.lanes[lane];
        lane.steps.get(lane.finished).copied()
    }

    /// The bytes of a step that may be worked on now, as (action, first byte of the span, how many). For an action
    /// within this rank, its other span is moved along.
    pub fn ready(&self, index: usize) -> (Action, Span) {
        let step = &self.steps[index];
        let done = self.done[index];
        let mut len = step.span.len - done;
        for hazard in &self.hazards[index] {
            let (from, earlier_done) = (hazard.from, self.done[hazard.earlier]);
            let end = from + self.steps[hazard.earlier].span.len;
            let reached = from + earlier_done;
            let here = hazard.mine + done;
            if reached < end && here < end {
                len = len.min(reached.saturating_sub(here));
            }
        }
        let forward = |span: Span| Span { region: span.region, start: span.start + done, len };
        let action = match step.action {
            Action::Copy(from) => Action::Copy(forward(from)),
            Action::Reduce(from) => Action::Reduce(forward(from)),
            other => other,
        };
        (action, forward(step.span))
    }

    /// Notes that `bytes` more of the lane's step are done; says whether the step is finished.
    pub fn advance(&mut self, lane: usize, bytes: usize) -> bool {
        let Some(index) = self.front(lane) else { return true };
        self.done[index] += bytes;
        let finished = self.done[index] >= self.steps[index].span.len;
        if finished {
            self.lanes[lane].finished += 1;
        }
        finished
    }

    /// Bytes sent and received so far.
    pub fn bytes_done(&self) -> u64 {
        self.done.iter().map(|done| *done as u64).sum()
    }
}

struct Touch {
    step: usize,
    len: usize,
    writes: bool,
}

/// The bytes that the steps so far touch.
#[derive(Default)]
struct Touched {
    /// By region and first byte.
    spans: BTreeMap<(usize, usize), Vec<Touch>>,
    /// The most bytes that one touches, by region.
    longest: [usize; 3],
}

impl Touched {
    /// Adds a step, and says which of those before it touch the same bytes, one of the two writing.
    fn add(&mut self, index: usize, step: &Step) -> Vec<Hazard> {
        let mut hazards = Vec::new();
        let (read, written) = step.touches();
        let mine = || read.map(|span| (span, false)).into_iter().chain(written.map(|span| (span, true)));
        for (span, writes) in mine().filter(|(span, _)| span.len > 0) {
            let region = span.region as usize;
            let first = (span.start + 1).saturating_sub(self.longest[region]);
            let near = self.spans.range((region, first)..(region, span.start + span.len));
            for ((_, from), before) in near {
                let clashes = |touch: &&Touch| from + touch.len > span.start && (writes || touch.writes);
                hazards.extend(before.iter().filter(clashes).map(|touch| Hazard {
                    earlier: touch.step,
                    from: *from,
                    mine: span.start,
                }));
            }
        }
        for (span, writes) in mine().filter(|(span, _)| span.len > 0) {
            let region = span.region as usize;
            self.longest[region] = self.longest[region].max(span.len);
            let touch = Touch { step: index, len: span.len, writes };
            self.spans.entry((region, span.start)).or_default().push(touch);
        }
        hazards
    }
}

#[cfg(test)]
mod tests {
    //! Every schedule is run by all its ranks in memory, with random lanes and random short pieces, over numbers that
    //! stand for sets of ranks. A missing hazard, a double addition or a deadlock shows as a wrong set. What is under way
    //! between two ranks, or from one to all others, is bounded: who sends may have to wait for who takes.

    use std::collections::VecDeque;

    use consort_base::Philox;

    use super::super::*;
    use super::*;

    struct Node {
        plan: Plan,
        /// Its host.
        host: usize,
        regions: [Vec<u8>; 3],
    }

    fn run(mut nodes: Vec<Node>, random: &mut impl FnMut(usize) -> usize) -> Vec<Vec<u8>> {
        let n = nodes.len();
        let hosts: Vec<usize> = nodes.iter().map(|node| node.host).collect();
        let mut wires: Vec<VecDeque<u8>> = vec![VecDeque::new(); n * n];
        let mut shared = wires.clone();
        let most = 1 + random(50);
        let mut idle = 0;
        while nodes.iter().any(|node| (0..node.plan.lanes.len()).any(|lane| node.plan.front(lane).is_some()))
        {
            assert!(idle < 200_000, "deadlock");
            idle += 1;
            let rank = random(n);
            let node = &mut nodes[rank];
            let lane = random(node.plan.lanes.len().max(1));
            if node.plan.lanes.is_empty() {
                continue;
            }
            let Some(index) = node.plan.front(lane) else { continue };
            let (action, span) = node.plan.ready(index);
            let mut len = if span.len == 0 { 0 } else { random(span.len) + 1 };
            let others = || (0..n).filter(|other| *other != rank && hosts[*other] == hosts[rank]);
            len = len.min(match action {
                Action::Recv(from) | Action::RecvReduce(from) => wires[from * n + rank].len(),
                Action::Take(from) => shared[from * n + rank].len(),
                Action::Send(to) => most - wires[rank * n + to].len(),
                Action::Share => {
                    others().map(|other| most - shared[rank * n + other].len()).min().unwrap_or(most)
                }
                Action::Copy(_) | Action::Reduce(_) => len,
            });
            let at = span.region as usize;
            for i in span.start..span.start + len {
                let offset = i - span.start;
                match action {
                    Action::Send(to) => wires[rank * n + to].push_back(node.regions[at][i]),
                    Action::Recv(from) => node.regions[at][i] = wires[from * n + rank].pop_front().unwrap(),
                    Action::Share => {
                        others().for_each(|to| shared[rank * n + to].push_back(node.regions[at][i]));
                    }
                    Action::Take(from) => node.regions[at][i] = shared[from * n + rank].pop_front().unwrap(),
                    Action::RecvReduce(from) => {
                        let byte = wires[from * n + rank].pop_front().unwrap();
                        node.regions[at][i] = node.regions[at][i].wrapping_add(byte);
                    }
                    Action::Copy(other) => {
                        node.regions[at][i] = node.regions[other.region as usize][other.start + offset]
                    }
                    Action::Reduce(other) => {
                        let byte = node.regions[other.region as usize][other.start + offset];
                        node.regions[at][i] = node.regions[at][i].wrapping_add(byte);
                    }
                }
            }
            if len > 0 {
                idle = 0;
            }
            node.plan.advance(lane, len);
        }
        assert!(wires.iter().chain(&shared).all(VecDeque::is_empty), "bytes that nobody took");
        nodes.into_iter().map(|node| node.regions.into_iter().next().unwrap()).collect()
    }

    fn random(seed: u64) -> impl FnMut(usize) -> usize {
        let mut philox = Philox::new(seed, 0);

        move |below| philox.next_u64() as usize % below
    }

    #[test]
    fn every_reduction_adds_every_rank_once() {
        for world_size in 1..=9 {
            for count in [0, 1, 5, 37] {
                for algorithm in Algorithm::ALL {
                    for seed in 0..12 {
                        // Pieces of any length, and ranks on any hosts.
                        let mut any = random(seed << 32 | (world_size * 64 + count) as u64);
                        let pace = if seed == 0 {
                            Pace::WHOLE
                        } else {
                            Pace { piece: 1 + any(9), lead: 1 + any(4) }
                        };
                        let most = 1 + any(4);
                        let hosts: Vec<usize> = (0..world_size).map(|_| any(most)).collect();
                        let shares = seed % 2 == 1;
                        let nodes = (0..world_size)
                            .map(|rank| {
                                let hosts = &hosts[..];
                                let shape = Shape { rank, world_size, count, width: 1, pace, hosts, shares };
                                let plan = Plan::new(all_reduce(algorithm, shape));
                                let main = (0..count).map(|i| (1 << (rank % 8)) + i as u8).collect();
                                let regions = [main, vec![], vec![0; plan.scratch_bytes]];
                                Node { regions, plan, host: hosts[rank] }
                            })
                            .collect();
                        let want: Vec<u8> = (0..count)
                            .map(|i| {
                                (0..world_size).fold(0u8, |a, r| a.wrapping_add((1 << (r % 8)) + i as u8))
                            })
                            .collect();
                        for (rank, got) in run(nodes, &mut random(seed)).into_iter().enumerate() {
                            assert_eq!(
                                got, want,
                                "{algorithm:?} rank {rank} of {world_size} on {hosts:?} seed {seed}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// A part from each rank, or one root's vector, reaches everyone; what is shared once as well as what is sent.
    #[test]
    fn every_move_brings_everything_to_everyone() {
        for (world_size, seed) in (1..=9).flat_map(|n| (0..24).map(move |seed| (n, seed))) {
            for algorithm in Algorithm::ALL {
                let mut any = random(seed << 32 | world_size as u64);
                let pace = Pace { piece: 1 + any(9), lead: 1 + any(4) };
                let (count, root, most) = (any(40), any(world_size), 1 + any(3));
                let hosts: Vec<usize> = (0..world_size).map(|_| any(most)).collect();
                let shares = seed % 2 == 1;
                for gathers in [false, true] {
                    let byte = |rank: usize, i: usize| (rank * 41 + i) as u8;
                    let owner = |i: usize| {
                        let holds = |rank: &usize| crate::group::chunk(count, world_size, *rank).contains(&i);
                        if gathers { (0..world_size).find(holds).unwrap() } else { root }
                    };
                    let node = |rank| {
                        let hosts = &hosts[..];
                        let shape = Shape { rank, world_size, count, width: 1, pace, hosts, shares };
                        let steps = match gathers {
                            true => all_gather(algorithm, shape, None),
                            false => broadcast(algorithm, shape, root),
                        };
                        let mine = |i: usize| if owner(i) == rank { byte(rank, i) } else { 0 };
                        let main = (0..count).map(mine).collect();
                        Node { plan: Plan::new(steps), regions: [main, vec![], vec![]], host: hosts[rank] }
                    };
                    let want: Vec<u8> = (0..count).map(|i| byte(owner(i), i)).collect();
                    let got = run((0..world_size).map(node).collect(), &mut random(seed));
                    assert!(
                        got.iter().all(|got| *got == want),
                        "{algorithm:?} of {world_size} on {hosts:?}, gathers: {gathers}, seed {seed}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_later_round_starts_before_the_earlier_one_ends() {
        let pace = Pace::WHOLE;
        let shape = Shape { rank: 0, world_size: 3, count: 300, width: 1, pace, hosts: &[], shares: false };
        let mut plan = Plan::new(all_reduce(Algorithm::Ring, shape));
        // Lane 0 sends, lane 1 receives. Ten bytes of the first chunk have come: round two may send those ten.
        plan.advance(0, 100);
        plan.advance(1, 10);
        let (action, span) = plan.ready(plan.front(0).unwrap());
        assert_eq!((action, span.len), (Action::Send(1), 10));
    }
}

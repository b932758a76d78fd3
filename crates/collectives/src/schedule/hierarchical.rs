//! The hierarchical reduction: as much as can be inside each host, and between hosts once.
//!
//! Chunk c belongs to rank c. On every other host one rank, the chunk's *gateway*, stands for all of them: it adds up
//! what its host has, and passes it on. A host's ranks are gateways of about as many chunks each, so hosts may have
//! different numbers of ranks, and all of them talk over the network at once.
//!
//! 1. Inside each host everyone gives its part of chunk c to the gateway, which adds them (as `direct` does).
//! 2. Round the hosts, from the one after rank c's to rank c's own: each gateway adds its host's sum and passes it on.
//! 3. Back round the hosts; each gateway hands the finished chunk to the others on its host.
//!
//! With H hosts, each sends 2·(H−1)/H·b bytes to the next one in 2·(H−1) rounds: the least there is, whatever the number
//! of ranks on it. A flat ring of n ranks, even if it visits host by host, sends 2·(n−1)/n·b in 2·(n−1) rounds, and all
//! of them wait for the slow link. This is the two-level scheme of BlueConnect (Cho et al. 2019) and of Horovod's
//! hierarchical all-reduce, with the ring between hosts cut among all ranks of a host rather than given to one.
//!
//! Sum, for chunk c with hosts numbered from the one after rank c's: (host 1 + host 2) + … + host H, where a host's sum is
//! (x[g] + x[g+1]) + …, from its gateway g on round the host's ranks. On one host that is `direct` in another order, and
//! with one rank a host it is `ring`.

use super::{Action, Shape, Span, Step};

/// Which half of an all-reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// To where rank c has the sum of chunk c.
    Reduce,
    /// From there to where all have it.
    Gather,
    /// The one, then the other.
    Both,
}

/// Who is where.
struct Layout {
    /// The ranks of each host; hosts in the order of their first ranks.
    hosts: Vec<Vec<usize>>,
    /// The host of each rank.
    of: Vec<usize>,
}

impl Layout {
    fn new(shape: &Shape<'_>) -> Self {
        let mut layout = Self { hosts: Vec::new(), of: Vec::new() };
        let mut names: Vec<usize> = Vec::new();
        for rank in 0..shape.world_size {
            let name = shape.hosts.get(rank).copied().unwrap_or(0);
            let host = names.iter().position(|known| *known == name).unwrap_or_else(|| {
                names.push(name);
                layout.hosts.push(Vec::new());
                names.len() - 1
            });
            layout.hosts[host].push(rank);
            layout.of.push(host);
        }
        layout
    }

    /// The host `distance` after rank `chunk`'s, and its ranks from the chunk's gateway on.
    fn host(&self, chunk: usize, distance: usize) -> impl Iterator<Item = usize> + '_ {
        let ranks = &self.hosts[(self.of[chunk] + distance) % self.hosts.len()];
        let gateway = match ranks.iter().position(|rank| *rank == chunk) {
            Some(owner) => owner,
            None => chunk % ranks.len(),
        };
        ranks[gateway..].iter().chain(&ranks[..gateway]).copied()
    }

    fn gateway(&self, chunk: usize, distance: usize) -> usize {
        self.host(chunk, distance).next().unwrap_or(chunk)
    }
}

/// Steps of `part` over the chunks that `chunk` names.
pub(super) fn hierarchical(
    shape: Shape<'_>,
    part: Part,
    chunk: &dyn Fn(usize) -> Span,
    steps: &mut Vec<Step>,
) {
    let layout = Layout::new(&shape);
    let hosts = layout.hosts.len();
    let longest = (0..shape.world_size).map(|c| chunk(c).len).max().unwrap_or(0);
    let rounds = match part {
        Part::Reduce => 0..hosts,
        Part::Gather => hosts..2 * hosts,
        Part::Both => 0..2 * hosts,
    };
    for (index, piece) in shape.waves(rounds.len(), shape.pieces(longest)) {
        let round = rounds.start + index;
        for c in 0..shape.world_size {
            let Some(span) = shape.cut(chunk(c), piece) else { continue };
            let mut exchange = |from: usize, to: usize, take: fn(usize) -> Action| {
                if from == shape.rank {
                    steps.push(Step { action: Action::Send(to), span });
                } else if to == shape.rank {
                    steps.push(Step { action: take(from), span });
                }
            };
            if round == 0 {
                for distance in 1..=hosts {
                    let gateway = layout.gateway(c, distance);
                    for from in layout.host(c, distance).skip(1) {
                        exchange(from, gateway, Action::RecvReduce);
                    }
                }
            } else if round < hosts {
                exchange(layout.gateway(c, round), layout.gateway(c, round + 1), Action::RecvReduce);
            } else {
                let distance = round - hosts;
                let gateway = layout.gateway(c, distance);
                if distance + 1 < hosts {
                    exchange(gateway, layout.gateway(c, distance + 1), Action::Recv);
                }
                // Two have nobody else to share with. Within an all-reduce it costs more than it saves (`all_reduce`).
                if shape.shares && part == Part::Gather && layout.host(c, distance).count() > 2 {
                    let here = layout.host(c, distance).any(|rank| rank == shape.rank);
                    let action = if gateway == shape.rank { Action::Share } else { Action::Take(gateway) };
                    steps.extend(here.then_some(Step { action, span }));
                    continue;
                }
                for to in layout.host(c, distance).skip(1) {
                    exchange(gateway, to, Action::Recv);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Algorithm, Pace, all_reduce};
    use super::*;

    /// Bytes that each host sends to others.
    fn between_hosts(hosts: &[usize], count: usize, algorithm: Algorithm) -> Vec<usize> {
        let mut sent = vec![0; hosts.iter().max().map_or(0, |most| most + 1)];
        for rank in 0..hosts.len() {
            let shape = Shape {
                rank,
                world_size: hosts.len(),
                count,
                width: 1,
                pace: Pace { piece: 7, lead: 2 },
                hosts,
                shares: false,
            };
            for step in all_reduce(algorithm, shape) {
                if let Action::Send(to) = step.action
                    && hosts[to] != hosts[rank]
                {
                    sent[hosts[rank]] += step.span.len;
                }
            }
        }
        sent
    }

    #[test]
    fn hosts_send_the_least_that_they_can() {
        // Two hosts of four: half the vector is reduced on each, and comes back.
        assert_eq!(between_hosts(&[0, 0, 0, 0, 1, 1, 1, 1], 800, Algorithm::Hierarchical), [800, 800]);
        assert_eq!(between_hosts(&[0, 0, 0, 0, 1, 1, 1, 1], 800, Algorithm::Ring), [1400, 1400]);
        // Three hosts in any order, with any number of ranks: 2·(H−1)·b in all.
        for hosts in [&[0, 1, 2, 0, 1, 2][..], &[2, 0, 0, 1, 0], &[0, 1, 1, 1, 1, 1, 1, 2]] {
            let sent = between_hosts(hosts, 840, Algorithm::Hierarchical);
            assert_eq!(sent.iter().sum::<usize>(), 4 * 840, "{hosts:?}: {sent:?}");
        }
    }

    #[test]
    fn one_rank_a_host_is_a_ring() {
        let hosts = [0, 1, 2, 3];
        for rank in 0..4 {
            let pace = Pace::WHOLE;
            let shape =
                Shape { rank, world_size: 4, count: 103, width: 4, pace, hosts: &hosts, shares: false };
            let sends = |algorithm| {
                let steps = all_reduce(algorithm, shape).into_iter();
                steps.filter(|s| matches!(s.action, Action::Send(_))).collect::<Vec<_>>()
            };
            assert_eq!(sends(Algorithm::Hierarchical), sends(Algorithm::Ring));
        }
    }
}

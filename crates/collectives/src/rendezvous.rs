//! Who is in which epoch: a pure state machine, so that it can be run through any history.
//!
//! An epoch is formed once, has fixed ranks, and never changes; a failure ends it and the next one is formed. The rules:
//!
//! - The first epoch begins when `world_size` members wait.
//! - A later one begins when every member of the last one waits or has gone, and at least `min_world_size` wait. Members
//!   keep their order; those who are new come after them.
//! - A member that neither waits nor goes (stopped, cut off) is waited for `settle` after the first one came back. Then
//!   it is *fenced*: the epoch begins without it, its connection is closed, and when it wakes up it joins as new.
//! - An epoch may take `forming` until its members are connected; who is still at that isn't fenced for it. Members say
//!   how long they would give it, longer with each attempt that came to nothing, and the longest counts for all: where
//!   the machine is so busy that handshakes take seconds, equal short attempts would fail for as long as it is.
//! - When all members have gone, it is as in the beginning.
//! - A member may say that what they came for is done. From then on nobody is let in who isn't of the last epoch; its members
//!   may still form others, to do again what only some of them have done.

use std::collections::BTreeMap;
use std::time::Duration;

/// A member's connection to the store. Never used twice.
pub type MemberId = u64;

/// When epochs begin.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Members of the first epoch.
    pub world_size: usize,
    /// Fewer than this many never form an epoch.
    pub min_world_size: usize,
    /// How long a member that is connected, but doesn't come, is waited for.
    pub settle: Duration,
}

/// What happened to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wants to be in the next epoch.
    Join {
        /// Who.
        id: MemberId,
        /// How long it would give the epoch to come to stand; [`MOST_FORMING`] is the most that counts.
        forming: Duration,
    },
    /// Its connection is closed.
    Gone(MemberId),
    /// It says that what members came for is done.
    Conclude(MemberId),
    /// It isn't: a new job begins.
    Reopen,
    /// Time passed.
    Tick,
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// An epoch begins: tell these members, in the order of their ranks.
    Begin {
        /// Its number; the first is 1.
        epoch: u64,
        /// Rank r is the r-th.
        members: Vec<MemberId>,
        /// How long they may take to connect to each other.
        forming: Duration,
    },
    /// Close this member's connection.
    Fence(MemberId),
    /// Tell it that all is done.
    TurnAway(MemberId),
}

/// The longest that an epoch may take to come to stand.
pub const MOST_FORMING: Duration = Duration::from_secs(30);

/// Who waits.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: Duration,
    forming: Duration,
}

/// The members, and those who wait. Times are since any fixed beginning.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    policy: Policy,
    epoch: u64,
    /// Members of the last epoch that are still connected, with their ranks.
    members: BTreeMap<MemberId, usize>,
    /// Who waits.
    waiting: BTreeMap<MemberId, Waiting>,
    /// By when the last epoch's members are connected to each other, or ask for another.
    formed: Duration,
    concluded: bool,
}

impl Rendezvous {
    /// Nobody has come yet.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            epoch: 0,
            members: BTreeMap::new(),
            waiting: BTreeMap::new(),
            formed: Duration::ZERO,
            concluded: false,
        }
    }

    /// Takes in one event.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Command> {
        match event {
            Event::Join { id, forming } => {
                let forming = forming.min(MOST_FORMING);
                self.waiting.entry(id).or_insert(Waiting { since: now, forming });
            }
            Event::Gone(id) => {
                self.waiting.remove(&id);
                self.members.remove(&id);
            }
            // Who isn't of the last epoch can't have done its work.
            Event::Conclude(id) => self.concluded |= self.members.contains_key(&id),
            Event::Reopen => self.concluded = false,
            Event::Tick => {}
        }
        let mut commands = Vec::new();
        if self.concluded {
            let late: Vec<MemberId> =
                self.waiting.keys().filter(|id| !self.members.contains_key(id)).copied().collect();
            for id in late {
                self.waiting.remove(&id);
                commands.push(Command::TurnAway(id));
            }
            // That it has been heard.
            if let Event::Conclude(id) = event {
                commands.push(Command::TurnAway(id));
            }
        }
        let absent: Vec<MemberId> =
            self.members.keys().filter(|id| !self.waiting.contains_key(id)).copied().collect();
        let back = self
            .waiting
            .iter()
            .filter(|(id, _)| self.members.contains_key(id))
            .map(|(_, waiting)| waiting.since)
            .min();
        let enough =
            if self.members.is_empty() { self.policy.world_size } else { self.policy.min_world_size };
        if self.waiting.len() < enough.max(1) || (!self.members.is_empty() && back.is_none()) {
            return commands;
        }
        if !absent.is_empty() {
            let settling = |since: Duration| now < since.max(self.formed) + self.policy.settle;
            if back.is_none_or(settling) {
                return commands;
            }
            for id in absent {
                self.members.remove(&id);
                commands.push(Command::Fence(id));
            }
        }
        let mut order: Vec<MemberId> = self.waiting.keys().copied().collect();
        // Ids grow with time, so newcomers are in the order of their coming.
        order.sort_by_key(|id| (self.members.get(id).copied().unwrap_or(usize::MAX), *id));
        let forming = self.waiting.values().map(|waiting| waiting.forming).max().unwrap_or_default();
        self.formed = now + forming;
        self.epoch += 1;
        self.waiting.clear();
        self.members = order.iter().enumerate().map(|(rank, id)| (*id, rank)).collect();
        commands.push(Command::Begin { epoch: self.epoch, members: order, forming });
        commands
    }

    /// Members that wait for the next epoch.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Those of them who are not of the last epoch: for them the members would have to come too. None where there are
    /// no members, as the next epoch then waits for nobody.
    pub fn newcomers(&self) -> usize {
        let new = |id: &&MemberId| !self.members.contains_key(id);
        if self.members.is_empty() { 0 } else { self.waiting.keys().filter(new).count() }
    }

    /// The member with the lowest rank of the last epoch.
    pub fn lead(&self) -> Option<MemberId> {
        self.members.iter().min_by_key(|(_, rank)| **rank).map(|(id, _)| *id)
    }

    /// How many members the last epoch still has.
    pub fn present(&self) -> usize {
        self.members.len()
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    const POLICY: Policy = Policy { world_size: 3, min_world_size: 1, settle: Duration::from_secs(5) };

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    const FORMING: Duration = Duration::from_millis(500);

    fn begin(epoch: u64, members: &[MemberId]) -> Command {
        Command::Begin { epoch, members: members.to_vec(), forming: FORMING }
    }

    fn join(id: MemberId) -> Event {
        Event::Join { id, forming: FORMING }
    }

    fn formed() -> Rendezvous {
        let mut r = Rendezvous::new(POLICY);
        assert!(r.step(at(0), join(1)).is_empty() && r.step(at(0), join(2)).is_empty());
        assert_eq!(r.step(at(0), join(3)), [begin(1, &[1, 2, 3])]);
        r
    }

    #[test]
    fn survivors_go_on_at_once_in_their_order() {
        let mut r = formed();
        assert!(r.step(at(1), join(3)).is_empty());
        assert!(r.step(at(1), Event::Gone(2)).is_empty());
        assert_eq!(r.step(at(1), join(1)), [begin(2, &[1, 3])]);
    }

    #[test]
    fn who_does_not_come_is_fenced_and_returns_as_new() {
        let mut r = formed();
        r.step(at(1), join(1));
        r.step(at(2), join(3));
        assert!(r.step(at(5), Event::Tick).is_empty());
        assert_eq!(r.step(at(6), Event::Tick), [Command::Fence(2), begin(2, &[1, 3])]);
        // It woke up, found its connection closed, and came back as 4. Alone it changes nothing.
        assert!(r.step(at(7), join(4)).is_empty() && r.step(at(60), Event::Tick).is_empty());
        assert_eq!((r.newcomers(), r.lead()), (1, Some(1)));
        r.step(at(61), join(3));
        assert_eq!(r.newcomers(), 1, "3 waits too, and is none");
        assert_eq!(r.step(at(61), join(1)), [begin(3, &[1, 3, 4])]);
        assert_eq!(r.newcomers(), 0);
    }

    /// A worker that was fenced while the others did the last of their work came back to nobody, and waited in vain.
    #[test]
    fn who_comes_when_all_is_done_is_told_so() {
        let mut r = formed();
        r.step(at(1), join(1));
        r.step(at(2), join(3));
        assert_eq!(r.step(at(6), Event::Tick), [Command::Fence(2), begin(2, &[1, 3])]);
        assert!(r.step(at(7), Event::Conclude(2)).is_empty(), "not one of them");
        assert!(r.step(at(7), join(4)).is_empty());
        assert_eq!(r.step(at(8), Event::Conclude(1)), [Command::TurnAway(4), Command::TurnAway(1)]);
        assert_eq!((r.waiting(), r.newcomers()), (0, 0));
        assert_eq!(r.step(at(9), join(5)), [Command::TurnAway(5)]);
        // 3 hasn't done its part, and does it alone.
        assert!(r.step(at(9), Event::Gone(1)).is_empty());
        assert_eq!(r.step(at(9), join(3)), [begin(3, &[3])]);
        r.step(at(10), Event::Gone(3));
        assert_eq!(r.step(at(11), join(6)), [Command::TurnAway(6)]);
        r.step(at(12), Event::Reopen);
        let new: Vec<Vec<Command>> = (7..10).map(|id| r.step(at(13), join(id))).collect();
        assert_eq!(new[2], [begin(4, &[7, 8, 9])]);
    }

    /// On a starved machine connecting took longer than the half second that an epoch was given. Who had given up asked
    /// for the next one, the others were fenced while they still tried, came back as new and were too slow again; that
    /// went on for minutes.
    #[test]
    fn who_is_still_connecting_is_not_fenced_and_the_longest_patience_counts_for_all() {
        let mut r = formed();
        let slow = |id, seconds| Event::Join { id, forming: at(seconds) };
        assert!(r.step(at(1), slow(1, 8)).is_empty() && r.step(at(1), join(2)).is_empty());
        let said = r.step(at(1), join(3));
        assert_eq!(said, [Command::Begin { epoch: 2, members: vec![1, 2, 3], forming: at(8) }]);
        // One gives up at once; the others may try until second 9, and have the usual time to come back then.
        assert!(r.step(at(2), join(1)).is_empty() && r.step(at(13), Event::Tick).is_empty());
        r.step(at(13), join(2));
        assert_eq!(r.step(at(14), Event::Tick), [Command::Fence(3), begin(3, &[1, 2])]);
        // Nobody can make the others wait for ever.
        r.step(at(15), slow(1, u64::MAX / 4));
        let said = r.step(at(15), join(2));
        assert_eq!(said, [Command::Begin { epoch: 4, members: vec![1, 2], forming: MOST_FORMING }]);
    }

    #[test]
    fn any_history_keeps_the_rules() {
        for seed in 0..300 {
            let mut random = Philox::new(seed, 0);
            let mut r = Rendezvous::new(POLICY);
            let (mut alive, mut next, mut epoch, mut now) = (Vec::<MemberId>::new(), 1, 0, Duration::ZERO);
            for _ in 0..400 {
                now += Duration::from_millis(random.next_u64() % 900);
                let pick = random.next_u64() as usize % (alive.len() + 1);
                let event = match (random.next_u64() % 8, alive.get(pick).copied()) {
                    (0, Some(id)) => {
                        alive.retain(|other| *other != id);
                        Event::Gone(id)
                    }
                    (1..6, Some(id)) => join(id),
                    (6, _) if alive.len() < 6 => {
                        next += 1;
                        alive.push(next);
                        join(next)
                    }
                    _ => Event::Tick,
                };
                for command in r.step(now, event) {
                    match command {
                        Command::Fence(id) => alive.retain(|other| *other != id),
                        Command::TurnAway(id) => panic!("seed {seed}: {id} was turned away"),
                        Command::Begin { epoch: number, members, .. } => {
                            assert_eq!(number, epoch + 1, "seed {seed}");
                            epoch = number;
                            assert!(
                                members.iter().all(|id| alive.contains(id)),
                                "seed {seed}: a dead member"
                            );
                            let mut once = members.clone();
                            once.sort_unstable();
                            once.dedup();
                            assert_eq!(once.len(), members.len(), "seed {seed}: a member twice");
                        }
                    }
                }
            }
            assert!(epoch > 3, "seed {seed} formed {epoch} epochs");
        }
    }
}

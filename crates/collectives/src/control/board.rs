//! What is known of each peer, and when that becomes a fault. Pure: the time is an argument.

use std::time::{Duration, Instant};

use super::wire::Message;
use crate::call::Call;
use crate::error::Fault;

/// What is known of one peer.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// The long call that it said it is in.
    pub(super) call: Option<Call>,
    /// Whether it left with a word.
    pub(super) left: bool,
    heard_at: Instant,
    watched: bool,
}

/// All peers, and the first thing that went wrong.
#[derive(Debug)]
pub(super) struct Board {
    pub(super) peers: Vec<Seen>,
    pub(super) fault: Option<Fault>,
    silence: Duration,
    ticked_at: Instant,
}

impl Board {
    /// `watched` says, for each rank, whether it is a peer (and not this rank).
    pub(super) fn new(watched: impl Iterator<Item = bool>, silence: Duration, now: Instant) -> Self {
        let peers = watched.map(|watched| Seen { call: None, left: false, heard_at: now, watched }).collect();
        Self { peers, fault: None, silence, ticked_at: now }
    }

    /// Notes a fault, if it is the first; says whether it was.
    pub(super) fn failed(&mut self, fault: Fault) -> bool {
        let first = self.fault.is_none();
        if first {
            self.fault = Some(fault);
        }
        first
    }

    /// A message came. Says whether a waiting call should look.
    pub(super) fn heard(&mut self, peer: usize, message: Message, now: Instant) -> bool {
        self.peers[peer].heard_at = now;
        match message {
            Message::Alive { call } => {
                let changed = self.peers[peer].call != call;
                self.peers[peer].call = call;
                changed
            }
            Message::Abort { lost, reason } => self.failed(Fault::Aborted { by: peer, reason, lost }),
            Message::Goodbye => {
                self.peers[peer].left = true;
                self.peers[peer].watched = false;
                true
            }
        }
    }

    /// The connection is closed.
    pub(super) fn closed(&mut self, peer: usize, how: &str) -> bool {
        let expected = self.peers[peer].left;
        self.peers[peer].watched = false;
        !expected && self.failed(Fault::Lost { peer, how: how.to_owned() })
    }

    /// Time passed: who is silent for too long?
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        let paused = now.duration_since(self.ticked_at) > self.silence / 2;
        self.ticked_at = now;
        if paused {
            // It was this process that did nothing. Everyone starts anew.
            for peer in &mut self.peers {
                peer.heard_at = now;
            }
            return false;
        }
        let silent = self.peers.iter().enumerate().find_map(|(rank, peer)| {
            let silent = now.duration_since(peer.heard_at);
            (peer.watched && silent > self.silence).then_some((rank, silent))
        });
        silent.is_some_and(|(peer, silent)| self.failed(Fault::Silent { peer, silent }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn silence_is_a_fault_and_a_pause_of_ones_own_is_not() {
        let start = Instant::now();
        let mut board = Board::new([false, true, true].into_iter(), ms(100), start);
        for at in (0..=100).step_by(20) {
            board.heard(1, Message::Alive { call: None }, start + ms(at));
            assert!(!board.tick(start + ms(at)));
        }
        assert!(board.tick(start + ms(120)));
        assert_eq!(board.fault, Some(Fault::Silent { peer: 2, silent: ms(120) }));

        let mut paused = Board::new([false, true].into_iter(), ms(100), start);
        assert!(!paused.tick(start + ms(5000)), "we were stopped, they were not");
        assert!(!paused.tick(start + ms(5040)) && !paused.tick(start + ms(5080)));
        assert!(paused.tick(start + ms(5120)));
    }

    #[test]
    fn leaving_with_a_word_is_no_loss_and_the_first_fault_stays() {
        let now = Instant::now();
        let mut board = Board::new([false, true, true].into_iter(), ms(100), now);
        board.heard(1, Message::Goodbye, now);
        assert!(!board.closed(1, "closed") && board.fault.is_none() && board.peers[1].left);
        assert!(board.closed(2, "closed"));
        board.heard(2, Message::abort(Some(1), "late"), now);
        assert_eq!(board.fault, Some(Fault::Lost { peer: 2, how: "closed".into() }));
    }
}

//! Long chunks in pieces: in which order a rank's rounds take turns.
//!
//! Round by round, a vector beyond the caches goes through them once a round: a ring of two ranks would send the last
//! reduced byte of its chunk only after it has sent the whole of its other chunk, and read it from memory again. Piece
//! by piece, each round follows the one before it at a distance of `lead` pieces, and what was just reduced is sent
//! from the cache. For two ranks that is 4 bytes of memory traffic for each byte of the vector instead of 5; four is
//! the least there is, as each rank's vector must be read once and written once.
//!
//! What isn't sent yet can't arrive: no more than `lead` pieces are under way in a round. Within a host there is no way
//! to fill, so one is enough. A link must have its bandwidth times its delay under way.

use super::{Shape, Span};
use crate::transport::TransportKind;

/// How a long chunk is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Bytes of a piece; a chunk's last one may be shorter.
    pub piece: usize,
    /// By how many pieces a round is ahead of the next one.
    pub lead: usize,
}

impl Pace {
    /// Chunks are not cut.
    pub const WHOLE: Self = Self { piece: usize::MAX, lead: 1 };

    /// The best that was measured between ranks on these hosts (one entry a rank) over `kind`.
    pub fn of(kind: TransportKind, hosts: &[usize]) -> Self {
        let one_host = hosts.iter().all(|host| *host == hosts[0]);
        let lead = match kind {
            TransportKind::SharedMemory => 1,
            // Sockets of one host hold some pieces, but have no way to fill.
            _ if one_host => 4,
            // Eight megabytes: 10 Gb/s over 6 ms.
            _ => 64,
        };
        // Of more ranks, each piece is in as many rings at once as there are other ranks.
        let shared = kind == TransportKind::SharedMemory && hosts.len() > 2;
        Self { piece: if shared { 64 << 10 } else { 128 << 10 }, lead }
    }
}

impl Shape<'_> {
    /// Pieces of the longest of some chunks; one at least.
    pub(super) fn pieces(&self, longest: usize) -> usize {
        longest.div_ceil(self.piece_bytes()).max(1)
    }

    fn piece_bytes(&self) -> usize {
        (self.pace.piece / self.width.max(1)).max(1).saturating_mul(self.width.max(1))
    }

    /// A piece of a chunk. The first is always there, if empty; both ends of a stream leave the same ones out.
    pub(super) fn cut(&self, chunk: Span, piece: usize) -> Option<Span> {
        let start = piece.checked_mul(self.piece_bytes()).filter(|start| piece == 0 || *start < chunk.len)?;
        Some(Span { start: chunk.start + start, len: (chunk.len - start).min(self.piece_bytes()), ..chunk })
    }

    /// All (round, piece), in the order in which they come.
    pub(super) fn waves(&self, rounds: usize, pieces: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        // With a lead of all pieces it goes round by round.
        let lead = self.pace.lead.clamp(1, pieces);
        let last = pieces + rounds.saturating_sub(1) * lead;
        (0..last).flat_map(move |wave| {
            let piece = move |round: usize| wave.checked_sub(round * lead).filter(|piece| *piece < pieces);
            (0..rounds).filter_map(move |round| Some((round, piece(round)?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_of_every_round_comes_once_and_after_the_same_of_the_round_before() {
        for (pieces, lead) in [(1, 1), (5, 1), (5, 2), (5, 99), (40, 3)] {
            let shape = Shape {
                rank: 0,
                world_size: 2,
                count: 0,
                width: 4,
                pace: Pace { piece: 10, lead },
                hosts: &[],
                shares: false,
            };
            let mut reached = [0; 4];
            for (round, piece) in shape.waves(4, pieces) {
                assert_eq!(piece, reached[round], "in order");
                reached[round] += 1;
                assert!(round == 0 || reached[round] <= reached[round - 1], "before its bytes are there");
            }
            assert_eq!(reached, [pieces; 4]);
        }
    }

    #[test]
    fn pieces_hold_whole_elements_and_cover_the_chunk() {
        for (bytes, width) in [(0, 4), (4, 4), (40, 4), (44, 4), (160, 8), (10, 2)] {
            let pace = Pace { piece: 10, lead: 1 };
            let shape = Shape { rank: 0, world_size: 1, count: 0, width, pace, hosts: &[], shares: false };
            let chunk = Span::main(7..7 + bytes);
            let mut next = 7;
            for piece in 0..shape.pieces(bytes) {
                let span = shape.cut(chunk, piece).unwrap();
                assert!(span.start == next && span.len.is_multiple_of(width));
                next += span.len;
            }
            assert_eq!((next, shape.cut(chunk, shape.pieces(bytes))), (7 + bytes, None));
        }
    }
}

//! Gumbel-max sampling with noise that is a function: the token with the largest `x + g` is a draw from softmax(x)
//! if each g is an independent −ln(−ln u) (Gumbel 1954; Maddison, Tarlow, Minka, "A* sampling", 2014).
//!
//! `u` of token t at position p has 40 random bits, `(2³² · h + l + ½) / 2⁴⁰`. Its high byte h is byte `t % 16` of
//! Philox4x32-10 with counter `[t / 16, p mod 2³², p / 2³², "high"]` and the seed as key; its low word l is word
//! `t % 4` of counter `[t / 4, p mod 2³², p / 2³², "low "]`. Noise belongs to tokens, not to draws: two models that
//! put out nearly equal logits pick the same token nearly always, which speculation lives on.
//!
//! Cost: one Philox block a 16 tokens. E = −ln u is at least 1 − u, hence at least (255 − h) / 256, and a token wins
//! only if E < e^−y, where y is its distance to the best so far; e^y is at least its Taylor sum. So for most chunks
//! only the tokens with h = 255 need a second look, which is one in 256.

use std::cmp::Ordering;

use consort_base::philox4x32;

use super::peaks::{CHUNK, Candidate, Peaks, Row};

const HIGH: u32 = u32::from_be_bytes(*b"high");
const LOW: u32 = u32::from_be_bytes(*b"low ");

/// Tokens whose high bytes one Philox block holds.
const GROUP: usize = 16;

/// No noise is larger: −ln(−ln(1 − 2⁻⁴¹)) is 28.42.
const LARGEST: f32 = 28.5;

/// The noise of one position.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    key: [u32; 2],
    position: [u32; 2],
}

/// The best token so far and its x + g.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    id: u32,
}

impl Best {
    const NONE: Best = Best { score: f64::NEG_INFINITY, id: u32::MAX };

    fn offer(&mut self, score: f64, id: u32) {
        if score > self.score || (score == self.score && id < self.id) {
            *self = Best { score, id };
        }
    }

    fn id(self) -> Option<u32> {
        (self.score > f64::NEG_INFINITY).then_some(self.id)
    }
}

impl Noise {
    /// The noise of the answer's token at index `position`.
    pub fn new(seed: u64, position: usize) -> Noise {
        let position = position as u64;
        Noise {
            key: [seed as u32, (seed >> 32) as u32],
            position: [position as u32, (position >> 32) as u32],
        }
    }

    #[inline(always)]
    fn block(self, index: u32, domain: u32) -> [u32; 4] {
        philox4x32([index, self.position[0], self.position[1], domain], self.key)
    }

    fn high(self, id: u32) -> u8 {
        self.block(id / GROUP as u32, HIGH)[id as usize % GROUP / 4].to_le_bytes()[id as usize % 4]
    }

    /// The noise of one token.
    pub fn of(self, id: u32) -> f64 {
        self.completed(id, self.high(id))
    }

    /// The noise of a token whose high byte is known.
    fn completed(self, id: u32, high: u8) -> f64 {
        let low = self.block(id / 4, LOW)[id as usize % 4];
        let bits = u64::from(high) << 32 | u64::from(low);
        let u = (bits as f64 + 0.5) / (1u64 << 40) as f64;
        -libm::log(-libm::log(u))
    }

    /// The candidate with the largest x + g. For short lists: every candidate takes a Philox block.
    pub fn pick(self, candidates: &[Candidate]) -> Option<u32> {
        let mut best = Best::NONE;
        for &candidate in candidates {
            self.consider(candidate, self.high(candidate.id), &mut best);
        }
        best.id()
    }

    /// The token with the largest x + g among those of the row that come no later than `last` in
    /// [`Candidate::order`].
    pub fn pick_of_row(self, row: Row<'_>, peaks: &Peaks, last: Candidate) -> Option<u32> {
        let mut best = Best::NONE;
        // The likeliest token's chunk first: it raises the bar for the others.
        for (first, chunk) in peaks.chunks_at_least(row, 0.0).take(1) {
            self.pick_of_chunk(row, first, chunk, 0.0, last, &mut best);
        }
        let floor = last.x.max(best.score as f32 - LARGEST);
        for (first, chunk) in peaks.chunks_at_least(row, floor) {
            let peak = row.x(peaks.of_chunk(first));
            self.pick_of_chunk(row, first, chunk, peak, last, &mut best);
        }
        best.id()
    }

    fn pick_of_chunk(
        self,
        row: Row<'_>,
        first: usize,
        chunk: &[f32],
        peak: f32,
        last: Candidate,
        best: &mut Best,
    ) {
        let mut high = [0u8; CHUNK];
        for (index, bytes) in high.chunks_exact_mut(GROUP).enumerate() {
            let words = self.block((first / GROUP + index) as u32, HIGH);
            for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        let least = least_high(best.score as f32 - peak);
        for (offset, (&logit, &high)) in chunk.iter().zip(&high).enumerate() {
            if high >= least {
                let candidate = Candidate { x: row.x(logit), id: (first + offset) as u32 };
                if logit > f32::NEG_INFINITY && candidate.order(&last) != Ordering::Greater {
                    self.consider(candidate, high, best);
                }
            }
        }
    }

    #[inline]
    fn consider(self, candidate: Candidate, high: u8, best: &mut Best) {
        if high >= least_high(best.score as f32 - candidate.x) {
            best.offer(f64::from(candidate.x) + self.completed(candidate.id, high), candidate.id);
        }
    }
}

/// The least high byte with which a token `distance` below the best could still win; never too large.
#[inline(always)]
fn least_high(distance: f32) -> u8 {
    let y = if distance > 0.0 { distance } else { 0.0 };
    let exponential = 1.0 + y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0 + y * (1.0 / 120.0)))));
    // 1 % of slack covers all roundings.
    let steps_below = 256.0 * 1.01 / exponential;
    255 - steps_below as u8
}

//! Gumbel-max sampling with noise that is a function: the token with the largest `x + g` is a draw from softmax(x)
//! if each g is an independent −ln(−ln u) (Gumbel 1954; Maddison, Tarlow, Minka, "A* sampling", 2014).
//!
//! `u` of token t at position p is `(w + ½) / 2³²`, where w is word `t % 4` of Philox4x32-10 with counter
//! `[t / 4, p mod 2³², p / 2³², "samp"]` and the seed as key. Noise belongs to tokens, not to draws: two models
//! that put out nearly equal logits pick the same token nearly always, which speculation lives on.
//!
//! Cost: most tokens can't win whatever their noise (g never exceeds 22.9), and of the others a bound without a
//! logarithm rules out nearly all: E = −ln u is at least 1 − u, and t wins only if E < e^−y where y is its distance
//! to the best so far; e^y is at least its Taylor sum.

use consort_base::philox4x32;

use super::peaks::{CHUNK, Candidate, Peaks, Row};

const DOMAIN: u32 = u32::from_be_bytes(*b"samp");

/// No noise is larger: −ln(−ln(1 − 2⁻³³)) is 22.87.
const LARGEST: f32 = 22.9;

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
        Noise { key: [seed as u32, (seed >> 32) as u32], position: [position as u32, (position >> 32) as u32] }
    }

    fn words(self, block: u32) -> [u32; 4] {
        philox4x32([block, self.position[0], self.position[1], DOMAIN], self.key)
    }

    /// The noise of one token.
    pub fn of(self, id: u32) -> f64 {
        gumbel(self.words(id / 4)[id as usize % 4])
    }

    /// The candidate with the largest x + g.
    pub fn pick(self, candidates: &[Candidate]) -> Option<u32> {
        let mut best = Best::NONE;
        for candidate in candidates {
            let word = self.words(candidate.id / 4)[candidate.id as usize % 4];
            if may_win(word, best.score as f32 - candidate.x) {
                best.offer(f64::from(candidate.x) + gumbel(word), candidate.id);
            }
        }
        best.id()
    }

    /// The token of the whole row with the largest x + g.
    pub fn pick_of_row(self, row: Row<'_>, peaks: &Peaks) -> Option<u32> {
        let mut best = Best::NONE;
        // The likeliest token first: it raises the bar for the others.
        for (first, chunk) in peaks.chunks_at_least(row, 0.0).take(1) {
            self.pick_of_chunk(row, first, chunk, &mut best);
        }
        let floor = best.score as f32 - LARGEST;
        for (first, chunk) in peaks.chunks_at_least(row, floor) {
            self.pick_of_chunk(row, first, chunk, &mut best);
        }
        best.id()
    }

    fn pick_of_chunk(self, row: Row<'_>, first: usize, chunk: &[f32], best: &mut Best) {
        const BLOCKS: usize = CHUNK / 4;
        let mut words = [[0u32; BLOCKS]; 4];
        for block in 0..BLOCKS {
            let drawn = self.words((first / 4 + block) as u32);
            for (lane, word) in words.iter_mut().zip(drawn) {
                lane[block] = word;
            }
        }
        let bar = best.score as f32;
        let mut hopeful = [false; CHUNK];
        for (offset, (hopeful, &logit)) in hopeful.iter_mut().zip(chunk).enumerate() {
            *hopeful = may_win(words[offset % 4][offset / 4], bar - row.x(logit));
        }
        if !hopeful.contains(&true) {
            return;
        }
        for (offset, _) in hopeful.iter().enumerate().filter(|(_, hopeful)| **hopeful) {
            let logit = chunk[offset];
            if logit > f32::NEG_INFINITY {
                let word = words[offset % 4][offset / 4];
                best.offer(f64::from(row.x(logit)) + gumbel(word), (first + offset) as u32);
            }
        }
    }
}

fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
    -libm::log(-libm::log(u))
}

/// Whether a token `distance` below the best could still win with this word; never wrongly false. False for NaN.
#[inline(always)]
fn may_win(word: u32, distance: f32) -> bool {
    // 1 − u, rounded; the slack of 1 % below covers all roundings.
    let tail = (!word) as f32 * (1.0 / 4_294_967_296.0) + 1.0 / 8_589_934_592.0;
    let y = if distance > 0.0 { distance } else { 0.0 };
    let exponential = 1.0 + y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0 + y * (1.0 / 120.0)))));
    (tail * exponential < 1.01) & (distance < f32::INFINITY)
}

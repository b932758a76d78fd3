//! The largest logit of each chunk of the row, found in one pass. It answers most later questions by skipping:
//! the k-th largest of the chunks' maxima is a lower bound of the k-th largest of all, and a chunk whose maximum
//! is below a bound holds nothing above it.
//!
//! Costs: one pass of `max`; then a top-40 of 49,152 looks into some 40 of 768 chunks.

use std::cmp::Ordering;

/// Logits in a chunk.
pub const CHUNK: usize = 64;

/// A token that may be picked, with its tempered logit relative to the largest: `x <= 0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// `(logit − largest) / temperature`.
    pub x: f32,
    /// The token.
    pub id: u32,
}

impl Candidate {
    /// Likeliest first, the lower id first among equals: a total order, since x is never NaN.
    pub fn order(&self, other: &Candidate) -> Ordering {
        other.x.total_cmp(&self.x).then(self.id.cmp(&other.id))
    }
}

/// A row of logits seen through the temperature.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The logits.
    pub logits: &'a [f32],
    largest: f32,
    inverse_temperature: f32,
}

impl<'a> Row<'a> {
    /// `largest` is the row's largest logit.
    pub fn new(logits: &'a [f32], largest: f32, temperature: f32) -> Row<'a> {
        Row { logits, largest: finite(largest), inverse_temperature: 1.0 / temperature }
    }

    /// The row's own values, for log-probabilities.
    pub fn plain(logits: &'a [f32]) -> Row<'a> {
        Row { logits, largest: 0.0, inverse_temperature: 1.0 }
    }

    /// All tempered values, into `out`.
    pub fn tempered(&self, out: &mut Vec<f32>) {
        out.clear();
        out.extend(self.logits.iter().map(|&logit| self.x(logit)));
    }

    /// The tempered value of a logit: monotone; NaN for NaN.
    #[inline(always)]
    pub fn x(&self, logit: f32) -> f32 {
        (finite(logit) - self.largest) * self.inverse_temperature
    }
}

/// +∞ counts as the largest finite number; NaN stays.
#[inline(always)]
fn finite(logit: f32) -> f32 {
    if logit > f32::MAX { f32::MAX } else { logit }
}

/// The chunks' maxima.
#[derive(Debug, Default)]
pub struct Peaks {
    peaks: Vec<f32>,
    sorted: Vec<f32>,
}

impl Peaks {
    /// Finds them for this row; NaN never is one.
    pub fn find(&mut self, logits: &[f32]) {
        self.peaks.clear();
        self.peaks.extend(logits.chunks(CHUNK).map(chunk_peak));
    }

    /// The row's largest logit; `None` if all are −∞ or NaN.
    pub fn largest(&self) -> Option<f32> {
        let largest = chunk_peak(&self.peaks);
        (largest > f32::NEG_INFINITY).then_some(largest)
    }

    /// The largest logit of the chunk that starts at token `first`.
    pub fn of_chunk(&self, first: usize) -> f32 {
        self.peaks[first / CHUNK]
    }

    /// Chunks of the row whose largest x is at least `floor`, with the index of their first token.
    pub fn chunks_at_least<'a>(
        &'a self,
        row: Row<'a>,
        floor: f32,
    ) -> impl Iterator<Item = (usize, &'a [f32])> + 'a {
        (row.logits.chunks(CHUNK).zip(&self.peaks).enumerate())
            .filter(move |(_, (_, peak))| row.x(**peak) >= floor)
            .map(|(index, (chunk, _))| (index * CHUNK, chunk))
    }

    /// Every token with `x >= floor` that isn't banned, by id.
    pub fn at_least(&self, row: Row<'_>, floor: f32, out: &mut Vec<Candidate>) {
        out.clear();
        for (first, chunk) in self.chunks_at_least(row, floor) {
            for (offset, &logit) in chunk.iter().enumerate() {
                let x = row.x(logit);
                if x >= floor && logit > f32::NEG_INFINITY {
                    out.push(Candidate { x, id: (first + offset) as u32 });
                }
            }
        }
    }

    /// The `k` first tokens in [`Candidate::order`], in no order; fewer if the others are banned. `k` is at least 1.
    pub fn top_k(&mut self, row: Row<'_>, k: usize, out: &mut Vec<Candidate>) {
        let floor = if k <= self.peaks.len() {
            self.sorted.clear();
            self.sorted.extend_from_slice(&self.peaks);
            let (_, bound, _) = self.sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            row.x(*bound)
        } else {
            f32::NEG_INFINITY
        };
        self.at_least(row, floor, out);
        if out.len() > k {
            out.select_nth_unstable_by(k - 1, Candidate::order);
            out.truncate(k);
        }
    }
}

fn chunk_peak(chunk: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut parts = chunk.chunks_exact(LANES);
    for part in &mut parts {
        for (lane, &value) in lanes.iter_mut().zip(part) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(parts.remainder()).fold(f32::NEG_INFINITY, |most, &v| if v > most { v } else { most })
}

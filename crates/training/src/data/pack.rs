//! How documents become samples of equal length.
//!
//! A document longer than a sample is cut into pieces; a piece begins with the last token of the one before it, so that
//! every token but a document's first is predicted exactly once. What is shorter than a sample is packed with others:
//! the longest first, each into the fullest sample that still takes it (best fit decreasing). Pieces in a sample don't
//! see each other; a sample is a bin of sequences and never a stretch of text that runs from one document into the next.

use std::collections::BTreeMap;

/// Tokens `start..start + len` of a data set, of which all but the first are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u32,
}

impl Piece {
    pub(super) fn rows(self) -> usize {
        self.len.saturating_sub(1) as usize
    }
}

/// The pieces of a document of `len` tokens at `start` under a sample length of `context` rows.
pub(super) fn cut(start: u64, len: u64, context: usize) -> impl Iterator<Item = Piece> {
    let rows = len.saturating_sub(1);
    let context = context as u64;
    (0..rows.div_ceil(context)).map(move |i| {
        let first = i * context;
        Piece { start: start + first, len: (rows - first).min(context) as u32 + 1 }
    })
}

/// Pieces by sample: the pieces in their new order, and where each sample's begin, with the end.
///
/// The same pieces in the same order give the same samples.
pub(super) fn pack(mut pieces: Vec<Piece>, context: usize) -> (Vec<Piece>, Vec<u64>) {
    pieces.retain(|piece| piece.rows() > 0);
    // Stable, so equal lengths stay in the order of the documents.
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len));
    let mut samples: Vec<Vec<Piece>> = Vec::new();
    // Samples with room left, by how much; in each, the one opened last first.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for piece in pieces {
        let rows = piece.rows();
        let found = open.range_mut(rows..).next().and_then(|(&room, list)| Some((room, list.pop()?)));
        let (room, sample) = found.unwrap_or_else(|| {
            samples.push(Vec::new());
            (context, samples.len() - 1)
        });
        if open.get(&room).is_some_and(Vec::is_empty) {
            open.remove(&room);
        }
        samples[sample].push(piece);
        if room > rows {
            open.entry(room - rows).or_default().push(sample);
        }
    }
    let mut starts = Vec::with_capacity(samples.len() + 1);
    let mut packed = Vec::new();
    for sample in samples {
        starts.push(packed.len() as u64);
        packed.extend(sample);
    }
    starts.push(packed.len() as u64);
    (packed, starts)
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for len in 0..40u64 {
            let mut predicted: Vec<u64> = cut(100, len, 7)
                .flat_map(|piece| {
                    assert!((1..=7).contains(&piece.rows()));
                    (piece.start + 1..piece.start + u64::from(piece.len)).collect::<Vec<_>>()
                })
                .collect();
            predicted.sort_unstable();
            assert_eq!(predicted, (101..100 + len).collect::<Vec<_>>(), "{len} tokens");
        }
    }

    #[test]
    fn samples_are_full_and_hold_every_piece_once() {
        let mut random = Philox::new(5, 0);
        let mut start = 0;
        let mut pieces = Vec::new();
        for _ in 0..2000 {
            let len = 1 + random.below(300);
            pieces.extend(cut(start, len, 128));
            start += len;
        }
        let rows: usize = pieces.iter().map(|piece| piece.rows()).sum();
        let (packed, starts) = pack(pieces.clone(), 128);
        let mut seen: Vec<u64> = packed.iter().map(|piece| piece.start).collect();
        let mut all: Vec<u64> = pieces.iter().map(|piece| piece.start).collect();
        seen.sort_unstable();
        all.sort_unstable();
        assert_eq!(seen, all);
        for sample in starts.windows(2) {
            let pieces = &packed[sample[0] as usize..sample[1] as usize];
            let rows: usize = pieces.iter().map(|piece| piece.rows()).sum();
            assert!(rows > 0 && rows <= 128);
        }
        let samples = starts.len() - 1;
        assert!(samples <= rows.div_ceil(128) + 1, "{samples} samples for {rows} rows");
    }

    #[test]
    fn nothing_gives_nothing() {
        assert_eq!(pack(Vec::new(), 8), (Vec::new(), vec![0]));
        assert_eq!(pack(vec![Piece { start: 3, len: 1 }], 8), (Vec::new(), vec![0]));
    }
}

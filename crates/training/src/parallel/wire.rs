//! Gradients in fewer bits, with what rounding takes away kept for the next step.
//!
//! Not exact, and it says so by name: `exact = false`. A worker rounds its own sums to the wire's format, and adds the
//! difference to its gradient of the next step (error feedback: Seide et al. 2014; Karimireddy et al. 2019). Each chunk's
//! owner adds what all sent it as `f32`, in the order of ranks, rounds the sum (with feedback of its own) and hands it
//! out. So all workers end with the same bits, and a value is rounded twice however many workers there are, where a ring
//! of 16-bit additions rounds at every hop.
//!
//! | wire | bytes a value | rounding |
//! |---|---|---|
//! | `bf16` | 2 | to nearest even, 8 bits of mantissa |
//! | `int8` | 1 + 4/256 | to 1/127 of the largest in each block of 256 |

use consort_collectives::{Error, Group, chunk};

use super::plan::Wire;

/// Values that share a scale.
const BLOCK: usize = 256;

/// What rounding took away in the last step: from this worker's sums, and from the sums of its own chunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Feedback {
    own: Vec<f32>,
    sums: Vec<f32>,
}

/// Bytes of `len` values.
fn bytes(wire: Wire, len: usize) -> usize {
    match wire {
        Wire::F32 => 4 * len,
        Wire::Bf16 => 2 * len,
        Wire::Int8 => len + 4 * len.div_ceil(BLOCK),
    }
}

/// Writes `values` in the wire's format, and leaves in `values` what that lost.
fn encode(wire: Wire, values: &mut [f32], out: &mut [u8]) {
    match wire {
        Wire::F32 => {
            for (value, out) in values.iter_mut().zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&value.to_le_bytes());
                *value = 0.0;
            }
        }
        Wire::Bf16 => {
            for (value, out) in values.iter_mut().zip(out.chunks_exact_mut(2)) {
                let bits = value.to_bits();
                // To nearest even; infinities stay, and NaN must not become one.
                let rounded = match value.is_nan() {
                    true => 0x7fc0,
                    false => ((u64::from(bits) + 0x7fff + u64::from(bits >> 16 & 1)) >> 16) as u16,
                };
                out.copy_from_slice(&rounded.to_le_bytes());
                let lost = *value - f32::from_bits(u32::from(rounded) << 16);
                *value = if lost.is_finite() { lost } else { 0.0 };
            }
        }
        Wire::Int8 => {
            for (values, out) in values.chunks_mut(BLOCK).zip(out.chunks_mut(4 + BLOCK)) {
                let (scale_bytes, out) = out.split_at_mut(4);
                // A NaN anywhere makes the block NaN: whoever diverges must not look well.
                let odd = values.iter().any(|value| !value.is_finite());
                let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
                let scale = if odd { f32::NAN } else { most / 127.0 };
                scale_bytes.copy_from_slice(&scale.to_le_bytes());
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                for (value, out) in values.iter_mut().zip(out) {
                    let steps = (*value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
                    *out = steps as u8;
                    let lost = *value - f32::from(steps) * scale;
                    *value = if lost.is_finite() { lost } else { 0.0 };
                }
            }
        }
    }
}

/// Passes each value of the wire's format to `each`, with its place.
fn decode(wire: Wire, from: &[u8], mut each: impl FnMut(usize, f32)) {
    match wire {
        Wire::F32 => {
            let (words, _) = from.as_chunks::<4>();
            words.iter().enumerate().for_each(|(i, word)| each(i, f32::from_le_bytes(*word)));
        }
        Wire::Bf16 => {
            let (words, _) = from.as_chunks::<2>();
            let value = |word: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*word)) << 16);
            words.iter().enumerate().for_each(|(i, word)| each(i, value(word)));
        }
        Wire::Int8 => {
            for (block, bytes) in from.chunks(4 + BLOCK).enumerate() {
                let Some((scale, bytes)) = bytes.split_first_chunk::<4>() else { return };
                let scale = f32::from_le_bytes(*scale);
                for (i, byte) in bytes.iter().enumerate() {
                    each(block * BLOCK + i, f32::from(*byte as i8) * scale);
                }
            }
        }
    }
}

/// Adds what was lost before, writes the wire's format, and keeps what that lost.
fn round(wire: Wire, values: &[f32], lost: &mut Vec<f32>, out: &mut [u8]) {
    if lost.len() != values.len() {
        // Members changed, or this is the first step.
        lost.clear();
        lost.resize(values.len(), 0.0);
    }
    lost.iter_mut().zip(values).for_each(|(lost, value)| *lost += value);
    encode(wire, lost, out);
}

/// Adds `values` over all workers, in fewer bits.
pub(super) fn all_reduce(
    group: &mut Group,
    wire: Wire,
    values: &mut [f32],
    feedback: &mut Feedback,
) -> Result<(), Error> {
    let (rank, workers) = (group.rank(), group.world_size());
    if workers == 1 {
        return Ok(());
    }
    let chunks: Vec<_> = (0..workers).map(|rank| chunk(values.len(), workers, rank)).collect();
    let counts: Vec<usize> = chunks.iter().map(|range| bytes(wire, range.len())).collect();
    let mine = chunks[rank].clone();
    if feedback.own.len() != values.len() {
        feedback.own = vec![0.0; values.len()];
    }
    let mut sent = vec![0; counts.iter().sum()];
    {
        let mut rest = &mut sent[..];
        for (range, count) in chunks.iter().zip(&counts) {
            let (out, after) = rest.split_at_mut(*count);
            let lost = &mut feedback.own[range.clone()];
            lost.iter_mut().zip(&values[range.clone()]).for_each(|(lost, value)| *lost += value);
            encode(wire, lost, out);
            rest = after;
        }
    }
    let from_each = vec![counts[rank]; workers];
    let mut received = vec![0; counts[rank] * workers];
    group.all_to_all_uneven(&sent, &counts, &mut received, &from_each)?;
    let sums = &mut values[mine];
    sums.fill(0.0);
    for part in received.chunks_exact(counts[rank].max(1)) {
        decode(wire, part, |i, value| sums[i] += value);
    }
    // The same buffer again: every chunk comes back in its place.
    let start: usize = counts[..rank].iter().sum();
    round(wire, sums, &mut feedback.sums, &mut sent[start..start + counts[rank]]);
    group.all_gather_uneven(&mut sent, &counts)?;
    let mut rest = &sent[..];
    for (range, count) in chunks.into_iter().zip(&counts) {
        let (part, after) = rest.split_at(*count);
        let values = &mut values[range];
        decode(wire, part, |i, value| values[i] = value);
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u32, len: usize) -> Vec<f32> {
        let word = |i: usize| consort_base::philox4x32([i as u32, 0, 0, 0], [seed, 0])[0];
        (0..len).map(|i| (word(i) as f32 / 2f32.powi(31) - 1.0) * 10f32.powi((i % 5) as i32 - 4)).collect()
    }

    #[test]
    fn what_is_lost_and_what_arrives_make_the_whole() {
        for wire in [Wire::F32, Wire::Bf16, Wire::Int8] {
            for len in [0, 1, 255, 256, 257, 1000] {
                let whole = values(3, len);
                let (mut lost, mut out) = (whole.clone(), vec![0; bytes(wire, len)]);
                encode(wire, &mut lost, &mut out);
                let mut back = vec![f32::NAN; len];
                decode(wire, &out, |i, value| back[i] = value);
                for (i, whole) in whole.iter().enumerate() {
                    assert!((back[i] + lost[i] - whole).abs() <= 1e-7, "{wire:?} {i}");
                    let most = match wire {
                        Wire::F32 => 0.0,
                        Wire::Bf16 => whole.abs() / 256.0,
                        Wire::Int8 => 1.0 / 254.0 + 1e-6,
                    };
                    assert!(lost[i].abs() <= most, "{wire:?} {i}: {} of {whole}", lost[i]);
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for wire in [Wire::F32, Wire::Bf16, Wire::Int8] {
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (mut lost, mut out) = (vec![1.0, odd], vec![0; bytes(wire, 2)]);
                encode(wire, &mut lost, &mut out);
                let mut back = [0.0; 2];
                decode(wire, &out, |i, value| back[i] = value);
                assert!(!back[1].is_finite() && lost.iter().all(|x| x.is_finite()), "{wire:?} {odd}");
            }
        }
    }

    #[test]
    fn what_is_lost_comes_later() {
        // A constant too small for the block's scale arrives on average all the same.
        let (mut lost, mut total) = (Vec::new(), 0.0);
        for _ in 0..1000 {
            let mut out = vec![0; bytes(Wire::Int8, 2)];
            round(Wire::Int8, &[1.0, 0.001], &mut lost, &mut out);
            decode(Wire::Int8, &out, |i, value| total += if i == 1 { value } else { 0.0 });
        }
        assert!((total - 1.0).abs() < 0.01, "{total}");
    }
}

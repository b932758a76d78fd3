//! Copies past the caches, for bytes that nobody reads soon.
//!
//! A plain store first fetches the line that it overwrites; a non-temporal one doesn't. The last pass of a large
//! all-reduce writes half of every rank's vector, which comes back from memory at the earliest in the next layer's
//! turn: a fifth of the pass's memory traffic is the fetching. Below the size of a cache the fetch is free, and the line
//! is better left where it is.

/// Copies `from` to `into` (of equal length), past the caches where the machine can.
pub(super) fn copy(into: &mut [u8], from: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: the feature was just found on this machine.
        return unsafe { copy_avx(into, from) };
    }
    into.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn copy_avx(into: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{_mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};

    assert_eq!(into.len(), from.len());
    let head = into.as_ptr().align_offset(64).min(into.len());
    let (first, into) = into.split_at_mut(head);
    let (begin, from) = from.split_at(head);
    first.copy_from_slice(begin);
    let (lines, last) = into.as_chunks_mut::<64>();
    let (sources, rest) = from.as_chunks::<64>();
    for (line, source) in lines.iter_mut().zip(sources) {
        // SAFETY: both are 64 bytes long; `line` is aligned to 64, since the head before it was cut so.
        unsafe {
            let low = _mm256_loadu_si256(source.as_ptr().cast());
            let high = _mm256_loadu_si256(source.as_ptr().add(32).cast());
            _mm256_stream_si256(line.as_mut_ptr().cast(), low);
            _mm256_stream_si256(line.as_mut_ptr().add(32).cast(), high);
        }
    }
    last.copy_from_slice(rest);
    // Streamed stores are ordered with nothing else until a fence.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_copied_at_any_alignment() {
        let source: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        for start in [0, 1, 31, 63] {
            for len in [0, 1, 63, 64, 65, 200, 777] {
                let mut target = vec![0xaa; 1000];
                copy(&mut target[start..start + len], &source[7..7 + len]);
                assert!(target[start..start + len] == source[7..7 + len]);
                assert!(target[..start].iter().chain(&target[start + len..]).all(|b| *b == 0xaa));
            }
        }
    }
}

//! Cuts a stream of somebody else's into whole events, without reading them.
//!
//! What has no end yet stays here: a stream that breaks then ends behind an event, and a client can read what is said
//! next. Bytes that end where an event does are passed on without a copy.

use bytes::{Bytes, BytesMut};

use super::attempt::Failure;
use super::sse::MAX_EVENT;

/// Cuts bytes where events end.
#[derive(Default)]
pub(super) struct WholeEvents {
    begun: BytesMut,
}

impl WholeEvents {
    /// All events that are whole now.
    ///
    /// # Errors
    /// Where one is longer than any may be.
    pub(super) fn add(&mut self, bytes: Bytes) -> Result<Bytes, Failure> {
        if self.begun.is_empty() && end_of_last(&bytes) == bytes.len() {
            return Ok(bytes);
        }
        if self.begun.len() + bytes.len() > MAX_EVENT {
            return Err(Failure::Garbage);
        }
        // What was there before holds no whole event; its end and these bytes may make one.
        let from = self.begun.len().saturating_sub(3);
        self.begun.extend_from_slice(&bytes);
        let end = end_of_last(&self.begun[from..]);
        Ok(if end == 0 { Bytes::new() } else { self.begun.split_to(from + end).freeze() })
    }

    /// What is left of an event that never ended.
    pub(super) fn rest(&mut self) -> Bytes {
        self.begun.split().freeze()
    }
}

/// Behind the last empty line; 0 where there is none.
fn end_of_last(bytes: &[u8]) -> usize {
    let empty = |at: &usize| bytes[*at] == b'\n' && matches!(&bytes[..*at], [.., b'\n'] | [.., b'\n', b'\r']);
    (0..bytes.len()).rev().find(empty).map_or(0, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    #[test]
    fn only_whole_events_leave_and_none_is_lost() {
        let stream = "data: {\"a\":1}\n\ndata: {\"b\":\"ü\"}\r\n\r\n: x\n\ndata: [DONE]\n\n".as_bytes();
        let mut rng = Philox::new(3, 0);
        for _ in 0..500 {
            let (mut events, mut rest, mut out) = (WholeEvents::default(), stream, Vec::new());
            while !rest.is_empty() {
                let (now, later) = rest.split_at((1 + rng.next_u64() as usize % 20).min(rest.len()));
                rest = later;
                let whole = events.add(Bytes::copy_from_slice(now)).unwrap();
                assert!(whole.is_empty() || end_of_last(&whole) == whole.len(), "{whole:?}");
                out.extend_from_slice(&whole);
            }
            assert_eq!(out, stream);
            assert!(events.rest().is_empty());
        }
        let mut events = WholeEvents::default();
        let big = Bytes::from(vec![b'x'; MAX_EVENT / 2 + 1]);
        assert!(events.add(big.clone()).is_ok_and(|whole| whole.is_empty()));
        assert!(events.add(big).is_err(), "an event without an end");
    }
}

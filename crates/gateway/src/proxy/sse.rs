//! Cuts a replica's bytes into whole server-sent events.
//!
//! An event leaves only when its empty line has come: half an event is never passed on, so the client's stream can go
//! on with another replica's next event at any time. An event that lies within one read isn't copied.

use bytes::{Bytes, BytesMut};

/// The longest event: an echoed prompt of a whole context with twenty alternatives a token still fits.
pub(super) const MAX_EVENT: usize = 32 << 20;

/// One event, or a comment.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// Its name, where it has one, and its data.
    Data { error: bool, data: Bytes },
    /// `[DONE]`.
    Done,
    /// A comment, an event without data: a sign of life.
    Comment,
}

/// What came is no stream of events.
#[derive(Debug, PartialEq)]
pub(crate) struct Garbage;

/// Takes bytes as they come, gives events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// The last read, as far as it isn't taken.
    frame: Bytes,
    /// The beginning of an event that began in an earlier read.
    begun: BytesMut,
}

impl Events {
    /// Takes what was read. All events of the last read must have been taken.
    pub(crate) fn push(&mut self, frame: Bytes) {
        self.frame = frame;
    }

    /// The next whole event.
    ///
    /// # Errors
    /// Where an event is too long or not one.
    pub(crate) fn next(&mut self) -> Result<Option<Event>, Garbage> {
        if self.frame.is_empty() {
            return Ok(None);
        }
        let event = if self.begun.is_empty() {
            match end_of_event(&self.frame, 0) {
                Some(end) => self.frame.split_to(end),
                None => {
                    self.begun.extend_from_slice(&std::mem::take(&mut self.frame));
                    return if self.begun.len() > MAX_EVENT { Err(Garbage) } else { Ok(None) };
                }
            }
        } else {
            // The empty line may have begun in what was there before.
            let from = self.begun.len().saturating_sub(3);
            let before = self.begun.len();
            self.begun.extend_from_slice(&self.frame);
            match end_of_event(&self.begun, from) {
                Some(end) => {
                    let event = self.begun.split_to(end).freeze();
                    self.begun.clear();
                    let _ = self.frame.split_to(end - before);
                    event
                }
                None => {
                    self.frame = Bytes::new();
                    return if self.begun.len() > MAX_EVENT { Err(Garbage) } else { Ok(None) };
                }
            }
        };
        read(event).map(Some)
    }
}

/// Behind the first empty line that ends at or after `from`.
fn end_of_event(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(newline) = bytes[at..].iter().position(|b| *b == b'\n') {
        at += newline + 1;
        match &bytes[at..] {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
    None
}

fn read(event: Bytes) -> Result<Event, Garbage> {
    let text = std::str::from_utf8(&event).map_err(|_| Garbage)?;
    let (mut error, mut data) = (false, None);
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("data:") {
            let value = value.strip_prefix(' ').unwrap_or(value);
            if data.replace(value).is_some() {
                return Err(Garbage);
            }
        } else if let Some(name) = line.strip_prefix("event:") {
            error = name.trim() == "error";
        } else if !line.is_empty()
            && !line.starts_with(':')
            && !line.starts_with("id:")
            && !line.starts_with("retry:")
        {
            return Err(Garbage);
        }
    }
    Ok(match data {
        None => Event::Comment,
        Some("[DONE]") if !error => Event::Done,
        Some(data) => {
            let data = event.slice_ref(data.as_bytes());
            Event::Data { error, data }
        }
    })
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    const STREAM: &str = "data: {\"a\":1}\n\n: keep-alive\n\nevent: error\ndata: {}\n\nid: 3\r\ndata:x\r\n\r\ndata: [DONE]\n\n";

    fn expected() -> Vec<Event> {
        let data =
            |error, text: &'static str| Event::Data { error, data: Bytes::from_static(text.as_bytes()) };
        vec![data(false, "{\"a\":1}"), Event::Comment, data(true, "{}"), data(false, "x"), Event::Done]
    }

    #[test]
    fn events_are_the_same_however_the_bytes_come() {
        let mut rng = Philox::new(5, 0);
        for round in 0..500 {
            let (mut events, mut found, mut rest) = (Events::default(), Vec::new(), STREAM.as_bytes());
            while !rest.is_empty() {
                let most = if round == 0 { 1 } else { 1 + rng.next_u64() as usize % 20 };
                let (now, later) = rest.split_at(most.min(rest.len()));
                rest = later;
                events.push(Bytes::copy_from_slice(now));
                while let Some(event) = events.next().unwrap() {
                    found.push(event);
                }
            }
            assert_eq!(found, expected(), "round {round}");
        }
    }

    #[test]
    fn half_an_event_stays_inside_and_garbage_is_told() {
        let mut events = Events::default();
        events.push(Bytes::from_static(b"data: {\"a\":1}\n"));
        assert_eq!(events.next(), Ok(None));
        for garbage in [&b"\xff\xfe\n\n"[..], b"HTTP/1.1 200 OK\n\n", b"data: a\ndata: b\n\n"] {
            let mut events = Events::default();
            events.push(Bytes::copy_from_slice(garbage));
            assert_eq!(events.next(), Err(Garbage), "{garbage:?}");
        }
    }
}

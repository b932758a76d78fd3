//! One trace for a request across processes (W3C Trace Context, level 1), and the spans it is made of.

use std::time::{SystemTime, UNIX_EPOCH};

/// The trace that a request belongs to, and our own span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    span: u64,
    parent: Option<u64>,
    sampled: bool,
}

impl Trace {
    /// The trace that a `traceparent` header names rightly, with a span of our own; a new one otherwise. A trace that
    /// begins here is exported where spans are ([`crate::otlp`]); whether one from elsewhere is, is said there.
    pub fn of(traceparent: Option<&str>, random: impl Fn() -> u64) -> Trace {
        let span = random() | 1;
        match traceparent.and_then(parse) {
            Some((id, parent, sampled)) => Trace { id, span, parent: Some(parent), sampled },
            None => {
                let id = u128::from(random()) << 64 | u128::from(random()) | 1;
                Trace { id, span, parent: None, sampled: crate::otlp::is_on() }
            }
        }
    }

    /// The `traceparent` for whoever is asked next, as ASCII.
    pub fn header(&self) -> [u8; 55] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut text[3..35], self.id);
        put_hex(&mut text[36..52], u128::from(self.span));
        text[54] += u8::from(self.sampled);
        text
    }

    /// The trace's id, as logs show it.
    pub fn id(&self) -> String {
        let mut text = [0; 32];
        put_hex(&mut text, self.id);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Whether its spans are wanted.
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }

    pub(crate) fn ids(&self) -> (u128, u64, Option<u64>) {
        (self.id, self.span, self.parent)
    }
}

/// Fills `digits` with the low digits of `number`. On every request's way, where formatting costs ten times as much.
pub fn put_hex(digits: &mut [u8], mut number: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

fn parse(text: &str) -> Option<(u128, u64, bool)> {
    let mut parts = text.trim().splitn(4, '-');
    let (version, id, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    // A later version may say more behind the flags.
    let flags = if version == "00" { flags } else { flags.split('-').next()? };
    if !hex(version, 2) || version == "ff" || !hex(id, 32) || !hex(span, 16) || !hex(flags, 2) {
        return None;
    }
    let id = u128::from_str_radix(id, 16).ok().filter(|id| *id != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    Some((id, span, u8::from_str_radix(flags, 16).ok()? & 1 == 1))
}

/// A value of a span's attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Text(String),
    /// A whole number.
    Int(i64),
    /// Yes or no.
    Flag(bool),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Flag(flag)
    }
}

/// One request as one process saw it. Nothing of prompts, answers or keys belongs into it.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it belongs.
    pub trace: Trace,
    /// What it is, from few possible names.
    pub name: &'static str,
    /// Nanoseconds since 1970.
    pub began_ns: u64,
    /// Nanoseconds since 1970.
    pub ended_ns: u64,
    /// It failed, for a reason that wasn't the client's.
    pub failed: bool,
    /// What is known of it.
    pub attributes: Vec<(&'static str, Value)>,
}

impl Span {
    /// A span that ends now and began `took` ago.
    pub fn ending(trace: Trace, name: &'static str, took: std::time::Duration) -> Span {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ns = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Span {
            trace,
            name,
            began_ns: ns(now.saturating_sub(took)),
            ended_ns: ns(now),
            failed: false,
            attributes: Vec::new(),
        }
    }

    /// With one thing more that is known of it.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Span {
        self.attributes.push((name, value.into()));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_trace_goes_on_and_a_wrong_one_begins_anew() {
        let of = |value: &str| Trace::of(Some(value), || 7);
        let trace = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(&trace.header(), b"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000007-01");
        assert_eq!((trace.parent, trace.is_sampled()), (Some(0x00f0_67aa_0ba9_02b7), true));
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!((of(wrong).id, of(wrong).parent), (7 << 64 | 7, None), "{wrong}");
        }
    }
}

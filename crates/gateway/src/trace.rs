//! One trace for a request across gateway and replica (W3C Trace Context, level 1).

use hyper::header::{HeaderMap, HeaderName, HeaderValue};

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The trace a request belongs to, and the gateway's own span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    id: u128,
    span: u64,
    sampled: bool,
}

impl Trace {
    /// The client's trace where it names one rightly, with a span of our own; a new one otherwise.
    pub(crate) fn of(headers: &HeaderMap, random: impl Fn() -> u64) -> Trace {
        let span = random() | 1;
        let given = headers.get(&TRACEPARENT).and_then(|value| parse(value.to_str().ok()?));
        let (id, sampled) =
            given.unwrap_or_else(|| (u128::from(random()) << 64 | u128::from(random()) | 1, false));
        Trace { id, span, sampled }
    }

    /// For the replica.
    pub(crate) fn header(&self) -> HeaderValue {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut text[3..35], self.id);
        put_hex(&mut text[36..52], u128::from(self.span));
        text[54] += u8::from(self.sampled);
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// The trace's id, as logs show it.
    pub(crate) fn id(&self) -> String {
        let mut text = [0; 32];
        put_hex(&mut text, self.id);
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// Fills `digits` with the low digits of `number`. On every request's way, where formatting costs ten times as much.
pub(crate) fn put_hex(digits: &mut [u8], mut number: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

fn parse(text: &str) -> Option<(u128, bool)> {
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
    u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    Some((id, u8::from_str_radix(flags, 16).ok()? & 1 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_trace_goes_on_and_a_wrong_one_begins_anew() {
        let of = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, HeaderValue::from_static(value));
            Trace::of(&headers, || 7)
        };
        let trace = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(trace.header(), "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000007-01");
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!(of(wrong).id, 7 << 64 | 7, "{wrong}");
        }
    }
}

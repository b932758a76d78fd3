//! Heads: the request's, written; the response's, read.
//!
//! Of a response's headers only those are kept that somebody here looks at. A head that comes byte by byte is looked at
//! once a line and not once a byte ([`Reader`]).

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;

use bytes::{BufMut as _, Bytes, BytesMut};
use hyper::StatusCode;
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
};

use super::framing::Framing;
use super::looked_at;

/// Bytes of a response's head.
pub(super) const MOST: usize = 64 << 10;
/// Headers of a response.
const MOST_HEADERS: usize = 100;
/// Lines of a head that isn't complete: the status, the headers, an empty one before it.
const MOST_LINES: usize = MOST_HEADERS + 2;

/// The headers of a response that are kept.
const KEPT: [HeaderName; 3] = [CONTENT_TYPE, RETRY_AFTER, HeaderName::from_static("x-seed")];

/// Values that most responses have. Held once, and not with the buffer that they came in.
const USUAL: [&str; 3] = ["application/json", "text/event-stream; charset=utf-8", "text/event-stream"];

/// A request.
pub(crate) struct Asked<'a> {
    /// A path of ours.
    pub(crate) path: &'static str,
    pub(crate) host: &'a HeaderValue,
    pub(crate) authorization: Option<&'a HeaderValue>,
    pub(crate) headers: &'a [(HeaderName, HeaderValue)],
    /// JSON; a request without one is a GET.
    pub(crate) body: Bytes,
}

/// A response's beginning.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(super) framing: Framing,
    /// The connection may serve another request.
    pub(super) keep: bool,
}

impl Asked<'_> {
    /// Writes the head.
    pub(super) fn encode(&self, out: &mut BytesMut) {
        out.put_slice(if self.body.is_empty() { b"GET " } else { b"POST " });
        out.put_slice(self.path.as_bytes());
        out.put_slice(b" HTTP/1.1\r\n");
        let mut line = |name: &HeaderName, value: &[u8]| {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value);
            out.put_slice(b"\r\n");
        };
        line(&HOST, self.host.as_bytes());
        if let Some(authorization) = self.authorization {
            line(&AUTHORIZATION, authorization.as_bytes());
        }
        for (name, value) in self.headers {
            line(name, value.as_bytes());
        }
        if !self.body.is_empty() {
            line(&CONTENT_TYPE, b"application/json");
            line(&CONTENT_LENGTH, decimal(&mut [0; 20], self.body.len()));
        }
        out.put_slice(b"\r\n");
    }
}

/// The digits of a number.
fn decimal(digits: &mut [u8; 20], mut number: usize) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

/// Takes heads off a buffer that fills.
///
/// Parsing begins at the head's beginning each time, so it is only tried with what came first (a stranger who speaks
/// something else is known by that) and when a line has ended since. With lines as bounded as bytes, a server that sends a
/// head byte by byte costs [`MOST_LINES`] times [`MOST`] bytes of parsing, and not the square of [`MOST`].
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Bytes of the buffer that were looked at.
    seen: usize,
    /// Lines that have ended in them.
    lines: usize,
}

impl Reader {
    /// Takes a head off the buffer; none where it isn't all there yet.
    ///
    /// # Errors
    /// Where it is none, or one that leaves open where its response ends.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Head>> {
        let new = &buffer[self.seen..];
        if new.is_empty() {
            return Ok(None);
        }
        looked_at(new.len());
        let ended = new.iter().filter(|byte| **byte == b'\n').count();
        let worth = ended > 0 || self.seen == 0 || buffer.len() > MOST;
        (self.seen, self.lines) = (buffer.len(), self.lines + ended);
        if !worth {
            return Ok(None);
        }
        looked_at(buffer.len());
        let head = Head::take(buffer)?;
        if head.is_some() {
            *self = Reader::default();
        } else if self.lines > MOST_LINES {
            return Err(wrong("a response's head has more than 102 lines"));
        }
        Ok(head)
    }
}

impl Head {
    /// Parses what is there.
    fn take(buffer: &mut BytesMut) -> io::Result<Option<Head>> {
        let mut headers = [const { MaybeUninit::uninit() }; MOST_HEADERS];
        let mut response = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        let read = parser.parse_response_with_uninit_headers(&mut response, buffer, &mut headers);
        let length = match read {
            Ok(httparse::Status::Complete(length)) if length <= MOST => length,
            Ok(httparse::Status::Partial) if buffer.len() <= MOST => return Ok(None),
            Ok(_) => return Err(wrong("a response's head has more than 65536 bytes")),
            Err(error) => return Err(wrong(&format!("this is no response: {error}"))),
        };
        let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or_else(|| wrong("a response without a status"))?;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(wrong("a switch to another protocol, which nobody asked for"));
        }
        let mut facts = Facts { alive: response.version == Some(1), ..Facts::default() };
        let mut kept = HeaderMap::new();
        for header in response.headers.iter() {
            facts.note(header.name, header.value)?;
            if let Some(name) = KEPT.iter().find(|name| header.name.eq_ignore_ascii_case(name.as_str()))
                && let Some(value) = value(header.value)
            {
                kept.append(name, value);
            }
        }
        let framing = facts.framing(status);
        // Where two lengths are told, somebody else may believe the other one.
        let doubt = (facts.coded && facts.length.is_some()) || framing == Framing::Close;
        let keep = facts.alive && !facts.close && !doubt;
        bytes::Buf::advance(buffer, length);
        Ok(Some(Head { status, headers: kept, framing, keep }))
    }
}

/// What a head says of its response's length and of what follows it.
#[derive(Default)]
struct Facts {
    length: Option<u64>,
    /// There is a `Transfer-Encoding`, and the last one is `chunked`.
    coded: bool,
    chunked: bool,
    /// It stays open: said, or usual.
    alive: bool,
    close: bool,
}

impl Facts {
    fn note(&mut self, name: &str, value: &[u8]) -> io::Result<()> {
        if name.eq_ignore_ascii_case("content-length") {
            for part in value.split(|byte| *byte == b',') {
                let length = length(part.trim_ascii()).ok_or_else(|| wrong("a length that is no number"))?;
                if self.length.replace(length).is_some_and(|before| before != length) {
                    return Err(wrong("a response with two lengths"));
                }
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            let last = value.rsplit(|byte| *byte == b',').next().unwrap_or_default();
            self.coded = true;
            self.chunked = last.trim_ascii().eq_ignore_ascii_case(b"chunked");
        } else if name.eq_ignore_ascii_case("connection") {
            for part in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                self.close |= part.eq_ignore_ascii_case(b"close");
                // Said by servers of HTTP/1.0.
                self.alive |= part.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(())
    }

    fn framing(&self, status: StatusCode) -> Framing {
        if status.is_informational() || matches!(status.as_u16(), 204 | 304) {
            return Framing::Done;
        }
        match (self.coded, self.length) {
            (true, _) if self.chunked => Framing::chunked(),
            (true, _) | (false, None) => Framing::Close,
            (false, Some(0)) => Framing::Done,
            (false, Some(length)) => Framing::Length(length),
        }
    }
}

fn length(digits: &[u8]) -> Option<u64> {
    // Digits alone: `parse` would take a sign.
    let digits = Some(digits).filter(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn value(bytes: &[u8]) -> Option<HeaderValue> {
    match USUAL.iter().find(|usual| usual.as_bytes() == bytes) {
        Some(usual) => Some(HeaderValue::from_static(usual)),
        None => HeaderValue::from_bytes(bytes).ok(),
    }
}

pub(super) fn wrong(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::LOOKED_AT;
    use super::*;

    fn take(text: &str) -> io::Result<Option<Head>> {
        Reader::default().take(&mut BytesMut::from(text))
    }

    fn good(text: &str) -> (Framing, bool) {
        let head = take(text).unwrap().unwrap();
        (head.framing, head.keep)
    }

    #[test]
    fn a_request_is_written_as_it_is_read() {
        let headers = [(HeaderName::from_static("x-request-id"), HeaderValue::from_static("r1"))];
        let (host, key) = (HeaderValue::from_static("h:1"), HeaderValue::from_static("Bearer k"));
        let mut asked = Asked {
            path: "/v1/completions",
            host: &host,
            authorization: Some(&key),
            headers: &headers,
            body: Bytes::from_static(b"{\"a\": 1234}"),
        };
        let mut out = BytesMut::new();
        asked.encode(&mut out);
        let text = "POST /v1/completions HTTP/1.1\r\nhost: h:1\r\nauthorization: Bearer k\r\n\
                    x-request-id: r1\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n";
        assert_eq!(out, text);
        (asked.body, asked.authorization, out) = (Bytes::new(), None, BytesMut::new());
        asked.encode(&mut out);
        assert_eq!(out, "GET /v1/completions HTTP/1.1\r\nhost: h:1\r\nx-request-id: r1\r\n\r\n");
        assert_eq!(decimal(&mut [0; 20], 0), b"0");
        assert_eq!(decimal(&mut [0; 20], usize::MAX), usize::MAX.to_string().as_bytes());
    }

    #[test]
    fn a_head_says_where_its_response_ends_and_what_follows() {
        let ok = |headers: &str| good(&format!("HTTP/1.1 200 OK\r\n{headers}\r\n"));
        assert_eq!(ok("Content-Length: 5\r\n"), (Framing::Length(5), true));
        assert_eq!(ok("content-length: 5\r\nContent-Length: 5, 5\r\n"), (Framing::Length(5), true));
        assert_eq!(ok("content-length: 0\r\n"), (Framing::Done, true));
        assert_eq!(ok("content-length: 5\r\nConnection: foo, Close\r\n"), (Framing::Length(5), false));
        assert_eq!(ok("content-length: 5\r\nconnection: close, keep-alive\r\n"), (Framing::Length(5), false));
        assert_eq!(ok("Transfer-Encoding: gzip, Chunked\r\n"), (Framing::chunked(), true));
        // Whoever believed the length would take the answer's rest for another answer.
        assert_eq!(ok("transfer-encoding: chunked\r\ncontent-length: 5\r\n"), (Framing::chunked(), false));
        assert_eq!(ok("transfer-encoding: chunked, gzip\r\n"), (Framing::Close, false));
        assert_eq!(ok(""), (Framing::Close, false));
        assert_eq!(good("HTTP/1.1 204 No Content\r\n\r\n"), (Framing::Done, true));
        assert_eq!(good("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n"), (Framing::Length(1), false));
        let old = "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\n";
        assert_eq!(good(old), (Framing::Length(1), true));
    }

    #[test]
    fn what_is_looked_at_is_kept_and_what_follows_stays() {
        let mut buffer = BytesMut::from(
            "HTTP/1.1 429 Slow\r\nserver: s\r\ncontent-type: application/json\r\nRetry-After: 3\r\n\
             X-Seed: 7\r\ncontent-length: 2\r\n\r\n{}",
        );
        let head = Reader::default().take(&mut buffer).unwrap().unwrap();
        assert_eq!((head.status.as_u16(), &buffer[..]), (429, &b"{}"[..]));
        assert_eq!(head.headers.len(), 3);
        assert_eq!(
            (&head.headers["retry-after"], &head.headers["x-seed"]),
            (&"3".parse().unwrap(), &"7".parse().unwrap())
        );
        assert!(take("HTTP/1.1 200 OK\r\ncontent-le").unwrap().is_none());
    }

    #[test]
    fn what_leaves_a_doubt_is_refused() {
        for wrong in [
            "hello\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 101 Go\r\n\r\n",
        ] {
            assert!(take(wrong).is_err(), "{wrong}");
        }
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(MOST));
        assert!(take(&long).is_err());
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MOST_HEADERS + 1));
        assert!(take(&many).is_err());
    }

    /// Feeds a text byte by byte; what came of it, and bytes that were looked at.
    fn by_bytes(text: &[u8]) -> (io::Result<Option<Head>>, usize) {
        let (mut reader, mut buffer, before) = (Reader::default(), BytesMut::new(), LOOKED_AT.get());
        for byte in text {
            buffer.put_u8(*byte);
            let taken = reader.take(&mut buffer);
            if !matches!(taken, Ok(None)) {
                return (taken, LOOKED_AT.get() - before);
            }
        }
        (Ok(None), LOOKED_AT.get() - before)
    }

    /// Once each byte had all bytes before it parsed again: two thousand million of them for one head.
    #[test]
    fn a_head_that_comes_byte_by_byte_is_not_parsed_for_each_of_them() {
        let bound = (MOST_LINES + 3) * MOST;
        let one_line =
            format!("HTTP/1.1 200 OK\r\na: {}\r\ncontent-length: 1\r\n\r\n", "x".repeat(MOST - 100));
        let line = format!("a: {}\r\n", "x".repeat(MOST / MOST_HEADERS - 10));
        let many_lines = format!("HTTP/1.1 200 OK\r\n{}\r\n", line.repeat(MOST_HEADERS));
        for text in [one_line, many_lines] {
            let (head, work) = by_bytes(text.as_bytes());
            assert_eq!(head.unwrap().unwrap().status, 200);
            assert!(work < bound, "{work} bytes were looked at for a head of {}", text.len());
        }
        // And what is never a head.
        let endless = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(2 * MOST));
        let nothing = "\r\n".repeat(MOST);
        for text in [endless, nothing] {
            let (head, work) = by_bytes(text.as_bytes());
            assert!(head.is_err() && work < bound, "{work} bytes were looked at");
        }
        // A stranger is known by its first byte, and one who talks in lines by its first line.
        assert!(by_bytes(b"\x15\x03\x01").0.is_err());
        assert!(by_bytes(b"HELO you\r\n").0.is_err());
    }

    #[test]
    fn heads_are_the_same_however_they_are_cut() {
        let text = b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
        for size in 1..=text.len() {
            let (mut reader, mut buffer, mut heads) = (Reader::default(), BytesMut::new(), Vec::new());
            for piece in text.chunks(size) {
                buffer.extend_from_slice(piece);
                while heads.len() < 2
                    && let Some(head) = reader.take(&mut buffer).unwrap()
                {
                    heads.push((head.status.as_u16(), head.framing));
                }
            }
            assert_eq!(heads, [(103, Framing::Done), (200, Framing::Length(5))], "in pieces of {size}");
            assert_eq!(&buffer[..], b"hello");
        }
    }
}

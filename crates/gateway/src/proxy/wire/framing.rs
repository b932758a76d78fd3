//! Where a response's body ends, and what of the bytes read is of it.

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};

use super::head::wrong;
use super::looked_at;

/// Bytes of a line with a chunk's size, extensions and all.
const MOST_LINE: usize = 4 << 10;
/// Bytes behind the last chunk, which nobody reads.
const MOST_TRAILERS: usize = 16 << 10;

/// What is left of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// So many bytes, above 0.
    Length(u64),
    /// Chunks, each with its length.
    Chunked(Chunk),
    /// All that comes until the connection is closed.
    Close,
    /// Nothing.
    Done,
}

/// What comes next of a chunked body. What ends with a line has the number of bytes that were searched for its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Size(usize),
    /// So many bytes, above 0.
    Data(u64),
    /// The line's end behind them.
    End,
    Trailers(usize),
}

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Some of the body.
    Data(Bytes),
    /// More must be read before anything can be said.
    More,
    Ended,
}

impl Framing {
    pub(super) fn chunked() -> Framing {
        Framing::Chunked(Chunk::Size(0))
    }

    /// Takes what is next off the buffer. Behind the last data it takes the body's end along, where it is there.
    ///
    /// # Errors
    /// Where the chunks are none.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> io::Result<Step> {
        self.skip(buffer)?;
        let left = match self {
            Framing::Done => return Ok(Step::Ended),
            Framing::Length(left) | Framing::Chunked(Chunk::Data(left)) => *left,
            Framing::Close => u64::MAX,
            Framing::Chunked(_) => return Ok(Step::More),
        };
        if buffer.is_empty() {
            return Ok(Step::More);
        }
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let data = buffer.split_to(count).freeze();
        let left = left - count as u64;
        match self {
            Framing::Length(_) => *self = if left == 0 { Framing::Done } else { Framing::Length(left) },
            Framing::Chunked(chunk) => *chunk = if left == 0 { Chunk::End } else { Chunk::Data(left) },
            Framing::Close | Framing::Done => {}
        }
        // A mistake in what follows is still there when it is its turn.
        let _ = self.skip(buffer);
        Ok(Step::Data(data))
    }

    /// Whether the body ends with its connection.
    pub(super) fn closed(&mut self) -> bool {
        let ends = matches!(self, Framing::Close);
        if ends {
            *self = Framing::Done;
        }
        ends
    }

    /// Goes over what is between the data.
    fn skip(&mut self, buffer: &mut BytesMut) -> io::Result<()> {
        while let Framing::Chunked(chunk) = self {
            match chunk {
                Chunk::Data(_) => return Ok(()),
                Chunk::Size(seen) => {
                    // A line is parsed with its first bytes, where what is no size is found, and with its last one.
                    let worth = *seen == 0 || buffer.len() > MOST_LINE || buffer[*seen..].contains(&b'\n');
                    looked_at(buffer.len() - *seen + if worth { buffer.len().min(MOST_LINE) } else { 0 });
                    *seen = buffer.len();
                    if !worth {
                        return Ok(());
                    }
                    match httparse::parse_chunk_size(buffer) {
                        Ok(httparse::Status::Complete((length, size))) if length <= MOST_LINE => {
                            buffer.advance(length);
                            *chunk = if size == 0 { Chunk::Trailers(0) } else { Chunk::Data(size) };
                        }
                        Ok(httparse::Status::Partial) if buffer.len() <= MOST_LINE => return Ok(()),
                        _ => return Err(wrong("a chunk without a size")),
                    }
                }
                Chunk::End => match &buffer[..] {
                    [b'\r', b'\n', ..] => {
                        buffer.advance(2);
                        *chunk = Chunk::Size(0);
                    }
                    [] | [b'\r'] => return Ok(()),
                    _ => return Err(wrong("a chunk that is longer than it says")),
                },
                Chunk::Trailers(seen) => {
                    // The end may have begun in what was searched.
                    let from = seen.saturating_sub(3);
                    looked_at(buffer.len() - from);
                    let end = match &buffer[..] {
                        [b'\r', b'\n', ..] => Some(2),
                        text => {
                            let rest = &text[from..];
                            rest.windows(4).position(|end| end == b"\r\n\r\n").map(|at| from + at + 4)
                        }
                    };
                    *seen = buffer.len();
                    match end {
                        Some(end) if end <= MOST_TRAILERS => {
                            buffer.advance(end);
                            *self = Framing::Done;
                        }
                        None if buffer.len() <= MOST_TRAILERS => return Ok(()),
                        _ => return Err(wrong("a body with more than 16384 bytes behind it")),
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::LOOKED_AT;
    use super::*;

    /// All data of a body that comes in pieces of `size` bytes, and what is left of the bytes.
    fn read(mut framing: Framing, text: &[u8], size: usize) -> io::Result<(Vec<u8>, Framing, Vec<u8>)> {
        let (mut buffer, mut data) = (BytesMut::new(), Vec::new());
        for piece in text.chunks(size) {
            buffer.extend_from_slice(piece);
            while let Step::Data(bytes) = framing.next(&mut buffer)? {
                assert!(!bytes.is_empty());
                data.extend_from_slice(&bytes);
            }
        }
        Ok((data, framing, buffer.to_vec()))
    }

    #[test]
    fn bodies_are_the_same_however_they_are_cut() {
        let chunks = b"5\r\nhello\r\n1;a=b\r\n \r\n00A\r\n0123456789\r\n0\r\nx: y\r\n\r\nrest";
        for size in 1..=chunks.len() {
            let (data, framing, rest) = read(Framing::chunked(), chunks, size).unwrap();
            assert_eq!(
                (&data[..], framing, &rest[..]),
                (&b"hello 0123456789"[..], Framing::Done, &b"rest"[..])
            );
            let (data, framing, rest) = read(Framing::Length(5), b"hellorest", size).unwrap();
            assert_eq!((&data[..], framing, &rest[..]), (&b"hello"[..], Framing::Done, &b"rest"[..]));
            let (data, mut framing, _) = read(Framing::Close, b"hello", size).unwrap();
            assert_eq!(&data[..], b"hello");
            assert!(framing.closed() && framing == Framing::Done);
        }
    }

    #[test]
    fn the_end_is_taken_along_with_the_last_data() {
        let mut buffer = BytesMut::from("2\r\nhi\r\n0\r\n\r\n");
        let mut framing = Framing::chunked();
        assert_eq!(framing.next(&mut buffer).unwrap(), Step::Data(Bytes::from_static(b"hi")));
        assert_eq!((framing, buffer.len()), (Framing::Done, 0));
    }

    #[test]
    fn lines_that_come_byte_by_byte_are_not_read_for_each_of_them() {
        let before = LOOKED_AT.get();
        let line = format!("1;{}\r\nx\r\n", "x".repeat(MOST_LINE - 10));
        let trailers = "a: b\r\n".repeat(MOST_TRAILERS / 6);
        let body = format!("{}0\r\n{trailers}\r\n", line.repeat(4));
        assert_eq!(read(Framing::chunked(), body.as_bytes(), 1).unwrap().1, Framing::Done);
        let work = LOOKED_AT.get() - before;
        assert!(work < 5 * body.len(), "{work} bytes were looked at for a body of {}", body.len());
    }

    #[test]
    fn chunks_that_are_none_are_refused_behind_what_was_right() {
        for wrong in ["x\r\n", "-1\r\n", "11111111111111111\r\nx", "5 5\r\nhello"] {
            assert!(read(Framing::chunked(), wrong.as_bytes(), 64).is_err(), "{wrong}");
        }
        let mut buffer = BytesMut::from("2\r\nhi!\r\n");
        let mut framing = Framing::chunked();
        assert_eq!(framing.next(&mut buffer).unwrap(), Step::Data(Bytes::from_static(b"hi")));
        assert!(framing.next(&mut buffer).is_err());
        assert!(!framing.closed());
        let endless = format!("1;{}", "x".repeat(MOST_LINE));
        assert!(read(Framing::chunked(), endless.as_bytes(), 100).is_err());
        let endless = format!("0\r\n{}", "a: b\r\n".repeat(MOST_TRAILERS / 6 + 1));
        assert!(read(Framing::chunked(), endless.as_bytes(), 100).is_err());
    }
}

//! A position in a file's bytes that can't leave them: every read says which field it was for.

use super::Fault;

/// Reads little-endian fields from front to back.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Cursor<'a> {
        Cursor { bytes, at: at.min(bytes.len()) }
    }

    /// Bytes from the file's start.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `len` bytes. A length that comes from the file is compared with what is left before anything else.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], Fault> {
        let left = self.left();
        let len = usize::try_from(len).ok().filter(|&len| len <= left).ok_or_else(|| {
            Fault::Malformed(format!("{what} at byte {} needs {len} bytes, {left} are left", self.at))
        })?;
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length and that many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, Fault> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| Fault::Malformed(format!("{what} is not UTF-8")))
    }
}

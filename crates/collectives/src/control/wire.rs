//! Control messages: kind, length, body. Lengths are bounded; anything else ends the connection.

use crate::call::{Call, HEADER_BYTES, Header};

const MAGIC: u16 = 0xc0a7;
const HEAD: usize = 8;
/// The longest body: an abort's reason is cut to fit.
const BODY_BYTES: usize = 1024;

/// What control connections carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A heartbeat, with the call that the sender has been waiting in for long.
    Alive { call: Option<Call> },
    /// The sender gave up, because of the loss of a rank or of something else.
    Abort { lost: Option<usize>, reason: String },
    /// The sender leaves, and all is well.
    Goodbye,
}

impl Message {
    /// An abort whose reason fits.
    pub(super) fn abort(lost: Option<usize>, reason: &str) -> Self {
        let end = (0..=reason.len().min(BODY_BYTES - 4)).rev().find(|end| reason.is_char_boundary(*end));
        Self::Abort { lost, reason: reason[..end.unwrap_or(0)].to_owned() }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Alive { call: None } => (1, Vec::new()),
            Self::Alive { call: Some(call) } => (1, call.encode(0).to_vec()),
            Self::Abort { lost, reason } => {
                let lost = lost.map_or(u32::MAX, |lost| lost as u32);
                (2, [&lost.to_le_bytes(), reason.as_bytes()].concat())
            }
            Self::Goodbye => (3, Vec::new()),
        };
        let mut out = Vec::with_capacity(HEAD + body.len());
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[kind, 0]);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&body);
        out
    }

    fn decode(kind: u8, body: &[u8]) -> Option<Self> {
        match (kind, body.len()) {
            (1, 0) => Some(Self::Alive { call: None }),
            (1, HEADER_BYTES) => {
                let header: &Header = body.try_into().ok()?;
                Some(Self::Alive { call: Some(Call::decode(header)?.0) })
            }
            (2, 4..) => {
                let lost = u32::from_le_bytes(body[..4].try_into().ok()?);
                let reason = String::from_utf8_lossy(&body[4..]).into_owned();
                Some(Self::Abort { lost: (lost != u32::MAX).then_some(lost as usize), reason })
            }
            (3, 0) => Some(Self::Goodbye),
            _ => None,
        }
    }
}

/// Bytes that have come, until they are messages.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// Adds bytes and takes out the messages that are whole.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Vec<Message>, String> {
        self.bytes.extend_from_slice(bytes);
        let mut messages = Vec::new();
        let mut at = 0;
        while let Some(head) = self.bytes.get(at..at + HEAD) {
            let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
            if head[..2] != MAGIC.to_le_bytes() || len > BODY_BYTES {
                return Err(format!("a control message that begins {head:02x?}"));
            }
            let Some(body) = self.bytes.get(at + HEAD..at + HEAD + len) else { break };
            let message = Message::decode(head[2], body);
            messages.push(message.ok_or_else(|| format!("a control message of kind {}", head[2]))?);
            at += HEAD + len;
        }
        self.bytes.drain(..at);
        Ok(messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_any_cut_and_garbage_is_named() {
        let sent = [Message::Alive { call: None }, Message::abort(Some(3), "öl"), Message::Goodbye];
        let bytes: Vec<u8> = sent.iter().flat_map(Message::encode).collect();
        for cut in 0..bytes.len() {
            let mut inbox = Inbox::default();
            let mut got = inbox.take(&bytes[..cut]).unwrap();
            got.extend(inbox.take(&bytes[cut..]).unwrap());
            assert_eq!(got, sent);
        }
        assert!(Inbox::default().take(b"GET / HTTP/1.1\r\n").is_err());
        let long = Message::abort(None, &"ä".repeat(4000)).encode();
        assert_eq!(Inbox::default().take(&long).unwrap().len(), 1);
    }
}

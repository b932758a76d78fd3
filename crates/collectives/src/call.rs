//! What a rank has called: the header before every rank's bytes, and what two ranks compare to find that they have
//! called different things.

use std::fmt;

use crate::element::DType;
use crate::schedule::Algorithm;

/// An operation of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Everyone gets the reduction of everyone's vector.
    AllReduce = 1,
    /// Everyone gets its chunk of the reduction.
    ReduceScatter = 2,
    /// Everyone gets everyone's chunk.
    AllGather = 3,
    /// Everyone gets the root's vector.
    Broadcast = 4,
    /// Everyone sends everyone a part.
    AllToAll = 5,
    /// The root gets everyone's part.
    Gather = 6,
    /// Everyone gets its part of the root's vector.
    Scatter = 7,
    /// One rank to one other.
    SendRecv = 8,
    /// Nobody passes before everyone has come.
    Barrier = 9,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Broadcast,
        Self::AllToAll,
        Self::Gather,
        Self::Scatter,
        Self::SendRecv,
        Self::Barrier,
    ];

    /// The operation of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }

    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::AllToAll => "all_to_all",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::SendRecv => "send/recv",
            Self::Barrier => "barrier",
        }
    }
}

/// One call of one rank. Two ranks whose calls have the same `group` and `sequence` must have equal calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which group of the epoch: the whole, or one of its sub-groups.
    pub group: u64,
    /// How many calls of this group came before.
    pub sequence: u64,
    /// What was called.
    pub operation: Operation,
    /// The algorithm, already chosen.
    pub algorithm: Algorithm,
    /// The elements' type.
    pub dtype: DType,
    /// The reduction's code; 0 where nothing is reduced.
    pub reduce: u8,
    /// Elements in all.
    pub count: u64,
    /// The root's rank; for send/recv the sender; `u32::MAX` where there is none.
    pub root: u32,
    /// A digest of how the elements are divided among ranks, where the caller says so; for send/recv the receiver.
    pub layout: u64,
}

/// Bytes of a call on the wire.
pub(crate) const HEADER_BYTES: usize = 64;
/// A call as it goes before a stream of bytes.
pub(crate) type Header = [u8; HEADER_BYTES];
const MAGIC: u32 = 0x4c4c_4143;

impl Call {
    /// The header of a stream of `stream_bytes` bytes from one rank to another.
    pub(crate) fn encode(&self, stream_bytes: u64) -> Header {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&[
            self.operation as u8,
            self.algorithm as u8,
            self.dtype as u8,
            self.reduce,
        ]);
        out[8..16].copy_from_slice(&self.group.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.count.to_le_bytes());
        out[32..40].copy_from_slice(&self.layout.to_le_bytes());
        out[40..48].copy_from_slice(&stream_bytes.to_le_bytes());
        out[48..52].copy_from_slice(&self.root.to_le_bytes());
        out
    }

    /// The call and the stream's length, or `None` for bytes that are no call.
    pub(crate) fn decode(header: &Header) -> Option<(Self, u64)> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        if half(0) != MAGIC {
            return None;
        }
        let call = Self {
            operation: Operation::ALL.into_iter().find(|o| *o as u8 == header[4])?,
            algorithm: Algorithm::ALL.into_iter().find(|a| *a as u8 == header[5])?,
            dtype: DType::from_code(header[6])?,
            reduce: header[7],
            group: word(8),
            sequence: word(16),
            count: word(24),
            layout: word(32),
            root: half(48),
        };
        Some((call, word(40)))
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.operation.name())?;
        if self.operation == Operation::SendRecv {
            write!(f, " from rank {} to rank {}", self.root, self.layout)?;
        } else if self.root != u32::MAX {
            write!(f, " from root {}", self.root)?;
        }
        match self.reduce {
            1 => write!(f, " (sum)")?,
            2 => write!(f, " (max)")?,
            _ => {}
        }
        if self.dtype != DType::None {
            write!(f, " of {} {}", self.count, self.dtype.name())?;
        }
        write!(f, " by {}, call {}", self.algorithm.name(), self.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_garbage_does_not() {
        let call = Call {
            group: 7,
            sequence: 12,
            operation: Operation::AllReduce,
            algorithm: Algorithm::Ring,
            dtype: DType::Bf16,
            reduce: 1,
            count: 1001,
            root: u32::MAX,
            layout: 0,
        };
        assert_eq!(Call::decode(&call.encode(99)), Some((call, 99)));
        assert_eq!(call.to_string(), "all_reduce (sum) of 1001 bf16 by ring, call 12");
        for at in 0..8 {
            let mut bad = call.encode(99);
            bad[at] = 0xee;
            if at != 7 {
                assert_eq!(Call::decode(&bad), None, "byte {at}");
            }
        }
    }
}

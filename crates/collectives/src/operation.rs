//! What a rank calls, as a value: in errors, in logs, and as the header of every frame.

use std::fmt;

use paceline_transport::frame::{PREFIX_BYTES, Prefix};

use crate::dtype::{DType, ReduceOp};

/// Which collective (or message) a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Every rank gets the reduction of all inputs.
    AllReduce(ReduceOp),
    /// Rank i gets chunk i of the reduction.
    ReduceScatter(ReduceOp),
    /// Every rank gets all inputs.
    AllGather,
    /// Every rank gets the root's buffer.
    Broadcast {
        /// The rank whose buffer it is.
        root: usize,
    },
    /// The root gets the reduction of all inputs.
    Reduce {
        /// The operator.
        op: ReduceOp,
        /// The rank that gets it.
        root: usize,
    },
    /// The root gets all inputs.
    Gather {
        /// The rank that gets them.
        root: usize,
    },
    /// Rank i gets chunk i of the root's input.
    Scatter {
        /// The rank whose input it is.
        root: usize,
    },
    /// Rank i gets chunk i of every input.
    AllToAll,
    /// An all_gather of shares that differ in length.
    AllGatherV {
        /// A digest of all ranks' counts.
        counts: u32,
    },
    /// A reduce_scatter of shares that differ in length.
    ReduceScatterV {
        /// The operator.
        op: ReduceOp,
        /// A digest of all ranks' counts.
        counts: u32,
    },
    /// The exchange of counts with which an all_to_all_v begins.
    AllToAllCounts,
    /// An all_to_all of parts that differ in length.
    AllToAllV {
        /// A digest of all ranks' counts.
        counts: u32,
    },
    /// The ranks form groups among themselves.
    Split,
    /// Nobody leaves before everybody has entered.
    Barrier,
    /// A message from one rank to another.
    Message {
        /// The sending rank.
        from: usize,
        /// The receiving rank.
        to: usize,
    },
}

impl Kind {
    /// The operator, if it reduces.
    pub fn op(self) -> Option<ReduceOp> {
        match self {
            Self::AllReduce(op)
            | Self::ReduceScatter(op)
            | Self::Reduce { op, .. }
            | Self::ReduceScatterV { op, .. } => Some(op),
            _ => None,
        }
    }
}

/// One call, as this rank made it. Equal on all ranks that take part, or the call is a mismatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operation {
    /// Its number among the collectives of the communicator, from 1; for a message, that of the
    /// collective that comes next. Those of a probe before are negative, in two's complement.
    pub number: u64,
    /// What it is.
    pub kind: Kind,
    /// The type of the elements; `u8` for a barrier.
    pub dtype: DType,
    /// The number of elements: of the buffer (all_reduce, reduce, broadcast, messages), of one rank's share
    /// (reduce_scatter, all_gather, gather, scatter, all_to_all) or of all shares together (those that end
    /// in _v).
    pub count: usize,
    /// The longest piece the schedule cuts, in elements; a property of the configuration.
    pub(crate) segment_len: u32,
    /// Which schedule runs it; a property of the configuration and of the length.
    pub(crate) schedule: u8,
}

impl Operation {
    /// The header of frame number `index` (per peer, from 0) of this operation.
    ///
    /// ```text
    /// byte  0       8      16     20   24   28        29     30   31
    ///       number  count  index  a    b    schedule  dtype  op   kind     (little-endian, segment_len: see below)
    /// ```
    /// `a` is the root, the sender or the digest of the counts; `b` is the receiver of a message, else the segment length.
    pub(crate) fn to_prefix(self, index: u32) -> Prefix {
        let mut bytes = [0; PREFIX_BYTES];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(self.to_words(index)) {
            *bytes = word.to_le_bytes();
        }
        bytes
    }

    /// The header's words, each of which is little-endian in it.
    #[inline]
    pub(crate) fn to_words(self, index: u32) -> [u64; PREFIX_BYTES / 8] {
        let (code, op, a, b) = match self.kind {
            Kind::AllReduce(op) => (1, op as u8, 0, self.segment_len),
            Kind::ReduceScatter(op) => (2, op as u8, 0, self.segment_len),
            Kind::AllGather => (3, 0, 0, self.segment_len),
            Kind::Broadcast { root } => (4, 0, root as u32, self.segment_len),
            Kind::Barrier => (5, 0, 0, self.segment_len),
            Kind::Message { from, to } => (6, 0, from as u32, to as u32),
            Kind::Reduce { op, root } => (7, op as u8, root as u32, self.segment_len),
            Kind::Gather { root } => (8, 0, root as u32, self.segment_len),
            Kind::Scatter { root } => (9, 0, root as u32, self.segment_len),
            Kind::AllToAll => (10, 0, 0, self.segment_len),
            Kind::AllGatherV { counts } => (11, 0, counts, self.segment_len),
            Kind::ReduceScatterV { op, counts } => (12, op as u8, counts, self.segment_len),
            Kind::AllToAllCounts => (13, 0, 0, self.segment_len),
            Kind::AllToAllV { counts } => (14, 0, counts, self.segment_len),
            Kind::Split => (15, 0, 0, self.segment_len),
        };
        let last = u32::from_le_bytes([self.schedule, self.dtype as u8, op, code]);
        let two = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [self.number, self.count as u64, two(index, a), two(b, last)]
    }

    /// The operation and the frame index of a header, or `None` if no release of this format wrote it.
    pub(crate) fn from_prefix(bytes: &Prefix) -> Option<(Self, u32)> {
        let mut words = [0; PREFIX_BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Self::from_words(words)
    }

    /// [`from_prefix`](Self::from_prefix) of the header's words.
    pub(crate) fn from_words(
        [number, count, index_a, b_last]: [u64; PREFIX_BYTES / 8],
    ) -> Option<(Self, u32)> {
        let (index, a, b) = (index_a as u32, (index_a >> 32) as u32, b_last as u32);
        let [schedule, dtype, op, code] = ((b_last >> 32) as u32).to_le_bytes();
        let kind = match code {
            1 => Kind::AllReduce(ReduceOp::from_wire(op)?),
            2 => Kind::ReduceScatter(ReduceOp::from_wire(op)?),
            3 => Kind::AllGather,
            4 => Kind::Broadcast { root: a as usize },
            5 => Kind::Barrier,
            6 => Kind::Message { from: a as usize, to: b as usize },
            7 => Kind::Reduce { op: ReduceOp::from_wire(op)?, root: a as usize },
            8 => Kind::Gather { root: a as usize },
            9 => Kind::Scatter { root: a as usize },
            10 => Kind::AllToAll,
            11 => Kind::AllGatherV { counts: a },
            12 => Kind::ReduceScatterV { op: ReduceOp::from_wire(op)?, counts: a },
            13 => Kind::AllToAllCounts,
            14 => Kind::AllToAllV { counts: a },
            15 => Kind::Split,
            _ => return None,
        };
        let segment_len = if matches!(kind, Kind::Message { .. }) { 0 } else { b };
        let operation = Self {
            number,
            kind,
            dtype: DType::from_wire(dtype)?,
            count: usize::try_from(count).ok()?,
            segment_len,
            schedule,
        };
        Some((operation, index))
    }

    /// The operation's name as MPI and NCCL spell it in lower case.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::AllReduce(_) => "all_reduce",
            Kind::ReduceScatter(_) => "reduce_scatter",
            Kind::AllGather => "all_gather",
            Kind::Broadcast { .. } => "broadcast",
            Kind::Reduce { .. } => "reduce",
            Kind::Gather { .. } => "gather",
            Kind::Scatter { .. } => "scatter",
            Kind::AllToAll => "all_to_all",
            Kind::AllGatherV { .. } => "all_gather_v",
            Kind::ReduceScatterV { .. } => "reduce_scatter_v",
            Kind::AllToAllCounts | Kind::AllToAllV { .. } => "all_to_all_v",
            Kind::Split => "split",
            Kind::Barrier => "barrier",
            Kind::Message { .. } => "send/recv",
        }
    }

    /// Whether a peer's frame of `theirs`, from which nothing is due in this operation now, proves that
    /// the peer called something else. Frames of later calls wait for their turn.
    pub(crate) fn rules_out(&self, theirs: &Self) -> bool {
        if theirs.number != self.number {
            return theirs.is_before(self);
        }
        // A message precedes the collective of its number; several messages may wait at once.
        self.is_collective() && theirs != self
    }

    /// Whether its number is smaller.
    pub(crate) fn is_before(&self, other: &Self) -> bool {
        self.number.cast_signed() < other.number.cast_signed()
    }

    /// Whether it belongs to the probe of [`Communicator::tune`](crate::Communicator::tune).
    pub(crate) fn is_of_probe(&self) -> bool {
        self.number.cast_signed() < 0
    }

    /// Whether all ranks take part, rather than two.
    pub(crate) fn is_collective(&self) -> bool {
        !matches!(self.kind, Kind::Message { .. })
    }
}

/// A step of an operation: what it is headed by, and the type of the elements that it moves, which is another
/// one where partial sums of 16-bit floats travel in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) operation: Operation,
    pub(crate) dtype: DType,
}

impl From<Operation> for Step {
    fn from(operation: Operation) -> Self {
        Self { operation, dtype: operation.dtype }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, count, .. } = self;
        let number = self.number.cast_signed();
        let name = self.name();
        match self.kind {
            Kind::AllReduce(op) | Kind::ReduceScatter(op) => {
                write!(f, "{name} #{number} ({op} of {count} {dtype})")
            }
            Kind::AllGather | Kind::AllToAll => write!(f, "{name} #{number} ({count} {dtype})"),
            Kind::Broadcast { root } | Kind::Scatter { root } => {
                write!(f, "{name} #{number} ({count} {dtype} from rank {root})")
            }
            Kind::Gather { root } => write!(f, "{name} #{number} ({count} {dtype} to rank {root})"),
            Kind::Reduce { op, root } => {
                write!(f, "{name} #{number} ({op} of {count} {dtype} to rank {root})")
            }
            Kind::AllGatherV { counts } | Kind::AllToAllV { counts } => {
                write!(f, "{name} #{number} ({count} {dtype} in all, shared out as {counts:08x})")
            }
            Kind::ReduceScatterV { op, counts } => {
                write!(f, "{name} #{number} ({op} of {count} {dtype}, shared out as {counts:08x})")
            }
            Kind::AllToAllCounts => write!(f, "{name} #{number} (its counts)"),
            Kind::Barrier | Kind::Split => write!(f, "{name} #{number}"),
            Kind::Message { from, to } => {
                write!(f, "send/recv before #{number} ({count} {dtype} from rank {from} to rank {to})")
            }
        }
    }
}

/// A digest of `counts`, so that ranks whose counts differ notice: FNV-1a, which is the same in every
/// release and on every machine. It is against mistakes, not against malice.
pub(crate) fn digest(counts: &[usize]) -> u32 {
    let bytes = counts.iter().flat_map(|&count| (count as u64).to_le_bytes());
    bytes.fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_operation_survives_the_wire_and_its_bytes_are_fixed() {
        let kinds = [
            Kind::AllReduce(ReduceOp::Sum),
            Kind::ReduceScatter(ReduceOp::Max),
            Kind::AllGather,
            Kind::Broadcast { root: 3 },
            Kind::Barrier,
            Kind::Message { from: 1, to: 2 },
            Kind::Reduce { op: ReduceOp::Prod, root: 4 },
            Kind::Gather { root: 5 },
            Kind::Scatter { root: 6 },
            Kind::AllToAll,
            Kind::AllGatherV { counts: 7 },
            Kind::ReduceScatterV { op: ReduceOp::Avg, counts: 8 },
            Kind::AllToAllCounts,
            Kind::AllToAllV { counts: 9 },
            Kind::Split,
        ];
        let codes = kinds.map(|kind| {
            let operation =
                Operation { number: 7, kind, dtype: DType::U8, count: 0, segment_len: 1, schedule: 0 };
            let bytes = operation.to_prefix(0);
            (bytes[31], bytes[30], bytes[20])
        });
        assert_eq!(codes[..6], [(1, 1, 0), (2, 4, 0), (3, 0, 0), (4, 0, 3), (5, 0, 0), (6, 0, 1)]);
        assert_eq!(codes[6..10], [(7, 2, 4), (8, 0, 5), (9, 0, 6), (10, 0, 0)]);
        assert_eq!(codes[10..], [(11, 0, 7), (12, 5, 8), (13, 0, 0), (14, 0, 9), (15, 0, 0)]);
        for kind in kinds {
            for dtype in DType::ALL {
                let segment_len = if matches!(kind, Kind::Message { .. }) { 0 } else { 65_536 };
                let operation =
                    Operation { number: 7, kind, dtype, count: 1 << 40, segment_len, schedule: 2 };
                assert_eq!(Operation::from_prefix(&operation.to_prefix(9)), Some((operation, 9)));
            }
        }
        let golden = Operation {
            number: 1,
            kind: Kind::AllReduce(ReduceOp::Sum),
            dtype: DType::F32,
            count: 2,
            segment_len: 3,
            schedule: 1,
        };
        let bytes =
            [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 1, 1, 1];
        assert_eq!(golden.to_prefix(4), bytes);
    }

    #[test]
    fn counts_have_a_fixed_digest_that_depends_on_their_order() {
        assert_eq!(digest(&[]), 0x811c_9dc5, "FNV-1a's offset basis");
        assert_eq!(digest(&[1, 2, 3]), 0x414c_d0a5);
        assert_ne!(digest(&[1, 2, 3]), digest(&[1, 3, 2]));
    }

    #[test]
    fn unknown_codes_are_no_operation() {
        let good = Operation {
            number: 1,
            kind: Kind::AllReduce(ReduceOp::Sum),
            dtype: DType::F32,
            count: 2,
            segment_len: 3,
            schedule: 1,
        }
        .to_prefix(0);
        for at in 29..32 {
            let mut bad = good;
            bad[at] = 99;
            assert_eq!(Operation::from_prefix(&bad), None, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_an_operation_or_none(mut bytes: Prefix, known: bool) {
            if known {
                // Codes that exist, or nearly all headers would be none.
                bytes[29..].iter_mut().for_each(|byte| *byte = *byte % 15 + 1);
            }
            if let Some((operation, index)) = Operation::from_prefix(&bytes) {
                // Places that a kind does not use may hold anything.
                prop_assert_eq!(Operation::from_prefix(&operation.to_prefix(index)), Some((operation, index)));
                prop_assert!(!operation.name().is_empty());
                prop_assert!(!operation.rules_out(&operation));
            }
        }
    }
}

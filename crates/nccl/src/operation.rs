//! What can be enqueued: operations as values, on device memory that the caller vouches for.

/// The element types that Paceline and NCCL share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DataType {
    I8,
    U8,
    I32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
}

impl DataType {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::I8, Self::U8, Self::I32, Self::I64, Self::U64, Self::F16, Self::F32, Self::F64, Self::Bf16];

    /// The number in NCCL's header.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::I8 => 0,
            Self::U8 => 1,
            Self::I32 => 2,
            Self::I64 => 4,
            Self::U64 => 5,
            Self::F16 => 6,
            Self::F32 => 7,
            Self::F64 => 8,
            Self::Bf16 => 9,
        }
    }

    /// The name in NCCL's header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::I8 => "ncclInt8",
            Self::U8 => "ncclUint8",
            Self::I32 => "ncclInt32",
            Self::I64 => "ncclInt64",
            Self::U64 => "ncclUint64",
            Self::F16 => "ncclFloat16",
            Self::F32 => "ncclFloat32",
            Self::F64 => "ncclFloat64",
            Self::Bf16 => "ncclBfloat16",
        }
    }

    /// The size of an element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::I8 | Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }
}

/// How elements are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ReduceOp {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
}

impl ReduceOp {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Sum, Self::Prod, Self::Max, Self::Min, Self::Avg];

    /// The number in NCCL's header.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::Sum => 0,
            Self::Prod => 1,
            Self::Max => 2,
            Self::Min => 3,
            Self::Avg => 4,
        }
    }

    /// The name in NCCL's header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "ncclSum",
            Self::Prod => "ncclProd",
            Self::Max => "ncclMax",
            Self::Min => "ncclMin",
            Self::Avg => "ncclAvg",
        }
    }
}

/// A CUDA stream, as an opaque value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// The legacy default stream of the device.
    pub const DEFAULT: Self = Self(0);

    /// A stream by its handle (`cudaStream_t` or `CUstream`, which are the same).
    ///
    /// # Safety
    /// The stream belongs to the device of the communicator that it is used with, and lives until every operation that was
    /// enqueued on it has run.
    pub const unsafe fn from_handle(handle: usize) -> Self {
        Self(handle)
    }

    pub(crate) const fn handle(self) -> usize {
        self.0
    }
}

/// A range of elements in the memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    address: usize,
    len: usize,
    dtype: DataType,
}

impl Region {
    /// `len` elements at a device address.
    ///
    /// # Safety
    /// From the moment that an operation with this region is enqueued until its stream has run it or the communicator has
    /// been aborted: the memory belongs to the communicator's device and stays allocated; where the operation reads nobody
    /// writes, and where it writes nobody reads or writes, other than work that the stream orders before or after it.
    pub const unsafe fn new(address: usize, len: usize, dtype: DataType) -> Self {
        Self { address, len, dtype }
    }

    /// No elements, at no address.
    pub const fn empty(dtype: DataType) -> Self {
        Self { address: 0, len: 0, dtype }
    }

    pub(crate) const fn address(self) -> usize {
        self.address
    }

    /// The number of elements.
    pub const fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The type of the elements.
    pub const fn dtype(self) -> DataType {
        self.dtype
    }
}

/// One call of NCCL on one rank. All ranks enqueue the same collectives in the same order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// `ncclAllReduce`: both regions have the same length.
    AllReduce {
        /// This rank's contribution.
        send: Region,
        /// The result; may be `send`.
        receive: Region,
        /// How.
        op: ReduceOp,
    },
    /// `ncclBroadcast`: both regions have the same length.
    Broadcast {
        /// What the root sends; on other ranks not read.
        send: Region,
        /// Where every rank gets it; may be `send`.
        receive: Region,
        /// Who sends.
        root: usize,
    },
    /// `ncclReduce`: both regions have the same length; off the root `receive` may be empty.
    Reduce {
        /// This rank's contribution.
        send: Region,
        /// The result on the root; elsewhere not written.
        receive: Region,
        /// How.
        op: ReduceOp,
        /// Who gets the result.
        root: usize,
    },
    /// `ncclAllGather`: `receive` is `send` times the number of ranks.
    AllGather {
        /// This rank's share.
        send: Region,
        /// Every rank's share, by rank.
        receive: Region,
    },
    /// `ncclReduceScatter`: `send` is `receive` times the number of ranks.
    ReduceScatter {
        /// This rank's contribution to every share.
        send: Region,
        /// This rank's share of the result.
        receive: Region,
        /// How.
        op: ReduceOp,
    },
    /// `ncclSend`. The peer enqueues a `Receive` of the same length.
    Send {
        /// What.
        send: Region,
        /// To whom.
        peer: usize,
    },
    /// `ncclRecv`.
    Receive {
        /// Where to.
        receive: Region,
        /// From whom.
        peer: usize,
    },
}

impl Operation {
    /// The function of NCCL that does it.
    pub const fn function(&self) -> &'static str {
        match self {
            Self::AllReduce { .. } => "ncclAllReduce",
            Self::Broadcast { .. } => "ncclBroadcast",
            Self::Reduce { .. } => "ncclReduce",
            Self::AllGather { .. } => "ncclAllGather",
            Self::ReduceScatter { .. } => "ncclReduceScatter",
            Self::Send { .. } => "ncclSend",
            Self::Receive { .. } => "ncclRecv",
        }
    }

    /// What is wrong with the call in a group of `world_size` ranks of which this is `rank`, if anything: NCCL itself
    /// cannot know how long a region is, and would write behind its end.
    pub(crate) fn complaint(&self, rank: usize, world_size: usize) -> Option<String> {
        match *self {
            Self::AllReduce { send, receive, .. } => unequal(send, receive, 1),
            Self::Broadcast { send, receive, root } => {
                no_rank(root, world_size).or_else(|| unequal(send, receive, 1))
            }
            Self::Reduce { send, receive, root, .. } => no_rank(root, world_size).or_else(|| {
                let unused = rank != root && receive.is_empty();
                if unused { None } else { unequal(send, receive, 1) }
            }),
            Self::AllGather { send, receive } => unequal(send, receive, world_size),
            Self::ReduceScatter { send, receive, .. } => unequal(receive, send, world_size),
            Self::Send { peer, .. } | Self::Receive { peer, .. } => no_rank(peer, world_size),
        }
    }
}

fn no_rank(rank: usize, world_size: usize) -> Option<String> {
    (rank >= world_size).then(|| format!("there is no rank {rank} among {world_size}"))
}

/// Whether `larger` is not `times` as long as `smaller`, or of another type.
fn unequal(smaller: Region, larger: Region, times: usize) -> Option<String> {
    if smaller.dtype != larger.dtype {
        return Some(format!("one region holds {}, the other {}", smaller.dtype.name(), larger.dtype.name()));
    }
    let expected = smaller.len.checked_mul(times);
    (expected != Some(larger.len)).then(|| {
        format!(
            "{} elements on one side need {} × {times} on the other, not {}",
            smaller.len, smaller.len, larger.len
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A region of nothing but a length: nothing is ever enqueued here.
    fn region(len: usize) -> Region {
        Region { address: 0, len, dtype: DataType::F32 }
    }

    #[test]
    fn lengths_that_do_not_fit_are_complained_about() {
        let op = ReduceOp::Sum;
        let (one, four) = (region(1), region(4));
        let cases = [
            (Operation::AllReduce { send: four, receive: four, op }, None),
            (Operation::AllReduce { send: four, receive: one, op }, Some("4 elements")),
            (Operation::AllGather { send: one, receive: four }, None),
            (Operation::AllGather { send: one, receive: one }, Some("1 × 4")),
            (Operation::AllGather { send: region(usize::MAX), receive: one }, Some("× 4")),
            (Operation::ReduceScatter { send: four, receive: one, op }, None),
            (Operation::ReduceScatter { send: one, receive: four, op }, Some("4 × 4")),
            (Operation::Broadcast { send: one, receive: one, root: 3 }, None),
            (Operation::Broadcast { send: one, receive: one, root: 4 }, Some("no rank 4")),
            (Operation::Reduce { send: one, receive: region(0), op, root: 1 }, None),
            (Operation::Reduce { send: one, receive: region(0), op, root: 0 }, Some("1 elements")),
            (Operation::Send { send: one, peer: 4 }, Some("no rank 4")),
            (Operation::Receive { receive: one, peer: 3 }, None),
        ];
        for (operation, expected) in cases {
            let complaint = operation.complaint(0, 4);
            match expected {
                None => assert_eq!(complaint, None, "{operation:?}"),
                Some(words) => {
                    let complaint = complaint.unwrap_or_else(|| panic!("nothing wrong with {operation:?}"));
                    assert!(complaint.contains(words), "{operation:?}: {complaint}");
                }
            }
        }
    }

    #[test]
    fn types_that_differ_are_complained_about() {
        let bytes = Region::empty(DataType::U8);
        let complaint = Operation::AllGather { send: bytes, receive: region(0) }.complaint(0, 2);
        assert_eq!(complaint.as_deref(), Some("one region holds ncclUint8, the other ncclFloat32"));
    }
}

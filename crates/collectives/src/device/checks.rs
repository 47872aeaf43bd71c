//! What is checked of a collective on device memory before anything moves: neither NCCL nor a copy knows how long a buffer
//! is. A wrong call is refused here with one line, and leaves the group as it was.

use std::ops::Range;

use super::DeviceBuffer;
use super::pieces::shares_of;
use crate::dtype::DType;
use crate::error::Error;

/// A rank of a group, as far as lengths depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) rank: usize,
    pub(super) world_size: usize,
}

impl Place {
    /// The elements of all shares.
    pub(super) fn total(self, share: usize) -> usize {
        share.saturating_mul(self.world_size)
    }

    /// A share for each rank.
    pub(super) fn shares(self, share: usize) -> Vec<Range<usize>> {
        shares_of(&vec![share; self.world_size])
    }

    /// Refuses a rank that does not exist.
    pub(super) fn check_rank(self, operation: &'static str, rank: usize) -> Result<(), Error> {
        if rank < self.world_size {
            return Ok(());
        }
        let reason = format!("rank {rank} does not exist; the ranks are 0 to {}", self.world_size - 1);
        Err(Error::Usage { operation, reason })
    }

    /// Refuses a rank that does not exist or is this one.
    pub(super) fn check_peer(self, operation: &'static str, peer: usize) -> Result<(), Error> {
        self.check_rank(operation, peer)?;
        if peer == self.rank {
            return Err(Error::Usage { operation, reason: format!("rank {peer} is this rank itself") });
        }
        Ok(())
    }

    /// This rank's count, when there is one for each rank and together they are as long as the buffer.
    pub(super) fn check_counts(
        self,
        operation: &'static str,
        counts: &[usize],
        (name, buffer): (&str, DeviceBuffer),
    ) -> Result<usize, Error> {
        if counts.len() != self.world_size {
            let reason = format!("there are {} counts for {} ranks", counts.len(), self.world_size);
            return Err(Error::Usage { operation, reason });
        }
        let total = counts.iter().fold(0usize, |total, &count| total.saturating_add(count));
        check(operation, name, buffer, (total, buffer.dtype()))?;
        Ok(counts[self.rank])
    }

    /// A rank's share of the input of an all_to_all, when there is an equal one for each.
    pub(super) fn check_exchange(self, input: DeviceBuffer, output: DeviceBuffer) -> Result<usize, Error> {
        let (operation, len, ranks) = ("all_to_all", input.len(), self.world_size);
        if !len.is_multiple_of(ranks) {
            let reason = format!("the input has {len} elements, which is no multiple of {ranks} ranks");
            return Err(Error::Usage { operation, reason });
        }
        check(operation, "output", output, (len, input.dtype()))?;
        Ok(len / ranks)
    }
}

/// Refuses a buffer that has not as many elements as it must, of the dtype that it must.
pub(super) fn check(
    operation: &'static str,
    name: &str,
    buffer: DeviceBuffer,
    (len, dtype): (usize, DType),
) -> Result<(), Error> {
    if buffer.len() != len || buffer.dtype() != dtype {
        let (found, of) = (buffer.len(), buffer.dtype());
        let reason = format!("the {name} has {found} elements of {of} and needs {len} of {dtype}");
        return Err(Error::Usage { operation, reason });
    }
    Ok(())
}

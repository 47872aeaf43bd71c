//! The value by which the ranks of a new communicator find each other.

use std::fmt;

/// NCCL's unique id: made by one rank, brought to the others by the caller, used once.
///
/// It holds the address of a socket of the rank that made it, and the random number that is all that keeps strangers
/// away from that socket: carry it over authenticated, encrypted links only. `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct UniqueId([u8; Self::SIZE]);

impl UniqueId {
    /// Its size in bytes.
    pub const SIZE: usize = 128;

    /// An id that came from another rank. NCCL says whether it can be used when it is.
    pub const fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        Self(bytes)
    }

    /// The bytes to carry to the other ranks.
    pub const fn as_bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }

    pub(crate) const fn zeroed() -> Self {
        Self([0; Self::SIZE])
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(…)")
    }
}

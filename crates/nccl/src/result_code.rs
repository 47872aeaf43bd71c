//! Result codes as integers.

use std::fmt;

/// What a function of NCCL returned. Any integer is a value of this type: newer versions have codes that older headers
/// lack (8 became `ncclTimeout` in 2.30), and an enum of Rust that met one would be undefined behaviour.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ResultCode(pub i32);

impl ResultCode {
    /// It has been done.
    pub const SUCCESS: Self = Self(0);
    /// A function of CUDA failed.
    pub const UNHANDLED_CUDA_ERROR: Self = Self(1);
    /// The operating system refused something.
    pub const SYSTEM_ERROR: Self = Self(2);
    /// A defect inside NCCL, or memory that somebody has overwritten.
    pub const INTERNAL_ERROR: Self = Self(3);
    /// An argument makes no sense.
    pub const INVALID_ARGUMENT: Self = Self(4);
    /// The call is not allowed now.
    pub const INVALID_USAGE: Self = Self(5);
    /// Another rank failed, or the network between.
    pub const REMOTE_ERROR: Self = Self(6);
    /// It has begun and goes on in the background.
    pub const IN_PROGRESS: Self = Self(7);
    /// NCCL gave up waiting; since 2.30.
    pub const TIMEOUT: Self = Self(8);

    /// The name in NCCL's header, or `None` for a code that this crate does not know.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::SUCCESS => "ncclSuccess",
            Self::UNHANDLED_CUDA_ERROR => "ncclUnhandledCudaError",
            Self::SYSTEM_ERROR => "ncclSystemError",
            Self::INTERNAL_ERROR => "ncclInternalError",
            Self::INVALID_ARGUMENT => "ncclInvalidArgument",
            Self::INVALID_USAGE => "ncclInvalidUsage",
            Self::REMOTE_ERROR => "ncclRemoteError",
            Self::IN_PROGRESS => "ncclInProgress",
            Self::TIMEOUT => "ncclTimeout",
            _ => return None,
        })
    }
}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({})", self.0),
            None => write!(f, "result code {}, which is unknown here", self.0),
        }
    }
}

impl fmt::Debug for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_integer_is_a_code_that_can_be_shown() {
        assert_eq!(ResultCode(2).to_string(), "ncclSystemError (2)");
        assert_eq!(ResultCode(8).to_string(), "ncclTimeout (8)");
        for unknown in [9, 42, -1, i32::MIN, i32::MAX] {
            assert_eq!(ResultCode(unknown).name(), None);
            assert_eq!(
                ResultCode(unknown).to_string(),
                format!("result code {unknown}, which is unknown here")
            );
        }
    }
}

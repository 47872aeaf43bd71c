//! NCCL's version numbers.

use std::fmt;

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The first number. This crate knows the functions of major version 2.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number.
    pub patch: u32,
}

impl Version {
    /// The oldest that [`Library::open`](crate::Library::open) accepts: since 2.17 the configuration of a communicator
    /// begins as it does today, and what is behind its end is ignored. Non-blocking communicators, without which
    /// nothing can be aborted safely, are older (2.14).
    pub const OLDEST: Self = Self::new(2, 17, 0);

    /// `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Reads what `ncclGetVersion` tells: 22809 is 2.28.9. Up to 2.8 the minor number took one digit less: 2808 is 2.8.8.
    /// A code that is negative is none.
    pub fn from_code(code: i32) -> Option<Self> {
        let code = u32::try_from(code).ok()?;
        let unit = if code < 10_000 { 1000 } else { 10_000 };
        Some(Self::new(code / unit, code % unit / 100, code % 100))
    }

    /// The number by which NCCL knows a version from 2.9 on, as its configurations have it.
    pub const fn code(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, patch } = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_old_and_new_versions_are_read() {
        assert_eq!(Version::from_code(22809), Some(Version::new(2, 28, 9)));
        assert_eq!(Version::from_code(21700), Some(Version::OLDEST));
        assert_eq!(Version::from_code(2808), Some(Version::new(2, 8, 8)));
        assert_eq!(Version::from_code(30102), Some(Version::new(3, 1, 2)));
        assert_eq!(Version::from_code(-1), None);
        assert!(Version::new(2, 9, 9) < Version::new(2, 10, 0));
    }
}

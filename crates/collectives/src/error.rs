//! What a collective can end in, other than well.

use std::fmt;
use std::time::Duration;

use crate::operation::Operation;

/// Errors of this crate.
///
/// Two questions come first: whose fault is it, and [is it fatal](Error::is_fatal) to the communicator?
/// After a fatal error the buffers of the operation hold unspecified elements, every later call
/// answers with the same error at once, and what remains is to drop the communicator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This rank's call was wrong, or, where all ranks have compared their arguments first, those of two
    /// ranks do not fit. It had no effect; the communicator can be used.
    #[error("{operation}: {reason}")]
    Usage {
        /// The name of the called operation.
        operation: &'static str,
        /// What was wrong and what to do.
        reason: String,
    },
    /// The operation needs a rank that has left in order. Fatal: later operations with it end alike.
    #[error(
        "{operation} needs rank {rank}, which has left in order: call it before any rank leaves, or form a new group"
    )]
    PeerLeft {
        /// The operation on this rank.
        operation: Operation,
        /// Who left.
        rank: usize,
    },
    /// A rank died or its link broke. Fatal.
    #[error("lost rank {rank} in {operation}: {reason}")]
    PeerLost {
        /// The operation on this rank.
        operation: Operation,
        /// Who was lost.
        rank: usize,
        /// What was seen, in words.
        reason: String,
    },
    /// Ranks called different operations, or the same with different arguments. Fatal.
    #[error("mismatched calls: {}, {}, seen in {operation} on this rank", calls[0], calls[1])]
    Mismatch {
        /// The operation on this rank.
        operation: Operation,
        /// Two calls that disagree.
        calls: Box<[Call; 2]>,
    },
    /// The deadline passed. Fatal.
    #[error("{operation} timed out after {} ms waiting for {}", elapsed.as_millis(), Ranks(waiting_for))]
    TimedOut {
        /// The operation on this rank.
        operation: Operation,
        /// The ranks that were waited for and were not themselves waiting for anybody.
        waiting_for: Vec<usize>,
        /// How long the rank that gave up had waited.
        elapsed: Duration,
    },
    /// The owner of the communicator interrupted it. Fatal.
    #[error("{operation} was interrupted: {reason}")]
    Interrupted {
        /// The operation on this rank.
        operation: Operation,
        /// The reason given.
        reason: String,
    },
    /// Leaving in order did not complete in time. The communicator is gone.
    #[error("leaving: {reason}")]
    Leave {
        /// Who had not confirmed.
        reason: String,
    },
}

impl Error {
    /// Whether the communicator is unusable from now on.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Usage { .. })
    }

    /// The same error, in `operation` if it was in the probe before the first one.
    pub(crate) fn of_probe_in(mut self, first: Operation) -> Self {
        match &mut self {
            Self::PeerLeft { operation, .. }
            | Self::PeerLost { operation, .. }
            | Self::Mismatch { operation, .. }
            | Self::TimedOut { operation, .. }
            | Self::Interrupted { operation, .. }
                if operation.is_of_probe() =>
            {
                *operation = first;
            }
            _ => {}
        }
        self
    }
}

/// What one rank called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The rank that called.
    pub rank: usize,
    /// What it called.
    pub operation: Operation,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} called {}", self.rank, self.operation)
    }
}

/// `rank 3` or `ranks 1, 4 and 7`.
struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("the network"),
            [one] => write!(f, "rank {one}"),
            [first, middle @ .., last] => {
                write!(f, "ranks {first}")?;
                for rank in middle {
                    write!(f, ", {rank}")?;
                }
                write!(f, " and {last}")
            }
        }
    }
}

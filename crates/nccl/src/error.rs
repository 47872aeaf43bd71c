//! What can go wrong with NCCL.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::result_code::ResultCode;
use crate::version::Version;

/// Errors of this crate. [`Error::is_fatal`] says whether the communicator is lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no NCCL on this machine where it was looked for.
    #[error(
        "no NCCL found: {}; install it (pip install nvidia-nccl-cu13) or set PACELINE_NCCL_PATH",
        Attempts(tried)
    )]
    NotFound {
        /// Every place, in the order of the search.
        tried: Vec<Attempt>,
    },
    /// The library that was asked for, or the one that this process already has, is not an NCCL that can be used.
    #[error("cannot use {origin} as NCCL: {reason}")]
    Unusable {
        /// Which library.
        origin: String,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// This NCCL lacks a function. Nothing has been done.
    #[error("NCCL {have} ({origin}) has no {function}, which came with {since}: use a newer NCCL")]
    Missing {
        /// The function of NCCL.
        function: &'static str,
        /// The first version that has it.
        since: Version,
        /// The version that was loaded.
        have: Version,
        /// From where it was loaded.
        origin: String,
    },
    /// The call was wrong. It had no effect; the communicator can be used.
    #[error("{operation}: {reason}")]
    Usage {
        /// What was called.
        operation: &'static str,
        /// What was wrong and what to do.
        reason: String,
    },
    /// The caller's preparation of the communicator's thread failed; NCCL has not been called.
    #[error("cannot prepare the thread of a communicator: {reason}")]
    Prepare {
        /// The caller's words.
        reason: String,
    },
    /// NCCL reported an error. Fatal.
    #[error("{function} failed with {code}{}{}", Words(": ", words), Words("; NCCL's last error: ", last))]
    Failed {
        /// The function that returned the code, or whose work in the background ended in it.
        function: &'static str,
        /// The code.
        code: ResultCode,
        /// NCCL's words for the code; empty if it has none.
        words: String,
        /// NCCL's account of the last thing that went wrong in this process; empty if it gives none.
        last: String,
    },
    /// NCCL still worked in the background at the deadline. Fatal: other ranks may have gone on.
    #[error("{function} was not complete after {} ms; ranks that have not called it, or are gone?", elapsed.as_millis())]
    TimedOut {
        /// What was waited for.
        function: &'static str,
        /// How long.
        elapsed: Duration,
    },
    /// A function of NCCL has not returned. Fatal: its thread is lost, and only the end of the process frees what it
    /// holds. It cannot be aborted either, since NCCL forbids that while a thread is inside it.
    #[error("{function} has not returned for {} ms; its thread is given up: end this process", elapsed.as_millis())]
    Stuck {
        /// The function, as far as is known; what was asked for otherwise.
        function: &'static str,
        /// How long the caller has waited.
        elapsed: Duration,
    },
    /// The communicator was aborted or left. Fatal.
    #[error("the communicator has ended: {reason}")]
    Ended {
        /// The reason given.
        reason: String,
    },
    /// An earlier error was fatal: nothing has been called.
    #[error("the communicator has failed earlier: {cause}")]
    Failing {
        /// The error that was fatal.
        cause: Arc<Error>,
    },
    /// The operating system has no thread to give.
    #[error("cannot start the thread of a communicator: {reason}")]
    Thread {
        /// The operating system's reason.
        reason: String,
    },
}

impl Error {
    /// Whether the communicator is unusable from now on.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::Missing { .. } | Self::Usage { .. })
    }
}

/// One place where the search looked for NCCL, and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The file or name that was tried.
    pub place: PathBuf,
    /// Why it was not used.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.place.display(), self.reason)
    }
}

struct Attempts<'a>(&'a [Attempt]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no place was allowed to be looked at");
        }
        f.write_str("tried ")?;
        for (at, attempt) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{attempt}")?;
        }
        Ok(())
    }
}

/// Words after a separator; neither where there are no words.
struct Words<'a>(&'static str, &'a str);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.1.is_empty() { Ok(()) } else { write!(f, "{}{}", self.0, self.1) }
    }
}

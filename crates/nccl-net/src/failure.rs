//! Why a call of NCCL's fails: its code, and a line for its log.

use paceline_transport::Error;

use crate::abi::{INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, ResultCode, SYSTEM_ERROR};

/// What a call answers with when it fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// NCCL's code.
    pub code: ResultCode,
    /// What happened, for the log; `None` when that has been said.
    pub reason: Option<String>,
}

impl Failure {
    fn new(code: ResultCode, reason: impl Into<String>) -> Self {
        Self { code, reason: Some(reason.into()) }
    }

    /// NCCL passed something that is nothing of ours.
    pub fn argument(reason: impl Into<String>) -> Self {
        Self::new(INVALID_ARGUMENT, reason)
    }

    /// A call that may not be made, or with settings that do not fit.
    pub fn usage(reason: impl Into<String>) -> Self {
        Self::new(INVALID_USAGE, reason)
    }

    /// A defect of ours.
    pub fn internal(reason: impl Into<String>) -> Self {
        Self::new(INTERNAL_ERROR, reason)
    }

    /// The operating system, or what the user has set up, does not let us.
    pub fn system(reason: impl Into<String>) -> Self {
        Self::new(SYSTEM_ERROR, reason)
    }

    /// The other side: gone, or not who it should be.
    pub fn remote(reason: impl Into<String>) -> Self {
        Self::new(REMOTE_ERROR, reason)
    }

    /// That a link to `peer` is of no use any more.
    pub fn of_link(peer: &str, error: &Error) -> Self {
        match error {
            Error::Lost { reason, .. } => {
                Self::remote(format!("the connection to {peer} was lost: {reason}"))
            }
            Error::Left { .. } => Self::remote(format!("{peer} has closed the connection")),
            error => Self::remote(format!("the connection to {peer}: {error}")),
        }
    }

    /// What to answer with; the next time it has no reason, for the log has it.
    pub fn tell(&mut self) -> Self {
        Self { code: self.code, reason: self.reason.take() }
    }
}

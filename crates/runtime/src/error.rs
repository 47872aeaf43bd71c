//! What can go wrong in a training program's runtime.

use paceline_collectives as collectives;
use paceline_transport as transport;

use crate::nodes::Failure;

/// Errors of this crate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An environment variable is missing or unusable. Nothing has been started.
    #[error("environment variable {variable}: {reason}")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// The members of the job did not meet.
    #[error("rendezvous at {endpoint}: {reason}")]
    Rendezvous {
        /// Where it should have been.
        endpoint: String,
        /// Who is missing, or why this process was refused.
        reason: String,
    },
    /// The job has ended before this node could take part in it.
    #[error("the job has ended without this node{}", because(cause.as_ref()))]
    Over {
        /// What the job has failed of, if it has.
        cause: Option<Failure>,
    },
    /// A call with arguments that do not fit. It had no effect.
    #[error("{reason}")]
    Usage {
        /// What was wrong and what to do.
        reason: String,
    },
    /// A checkpoint; training can go on without it.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// This worker cannot go on in a job whose membership changes.
    #[error("membership: {reason}")]
    Membership {
        /// What has happened.
        reason: String,
    },
    /// The links between the ranks.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// A collective; it says itself [whether the communicator survives](collectives::Error::is_fatal).
    #[error(transparent)]
    Collectives(#[from] collectives::Error),
}

fn because(cause: Option<&Failure>) -> String {
    cause.map_or_else(String::new, |cause| format!(": {cause}"))
}

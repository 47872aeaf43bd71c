//! Why a job was not started, in one line each.
//!
//! Only what happens before the ranks run is an error of the launcher; what ranks do is told by [`crate::report`].

use crate::cli::RunArgs;

/// Why the launcher did not start the job. The text follows `paceline: ` and is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command line or an environment variable is wrong.
    #[error("{0}")]
    Usage(String),
    /// No file of that name, along PATH or at the path given.
    #[error("{program}: no such program; give a path, or a name that PATH leads to")]
    ProgramMissing {
        /// As it was written on the command line.
        program: String,
    },
    /// What was to be run by Python is not there.
    #[error(
        "{script}: no such file for Python to run; write -- in front of what is no script: paceline run -- {script}"
    )]
    ScriptMissing {
        /// As it was written on the command line.
        script: String,
    },
    /// There is a file, but it cannot be executed.
    #[error("{program} cannot be executed: {why}")]
    ProgramNotExecutable {
        /// As it was written on the command line.
        program: String,
        /// The reason, and what to do about it where that is known.
        why: String,
    },
    /// The rendezvous cannot listen at the endpoint.
    #[error("the rendezvous cannot listen on {endpoint}: {why}")]
    Endpoint {
        /// HOST:PORT.
        endpoint: String,
        /// The reason and what to do about it.
        why: String,
    },
    /// The launchers of a job of several nodes have not met. No rank has been started.
    #[error("the nodes have not met at {endpoint}: {why}")]
    Nodes {
        /// HOST:PORT.
        endpoint: String,
        /// Who is missing, or why this node was refused.
        why: String,
    },
    /// The job has ended before this launcher could take part in it. No rank has been started.
    #[error("{why}")]
    Over {
        /// That it has, and of what it has failed if it has.
        why: String,
        /// The job's exit code.
        exit_code: u8,
    },
    /// Supervising this many ranks needs more open files than the process may have.
    #[error(
        "{ranks} ranks need {needed} open files and the limit is {limit}; raise it with ulimit -n {needed}"
    )]
    FileLimit {
        /// The number of ranks asked for.
        ranks: u32,
        /// Open files that the launcher would need.
        needed: u64,
        /// The soft limit of this process.
        limit: u64,
    },
    /// The operating system refused something the launcher needs. Ranks already started have been killed.
    #[error("{what}: {why}")]
    System {
        /// The operation that failed.
        what: String,
        /// The operating system's reason.
        why: String,
    },
}

impl Error {
    /// The library's error about the meeting of the nodes.
    pub fn nodes(args: &RunArgs, e: &paceline_runtime::Error) -> Self {
        let why = match e {
            paceline_runtime::Error::Rendezvous { reason, .. } => reason.clone(),
            paceline_runtime::Error::Over { cause } => {
                let code = cause.as_ref().map_or(0, |cause| cause.exit_code);
                return Error::Over { why: e.to_string(), exit_code: args.torchrun.exit_code.of(code) };
            }
            e => e.to_string(),
        };
        Error::Nodes { endpoint: args.rendezvous.to_string(), why }
    }

    /// The launcher's exit code for this error, with the shells' meaning of 126 and 127.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::Endpoint { .. } | Error::FileLimit { .. } => 2,
            Error::ProgramMissing { .. } | Error::ScriptMissing { .. } => 127,
            Error::ProgramNotExecutable { .. } => 126,
            Error::System { .. } | Error::Nodes { .. } => 1,
            Error::Over { exit_code, .. } => *exit_code,
        }
    }
}

//! Where the ranks of the job meet, as far as the launcher is concerned.
//!
//! The supervisor needs little of it, which is all the trait has; so it is tested with shell programs. Two real ones
//! exist: `founder` makes the job's certificate authority and serves the rendezvous of
//! `paceline_runtime`, on one machine or as node 0 of several; `follower` is any other node.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use paceline_runtime::env::{self, JobEnv};
use paceline_runtime::nodes::Failure;

use crate::cli::RunArgs;
use crate::console::{Console, Stream};
use crate::credentials::Credentials;
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::news::News;
use crate::{follower, founder};

/// The rendezvous of one job. Ranks are counted from 0 on this machine. None of the calls blocks.
pub trait Rendezvous: Send {
    /// What the rank must find in its environment to take part.
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)>;

    /// The rank has exited with code 0: who waits for it waits in vain, but nothing is wrong.
    fn announce_exit(&self, rank: u32);

    /// The rank is dead; `by_itself`: the launcher had not told it to end.
    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool);

    /// No rank runs here any more. May be said again.
    fn ranks_ended(&self);

    /// The failure on another machine that ends the job, in words and as an exit code.
    fn failure_elsewhere(&self) -> Option<(String, u8)>;

    /// Whether this launcher may end, once it has said that its ranks have.
    fn is_over(&self) -> bool;

    /// What the job has failed of, by what the ranks of all machines said about each other before they ended.
    fn cause(&self) -> Option<Cause>;

    /// Rung when one of the answers may have changed.
    fn news(&self) -> &News;
}

/// Opens the rendezvous of the job at the endpoint of `args`; it lasts until the value is dropped. In a job of several
/// nodes it blocks until all of them have come, and says on `console` whom it waits for.
///
/// # Errors
/// [`Error::Endpoint`] if nothing can listen there, [`Error::System`] if the certificates cannot be stored,
/// [`Error::Usage`] for a secret that will not do, [`Error::Nodes`] if the nodes have not met.
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    match args.node() {
        0 => founder::open(args, console),
        _ => follower::open(args, console),
    }
}

/// The environment of a rank that finds the others at `rendezvous`.
pub fn worker_env(
    args: &RunArgs,
    rank: u32,
    rendezvous: String,
    credentials: &Credentials,
) -> Vec<(String, OsString)> {
    let number = (args.first_rank() + rank) as usize;
    let job_env = JobEnv {
        rank: number,
        world_size: args.layout().world_size(),
        local_rank: rank as usize,
        local_world_size: args.ranks as usize,
        rendezvous,
        rendezvous_timeout: args.rendezvous_timeout,
        identity: credentials.path(number),
    };
    let timeout = args.timeout.map(env::timeout_var);
    let fabric = args.fabric.map(env::fabric_var);
    job_env
        .to_vars()
        .into_iter()
        .chain(timeout)
        .chain(fabric)
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

/// The failure as seen from this machine.
pub fn cause(args: &RunArgs, failure: Failure) -> Cause {
    match failure.rank {
        Some(rank) if failure.node == args.node() => Cause::Here { rank: rank - args.first_rank() },
        _ => Cause::Elsewhere { exit_code: failure.exit_code, what: failure.to_string() },
    }
}

/// The failure, if it is not of a rank of this machine.
pub fn elsewhere(args: &RunArgs, failure: Failure) -> Option<(String, u8)> {
    (failure.node != args.node()).then(|| (failure.to_string(), failure.exit_code))
}

/// Says whom this launcher waits for: at once, and when it changes, but not more often than every 5 s.
#[derive(Clone)]
pub struct Status {
    console: Console,
    said: Arc<std::sync::Mutex<Option<Instant>>>,
}

/// The least time between two lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

impl Status {
    /// Nothing has been said yet.
    pub fn new(console: &Console) -> Self {
        Self { console: console.clone(), said: Arc::default() }
    }

    /// Completes the line "paceline: waiting for …".
    pub fn waiting_for(&self, whom: &str) {
        tracing::info!(whom, "waiting");
        // Replaced whole.
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) {
            *said = Some(Instant::now());
            self.console.print(Stream::Err, format!("paceline: waiting for {whom}\n").into_bytes());
        }
    }
}

/// `node 1, node 3`.
pub fn list_nodes(nodes: &[u32]) -> String {
    const NAMED: usize = 16;
    let names: Vec<String> = nodes.iter().take(NAMED).map(|node| format!("node {node}")).collect();
    let more = if nodes.len() > NAMED { format!(" and {} more", nodes.len() - NAMED) } else { String::new() };
    names.join(", ") + &more
}

//! Where the ranks of the job meet, as far as the launcher is concerned.
//!
//! The supervisor needs little of it, which is all the trait has; so it is tested with shell programs. Two real ones
//! exist: `founder` makes the job's certificate authority and serves the rendezvous of
//! `paceline_runtime`, on one machine or as node 0 of several; `follower` is any other node. A third, `voter`, is any node of
//! a job whose number of nodes may change.

use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use paceline_runtime::env::{self, JobEnv};
use paceline_runtime::interface::Selection;
use paceline_runtime::nodes::{Failure, Generation};

use crate::cli::{Changes, RunArgs, Seating};
use crate::console::{Console, Stream};
use crate::credentials::Credentials;
use crate::elastic::Companions;
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::news::News;
use crate::{follower, founder, voter};

/// The rendezvous of one job. Ranks are counted from 0 on this machine. None of the calls blocks.
pub trait Rendezvous: Send {
    /// What the rank must find in its environment to take part.
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)>;

    /// The rank has exited with code 0: who waits for it waits in vain, but nothing is wrong. `by_itself`: nobody had told
    /// it to end.
    fn announce_exit(&self, rank: u32, by_itself: bool);

    /// The rank is dead; `by_itself`: the launcher had not told it to end.
    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool);

    /// All ranks of the job are to write what they did last.
    fn ask_for_traces(&self);

    /// No rank runs here any more, and none will if the launcher was told to stop. May be said again.
    fn ranks_ended(&self, told: Told);

    /// The failure on another machine that ends the job, in words and as an exit code.
    fn failure_elsewhere(&self) -> Option<(String, u8)>;

    /// The number of this node.
    fn node(&self) -> u32;

    /// The present generation of the job.
    fn generation(&self) -> Generation;

    /// What this launcher does, once it has said that its ranks have ended. One that was told to stop does not start them again.
    fn next(&self, told: Told) -> Next;

    /// What the job has failed of, by what the ranks of all machines said about each other before they ended.
    fn cause(&self) -> Option<Cause>;

    /// Rung when one of the answers may have changed.
    fn news(&self) -> &News;

    /// The other launchers, where the job may lose them and go on.
    fn companions(&self) -> Option<Companions> {
        None
    }
}

/// Whether somebody wants this launcher to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nobody has said so.
    Nothing,
    /// It was sent a signal.
    ToStop,
    /// Its ranks were members of a training that goes on without those it loses, or ends: they do not all start again.
    NotToStartAgain,
}

/// What a launcher without ranks does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Others have still something to do, or to say.
    Wait,
    /// The job is over.
    End,
    /// The ranks start again, as the present generation.
    Again,
}

/// Opens the rendezvous of the job at the endpoint of `args`; it lasts until the value is dropped. In a job of several
/// nodes it blocks until all of them have come, and says on `console` whom it waits for.
///
/// # Errors
/// [`Error::Endpoint`] if nothing can listen there, [`Error::System`] if the certificates cannot be stored,
/// [`Error::Usage`] for a secret or an interface that will not do, [`Error::Nodes`] if the nodes have not met.
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    // Once by the launcher, so that it is one line and not one from each rank.
    interface(args)?;
    if args.changes() == Changes::Vote {
        return voter::open(args, console);
    }
    let seating = args.nodes.as_ref().map_or(Seating::Given, |nodes| nodes.seating);
    match (args.node(), seating) {
        (0, Seating::Given) => founder::open(args, console),
        (_, Seating::Given) | (_, Seating::Any { is_host: Some(false) }) => follower::open(args, console),
        (_, Seating::Any { is_host: Some(true) }) => founder::open(args, console),
        (_, Seating::Any { is_host: None }) if !founder::is_here(args) => follower::open(args, console),
        (_, Seating::Any { is_host: None }) => match founder::open(args, console) {
            // Another launcher of this machine was first.
            Err(Error::Endpoint { .. }) => follower::open(args, console),
            opened => opened,
        },
    }
}

/// The address of this machine that was asked for, if one was.
///
/// # Errors
/// [`Error::Usage`] with what there is instead.
pub fn interface(args: &RunArgs) -> Result<Option<IpAddr>, Error> {
    let chosen = args.interface.as_ref().map(Selection::choose_here).transpose();
    chosen.map_err(|reason| Error::Usage(format!("the interface {reason}")))
}

/// The environment of a rank of this generation that finds the others at `rendezvous`.
pub fn worker_env(
    args: &RunArgs,
    rank: u32,
    (rendezvous, generation): (String, &Generation),
    credentials: &Credentials,
) -> Vec<(String, OsString)> {
    let within = args.within(generation);
    // Certificates are for places among all nodes that there may be.
    let place = (args.first_rank() + rank) as usize;
    let job_env = JobEnv {
        rank: (within.first_rank() + rank) as usize,
        world_size: within.layout().world_size(),
        local_rank: rank as usize,
        local_world_size: args.ranks as usize,
        generation: generation.number,
        rendezvous,
        rendezvous_timeout: args.rendezvous_timeout,
        identity: credentials.path(place),
        interface: args.interface.clone(),
        flight_recorder: args.flight_recorder.clone(),
    };
    let timeout = args.timeout.map(env::timeout_var);
    let fabric = args.fabric.map(env::fabric_var);
    let insecure = args.insecure.then(env::insecure_var);
    job_env
        .to_vars()
        .into_iter()
        .chain(timeout)
        .chain(fabric)
        .chain(insecure)
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

/// The failure of a generation as seen from this machine.
pub fn cause(args: &RunArgs, generation: &Generation, failure: Failure) -> Cause {
    let first = args.within(generation).first_rank();
    match failure.rank {
        // Another launcher may say what it likes: only a rank of this machine is one here.
        Some(rank) if failure.node == args.node() && (first..first + args.ranks).contains(&rank) => {
            Cause::Here { rank: rank - first }
        }
        _ => Cause::Elsewhere { exit_code: failure.exit_code, what: failure.to_string() },
    }
}

/// The failure, if it is not of a rank of this machine.
pub fn elsewhere(args: &RunArgs, failure: Failure) -> Option<(String, u8)> {
    (failure.node != args.node() || failure.rank.is_none()).then(|| (failure.to_string(), failure.exit_code))
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

    /// Completes the line "paceline: …", whenever that is.
    pub fn say(&self, what: &str) {
        self.console.print(Stream::Err, format!("paceline: {what}\n").into_bytes());
    }

    /// Says whom at once: whoever asks has seen to it that it is not too often.
    pub fn say_waiting_for(&self, whom: &str) {
        tracing::info!(whom, "waiting");
        self.say(&format!("waiting for {whom}"));
    }

    /// Completes the line "paceline: waiting for …".
    pub fn waiting_for(&self, whom: &str) {
        tracing::info!(whom, "waiting");
        // Replaced whole.
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) {
            *said = Some(Instant::now());
            self.say(&format!("waiting for {whom}"));
        }
    }
}

/// `node 1, node 3`, or the names of their pods.
pub fn list_nodes(args: &RunArgs, nodes: &[u32]) -> String {
    const NAMED: usize = 16;
    let names: Vec<String> = nodes.iter().take(NAMED).map(|&node| args.pod.name(node)).collect();
    let more = if nodes.len() > NAMED { format!(" and {} more", nodes.len() - NAMED) } else { String::new() };
    names.join(", ") + &more
}

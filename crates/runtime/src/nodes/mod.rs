//! The launchers of a job of several nodes: who may come, what they tell each other, whose failure it was.
//!
//! Launcher 0 serves the rendezvous; every other launcher stays connected to it for as long as it has ranks.
//! Ranks start when all launchers are there, so that a node that does not come is one line and not a hundred.
//!
//! ```text
//! launcher of node 2                        launcher 0
//! Attend{claim, after}          ─────▶  after: the generation that it has been part of, if launcher 0 was lost
//!                               ◀─────  Waiting{missing}
//! Beat                          ─────▶
//!                               ◀─────  Start{generation} | Refused{reason}
//! Died{rank, …} | Exited{rank}  ─────▶  told to all workers and launchers
//!                               ◀─────  Failed{failure}     the first of the job, wherever it was
//!                               ◀─────  or Changes{node}    nothing has failed: the next generation has this node too
//! Ended | Left                  ─────▶  no rank runs here any more, or ever will
//!                               ◀─────  Verdict{cause}      what the job failed of, if it has
//!                               ◀─────  or Waiting{missing} and Start again: the next generation of the job
//! Beat                          ◀────▶  every half second; silence for 5 s is a loss
//! ```
//! Where fewer nodes will do, the job starts with those that are there when no other one has come for a while; the nodes
//! that take part, in their order, have its ranks. A launcher that comes later is told to all, who end their ranks as after
//! a failure, and the next generation is one with it.
//!
//! A launcher that loses launcher 0 may come again, to another one at the same place, which goes on with the generation
//! after the last one that any of them has been part of.
//!
//! What is decided is decided in `Seats` and `Causes`, which have neither clock nor network; `Attendance` is the other launchers' side.

mod attendance;
mod causes;
mod seats;

use std::fmt;
use std::time::Duration;

use paceline_transport::boot::Claim;
use serde::{Deserialize, Serialize};

pub(crate) use self::attendance::reason_of;
pub use self::attendance::{Attendance, Comer, OnChange};
pub(crate) use self::causes::{Causes, Settled};
pub(crate) use self::seats::Seats;

/// How often launchers tell each other that they are alive, and how long one may be silent. A launcher is
/// not where the work is; a machine so busy that it says nothing for 5 s trains nothing either.
pub(crate) const BEAT: Duration = Duration::from_millis(500);
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// How long a place that is taken may take to become free: a launcher that was killed is missed after 5 s, and that of
/// a job before goes when its ranks have had their grace.
pub const TAKEN: Duration = Duration::from_secs(30);

/// The exit code of a job that has lost a launcher, and with it a machine or a pod: 128 + SIGUSR1, which
/// the training operators take for "start again" in all their versions.
pub const LOST_NODE: u8 = 138;

/// The member name of the launcher of a node.
pub fn launcher(node: usize) -> String {
    format!("launcher-{node}")
}

pub(crate) fn node_of(member: &str) -> Option<u32> {
    member.strip_prefix("launcher-")?.parse().ok()
}

/// How the ranks are spread: node n has the ranks from n × ranks per node on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How many nodes, at least one.
    pub nodes: usize,
    /// How many ranks on each, at least one.
    pub ranks_per_node: usize,
}

impl Layout {
    /// The ranks of one host.
    pub fn one_host(ranks: usize) -> Self {
        Self { nodes: 1, ranks_per_node: ranks }
    }

    /// The number of ranks.
    pub fn world_size(self) -> usize {
        self.nodes * self.ranks_per_node
    }

    /// The ranks of a node.
    pub fn ranks(self, node: usize) -> std::ops::Range<usize> {
        node * self.ranks_per_node..(node + 1) * self.ranks_per_node
    }
}

/// What all launchers of a job must have been started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How the ranks are spread when all nodes are there.
    pub layout: Layout,
    /// With how many nodes the job runs too.
    pub least_nodes: usize,
    /// How long it then waits for another one since the last has come.
    pub last_call: Duration,
    /// The name of the run.
    pub run_id: String,
}

/// One start of all ranks of the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// How many there have been before.
    pub number: u32,
    /// How many of those have ended because another node came.
    pub changes: u32,
    /// How many may end in a failure and be followed by another one, as launcher 0 was told.
    pub max_restarts: u32,
    /// The nodes that take part, in the order of their ranks.
    pub nodes: Vec<u32>,
    /// Where the programs meet by themselves, if they do: a name or an address of node 0,
    pub master_addr: String,
    /// and a port there, which is no other generation's.
    pub master_port: u16,
}

impl Generation {
    /// How often the job has started again after a failure.
    pub fn restarts(&self) -> u32 {
        self.number.saturating_sub(self.changes)
    }

    /// How often it may do so again.
    pub fn restarts_left(&self) -> u32 {
        self.max_restarts.saturating_sub(self.restarts())
    }

    /// The place of a node among those that take part.
    pub fn place(&self, node: u32) -> Option<u32> {
        self.nodes.iter().position(|&other| other == node).map(|place| place as u32)
    }

    /// What another launcher 0 has to know of it.
    pub fn past(&self) -> Past {
        Past { number: self.number, changes: self.changes }
    }

    /// With another launcher's words made fit for an environment variable.
    fn quoted(self) -> Self {
        Self { master_addr: quote(&self.master_addr), ..self }
    }
}

/// The last generation that a launcher has been part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Past {
    /// See [`Generation::number`].
    pub number: u32,
    /// See [`Generation::changes`].
    pub changes: u32,
}

/// What made a job fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Where it was.
    pub node: u32,
    /// The rank that failed; none when the launcher of the node was lost.
    pub rank: Option<u32>,
    /// How, as the end of a sentence: `exited with code 3`.
    pub cause: String,
    /// The exit code of the job on that account.
    pub exit_code: u8,
}

impl Failure {
    /// With another launcher's words made fit for one line, and an exit code that is one of a failure.
    fn quoted(self) -> Self {
        Self { cause: quote(&self.cause), exit_code: self.exit_code.max(1), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, rank, cause, .. } = self;
        match rank {
            Some(rank) => write!(f, "rank {rank} on node {node} {cause}"),
            None => write!(f, "the launcher of node {node} {cause}"),
        }
    }
}

/// From a launcher to launcher 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Attend { claim: Claim, after: Option<Past> },
    Died { rank: u32, cause: String, exit_code: u8, by_itself: bool },
    Exited { rank: u32 },
    Ended,
    Left,
    Beat,
    AskForTraces,
}

/// From launcher 0 to another launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    Waiting {
        missing: Vec<u32>,
    },
    Start(Generation),
    Refused {
        reason: String,
        for_now: bool,
    },
    Failed(Failure),
    Verdict {
        cause: Option<Failure>,
    },
    Beat,
    /// The job is over, and has not failed: this rank has finished, which decides for all.
    Completed {
        rank: u32,
    },
    /// All ranks start again because this node has come.
    Changes {
        node: u32,
    },
}

/// The longest cause that is passed on, in bytes; ours have a tenth.
const CAUSE_LIMIT: usize = 500;

/// The words of another launcher, made fit for one line.
pub(crate) fn quote(cause: &str) -> String {
    cause.chars().take(CAUSE_LIMIT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A job that is over ends as one that has failed, but for its exit code.
fn completion(rank: u32) -> Failure {
    let cause = "has finished, and with it the job".to_owned();
    Failure { node: 0, rank: Some(rank), cause, exit_code: 0 }
}

/// What the ranks of the others are ended for is not what the job fails of.
fn arrival(node: u32) -> Failure {
    Failure { node, rank: None, cause: "has come".to_owned(), exit_code: LOST_NODE }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            use paceline_transport::wire;
            let _ = wire::decode::<Report>(&bytes);
            if let Ok(Order::Failed(failure)) = wire::decode::<Order>(&bytes) {
                let text = failure.quoted().to_string();
                prop_assert!(text.chars().all(|c| !c.is_control()) && text.len() < 4 * CAUSE_LIMIT);
            }
        }
    }
}

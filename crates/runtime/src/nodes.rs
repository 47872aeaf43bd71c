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
//! What is decided is decided in `Seats` and `Causes`, which have neither clock nor network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::IoHandle;
use paceline_transport::boot::{Claim, Verdict};
use paceline_transport::tls::{Connection, Dialler, MessageReceiver, MessageSender};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::Error;
use crate::rendezvous::{LAUNCHER, dial, worker};

/// How often launchers tell each other that they are alive, and how long one may be silent. A launcher is
/// not where the work is; a machine so busy that it says nothing for 5 s trains nothing either.
pub(crate) const BEAT: Duration = Duration::from_millis(500);
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// How long a place that is taken may take to become free: a launcher that was killed is missed after 5 s, and that of
/// a job before goes when its ranks have had their grace.
pub const TAKEN: Duration = Duration::from_secs(30);

/// The pause between two attempts at a place that is taken.
const TAKEN_PAUSE: Duration = Duration::from_secs(1);

/// How long a node that has its certificates may take to attend.
const PROMISE: Duration = Duration::from_secs(10);

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

/// The places of the launchers other than launcher 0, which has node 0.
#[derive(Debug)]
pub(crate) struct Seats {
    terms: Terms,
    seats: BTreeMap<u32, Seat>,
    /// When the last one has come.
    came: Option<Instant>,
    /// Whether the last call is over whoever has come.
    called: bool,
    /// Since when enough have come.
    complete: Option<Instant>,
    started: bool,
    /// The nodes of the generation that has started last; before the first all.
    present: Vec<u32>,
    /// How often the job may start again.
    restarts: u32,
    /// It starts again because another node has come.
    changes: bool,
    /// The nodes because of which it does, until the next start.
    newcomers: BTreeSet<u32>,
    /// Those that were gone before that. Without this a launcher that ends as soon as it has come, again and again, would have all
    /// others start again each time, without limit.
    in_vain: BTreeSet<u32>,
    /// The last generation that any launcher has been part of, if one has come from another launcher 0.
    after: Option<Past>,
}

#[derive(Debug)]
struct Seat {
    incarnation: u128,
    remote: SocketAddr,
    presence: Presence,
    /// When it last said something.
    heard: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    /// It has certificates and is expected until then.
    Promised(Instant),
    Attending,
    /// All of its ranks have ended, and it may go.
    Ended,
    Lost,
}

impl Seats {
    pub(crate) fn new(terms: Terms) -> Self {
        Self {
            seats: BTreeMap::new(),
            came: None,
            called: false,
            complete: None,
            started: terms.layout.nodes == 1,
            present: (0..terms.layout.nodes as u32).collect(),
            restarts: 0,
            changes: false,
            newcomers: BTreeSet::new(),
            in_vain: BTreeSet::new(),
            after: None,
            terms,
        }
    }

    /// How many ranks the generation has that has started last.
    pub(crate) fn world_size(&self) -> usize {
        self.present.len() * self.terms.layout.ranks_per_node
    }

    /// The ranks of a node in it.
    pub(crate) fn ranks(&self, node: u32) -> std::ops::Range<u32> {
        let per_node = self.terms.layout.ranks_per_node as u32;
        let place = self.present.iter().position(|&present| present == node);
        place.map_or(0..0, |place| place as u32 * per_node..(place as u32 + 1) * per_node)
    }

    /// The name of the member that is this rank of it: certificates are for places, which last longer than a generation.
    pub(crate) fn member(&self, rank: usize) -> Option<String> {
        let per_node = self.terms.layout.ranks_per_node;
        let node = *self.present.get(rank / per_node)? as usize;
        self.terms.layout.ranks(node).nth(rank % per_node).map(worker)
    }

    fn is_present(&self, node: u32) -> bool {
        self.present.contains(&node)
    }

    /// Lets the job start again so often.
    pub(crate) fn allow_restarts(&mut self, most: u32) {
        self.restarts = most;
    }

    /// A launcher that attends has been part of this generation, under another launcher 0.
    pub(crate) fn comes_after(&mut self, past: Past) {
        self.after = self.after.max(Some(past));
    }

    /// The one of these that starts: the first, or, where launchers have come from another launcher 0, the other one
    /// with the number after theirs. It costs a restart as any does.
    pub(crate) fn begins_with(&mut self, first: Generation, instead: Generation) -> Generation {
        let nodes = self.present.clone();
        let after = self.after.take().filter(|after| after.number >= first.number);
        let Some(Past { number, changes }) = after else { return Generation { nodes, ..first } };
        let next = Generation { number: number.saturating_add(1), changes, nodes, ..instead };
        self.restarts = next.restarts_left();
        next
    }

    /// Whether the job may start again.
    pub(crate) fn may_restart(&self) -> bool {
        self.restarts > 0 || self.changes
    }

    /// Whether the launcher of this node, which attends, has come to a job that runs without it.
    pub(crate) fn is_late(&self, node: u32) -> bool {
        self.started && !self.is_present(node)
    }

    /// The job starts again because this node has come. Says whether it does: not for one that has come before and was gone
    /// when the others started, which waits for them to start again for another reason.
    pub(crate) fn change(&mut self, node: u32) -> bool {
        let may = !self.in_vain.contains(&node);
        if may {
            self.changes = true;
            self.newcomers.insert(node);
        }
        may
    }

    /// Whether it does.
    pub(crate) fn changes(&self) -> bool {
        self.changes
    }

    /// The job starts again, as `next`, as soon as enough launchers are there: those that `are_connected`, and others in place of
    /// the rest.
    pub(crate) fn begin_again(&mut self, next: &Generation, is_connected: impl Fn(u32) -> bool) {
        self.restarts = next.restarts_left();
        self.started = self.terms.layout.nodes == 1;
        let has_come = std::mem::take(&mut self.changes);
        let has_gone = self.present.iter().any(|&node| node != 0 && !is_connected(node));
        // After the failure of a rank alone there is nobody to wait for.
        self.called = !has_come && !has_gone;
        (self.came, self.complete) = (None, None);
        for (&node, seat) in &mut self.seats {
            seat.presence = match seat.presence {
                _ if is_connected(node) => Presence::Attending,
                // It has its certificate, and is on its way.
                Presence::Promised(until) => Presence::Promised(until),
                _ => Presence::Lost,
            };
        }
    }

    /// Decides about a node that knows the secret.
    pub(crate) fn admit(&mut self, claim: &Claim, remote: SocketAddr, now: Instant) -> Verdict {
        let &Claim { node, nodes, least_nodes, ranks_per_node, ref run_id, incarnation } = claim;
        let Terms { layout, least_nodes: least, run_id: ours, .. } = &self.terms;
        let refused = |reason: String| Verdict::Refused(reason);
        // First: a launcher of another run has every right to other numbers.
        if run_id != ours {
            return refused(format!(
                "node 0 was started with --rdzv-id {} and node {node} with {}; it is of another run",
                quote(ours),
                quote(run_id)
            ));
        }
        if (nodes as usize, least_nodes as usize) != (layout.nodes, *least) {
            return refused(format!(
                "node 0 was started with --nnodes {} and node {node} with {}",
                span(*least, layout.nodes),
                span(least_nodes as usize, nodes as usize)
            ));
        }
        if ranks_per_node as usize != layout.ranks_per_node {
            return refused(format!(
                "node 0 was started with --nproc-per-node {} and node {node} with {ranks_per_node}",
                layout.ranks_per_node
            ));
        }
        if node == 0 || node >= nodes {
            return refused(format!("there is no place for node {node}; the others are 1 to {}", nodes - 1));
        }
        match self.seats.get(&node) {
            Some(seat) if seat.incarnation == incarnation => match seat.presence {
                // Renewing.
                Presence::Attending | Presence::Promised(_) => return Verdict::Admitted,
                // It waits for the next generation.
                Presence::Ended if self.may_restart() => return Verdict::Admitted,
                Presence::Ended | Presence::Lost => {
                    return refused(format!("node {node} has ended"));
                }
            },
            Some(seat) => match seat.presence {
                Presence::Promised(until) if until <= now => {}
                Presence::Lost if !self.started || !self.is_present(node) => {}
                Presence::Promised(_) | Presence::Attending => {
                    let holder = seat.remote.ip();
                    return Verdict::NotNow(format!("node {node} is taken by a live launcher at {holder}"));
                }
                Presence::Ended | Presence::Lost if self.may_restart() => {
                    return Verdict::NotNow(format!(
                        "node {node} has ended, and the job has not yet started again"
                    ));
                }
                // The whole job may have been started again, and this launcher be that of the job before, which is ending.
                Presence::Ended | Presence::Lost => {
                    return Verdict::NotNow(format!(
                        "node {node} of this job has ended; start the whole job again"
                    ));
                }
            },
            None => {}
        }
        let presence = Presence::Promised(now + PROMISE);
        self.seats.insert(node, Seat { incarnation, remote, presence, heard: now });
        Verdict::Admitted
    }

    /// Whether the member belongs to the node of this claim.
    pub(crate) fn may_certify(&self, claim: &Claim, member: &str) -> bool {
        let node = claim.node as usize;
        let holds = self.seats.get(&claim.node).is_some_and(|seat| seat.incarnation == claim.incarnation);
        holds
            && (member == launcher(node) || self.terms.layout.ranks(node).any(|rank| member == worker(rank)))
    }

    /// The launcher of `node` has come, with a certificate that says so. Where it did not get that from us, its
    /// claim is decided about now.
    pub(crate) fn attend(&mut self, node: u32, claim: &Claim, remote: SocketAddr, now: Instant) -> Verdict {
        let refused = Verdict::Refused;
        if claim.node != node {
            return refused(format!(
                "the launcher of node {node} may not come as that of node {}",
                claim.node
            ));
        }
        let admitted = self.admit(claim, remote, now);
        if admitted != Verdict::Admitted {
            return admitted;
        }
        let incarnation = claim.incarnation;
        match self.seats.get_mut(&node) {
            Some(seat) if seat.incarnation == incarnation => match seat.presence {
                Presence::Promised(until) if now < until || !self.started => {
                    seat.presence = Presence::Attending;
                    seat.heard = now;
                    self.came = Some(now);
                    Verdict::Admitted
                }
                _ => refused(format!("node {node} has come before")),
            },
            _ => refused(format!("node {node} is another launcher's")),
        }
    }

    /// The launcher of a node has said something. Says whether the job still has to start.
    pub(crate) fn heard(&mut self, node: u32, now: Instant) -> bool {
        if let Some(seat) = self.seats.get_mut(&node) {
            seat.heard = now;
        }
        !self.started
    }

    /// All ranks of a node have ended.
    pub(crate) fn ended(&mut self, node: u32) {
        self.set(node, Presence::Ended);
    }

    /// The connection of a launcher has ended. Says whether that is a loss: it was needed still.
    pub(crate) fn disconnected(&mut self, node: u32) -> bool {
        let was = self.seats.get(&node).map(|seat| seat.presence);
        if was == Some(Presence::Attending) {
            self.set(node, Presence::Lost);
            // Before the start another one may come in its place.
            self.called &= self.started;
        }
        was == Some(Presence::Attending) && self.started && self.is_present(node)
    }

    fn set(&mut self, node: u32, presence: Presence) {
        if let Some(seat) = self.seats.get_mut(&node) {
            seat.presence = presence;
        }
    }

    /// The nodes that have not come.
    pub(crate) fn missing(&self) -> Vec<u32> {
        let came = |node: &u32| self.seats.get(node).is_some_and(|seat| seat.presence == Presence::Attending);
        (1..self.terms.layout.nodes as u32).filter(|node| !came(node)).collect()
    }

    /// Whether so many have come that the job can run.
    pub(crate) fn are_enough(&self) -> bool {
        self.missing().len() <= self.terms.layout.nodes - self.terms.least_nodes
    }

    /// When the wait for others is over for those that have come, if they are enough.
    pub(crate) fn last_call_ends(&self, now: Instant) -> Option<Instant> {
        let is_over = self.called || self.missing().is_empty();
        let end = if is_over { now } else { self.came.unwrap_or(now) + self.terms.last_call };
        self.are_enough().then_some(end)
    }

    /// Nobody is waited for any more once enough have come.
    pub(crate) fn end_last_call(&mut self) {
        self.called = true;
    }

    /// Starts the job if all have come, or enough and no other one for a while, and have been heard since: true once. One that
    /// has died since it came and is not missed yet would be a failure of the job, while before the start it may come again.
    pub(crate) fn start(&mut self, now: Instant) -> bool {
        if self.started {
            return false;
        }
        self.came.get_or_insert(now);
        if self.last_call_ends(now).is_none_or(|end| end > now) {
            self.complete = None;
            return false;
        }
        let complete = *self.complete.get_or_insert(now);
        let attending = self.seats.iter().filter(|(_, seat)| seat.presence == Presence::Attending);
        self.started = attending.clone().all(|(_, seat)| seat.heard > complete);
        if self.started {
            self.present = std::iter::once(0).chain(attending.map(|(&node, _)| node)).collect();
            self.in_vain.append(&mut self.newcomers);
            self.in_vain.retain(|node| !self.present.contains(node));
        }
        self.started
    }

    /// Whether the others are to start again without this node when it leaves: it is at work, and they may be fewer.
    pub(crate) fn is_missed(&self, node: u32) -> bool {
        self.started && self.terms.least_nodes < self.terms.layout.nodes && self.at_work().contains(&node)
    }

    /// The nodes other than 0 whose ranks have not ended.
    pub(crate) fn at_work(&self) -> Vec<u32> {
        let gone = |seat: &Seat| matches!(seat.presence, Presence::Ended | Presence::Lost);
        let at_work = self.seats.iter().filter(|(node, seat)| self.is_present(**node) && !gone(seat));
        at_work.map(|(node, _)| *node).collect()
    }
}

/// A number of nodes as it was written.
fn span(least: usize, most: usize) -> String {
    if least == most { most.to_string() } else { format!("{least}:{most}") }
}

/// Who has failed, and because of whom.
#[derive(Debug, Default)]
pub(crate) struct Causes {
    first: Option<Failure>,
    /// The node that has come before anything had failed: all ranks are told to end, and how they do is nobody's failure.
    came: Option<u32>,
    /// By rank; those that exited with 0 have no failure.
    ends: BTreeMap<u32, Option<End>>,
    /// The first rank that a worker blamed for its own failure, by the worker's rank.
    blamed: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct End {
    failure: Failure,
    /// Not on a signal from its launcher.
    by_itself: bool,
}

/// What a job has failed of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Known(Option<Failure>),
    /// The best that is known before the end of the rank that is blamed.
    Open(Failure),
}

impl Causes {
    /// A failure without a rank. Says whether it is what ends the generation.
    pub(crate) fn lost(&mut self, failure: Failure) -> bool {
        let first = self.first.is_none() && self.came.is_none();
        self.first.get_or_insert(failure);
        first
    }

    /// A rank is dead. Says whether that is what ends the generation.
    pub(crate) fn died(&mut self, rank: u32, failure: Failure, by_itself: bool) -> bool {
        self.ends.entry(rank).or_insert(Some(End { failure: failure.clone(), by_itself }));
        self.came.is_none() && self.lost(failure)
    }

    /// A node has come, with which all ranks start again. Says whether that is what ends the generation.
    pub(crate) fn came(&mut self, node: u32) -> bool {
        let first = self.first.is_none() && self.came.is_none();
        if first {
            self.came = Some(node);
        }
        first
    }

    /// The ranks do not start again: that a node has come is not what the job fails of.
    pub(crate) fn conclude(&mut self) {
        if self.came.take().is_some() {
            let cause = "ended before the job had started again".to_owned();
            self.first.get_or_insert(Failure { node: 0, rank: None, cause, exit_code: LOST_NODE });
        }
    }

    /// A rank has exited with code 0.
    pub(crate) fn exited(&mut self, rank: u32) {
        self.ends.entry(rank).or_insert(None);
    }

    /// Whether any rank has exited with code 0.
    pub(crate) fn any_exited(&self) -> bool {
        self.ends.values().any(Option::is_none)
    }

    pub(crate) fn blames(&mut self, blamer: u32, culprit: u32) {
        self.blamed.entry(blamer).or_insert(culprit);
    }

    /// Whether anything has.
    pub(crate) fn has_failed(&self) -> bool {
        self.first.is_some()
    }

    /// What has ended the generation: the first failure that was noticed, or a node that has come.
    pub(crate) fn first(&self) -> Option<Failure> {
        self.came.map(arrival).or_else(|| self.first.clone())
    }

    /// Whose failure it was. Two ranks that end within a moment may be found in either order: the blame is
    /// followed from the first one to a rank that failed by itself.
    pub(crate) fn settled(&self) -> Settled {
        if let Some(node) = self.came {
            return Settled::Known(Some(arrival(node)));
        }
        let Some(mut cause) = self.first.as_ref() else { return Settled::Known(None) };
        // Each step leads to another rank, or stops: a circle of blame ends after one round.
        for _ in 0..=self.ends.len() {
            let Some(culprit) = cause.rank.and_then(|rank| self.blamed.get(&rank)) else { break };
            match self.ends.get(culprit) {
                Some(Some(end)) if end.by_itself => cause = &end.failure,
                Some(_) => break,
                None => return Settled::Open(cause.clone()),
            }
        }
        Settled::Known(Some(cause.clone()))
    }
}

/// What is called when there is news for the launcher. Must not block.
pub type OnChange = Arc<dyn Fn() + Send + Sync>;

/// A launcher's connection to launcher 0.
pub struct Attendance {
    reports: UnboundedSender<Report>,
    heard: Arc<Heard>,
    task: tokio::task::JoinHandle<()>,
}

struct Heard {
    /// This node.
    node: u32,
    state: Mutex<HeardState>,
    on_change: OnChange,
}

struct HeardState {
    /// The last one that has started.
    generation: Generation,
    failure: Option<Failure>,
    /// The node that has come, with which all ranks start again.
    came: Option<u32>,
    /// The answer to [`Report::Ended`].
    verdict: Option<Option<Failure>>,
    /// The connection has ended without one.
    lost: bool,
}

impl HeardState {
    /// Nothing was said about this generation.
    fn of(generation: Generation) -> Self {
        Self { generation: generation.quoted(), failure: None, came: None, verdict: None, lost: false }
    }
}

impl Heard {
    fn order(&self, order: Order) {
        match order {
            Order::Failed(failure) => self.update(|state| {
                state.failure.get_or_insert(failure.quoted());
            }),
            Order::Verdict { cause } => {
                self.update(|state| state.verdict = Some(cause.map(Failure::quoted)));
            }
            Order::Start(generation) if generation.place(self.node).is_none() => {
                self.update(|state| lost(state, LEFT_OUT));
            }
            Order::Start(generation) => self.update(|state| {
                *state = HeardState::of(generation);
            }),
            // The nodes have not met again.
            Order::Refused { reason, .. } => self.update(|state| lost(state, &reason)),
            Order::Completed { rank } => self.update(|state| {
                state.failure.get_or_insert(completion(rank));
            }),
            Order::Changes { node } => self.update(|state| {
                state.came.get_or_insert(node);
            }),
            Order::Waiting { .. } | Order::Beat => {}
        }
    }

    fn update(&self, change: impl FnOnce(&mut HeardState)) {
        change(&mut self.lock());
        (self.on_change)();
    }

    fn lock(&self) -> MutexGuard<'_, HeardState> {
        // Fields are replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Said of a start that does not count on this launcher, which had come.
const LEFT_OUT: &str = "it has started the job without this node";

/// A launcher that comes to launcher 0.
#[derive(Clone, Debug)]
pub struct Comer {
    /// Who it is.
    pub claim: Claim,
    /// The generation that it has been part of, if it has lost launcher 0 since.
    pub after: Option<Past>,
    /// Until when it waits for the others.
    pub deadline: Instant,
    /// How long it waits for its place to become free.
    pub patience: Duration,
}

impl Attendance {
    /// Connects to launcher 0 at `server`, says who this is, and waits until all nodes have come. `waiting` is
    /// called with the nodes that are missing whenever that changes. Blocks.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] with who is missing, or why this launcher was refused; [`Error::Transport`] when the
    /// connection has ended before the start: launcher 0 may be replaced.
    pub fn begin(
        io: &IoHandle,
        dialler: Dialler,
        server: &str,
        comer: Comer,
        waiting: impl Fn(&[u32]) + Send + 'static,
        on_change: OnChange,
    ) -> Result<Self, Error> {
        let (reports, outgoing) = unbounded_channel();
        let node = comer.claim.node;
        let attending = attend_in_the_end(dialler, server.to_owned(), comer, waiting);
        let (lane, first) = io.block_on(attending)??;
        let heard = Arc::new(Heard { node, state: Mutex::new(HeardState::of(first)), on_change });
        let task = io.spawn(follow(lane, outgoing, heard.clone()));
        Ok(Self { reports, heard, task })
    }

    /// Tells all others that a rank of this node is dead. Does not block.
    pub fn announce_death(&self, rank: usize, cause: &str, exit_code: u8, by_itself: bool) {
        let (rank, cause) = (rank as u32, cause.to_owned());
        self.report(Report::Died { rank, cause, exit_code, by_itself });
    }

    /// Tells all others that a rank of this node has exited with code 0. Does not block.
    pub fn announce_exit(&self, rank: usize) {
        self.report(Report::Exited { rank: rank as u32 });
    }

    /// Says that no rank runs here any more; the [`verdict`](Self::verdict) is the answer. Does not block.
    pub fn announce_end(&self) {
        self.report(Report::Ended);
    }

    /// Has all ranks of the job write what they did last. Does not block.
    pub fn ask_for_traces(&self) {
        self.report(Report::AskForTraces);
    }

    /// Says that no rank runs here any more and that this launcher goes: it does not take part in another generation.
    /// Does not block.
    pub fn announce_leave(&self) {
        self.report(Report::Left);
    }

    /// The generation that has started last.
    pub fn generation(&self) -> Generation {
        self.heard.lock().generation.clone()
    }

    /// What ends the ranks of all nodes: the first failure of the job, on whichever node, or the loss of launcher 0; that another
    /// node has come; or, with an exit code of 0, that a rank has finished which decides for all.
    pub fn failure(&self) -> Option<Failure> {
        let state = self.heard.lock();
        state.failure.clone().or_else(|| state.came.map(arrival))
    }

    /// What the job has failed of, if it has; `None` before launcher 0 has said so.
    pub fn verdict(&self) -> Option<Option<Failure>> {
        self.heard.lock().verdict.clone()
    }

    /// Whether launcher 0 was lost before it had said how the job ends: another one may take its place.
    pub fn is_lost(&self) -> bool {
        self.heard.lock().lost
    }

    fn report(&self, report: Report) {
        // The task ends with the connection, and then nobody wants to know.
        let _ = self.reports.send(report);
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Lane {
    _connection: Connection,
    sender: MessageSender,
    receiver: MessageReceiver,
}

/// Attends, and tries again for a while when the place is not free yet.
async fn attend_in_the_end(
    dialler: Dialler,
    server: String,
    comer: Comer,
    mut waiting: impl Fn(&[u32]),
) -> Result<(Lane, Generation), Error> {
    let until = comer.deadline.min(Instant::now() + comer.patience);
    loop {
        match attend(&dialler, &server, comer.clone(), &mut waiting).await? {
            Answered::Start(lane, generation) => return Ok((lane, generation)),
            Answered::NotNow(reason) if Instant::now() + TAKEN_PAUSE >= until => {
                return Err(Error::Rendezvous { endpoint: server, reason });
            }
            Answered::NotNow(reason) => {
                tracing::debug!(server, reason, "refused for now");
                tokio::time::sleep(TAKEN_PAUSE).await;
            }
        }
    }
}

/// What launcher 0 has said to a launcher that has come.
enum Answered {
    Start(Lane, Generation),
    NotNow(String),
}

async fn attend(
    dialler: &Dialler,
    server: &str,
    Comer { claim, after, deadline, .. }: Comer,
    waiting: &mut impl Fn(&[u32]),
) -> Result<Answered, Error> {
    let failed = |reason: String| Error::Rendezvous { endpoint: server.to_owned(), reason };
    let node = claim.node;
    let connection = dial(dialler, server, deadline).await.map_err(&failed)?;
    let (mut sender, mut receiver) = connection.open_messages().await?;
    sender.send(&Report::Attend { claim, after }).await?;
    let mut beat = tokio::time::interval(BEAT);
    let mut missing = Vec::new();
    let mut last = Instant::now();
    // Launcher 0 gives up first, and says who is missing.
    let deadline = deadline + SILENCE;
    loop {
        let order = tokio::select! {
            order = receiver.recv::<Order>() => order?,
            _ = beat.tick() => {
                if last.elapsed() > SILENCE || Instant::now() > deadline {
                    let (what, elapsed) = (format!("a word of {LAUNCHER}"), last.elapsed());
                    return Err(paceline_transport::Error::TimedOut { what, ranks: Vec::new(), elapsed }.into());
                }
                sender.send(&Report::Beat).await?;
                continue;
            }
        };
        last = Instant::now();
        match order {
            Some(Order::Start(generation)) if generation.place(node).is_none() => {
                return Err(failed(format!("{LAUNCHER}: {LEFT_OUT}")));
            }
            Some(Order::Verdict { cause }) => return Err(Error::Over { cause: cause.map(Failure::quoted) }),
            Some(Order::Start(generation)) => {
                let lane = Lane { _connection: connection, sender, receiver };
                return Ok(Answered::Start(lane, generation));
            }
            Some(Order::Refused { reason, for_now: true }) => return Ok(Answered::NotNow(quote(&reason))),
            Some(Order::Refused { reason, for_now: false }) => return Err(failed(reason)),
            Some(Order::Waiting { missing: nodes }) => {
                // When none is missing, the answer is waited for.
                sender.send(&Report::Beat).await?;
                if nodes != missing {
                    waiting(&nodes);
                    missing = nodes;
                }
            }
            Some(_) => {}
            None => {
                let what = "the start of the job".to_owned();
                let reason = format!("{LAUNCHER} closed the connection");
                return Err(paceline_transport::Error::GaveUp { what, reason }.into());
            }
        }
    }
}

/// Keeps the connection to launcher 0 from the start on.
async fn follow(mut lane: Lane, mut reports: UnboundedReceiver<Report>, heard: Arc<Heard>) {
    let mut beat = tokio::time::interval(BEAT);
    let silence = tokio::time::sleep(SILENCE);
    tokio::pin!(silence);
    let reason = loop {
        let sent = tokio::select! {
            order = lane.receiver.recv::<Order>() => {
                silence.as_mut().reset((Instant::now() + SILENCE).into());
                match order {
                    // Launcher 0 waits for a sign of life.
                    Ok(Some(Order::Waiting { .. })) => {
                        if let Err(error) = lane.sender.send(&Report::Beat).await {
                            break reason_of(error);
                        }
                    }
                    Ok(Some(order)) => heard.order(order),
                    Ok(None) => break "it closed the connection".to_owned(),
                    Err(error) => break reason_of(error),
                }
                Ok(())
            }
            report = reports.recv() => match report {
                Some(report) => lane.sender.send(&report).await,
                None => return,
            },
            _ = beat.tick() => lane.sender.send(&Report::Beat).await,
            () = &mut silence => break format!("it has said nothing for {} s", SILENCE.as_secs()),
        };
        if let Err(error) = sent {
            break reason_of(error);
        }
    };
    heard.update(|state| {
        state.lost = state.verdict.is_none();
        lost(state, &reason);
    });
}

/// The reason alone: the address of launcher 0 is known.
pub(crate) fn reason_of(error: paceline_transport::Error) -> String {
    match error {
        paceline_transport::Error::Refused { reason, .. } => reason,
        error => error.to_string(),
    }
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

/// Launcher 0 is lost. If the job had failed before, that stays the reason.
fn lost(state: &mut HeardState, reason: &str) {
    if state.verdict.is_some() {
        return;
    }
    let cause = format!("was lost: {}", quote(reason));
    state.failure.get_or_insert(Failure { node: 0, rank: None, cause, exit_code: LOST_NODE });
    state.verdict = Some(state.failure.clone());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout { nodes: 3, ranks_per_node: 2 };

    fn claim(node: u32, incarnation: u128) -> Claim {
        let run_id = "tuesday".to_owned();
        Claim { node, nodes: 3, least_nodes: 3, ranks_per_node: 2, run_id, incarnation }
    }

    fn seats() -> Seats {
        Seats::new(terms(3))
    }

    fn terms(least_nodes: usize) -> Terms {
        Terms { layout: LAYOUT, least_nodes, last_call: LAST_CALL, run_id: "tuesday".to_owned() }
    }

    const LAST_CALL: Duration = Duration::from_secs(30);

    fn generation(number: u32, master_port: u16) -> Generation {
        let (master_addr, nodes) = ("host".to_owned(), vec![0, 1, 2]);
        Generation { number, changes: 0, max_restarts: 5, nodes, master_addr, master_port }
    }

    fn remote() -> SocketAddr {
        ([10, 0, 0, 7], 1).into()
    }

    /// Starts what waits for a sign of life alone.
    fn start(seats: &mut Seats, now: Instant) {
        assert!(!seats.start(now));
        for node in 1..LAYOUT.nodes as u32 {
            assert!(seats.heard(node, now + BEAT));
        }
        assert!(seats.start(now + BEAT));
    }

    /// Seats in which the nodes attend, each with its number for an incarnation.
    fn attended(nodes: &[u32], now: Instant) -> Seats {
        let mut seats = seats();
        for &node in nodes {
            assert_eq!(seats.admit(&claim(node, node.into()), remote(), now), Verdict::Admitted);
            assert_eq!(seats.attend(node, &claim(node, node.into()), remote(), now), Verdict::Admitted);
        }
        seats
    }

    fn refusal(verdict: Verdict) -> String {
        match verdict {
            Verdict::Refused(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    fn not_now(verdict: Verdict) -> String {
        match verdict {
            Verdict::NotNow(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_job_starts_once_when_all_nodes_have_come_and_live() {
        let now = Instant::now();
        let mut seats = attended(&[2], now);
        assert_eq!((seats.missing(), seats.start(now)), (vec![1], false));
        assert_eq!(seats.admit(&claim(1, 1), remote(), now), Verdict::Admitted);
        assert_eq!(seats.missing(), [1], "a promise is no presence");
        assert_eq!(seats.attend(1, &claim(1, 1), remote(), now), Verdict::Admitted);
        assert!(!seats.start(now), "nobody has been heard since");
        let later = now + BEAT;
        assert!(seats.heard(1, later) && !seats.start(later), "node 2 may be dead");
        assert!(!seats.disconnected(2) && !seats.start(later), "it was, and may come again");
        assert_eq!(seats.admit(&claim(2, 9), remote(), later), Verdict::Admitted);
        assert_eq!(seats.attend(2, &claim(2, 9), remote(), later), Verdict::Admitted);
        assert!(!seats.start(later));
        let last = later + BEAT;
        assert!(seats.heard(1, last) && seats.heard(2, last));
        assert!(seats.start(last) && !seats.start(last));
        assert!(!seats.heard(1, last));
        assert_eq!(seats.at_work(), [1, 2]);
        seats.ended(1);
        assert_eq!(seats.at_work(), [2]);
    }

    #[test]
    fn the_job_goes_on_after_the_last_generation_that_any_launcher_has_been_part_of() {
        let mut seats = seats();
        seats.allow_restarts(5);
        let begins = |seats: &mut Seats| seats.begins_with(generation(0, 1), generation(1, 2));
        assert_eq!(begins(&mut seats), generation(0, 1), "nobody has been part of another one");
        let past = |number, changes| Past { number, changes };
        seats.comes_after(past(2, 0));
        seats.comes_after(past(1, 0));
        assert_eq!(begins(&mut seats), generation(3, 2));
        assert_eq!(seats.restarts, 2, "each has cost one");
        seats.comes_after(past(2, 1));
        assert_eq!(begins(&mut seats), Generation { changes: 1, ..generation(3, 2) });
        assert_eq!(seats.restarts, 3, "a node that came has cost none");
        seats.comes_after(past(3, 0));
        let next = seats.begins_with(generation(4, 1), generation(4, 1));
        assert_eq!((next.number, seats.restarts), (4, 3), "its link to this launcher 0 was cut");
    }

    /// Seats of a job that runs with one node too, and what its nodes claim.
    fn few(nodes: &[u32], now: Instant) -> Seats {
        let mut seats = Seats::new(terms(1));
        nodes.iter().for_each(|&node| come(&mut seats, node, u128::from(node), now));
        seats
    }

    fn come(seats: &mut Seats, node: u32, incarnation: u128, now: Instant) {
        let claim = Claim { least_nodes: 1, ..claim(node, incarnation) };
        assert_eq!(seats.attend(node, &claim, remote(), now), Verdict::Admitted);
    }

    #[test]
    fn with_fewer_nodes_the_job_starts_when_no_other_one_has_come_for_a_while() {
        let now = Instant::now();
        let mut seats = few(&[2], now);
        assert!(!seats.start(now) && seats.are_enough());
        let soon = now + LAST_CALL;
        assert_eq!(seats.last_call_ends(now), Some(soon));
        seats.heard(2, soon);
        assert!(!seats.start(soon), "it may be dead");
        seats.heard(2, soon + BEAT);
        assert!(seats.start(soon + BEAT) && !seats.start(soon + BEAT));
        assert_eq!((seats.world_size(), seats.ranks(2), seats.ranks(1)), (4, 2..4, 0..0));
        let members = [0, 3, 4].map(|rank| seats.member(rank));
        assert_eq!(members, [Some("worker-0".to_owned()), Some("worker-5".to_owned()), None]);
        assert_eq!(seats.at_work(), [2]);
    }

    #[test]
    fn each_node_that_comes_prolongs_the_last_call_until_all_are_there_or_the_time_is_up() {
        let now = Instant::now();
        let mut seats = few(&[], now);
        assert!(!seats.start(now));
        let later = now + LAST_CALL - BEAT;
        come(&mut seats, 1, 1, later);
        assert_eq!(seats.last_call_ends(later), Some(later + LAST_CALL));
        assert!(!seats.start(now + LAST_CALL));
        seats.end_last_call();
        assert_eq!(seats.last_call_ends(later), Some(later));
        let mut seats = few(&[1, 2], now);
        start(&mut seats, now);
        assert_eq!(seats.world_size(), 6);
        let mut fixed = attended(&[1], now);
        fixed.end_last_call();
        assert!(!fixed.are_enough() && !fixed.start(now + 2 * LAST_CALL));
    }

    #[test]
    fn a_node_that_comes_late_takes_part_in_the_next_generation_which_costs_no_restart() {
        let now = Instant::now();
        let mut seats = few(&[1], now);
        seats.end_last_call();
        assert!(!seats.start(now) && !seats.is_late(1));
        seats.heard(1, now + BEAT);
        assert!(seats.start(now + BEAT));
        come(&mut seats, 2, 2, now + BEAT);
        assert!(seats.is_late(2) && !seats.is_late(1));
        assert_eq!((seats.at_work(), seats.may_restart()), (vec![1], false));
        assert!(seats.change(2) && seats.may_restart());
        seats.ended(1);
        let next = Generation { changes: 1, ..generation(1, 7) };
        seats.begin_again(&next, |_| true);
        assert_eq!((seats.restarts, seats.changes()), (5, false));
        start(&mut seats, now + 2 * BEAT);
        assert_eq!(seats.begins_with(next.clone(), next).nodes, [0, 1, 2]);
        assert!(seats.disconnected(2), "now it is a loss");
        seats.begin_again(&generation(2, 8), |node| node == 1);
        seats.end_last_call();
        let later = now + 10 * BEAT;
        assert!(!seats.start(later));
        seats.heard(1, later + BEAT);
        assert!(seats.start(later + BEAT));
        assert!(!seats.disconnected(2) && seats.missing() == [2], "the others go on");
        come(&mut seats, 2, 9, later + BEAT);
        assert!(seats.is_late(2), "it has come again");
        seats.begin_again(&generation(3, 9), |_| true);
        assert_eq!(seats.last_call_ends(later), Some(later), "a rank has failed, and no node");
    }

    #[test]
    fn a_node_that_was_gone_when_the_others_started_with_it_does_not_have_them_start_again_once_more() {
        let now = Instant::now();
        let mut seats = few(&[1], now);
        let mut at = now;
        let mut start = |seats: &mut Seats, nodes: &[u32]| {
            at += BEAT;
            seats.end_last_call();
            assert!(!seats.start(at));
            for &node in nodes {
                assert!(seats.heard(node, at + BEAT));
            }
            assert!(seats.start(at + BEAT));
        };
        start(&mut seats, &[1]);
        come(&mut seats, 2, 2, now);
        assert!(seats.change(2), "for the first time");
        assert!(!seats.disconnected(2));
        seats.begin_again(&Generation { changes: 1, ..generation(1, 7) }, |node| node == 1);
        start(&mut seats, &[1]);
        come(&mut seats, 2, 3, now);
        assert!(seats.is_late(2) && !seats.change(2) && !seats.changes(), "it waits");
        seats.begin_again(&generation(2, 8), |_| true);
        start(&mut seats, &[1, 2]);
        assert_eq!(seats.world_size(), 6, "a rank has failed, and it takes part");
        assert!(seats.disconnected(2));
        seats.begin_again(&generation(3, 9), |node| node == 1);
        start(&mut seats, &[1]);
        come(&mut seats, 2, 4, now);
        assert!(seats.change(2), "it has shown that it can");
    }

    #[test]
    fn a_launcher_that_has_its_certificate_when_the_job_starts_again_may_still_come() {
        let now = Instant::now();
        let mut seats = few(&[1], now);
        seats.end_last_call();
        assert!(!seats.start(now));
        seats.heard(1, now + BEAT);
        assert!(seats.start(now + BEAT));
        let late = Claim { least_nodes: 1, ..claim(2, 2) };
        assert_eq!(seats.admit(&late, remote(), now + BEAT), Verdict::Admitted);
        seats.begin_again(&generation(1, 7), |node| node == 1);
        come(&mut seats, 2, 2, now + 2 * BEAT);
    }

    #[test]
    fn a_claim_that_does_not_fit_the_job_is_refused_with_both_values() {
        let mut seats = seats();
        let mut admit = |claim: Claim| refusal(seats.admit(&claim, remote(), Instant::now()));
        assert!(admit(Claim { nodes: 4, ..claim(1, 1) }).contains("--nnodes 3 and node 1 with 3:4"));
        assert!(admit(Claim { least_nodes: 1, ..claim(1, 1) }).contains("--nnodes 3 and node 1 with 1:3"));
        let text = admit(Claim { ranks_per_node: 8, ..claim(1, 1) });
        assert!(text.contains("--nproc-per-node 2 and node 1 with 8"), "{text}");
        assert!(admit(claim(0, 1)).contains("no place for node 0; the others are 1 to 2"));
        assert!(admit(claim(3, 1)).contains("no place for node 3"));
        let text = admit(Claim { run_id: "monday".to_owned(), nodes: 4, ..claim(1, 1) });
        assert_eq!(
            text,
            "node 0 was started with --rdzv-id tuesday and node 1 with monday; it is of another run"
        );
    }

    #[test]
    fn a_node_is_one_launchers_until_that_is_gone() {
        let now = Instant::now();
        let mut seats = attended(&[1], now);
        let taken = |seats: &mut Seats, now| not_now(seats.admit(&claim(1, 77), remote(), now));
        assert_eq!(taken(&mut seats, now), "node 1 is taken by a live launcher at 10.0.0.7");
        assert_eq!(seats.admit(&claim(1, 1), remote(), now), Verdict::Admitted, "it renews");
        let attend = |seats: &mut Seats, incarnation| seats.attend(1, &claim(1, incarnation), remote(), now);
        assert_eq!(refusal(attend(&mut seats, 1)), "node 1 has come before");
        assert_eq!(not_now(attend(&mut seats, 77)), "node 1 is taken by a live launcher at 10.0.0.7");
        let other = seats.attend(2, &claim(1, 1), remote(), now);
        assert_eq!(refusal(other), "the launcher of node 2 may not come as that of node 1");
        assert!(!seats.disconnected(1), "no loss before the start");
        assert_eq!(seats.admit(&claim(1, 77), remote(), now), Verdict::Admitted);
        assert_eq!(
            not_now(seats.attend(1, &claim(1, 1), remote(), now)),
            "node 1 is taken by a live launcher at 10.0.0.7"
        );
        assert!(matches!(seats.admit(&claim(1, 78), remote(), now), Verdict::NotNow(_)));
    }

    #[test]
    fn a_promise_that_is_not_kept_ends() {
        let now = Instant::now();
        let mut seats = seats();
        seats.admit(&claim(1, 1), remote(), now);
        assert!(matches!(seats.admit(&claim(1, 2), remote(), now), Verdict::NotNow(_)));
        assert_eq!(seats.admit(&claim(1, 2), remote(), now + PROMISE), Verdict::Admitted);
    }

    #[test]
    fn after_the_start_a_launcher_that_goes_is_a_loss_and_has_no_successor() {
        let now = Instant::now();
        let mut seats = attended(&[1, 2], now);
        start(&mut seats, now);
        seats.ended(2);
        assert!(!seats.disconnected(2), "it had ended");
        assert!(seats.disconnected(1));
        assert!(seats.at_work().is_empty());
        let successor = not_now(seats.admit(&claim(1, 9), remote(), now));
        assert!(successor.contains("start the whole job again"), "{successor}");
        assert!(refusal(seats.admit(&claim(1, 1), remote(), now)).contains("has ended"));
    }

    #[test]
    fn a_node_gets_certificates_for_its_own_members_alone() {
        let seats = attended(&[1], Instant::now());
        for member in ["launcher-1", "worker-2", "worker-3"] {
            assert!(seats.may_certify(&claim(1, 1), member), "{member}");
        }
        for member in ["launcher-0", "launcher-2", "worker-1", "worker-4", "worker-02", "worker-", ""] {
            assert!(!seats.may_certify(&claim(1, 1), member), "{member}");
        }
        assert!(!seats.may_certify(&claim(1, 2), "worker-2"), "another incarnation");
        assert!(!seats.may_certify(&claim(2, 2), "worker-4"), "a node that was not admitted");
    }

    fn failure(rank: u32) -> Failure {
        let cause = "exited with code 1".to_owned();
        Failure { node: rank / 2, rank: Some(rank), cause, exit_code: 1 }
    }

    #[test]
    fn the_blame_is_followed_across_nodes_to_a_rank_that_failed_by_itself() {
        let mut causes = Causes::default();
        assert_eq!(causes.settled(), Settled::Known(None));
        assert!(causes.died(0, failure(0), true), "the first");
        causes.blames(0, 3);
        assert_eq!(causes.settled(), Settled::Open(failure(0)), "rank 3 has not ended");
        assert!(!causes.died(3, failure(3), true));
        causes.blames(3, 2);
        causes.blames(3, 0);
        causes.died(2, failure(2), false);
        assert_eq!(causes.settled(), Settled::Known(Some(failure(3))), "rank 2 was told to end");
        assert_eq!(causes.first(), Some(failure(0)));
    }

    #[test]
    fn a_circle_of_blame_ends_and_a_rank_that_exited_with_0_has_none() {
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        causes.died(1, failure(1), true);
        causes.blames(0, 1);
        causes.blames(1, 0);
        assert!(matches!(causes.settled(), Settled::Known(Some(_))));
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        causes.exited(1);
        causes.blames(0, 1);
        assert_eq!(causes.settled(), Settled::Known(Some(failure(0))));
    }

    #[test]
    fn a_lost_launcher_is_a_cause_of_its_own() {
        let mut causes = Causes::default();
        let cause = "was lost: it closed the connection".to_owned();
        let failure = Failure { node: 1, rank: None, cause, exit_code: LOST_NODE };
        assert!(causes.lost(failure.clone()));
        causes.died(0, super::tests::failure(0), true);
        assert_eq!(causes.settled(), Settled::Known(Some(failure.clone())));
        assert_eq!(failure.to_string(), "the launcher of node 1 was lost: it closed the connection");
        assert_eq!(super::tests::failure(3).to_string(), "rank 3 on node 1 exited with code 1");
    }

    #[test]
    fn a_node_that_has_come_ends_a_generation_and_is_not_what_the_job_fails_of() {
        let mut causes = Causes::default();
        assert!(causes.came(2) && !causes.came(1), "the first");
        assert!(!causes.died(0, failure(0), true), "a consequence");
        assert_eq!(causes.settled(), Settled::Known(Some(arrival(2))));
        let words = |causes: &Causes| causes.first().expect("it has ended").to_string();
        assert_eq!(words(&causes), "the launcher of node 2 has come");
        causes.conclude();
        assert_eq!(words(&causes), "the launcher of node 0 ended before the job had started again");
        let mut causes = Causes::default();
        causes.came(2);
        let lost = Failure { node: 1, rank: None, cause: "was lost".to_owned(), exit_code: LOST_NODE };
        assert!(!causes.lost(lost.clone()));
        causes.conclude();
        assert_eq!(causes.settled(), Settled::Known(Some(lost)));
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        assert!(!causes.came(2));
        causes.conclude();
        assert_eq!(causes.first(), Some(failure(0)));
    }

    #[test]
    fn a_launcher_0_that_is_lost_while_a_node_comes_is_what_the_job_fails_of() {
        let heard = Heard {
            node: 1,
            state: Mutex::new(HeardState::of(generation(0, 1))),
            on_change: Arc::new(|| {}),
        };
        heard.order(Order::Changes { node: 2 });
        heard.update(|state| lost(state, "it closed the connection"));
        let verdict = heard.lock().verdict.clone().flatten().expect("there is one").to_string();
        assert_eq!(verdict, "the launcher of node 0 was lost: it closed the connection");
    }

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

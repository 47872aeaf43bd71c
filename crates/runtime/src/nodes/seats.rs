//! Who may come, and when the job starts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use paceline_transport::boot::{Claim, Verdict};

use super::{Generation, Past, Terms, launcher, quote};
use crate::rendezvous::worker;

/// How long a node that has its certificates may take to attend.
const PROMISE: Duration = Duration::from_secs(10);

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

    /// It does not start again, for whatever reason it was to.
    pub(crate) fn allow_no_restarts(&mut self) {
        self.restarts = 0;
        self.changes = false;
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
        if !self.are_ready(now) {
            return false;
        }
        self.started = true;
        let attending = self.seats.iter().filter(|(_, seat)| seat.presence == Presence::Attending);
        self.present = std::iter::once(0).chain(attending.map(|(&node, _)| node)).collect();
        self.in_vain.append(&mut self.newcomers);
        self.in_vain.retain(|node| !self.present.contains(node));
        true
    }

    /// Whether [`start`](Self::start) would start it.
    pub(crate) fn are_ready(&mut self, now: Instant) -> bool {
        if self.started {
            return false;
        }
        self.came.get_or_insert(now);
        if self.last_call_ends(now).is_none_or(|end| end > now) {
            self.complete = None;
            return false;
        }
        let complete = *self.complete.get_or_insert(now);
        let mut attending = self.seats.values().filter(|seat| seat.presence == Presence::Attending);
        attending.all(|seat| seat.heard > complete)
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

#[cfg(test)]
mod tests {
    use super::super::{BEAT, Layout};
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
}

//! The end of an epoch: one single-decree Paxos (Lamport 2001) whose acceptors are the voters of the view, and
//! whose value is the next view with the state it begins from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{ChildState, Launcher, LauncherAction};
use crate::membership::message::{Ballot, Decision, Evidence, Message, ToWorker};
use crate::membership::mutation::Mutation;
use crate::membership::progress::{Report, Step, resolve};
use crate::membership::settings::Fence;
use crate::membership::view::{Incarnation, MAX_LAUNCHERS, MAX_WORKERS, Member, Slot, View, Voter, deal};

/// An attempt to lead.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Campaign {
    ballot: Ballot,
    pub(super) started: Duration,
    pub(super) resend_at: Duration,
    promises: BTreeMap<Incarnation, Promise>,
    proposal: Option<Decision>,
    accepted: BTreeSet<Incarnation>,
}

/// What a voter says along with its promise.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Promise {
    pub(super) reports: Vec<Report>,
    pub(super) complete: bool,
    pub(super) accepted: Option<(Ballot, Decision)>,
    pub(super) stable: Step,
}

impl Launcher {
    /// Ends the epoch if there is a reason and it is this launcher's turn.
    pub(super) fn drive(&mut self) {
        let reason = !self.suspects.is_empty() || !self.newcomers.is_empty();
        let hears = self.hears_quorum();
        if !reason && self.wedged.is_none() {
            self.stuck = None;
            self.trouble = if hears { None } else { self.trouble.or(Some(self.now)) };
            return;
        }
        let stuck = *self.stuck.get_or_insert(self.now);
        self.trouble.get_or_insert(self.now);
        if self.campaign.is_some() {
            self.press();
        } else if hears {
            let leads = self.leader() == Some(self.me) && self.promised == Ballot::default();
            if leads || self.now >= stuck + self.patience() {
                self.start_campaign();
            } else if self.now >= self.accuse_at {
                self.accuse();
            }
        }
    }

    /// The lowest voter that is not suspected.
    fn leader(&self) -> Option<Voter> {
        let view = self.view()?;
        view.voters.iter().find(|voter| !self.suspects.contains_key(&voter.incarnation)).copied()
    }

    fn accuse(&mut self) {
        self.accuse_at = self.now + self.job.timing.resend;
        let (epoch, Some(leader)) = (self.epoch(), self.leader()) else { return };
        if leader != self.me {
            for (target, evidence) in self.suspects.clone() {
                self.send(leader.seat, Message::Suspect { epoch, target, evidence });
            }
        }
    }

    fn start_campaign(&mut self) {
        let Some((index, _)) = self.view().and_then(|view| view.voter(self.me.incarnation)) else { return };
        let round = self.promised.round.max(self.highest_round).saturating_add(1);
        self.campaign = Some(Campaign {
            ballot: Ballot { round, leader: index as u32 },
            started: self.now,
            resend_at: self.now,
            promises: BTreeMap::new(),
            proposal: None,
            accepted: BTreeSet::new(),
        });
        self.press();
    }

    /// Asks those who have not answered, and looks whether enough have.
    fn press(&mut self) {
        let (Some(campaign), Some(view)) = (&mut self.campaign, self.decision.as_ref().map(|d| &d.view))
        else {
            return;
        };
        if self.now >= campaign.resend_at {
            campaign.resend_at = self.now + self.job.timing.resend;
            let (epoch, ballot) = (view.epoch, campaign.ballot);
            let (message, silent): (Message, Vec<Voter>) = match &campaign.proposal {
                None => {
                    let complete = |voter: &&Voter| {
                        campaign.promises.get(&voter.incarnation).is_some_and(|p| p.complete)
                    };
                    let silent = view.voters.iter().filter(|voter| !complete(voter)).copied().collect();
                    (Message::Wedge { epoch, ballot }, silent)
                }
                Some(_) if self.job.fence == Fence::Lease => {
                    let decision = campaign.proposal.clone().expect("just matched");
                    self.act(LauncherAction::Swap(decision));
                    return;
                }
                Some(decision) => {
                    let accepted = |voter: &&Voter| campaign.accepted.contains(&voter.incarnation);
                    let silent = view.voters.iter().filter(|voter| !accepted(voter)).copied().collect();
                    (Message::Propose { epoch, ballot, decision: decision.clone() }, silent)
                }
            };
            self.send_to_all(&silent, &message);
        }
        self.evaluate();
    }

    /// Whether these voters are enough to end this epoch.
    pub(super) fn has_quorum(&self, voters: &BTreeSet<Incarnation>) -> bool {
        let certain = |evidence: &Evidence| matches!(evidence, Evidence::Died | Evidence::Replaced);
        let dead = self.suspects.iter().filter(|(_, e)| certain(e)).map(|(&who, _)| who).collect();
        self.view().is_some_and(|view| view.quorum_with(voters, &dead, self.mutation))
    }

    // ---- the acceptor ----

    /// Whether that voter may use that ballot; ballots seen make later ones higher.
    fn is_leaders(&mut self, from: Voter, ballot: Ballot) -> bool {
        self.highest_round = self.highest_round.max(ballot.round);
        let leader = self.view().and_then(|view| view.voters.get(ballot.leader as usize));
        leader == Some(&from)
    }

    /// Follows a ballot, or says which one it follows.
    fn follow(&mut self, from: Voter, ballot: Ballot) -> bool {
        if !self.is_leaders(from, ballot) {
            return false;
        }
        if ballot < self.promised {
            let (epoch, promised) = (self.epoch(), self.promised);
            self.send(from.seat, Message::Reject { epoch, promised });
            return false;
        }
        if ballot > self.promised {
            self.promised = ballot;
            self.stuck = Some(self.now);
            self.campaign.take_if(|campaign| campaign.ballot < ballot);
        }
        self.wedge_workers();
        true
    }

    fn wedge_workers(&mut self) {
        if self.wedged.is_some() {
            return;
        }
        self.wedged = Some(self.now);
        let epoch = self.epoch();
        let workers: Vec<_> = self.children.keys().copied().collect();
        for child in workers {
            self.act(LauncherAction::Worker { child, message: ToWorker::Wedge { epoch } });
        }
    }

    pub(super) fn on_wedge(&mut self, from: Voter, ballot: Ballot) {
        if self.follow(from, ballot) {
            self.promise_sent = None;
            self.try_promise();
        }
    }

    /// Answers the leader when all workers have reported that are not suspected, or with those that have when time is
    /// up; again when a late report comes in.
    pub(super) fn try_promise(&mut self) {
        let (Some(wedged), Some(view)) = (self.wedged, self.view()) else { return };
        let Some(leader) = view.voters.get(self.promised.leader as usize).copied() else { return };
        let members = || self.children.values().filter(|child| view.member(child.hello.worker).is_some());
        let reports: Vec<Report> = members().filter_map(|child| child.report).collect();
        let awaited =
            |child: &ChildState| child.report.is_none() && !self.suspects.contains_key(&child.hello.worker);
        let complete = !members().any(awaited);
        let sending = Some((self.promised, reports.len(), complete));
        let due = complete || self.now >= wedged + self.job.timing.promise_wait / 2;
        if self.promise_sent == sending || !due {
            return;
        }
        self.promise_sent = sending;
        let (epoch, ballot, accepted) = (self.epoch(), self.promised, self.accepted.clone());
        let stable = self.newest_stable;
        self.send(leader.seat, Message::Promise { epoch, ballot, reports, complete, accepted, stable });
    }

    pub(super) fn on_propose(&mut self, from: Voter, ballot: Ballot, decision: Decision) {
        if decision.epoch() == self.epoch().next() && self.follow(from, ballot) {
            #[cfg(test)]
            self.accepted_ever.push((self.epoch(), ballot, decision.clone()));
            self.accepted = Some((ballot, decision));
            let epoch = self.epoch();
            self.send(from.seat, Message::Accepted { epoch, ballot });
        }
    }

    // ---- the leader ----

    pub(super) fn on_reject(&mut self, promised: Ballot) {
        self.highest_round = self.highest_round.max(promised.round);
        if self.campaign.take_if(|campaign| campaign.ballot < promised).is_some() {
            self.stuck = Some(self.now);
        }
    }

    pub(super) fn on_promise(&mut self, from: Voter, ballot: Ballot, mut promise: Promise) {
        let Some(view) = self.decision.as_ref().map(|decision| &decision.view) else { return };
        let next = view.epoch.next();
        if promise.accepted.as_ref().is_some_and(|(_, decision)| decision.epoch() != next) {
            return;
        }
        let Some(campaign) = &mut self.campaign else { return };
        if campaign.ballot == ballot && campaign.proposal.is_none() {
            let own = |worker| view.member(worker).is_some_and(|member| member.launcher == from.incarnation);
            promise.reports.retain(|report| own(report.worker));
            campaign.promises.insert(from.incarnation, promise);
            self.evaluate();
        }
    }

    /// Proposes when enough have promised and those who may still come have had their time.
    fn evaluate(&mut self) {
        let (Some(campaign), Some(view)) = (&self.campaign, self.view()) else { return };
        let promised: BTreeSet<_> = campaign.promises.keys().copied().collect();
        if campaign.proposal.is_some() || !(self.job.fence == Fence::Lease || self.has_quorum(&promised)) {
            return;
        }
        let complete = |voter: &Voter| campaign.promises.get(&voter.incarnation).is_some_and(|p| p.complete);
        let awaited = |voter: &Voter| !complete(voter) && !self.suspects.contains_key(&voter.incarnation);
        if view.voters.iter().any(awaited) && self.now < campaign.started + self.job.timing.promise_wait {
            return;
        }
        let accepted = campaign.promises.values().filter_map(|promise| promise.accepted.as_ref());
        let newest = accepted.max_by_key(|(ballot, _)| *ballot).map(|(_, decision)| decision.clone());
        let newest = newest.filter(|_| self.mutation != Mutation::IgnoreAccepted);
        if let Some(decision) = newest.or_else(|| self.choose(view, &campaign.promises)) {
            if let Some(campaign) = &mut self.campaign {
                campaign.proposal = Some(decision);
                campaign.resend_at = self.now;
            }
            self.press();
        }
    }

    /// The next view: those who have promised and reported and whom nobody suspects, and the newcomers that
    /// are ready. None without a worker that holds the state, and none that would undo a stable step: every
    /// holder is at or beyond it, so a report that is not is a defect, and waiting is better than following it.
    fn choose(&self, view: &View, promises: &BTreeMap<Incarnation, Promise>) -> Option<Decision> {
        let trusted = |who: Incarnation| !self.suspects.contains_key(&who);
        let mut voters: Vec<Voter> = view
            .voters
            .iter()
            .filter(|v| promises.contains_key(&v.incarnation) && trusted(v.incarnation))
            .copied()
            .collect();
        let of_voters: Vec<Report> = voters
            .iter()
            .filter_map(|voter| promises.get(&voter.incarnation))
            .flat_map(|promise| promise.reports.iter().copied())
            .collect();
        let mut reports: Vec<Report> =
            of_voters.iter().filter(|report| trusted(report.worker)).copied().collect();
        let own = |worker| view.member(worker).is_some_and(|m| m.launcher == self.me.incarnation);
        let resolution = resolve(&reports, own, self.mutation).or_else(|| {
            // A suspect that has reported lives; better one of them than the state lost.
            let certain = |report: &&Report| self.suspects.get(&report.worker) != Some(&Evidence::Died);
            let holders = of_voters.iter().filter(certain).filter(|report| report.holds);
            reports.extend(holders.max_by_key(|report| report.progress).copied());
            resolve(&reports, own, self.mutation)
        })?;
        let stable = promises.values().map(|promise| promise.stable).max()?;
        // Defects are looked for without this rule's help.
        if resolution.applied < stable && self.mutation == Mutation::None {
            return None;
        }
        let mut members: Vec<Member> = view.members.clone();
        members.retain(|member| reports.iter().any(|report| report.worker == member.incarnation));
        for (voter, workers) in self.newcomers.values() {
            self.admit(view, *voter, workers, &mut voters, &mut members);
        }
        voters.sort_unstable();
        let had: Vec<_> = members.iter().map(|member| member.slots.clone()).collect();
        let dealt = deal(self.job.mode, self.job.slots, self.job.contributors(), &had);
        for (member, slots) in members.iter_mut().zip(dealt) {
            member.slots = slots;
        }
        // Ranks in the order of slots, those without one last: then a sum over ranks is one over slots.
        members.sort_by_key(|member| member.slots.first().copied().unwrap_or(Slot::MAX));
        Some(Decision { view: View { epoch: view.epoch.next(), voters, members }, resolution })
    }

    fn admit(
        &self,
        view: &View,
        voter: Voter,
        workers: &[Incarnation],
        voters: &mut Vec<Voter>,
        members: &mut Vec<Member>,
    ) {
        if !voters.contains(&voter) {
            let taken = voters.iter().any(|other| other.seat == voter.seat);
            if taken || view.has(voter.incarnation) || voters.len() >= MAX_LAUNCHERS {
                return;
            }
            voters.push(voter);
        }
        for &incarnation in workers {
            let known =
                view.has(incarnation) || members.iter().any(|member| member.incarnation == incarnation);
            if !known && members.len() < MAX_WORKERS {
                members.push(Member { incarnation, launcher: voter.incarnation, slots: Vec::new() });
            }
        }
    }

    pub(super) fn on_accepted(&mut self, from: Voter, ballot: Ballot) {
        let Some(campaign) = &mut self.campaign else { return };
        let Some(decision) = campaign.proposal.clone().filter(|_| campaign.ballot == ballot) else { return };
        campaign.accepted.insert(from.incarnation);
        let accepted = campaign.accepted.clone();
        if !self.has_quorum(&accepted) {
            return;
        }
        self.announce(&decision);
    }

    /// What the lease says: this leader's proposal, or what another one was faster with.
    pub(super) fn on_swapped(&mut self, decision: Decision) {
        if decision.epoch() > self.epoch() {
            self.announce(&decision);
        }
    }

    /// Stores the epoch first, whether this launcher is in the view or not: a job that is founded again must
    /// not use an epoch that somebody may have heard of.
    fn announce(&mut self, decision: &Decision) {
        self.act(LauncherAction::Persist(decision.epoch()));
        let old = self.view().map_or(&[][..], |view| &view.voters);
        let all: BTreeSet<_> = old.iter().chain(&decision.view.voters).map(|voter| voter.seat).collect();
        for seat in all {
            self.send(seat, Message::Install(decision.clone()));
        }
        if !decision.view.voters.iter().any(|voter| voter.seat == self.me.seat) {
            self.loopback.push(Message::Install(decision.clone()));
        }
    }
}

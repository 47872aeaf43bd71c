//! What must hold in every situation, by rules that are not the core's own.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::situation::Situation;
use crate::membership::message::{Ballot, Decision, Transfer};
use crate::membership::progress::{Progress, Step};
use crate::membership::view::{Epoch, Incarnation, View};
use crate::membership::worker::Worker;

impl Situation {
    pub(super) fn fail(&mut self, reason: &'static str) {
        self.violation.get_or_insert(reason);
    }

    fn check(&mut self, holds: bool, reason: &'static str) {
        if !holds {
            self.fail(reason);
        }
    }

    // ---- views ----

    pub(super) fn on_decision(&mut self, decision: &Decision) {
        let epoch = decision.epoch();
        if let Some(known) = self.decisions.get(&epoch) {
            let same = known == decision;
            self.check(same, "I1: two decisions for an epoch");
            return;
        }
        Arc::make_mut(&mut self.decisions).insert(epoch, decision.clone());
        self.check(decision.check().is_ok(), "I1: a view that contradicts itself");
        if let Some(before) = self.decisions.get(&Epoch(epoch.0 - 1)) {
            let enough = self.has_quorum(&before.view, decision);
            self.check(enough, "I2: a decision without a quorum");
        }
        self.check(!self.has_returned(), "I3: what was removed returns under its name");
        // Of this epoch or a later one none is stable yet.
        self.stable.clone().into_iter().for_each(|stable| self.check_kept(stable, decision));
    }

    fn has_quorum(&self, before: &View, decision: &Decision) -> bool {
        // The lowest counts half a vote more: more than half of the votes is a majority, or half with it.
        let votes_of = |launcher: Incarnation| match before.voter(launcher) {
            Some((0, _)) => 3,
            Some(_) => 2,
            None => 0,
        };
        let by_ballot = |ballot: Ballot| -> usize {
            let of_it =
                self.accepted.iter().filter(|a| a.0 == before.epoch && a.1 == ballot && a.3 == *decision);
            of_it.map(|accepted| votes_of(accepted.2)).sum()
        };
        let votes = 2 * before.voters.len() + 1;
        let ballots: BTreeSet<Ballot> = self.accepted.iter().map(|accepted| accepted.1).collect();
        ballots.into_iter().any(|ballot| 2 * by_ballot(ballot) > votes)
    }

    /// Whether anybody is in a view and in a later one, and not in one between them.
    fn has_returned(&self) -> bool {
        let views = || self.decisions.values().map(|decision| &decision.view);
        let names = |view: &View| -> Vec<Incarnation> {
            let voters = view.voters.iter().map(|voter| voter.incarnation);
            voters.chain(view.members.iter().map(|member| member.incarnation)).collect()
        };
        views().flat_map(names).any(|who| {
            let present: Vec<bool> = views().map(|view| view.has(who)).collect();
            present.windows(2).filter(|pair| pair[1] && !pair[0]).count() + usize::from(present[0]) > 1
        })
    }

    // ---- steps ----

    /// A stable step of an earlier epoch is in the history that a view begins with.
    fn check_kept(&mut self, stable: Progress, decision: &Decision) {
        let begins_with = decision.resolution.state();
        self.check(stable.applied <= begins_with.applied, "I5: a stable step is not in a later view");
        let kept = leads_to(stable, begins_with, decision.epoch());
        self.check(kept, "I4: a later view has another outcome of a stable step");
    }

    pub(super) fn on_stable(&mut self, index: usize, step: Step) {
        let worker = self.nodes[index].worker.as_ref();
        let state = worker.and_then(Worker::progress).filter(|state| state.applied == step);
        let epoch = worker.map_or(Epoch(0), Worker::epoch);
        self.stable.extend(state);
        let one = self.stable.iter().filter(|stable| stable.applied == step).count() == 1;
        self.check(one, "I4: two outcomes of a step are stable");
        let later: Vec<Decision> = self.decisions.range(epoch.next()..).map(|(_, d)| d.clone()).collect();
        for (stable, decision) in state.iter().flat_map(|state| later.iter().map(move |d| (*state, d))) {
            self.check_kept(stable, decision);
        }
    }

    pub(super) fn on_run(&mut self, index: usize, epoch: Epoch) {
        let node = &self.nodes[index];
        let Some(worker) = &node.worker else { return };
        let Some(from) = worker.progress() else { return };
        let (me, has_it) = (worker.incarnation(), node.data == Some(from));
        let begins_with = worker.decision().map(|decision| decision.resolution.state());
        let ran =
            |contribution: &(Epoch, Progress, Incarnation)| contribution.0 == epoch && contribution.2 == me;
        let is_first = !self.contributions.iter().any(ran);
        self.check(has_it, "I6: a step is run from a state that the program does not have");
        self.check(
            !is_first || begins_with == Some(from),
            "I11: a first step not from the state of the view",
        );
        self.contributions.insert((epoch, from, me));
        let states = self.contributions.iter().filter(|contribution| contribution.0 == epoch);
        let states: BTreeSet<Progress> = states.map(|contribution| contribution.1).collect();
        let steps: BTreeSet<Step> = states.iter().map(|state| state.applied).collect();
        self.check(states.len() == steps.len(), "I6: two states run the same step in an epoch");
    }

    // ---- what the program has ----

    pub(super) fn on_apply(&mut self, index: usize, step: Step) {
        let epoch = self.nodes[index].worker.as_ref().map_or(Epoch(0), Worker::epoch);
        let data = self.nodes[index].data.filter(|data| data.applied.next() == step);
        self.check(data.is_some(), "I6: a step is applied to another state than the one before");
        self.node(index).data = data.map(|data| data.after(epoch));
    }

    pub(super) fn on_adopt(&mut self, index: usize, transfer: Transfer) {
        if let Transfer::Result { before, .. } = transfer {
            let fits = self.nodes[index].data == Some(before);
            self.check(fits, "I11: a result is applied to another state than its own");
        }
        self.node(index).data = Some(transfer.reaches());
    }

    pub(super) fn on_send(&mut self, index: usize, transfer: Transfer) {
        let has_it = self.nodes[index].data == Some(transfer.reaches());
        self.check(has_it, "I11: a state or a result is sent that the sender has not");
    }
}

/// Whether some epochs before that one have led from one state to the other. Lineages are hashes, so all are tried.
fn leads_to(from: Progress, to: Progress, before: Epoch) -> bool {
    let by_a_step = || (1..before.0).any(|epoch| leads_to(from.after(Epoch(epoch)), to, before));
    from == to || from.applied < to.applied && by_a_step()
}
